"""iCaRL: herding and the loss by plain loops, a memory that is balanced, nearest exemplar means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import log_loss

from tail_jax.methods.icarl import ICaRL, herding
from tail_jax.training import sharding
from tail_jax.training.task_data import TaskData
from tests.tiny import TwoTowers

CLASSES, SHAPE = 7, (3, 2)
MODEL = TwoTowers(classes=CLASSES, embedding=4)


# --- Herding --------------------------------------------------------------------------------------


def test_herding_follows_the_mean_on_a_hand_worked_line():
    # Mean 2. First 2; then (2 + x) / 2 is nearest to 2 by 3; then (5 + x) / 3 by 0; then
    # (5 + x) / 4 by 6.
    x = np.array([[0.0], [2.0], [3.0], [6.0], [-1.0]])
    assert herding(x, 3).tolist() == [1, 2, 0]
    assert herding(x, 9).tolist() == [1, 2, 0, 3, 4]


@pytest.mark.parametrize("count", [1, 4, 30])
def test_herding_is_the_greedy_choice_of_a_plain_loop(count):
    features = np.random.default_rng(0).normal(size=(11, 3))
    chosen = []
    for _ in range(min(count, 11)):
        gaps = {i: np.linalg.norm(features.mean(0) - features[[*chosen, i]].mean(0))
                for i in range(11) if i not in chosen}
        chosen.append(min(gaps, key=gaps.get))
    assert herding(features, count).tolist() == chosen


# --- The loss -------------------------------------------------------------------------------------


def test_loss_is_the_entropy_of_sigmoids_with_the_old_ones_from_the_old_model():
    random, rows, real = np.random.default_rng(1), 9, 6
    logits, teacher = random.normal(0, 3, (2, rows, CLASSES)).astype(np.float32)
    current, seen = np.isin(np.arange(CLASSES), [2, 5]), np.isin(np.arange(CLASSES), [0, 2, 3, 5])
    label = random.choice([2, 5, 0], rows)  # exemplars among them
    targets = np.where(current, np.equal.outer(label, np.arange(CLASSES)), expit(teacher))
    g = expit(logits.astype(np.float64))
    bce = -(targets * np.log(g) + (1 - targets) * np.log(1 - g))
    run = lambda logits: ICaRL().objective(
        MODEL, {}, {}, {"classes": {"current": current, "seen": seen}},
        {"logits": logits, "teacher_logits": jnp.asarray(teacher)},
        {"label": jnp.asarray(label), "mask": np.arange(rows) < real})[0]
    loss, gradient = jax.value_and_grad(run)(jnp.asarray(logits))
    assert float(loss) == pytest.approx(bce[:real, seen].sum(1).mean(), rel=1e-5)
    assert not np.any(gradient[:, ~seen]) and not np.any(gradient[real:])
    # New classes alone, in the first session: scikit-learn's log loss of each of their sigmoids.
    run = lambda on: ICaRL().objective(
        MODEL, {}, {}, {"classes": {"current": on, "seen": on}},
        {"logits": jnp.asarray(logits), "teacher_logits": jnp.asarray(teacher)},
        {"label": jnp.asarray(label), "mask": np.ones(rows, bool)})[0]
    own = np.isin(np.arange(CLASSES), [0, 2, 5])
    expected = sum(log_loss(label == c, g[:, c], labels=[False, True]) for c in (0, 2, 5))
    assert float(run(own)) == pytest.approx(expected, rel=1e-5)


# --- The memory -----------------------------------------------------------------------------------


class Session:
    """Clips of some classes; a clip's audio is its own number, its features follow from that."""

    def __init__(self, number, labels):
        self.seed, self.model, self.reader = number, MODEL, self
        self.labels = np.array(labels, np.int32)
        self.values = 100.0 * number + np.arange(len(labels))

    def map_audio(self, function, state):
        return features(self.values)

    def map_rows(self, function, state, audio):
        assert len(audio)
        return features(audio[:, 0, 0])

    def clips(self, rows):
        return np.broadcast_to(self.values[rows][:, None, None], (len(rows), *SHAPE))


def features(values):
    z = np.stack([np.random.default_rng(int(v)).normal(size=4) for v in values])
    return z / np.linalg.norm(z, axis=1, keepdims=True)


SESSIONS = [Session(0, [4, 1, 4, 4, 1, 4, 4, 1]), Session(1, [0] * 3 + [6] * 5 + [0] * 4),
            Session(2, [2]), Session(3, [3, 5, 3, 5, 5])]


def states(method):
    out = [{"trainable": {}, "aux": {}, "memory": method.memory(MODEL, SHAPE, 0),
            "statistics": {"counts": np.zeros(CLASSES), "sums": np.zeros((CLASSES, 4))}}]
    for number, session in enumerate(SESSIONS):
        out.append(method.end_task(out[-1], number, session))
    return out


@pytest.mark.parametrize("capacity", [7, 9, 12, 60])
def test_memory_is_shared_evenly_by_the_herded_clips_of_the_classes_seen(capacity):
    runs, shown = states(ICaRL(capacity=capacity)), {}
    for number, state in enumerate(runs[1:]):
        session = SESSIONS[number]
        shown |= {int(c): session.values[session.labels == c] for c in set(session.labels)}
        memory, each = state["memory"], capacity // len(shown)
        assert memory["mask"].sum() <= capacity and len(memory["mask"]) == capacity
        audio = memory["audio"][memory["mask"]]
        for label, values in shown.items():
            own = audio[memory["label"][memory["mask"]] == label][:, 0, 0]
            expected = values[herding(features(values), each)]
            assert own.tolist() == expected.tolist()  # also classes that were cut back
            assert len(own) == min(each, len(values))
        ids = memory["clip_id"][memory["mask"]]
        assert len(set(ids)) == len(ids) and (ids < 0).all()
        assert memory.keys() == runs[0]["memory"].keys()
        assert all(memory[k].dtype == v.dtype and memory[k].shape == v.shape
                   for k, v in runs[0]["memory"].items())
    assert not runs[0]["memory"]["mask"].any()  # the hook is pure


def test_too_small_a_memory_is_an_error():
    with pytest.raises(ValueError, match="method.capacity is 6; expected at least 7"):
        ICaRL(capacity=6).memory(MODEL, SHAPE, 0)


def test_a_clip_has_the_class_of_the_nearest_mean_of_exemplars():
    method = ICaRL(capacity=9)
    state = states(method)[2]
    memory = state["memory"]
    test = features(np.arange(500, 540))
    means = {}
    for label in (0, 1, 4, 6):
        own = memory["audio"][memory["mask"] & (memory["label"] == label)][:, 0, 0]
        mean = features(own).mean(0)
        means[label] = mean / np.linalg.norm(mean)
    nearest = [min(means, key=lambda c: np.linalg.norm(x - means[c])) for x in test]
    scores = method.decide(state, 0.5 * test)  # the mean over chunks of a clip is shorter than 1
    assert scores.argmax(1).tolist() == nearest and len(set(nearest)) > 2


def test_features_of_a_memory_are_computed_in_padded_batches():
    data = TaskData(None, {}, None, jax.random.key(0), 0, 4, sharding.make_mesh(1, 1))
    audio = np.random.default_rng(2).normal(size=(7, *SHAPE)).astype(np.float32)
    total = lambda model, trainable, frozen, aux, batch: jnp.stack(
        [batch["audio"].sum((1, 2)), batch["clip_id"]], 1)
    rows = data.map_rows(total, {"trainable": {}, "aux": {}}, audio)
    np.testing.assert_allclose(rows, np.stack([audio.sum((1, 2)), np.arange(7)], 1), rtol=1e-5)
