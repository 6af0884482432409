"""L2P, DualPrompt, CODA-Prompt and S-Prompts on a ViT and an HTSAT of two and three layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors

from tail_jax import losses, methods
from tail_jax.models.ast import ASTConfig
from tail_jax.models.bert import TextConfig
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.htsat import HTSATConfig
from tail_jax.training.checkpoints import flatten
from tail_jax.training.optimizers import OptimizerConfig, make_optimizer
from tail_jax.tuning.pools import centroids, nearest_task, orthogonal_rows
from tail_jax.tuning.prompts import prompt_tuning

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEXT = TextConfig(vocab_size=20, width=8, layers=2, heads=2, hidden=12, max_positions=16,
                  pool="mean")
MODELS = {
    "ast": DualEncoder(ASTConfig(frames=12, mels=8, patch=4, stride=4, width=8, layers=3, heads=2,
                                 hidden=12, epsilon=1e-5), TEXT, embedding=6),
    "htsat": DualEncoder(HTSATConfig(spec_size=16, mels=8, patch=2, width=6, depths=(1, 2),
                                     heads=(2, 2), window=4), TEXT, embedding=6)}
SETTINGS = {"l2p": {"entries": 7, "length": 2, "chosen": 2, "pull_weight": 0.7},
            "dualprompt": {"general_length": 2, "expert_length": 3},
            "coda": {"components": 2, "length": 4},
            "sprompts": {"prompts": {"length": 2}, "centroids": 2}}
TASKS, ROWS, REAL = 3, 6, 5
TOWERS = pytest.mark.parametrize("tower", MODELS)
POOLS = pytest.mark.parametrize("name", SETTINGS)


def build(name, **settings):
    return methods.build({"name": name} | SETTINGS[name] | settings, TASKS)


@functools.cache
def params(tower):
    values = jax.device_get(jax.jit(MODELS[tower].init)(jax.random.key(0)))
    rng = np.random.default_rng(0)  # wide apart, so that rows differ
    return jax.tree.map(lambda x: np.asarray(x + rng.normal(0, 0.2, x.shape), np.float32)
                        if x.ndim > 1 else x, values)


def make_batch(tower, seed=1, rows=ROWS):
    rng = np.random.default_rng(seed)
    frames, mels = MODELS[tower].audio.input_shape
    return {"audio": rng.normal(0, 5, (rows, frames, mels)).astype(np.float32),
            "token_ids": rng.integers(0, 20, (rows, 7)).astype(np.int32),
            "token_mask": np.arange(7) < rng.integers(2, 8, (rows, 1)),
            "clip_id": np.arange(rows, dtype=np.int32),
            "caption_key": np.arange(rows, dtype=np.int32) + 100, "mask": np.arange(rows) < REAL}


class Data:
    """As much of a TaskData as S-Prompts reads: features of random clips and captions."""

    seed = 5

    def __init__(self, method, tower, task):
        self.method, self.tower, self.batch = method, tower, make_batch(tower, 40 + task, 9)

    def map_audio(self, function, state):
        return np.asarray(jax.jit(functools.partial(function, MODELS[self.tower]))(
            state["trainable"], self.method.frozen(params(self.tower)), state["aux"], self.batch))

    map_text = map_audio


def begun(name, tower, tasks, **settings):
    """(method, its state at the start of the last of `tasks` tasks)."""
    method = build(name, **settings)
    state = method.init(jax.random.key(2), MODELS[tower], params(tower))
    for task in range(tasks):
        state = method.begin_task(state, task, Data(method, tower, task))
    return method, state


@functools.cache
def compiled_loss(name, tower):
    method, model = build(name), MODELS[tower]

    @jax.jit
    def run(trainable, frozen, aux, batch):
        def loss(trainable):
            outputs = method.forward(model, trainable, frozen, aux, batch, None)
            value, metrics = method.objective(model, trainable, frozen, aux, outputs, batch)
            return value, (metrics, outputs)
        return jax.value_and_grad(loss, has_aux=True)(trainable)

    return run


def loss_and_gradient(name, tower, state, batch=None):
    """((loss, (metrics, outputs)), gradient) of a batch."""
    return compiled_loss(name, tower)(state["trainable"], params(tower), state["aux"],
                                      batch or make_batch(tower))


def train(method, name, tower, state, steps=3):
    """A few updates by the project's optimizer."""
    optimizer = make_optimizer(OptimizerConfig(), method, state["trainable"])
    opt_state, trainable = optimizer.init(state["trainable"]), state["trainable"]
    mask = method.update_mask(state)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        _, gradient = loss_and_gradient(name, tower, state | {"trainable": trainable},
                                        make_batch(tower, step))
        trainable, opt_state, _ = update(gradient, opt_state, trainable, mask, step, steps)
    return state | {"trainable": trainable}


@functools.cache
def compiled_embed(name, tower):
    method = build(name)
    return [jax.jit(functools.partial(f, MODELS[tower]))
            for f in (method.embed_audio, method.embed_text)]


def embed(name, tower, state, batch):
    """{audio, text}: embeddings of a batch."""
    return {side: np.asarray(f(state["trainable"], params(tower), state["aux"], batch))
            for side, f in zip(("audio", "text"), compiled_embed(name, tower))}


@functools.cache
def compiled_encode(tower, side):
    return jax.jit(functools.partial(MODELS[tower].encode, side))


def features(tower, batch):
    """{audio, text}: what the frozen towers pool, in NumPy."""
    return {side: np.asarray(compiled_encode(tower, side)(params(tower), None, batch)["pooled"])
            for side in ("audio", "text")}


def cosines(q, keys):
    q, keys = (np.asarray(x, np.float64) for x in (q, keys))
    return q @ keys.T / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(keys, axis=1)


def by_row(tree):
    return {k: np.asarray(v) for k, v in flatten(jax.device_get(tree)).items()}


# --- All pools --------------------------------------------------------------------------------


@TOWERS
@POOLS
def test_embeddings_do_not_depend_on_the_batch(name, tower):
    _, state = begun(name, tower, 2)
    batch = make_batch(tower)
    whole = embed(name, tower, state, batch)
    order = np.array([3, 0, 5, 2, 1, 4])
    moved = embed(name, tower, state, {k: v[order] for k, v in batch.items()})
    first = {k: np.concatenate([v[:1], np.zeros_like(v[1:])]) for k, v in batch.items()}
    padded = embed(name, tower, state, first | {"token_mask": first["token_mask"]})
    for side in whole:
        np.testing.assert_allclose(moved[side], whole[side][order], atol=2e-5)
        np.testing.assert_allclose(padded[side][0], whole[side][0], atol=2e-5)
        np.testing.assert_allclose(np.linalg.norm(whole[side], axis=1), 1, atol=1e-5)


@TOWERS
@POOLS
def test_a_modality_never_sees_the_other(name, tower):
    _, state = begun(name, tower, 2)
    batch, other = make_batch(tower), make_batch(tower, 9)
    rows = lambda batch: loss_and_gradient(name, tower, state, batch)[0][1][1]
    plain = rows(batch)
    sides = {"audio": ("audio",), "text": ("token_ids", "token_mask")}
    for side, keys in sides.items():
        got = rows(other | {k: batch[k] for k in keys})
        for fact in (k for k in plain if k.startswith(side)):
            np.testing.assert_array_equal(got[fact], plain[fact], err_msg=fact)
        assert any((np.asarray(got[k]) != plain[k]).any() for k in got if not k.startswith(side))


@TOWERS
@pytest.mark.parametrize("name", ["dualprompt", "coda", "sprompts"])
def test_rows_of_other_tasks_stay_bit_for_bit(name, tower):
    method, state = begun(name, tower, 2)
    before = by_row(state["trainable"])
    after = by_row(train(method, name, tower, state)["trainable"])
    per_task = {"coda": SETTINGS["coda"]["components"]}.get(name, 1)
    moved = set()
    for leaf, old in before.items():
        if leaf.startswith("heads") or leaf == "logit_scale" or "/general/" in leaf:
            changed = (old != after[leaf]).any()
            assert changed, leaf
            continue
        rows = np.arange(len(old)) // per_task == 1
        np.testing.assert_array_equal(after[leaf][~rows], old[~rows], err_msg=leaf)
        if (after[leaf][rows] != old[rows]).any():
            moved.add(leaf)
    assert moved == {leaf for leaf in before if leaf.startswith(("pool", "prompts"))
                     and "/general/" not in leaf}


@POOLS
def test_gradients_reach_rows_in_use_alone(name):
    _, state = begun(name, "ast", 2)
    (_, (_, outputs)), gradient = loss_and_gradient(name, "ast", state)
    group = "prompts" if name == "sprompts" else "pool"
    for leaf, g in by_row(gradient[group]).items():
        if name == "l2p":
            side = leaf.split("/")[0]
            # Padding rows choose, too, and give no gradient.
            used = np.isin(np.arange(7), np.asarray(outputs[f"{side}_chosen"])[:REAL])
            assert not used.all()
        elif "/general/" in leaf:
            used = np.array([True])
        else:
            used = np.arange(len(g)) // (2 if name == "coda" else 1) == 1
        touched = np.abs(g).reshape(len(g), -1).max(1) > 0
        np.testing.assert_array_equal(touched, used, err_msg=leaf)


# --- L2P --------------------------------------------------------------------------------------


@TOWERS
def test_l2p_chooses_by_cosine_and_pulls_the_chosen_keys(tower):
    _, state = begun("l2p", tower, 1)
    batch = make_batch(tower)
    (loss, (metrics, outputs)), _ = loss_and_gradient("l2p", tower, state)
    total = 0
    for side, q in features(tower, batch).items():
        c = cosines(q, state["trainable"]["pool"][side]["keys"])
        best = np.argsort(-c, axis=1)[:, :2]
        np.testing.assert_array_equal(np.sort(outputs[f"{side}_chosen"]), np.sort(best))
        total += np.take_along_axis(c, best, 1).sum(1)[:REAL].mean()
        share = [(best[:REAL] == entry).any(1).mean() for entry in range(7)]
        np.testing.assert_allclose([metrics[f"{side}_share_{i}"] for i in range(7)], share,
                                   atol=1e-6)
    a, t = (np.asarray(outputs[side], np.float64)[:REAL] for side in ("audio", "text"))
    s = np.exp(float(state["trainable"]["logit_scale"])) * a @ t.T
    both = [np.diag(x) - np.log(np.exp(x).sum(1)) for x in (s, s.T)]
    assert float(loss) == pytest.approx(-np.mean(both) - 0.7 * total, abs=1e-4)


def test_l2p_embeds_a_row_as_with_its_prompts_alone():
    _, state = begun("l2p", "ast", 1)
    batch = make_batch("ast")
    got = embed("l2p", "ast", state, batch)
    for side, q in features("ast", batch).items():
        pool = state["trainable"]["pool"][side]
        best = np.argsort(-cosines(q, pool["keys"]), axis=1)[:, :2]
        for row in (0, 3):
            prompts = np.concatenate([pool["prompts"]["0"][i, 0] for i in best[row]])
            out = compiled_encode("ast", side)(params("ast"), {side: {"prompts": prompts[None]}},
                                               batch)
            np.testing.assert_allclose(got[side][row], out["embedding"][row], atol=2e-5)


# --- DualPrompt -------------------------------------------------------------------------------


@TOWERS
def test_dualprompt_takes_the_expert_of_the_nearest_key_of_the_tasks_seen(tower):
    for seen in (1, 2, 3):
        _, state = begun("dualprompt", tower, seen)
        (_, (metrics, outputs)), _ = loss_and_gradient("dualprompt", tower, state)
        chosen = {}
        for side, q in features(tower, make_batch(tower)).items():
            c = cosines(q, state["trainable"]["pool"][side]["keys"])
            chosen[side] = c[:, :seen].argmax(1)
            np.testing.assert_array_equal(outputs[f"{side}_chosen"][:, 0], chosen[side])
            np.testing.assert_allclose(metrics[f"{side}_pull"], c[:REAL, seen - 1].mean(),
                                       atol=1e-5)
        differ = (chosen["audio"] != chosen["text"])[:REAL].mean()
        assert float(metrics["tasks_differ"]) == pytest.approx(differ)


@pytest.mark.parametrize("layers, expected", [(12, (2, 5)), (24, (4, 10)), (6, (1, 3)),
                                              (4, (1, 2)), (3, (1, 2)), (2, (1, 2))])
def test_dualprompt_layers_scale_with_the_tower(layers, expected):
    assert build("dualprompt").layers(TextConfig(layers=layers)) == expected


def test_one_layer_leaves_no_room_for_experts():
    with pytest.raises(ValueError, match="two layers or more"):
        build("dualprompt").layers(TextConfig(layers=1))


# --- CODA -------------------------------------------------------------------------------------


@TOWERS
def test_new_components_are_orthogonal_to_the_old(tower):
    method, state = begun("coda", tower, 1)
    state = train(method, "coda", tower, state)
    old = by_row(state["trainable"]["pool"])
    state = method.begin_task(state, 1, None)
    for leaf, x in by_row(state["trainable"]["pool"]).items():
        np.testing.assert_array_equal(x[:2], old[leaf][:2])  # trained: neither unit nor orthogonal
        np.testing.assert_array_equal(x[4:], old[leaf][4:])
        for layer in range(x.shape[1]):
            rows = x[:, layer].reshape(len(x), -1)
            np.testing.assert_allclose(rows[2:4] @ rows[:2].T, 0, atol=1e-5)
            np.testing.assert_allclose(rows[2:4] @ rows[2:4].T, np.eye(2), atol=1e-5)


def test_more_components_than_dimensions_stay_unit_vectors():
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    rows = orthogonal_rows(x, 1, 5)
    np.testing.assert_allclose(np.linalg.norm(rows[1:], axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(rows[1:3] @ rows[1:3].T, np.eye(2), atol=1e-6)
    np.testing.assert_array_equal(rows[0], x[0])


def test_coda_sums_components_by_the_formula():
    method, state = begun("coda", "ast", 2)
    batch = make_batch("ast")
    tuning, _ = method.choose("text", MODELS["ast"], state["trainable"], params("ast"),
                              state["aux"], batch, True)
    pool = by_row(state["trainable"]["pool"]["text"])
    q = features("ast", batch)["text"].astype(np.float64)
    assert pool["keys"].shape == (6, 1, 8)  # 2 layers: the first ceil(10 / 12)
    p = 0
    for c in range(4):  # of the two tasks so far
        attended, key = q * pool["attention"][c, 0], pool["keys"][c, 0]
        alpha = attended @ key / np.linalg.norm(attended, axis=1) / np.linalg.norm(key)
        p += alpha[:, None, None] * pool["prompts/0"][c, 0]
    np.testing.assert_allclose(tuning["prefix"]["key"][:, 0], p[:, :2], atol=1e-5)
    np.testing.assert_allclose(tuning["prefix"]["value"][:, 0], p[:, 2:], atol=1e-5)
    np.testing.assert_array_equal(tuning["prefix_mask"], [[True, True], [False, False]])


def test_coda_adds_the_distance_from_orthogonality():
    _, state = begun("coda", "ast", 2)
    rng = np.random.default_rng(6)
    state["trainable"]["pool"] = jax.tree.map(
        lambda x: np.float32(x + rng.normal(0, 0.3, x.shape)), state["trainable"]["pool"])
    pool = by_row(state["trainable"]["pool"])
    expected = 0
    for x in pool.values():
        for layer in range(x.shape[1]):
            z = x[:4, layer].reshape(4, -1).astype(np.float64)
            expected += ((z @ z.T - np.eye(4)) ** 2).sum()
    (plain, (_, outputs)), _ = loss_and_gradient("coda", "ast", state)
    loss, metrics = build("coda", orthogonality=0.1).objective(
        MODELS["ast"], state["trainable"], params("ast"), state["aux"], outputs, make_batch("ast"))
    assert expected > 0.1
    assert float(metrics["orthogonality"]) == pytest.approx(expected, rel=1e-4)
    assert float(loss) == pytest.approx(float(plain) + 0.1 * expected, rel=1e-4)


# --- S-Prompts --------------------------------------------------------------------------------


@TOWERS
def test_sprompts_embeds_with_the_prompts_of_the_nearest_centroid(tower):
    method, state = begun("sprompts", tower, 2)
    state["trainable"] = jax.tree.map(
        lambda x: x + np.random.default_rng(3).normal(0, 0.5, x.shape), state["trainable"])
    batch = make_batch(tower)
    got = embed("sprompts", tower, state, batch)
    for side, q in features(tower, batch).items():
        centres = np.asarray(state["aux"]["centroids"][side])
        assert (centres[2] == 0).all() and not (centres[:2] == 0).any()
        index = NearestNeighbors(n_neighbors=1).fit(centres[:2].reshape(4, -1))
        tasks = index.kneighbors(q, return_distance=False)[:, 0] // 2
        for task in range(2):
            own = jax.tree.map(lambda x: x[task], state["trainable"]["prompts"])
            out = compiled_encode(tower, side)(
                params(tower), prompt_tuning(method.prompts, MODELS[tower], own), batch)
            mine = tasks == task
            np.testing.assert_allclose(got[side][mine], out["embedding"][mine], atol=2e-5)


def test_tasks_not_begun_are_never_the_nearest():
    rng = np.random.default_rng(0)
    centres, q = rng.normal(size=(4, 3, 5)), rng.normal(size=(50, 5))
    gaps = np.linalg.norm(q[:, None, None] - centres, axis=-1).min(-1)
    for seen in (1, 2, 4):
        np.testing.assert_array_equal(nearest_task(q, jnp.asarray(centres), seen),
                                      gaps[:, :seen].argmin(1))


def test_centroids_are_those_of_scikit_learn_on_separate_groups():
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(5, 1, 7)) * 10 + rng.normal(size=(5, 13, 7)) * 0.3).reshape(-1, 7)
    expected = KMeans(5, n_init=10, random_state=0).fit(x).cluster_centers_
    ours = centroids(x, 5, seed=3)
    np.testing.assert_array_equal(ours, centroids(x, 5, seed=3))
    order = lambda c: c[np.lexsort(np.round(c, 2).T)]
    np.testing.assert_allclose(order(ours), order(expected), atol=1e-4)
    assert centroids(x[:2], 5, seed=0).shape == (5, 7)  # fewer features than centres


def test_sprompts_trains_heads_in_the_first_task_only():
    method, state = begun("sprompts", "ast", 1, train_heads=True)
    assert all(jax.tree.leaves(method.update_mask(state)["heads"]))
    state = method.begin_task(state, 1, None)
    assert not any(jax.tree.leaves(method.update_mask(state)["heads"]))
    assert "heads" not in begun("sprompts", "ast", 1)[1]["trainable"]


def test_retrieval_loss_is_that_of_all_methods():
    _, state = begun("coda", "ast", 1)
    batch = make_batch("ast")
    (loss, (_, outputs)), _ = loss_and_gradient("coda", "ast", state)
    expected = losses.retrieval_loss(outputs["audio"], outputs["text"],
                                     state["trainable"]["logit_scale"], batch)
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
