"""Replay: the reservoir, what a batch gets of it, and the stored embeddings."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from data_pipelines.corpora import caption_keys, normalise_caption
from tail_jax import methods
from tail_jax.methods.replay import DarkReplay, Replay, hashes, reservoir
from tail_jax.models.htsat import HTSATConfig
from tail_jax.run import open_run, read
from tail_jax.training.checkpoints import Checkpoints
from tests.tiny import TwoTowers

SHAPE, TOKENS = (3, 2), 4
MODEL = TwoTowers(embedding=5)


@dataclasses.dataclass
class Task:
    """A task of `clips` clips with two captions each, as the hooks see it.

    All values say which clip or caption they belong to: 100 task + row.
    """

    number: int
    clips_count: int
    seed: int = 0

    def __post_init__(self):
        captions = np.arange(2 * self.clips_count, dtype=np.int32)
        self.pairs = np.stack([captions // 2, captions], 1)
        self.values = 100 * self.number + captions
        self.token_ids = np.repeat(self.values[:, None], TOKENS, 1)
        self.token_mask = np.ones((len(captions), TOKENS), bool)
        self.split = types.SimpleNamespace(
            clips=range(self.clips_count), captions=[f"Sound, {v}!" for v in self.values])
        self.caption_key = caption_keys(self.split.captions)
        self.reader = self

    def clips(self, rows):
        return np.broadcast_to(100.0 * self.number + rows[:, None, None], (len(rows), *SHAPE))

    def batch(self, rows, real):
        chosen = np.where(np.arange(rows) < real, np.arange(rows) % len(self.pairs), 0)
        clip, caption = self.pairs[chosen].T
        return {"audio": self.clips(clip).astype(np.float32), "clip_id": clip,
                "caption_id": caption, "caption_key": self.caption_key[caption],
                "token_ids": self.token_ids[caption], "token_mask": self.token_mask[caption],
                "mask": np.arange(rows) < real}


def after(method, *tasks):
    """The state after these tasks."""
    state = {"trainable": {}, "aux": {}, "memory": method.memory(MODEL, SHAPE, TOKENS)}
    for number, task in enumerate(tasks):
        state = method.end_task(state, number, task)
    return state


def held(state):
    """The values of the captions in the memory."""
    return sorted(state["memory"]["token_ids"][state["memory"]["mask"], 0].tolist())


# --- The reservoir ------------------------------------------------------------------------------


def test_memory_is_a_uniform_sample_of_all_pairs_of_all_tasks():
    capacity, sizes, runs = 7, (9, 14, 5), 6000
    counts = np.zeros(sum(sizes))
    for seed in range(runs):
        random, memory, before = np.random.default_rng(seed), np.full(capacity, -1), 0
        for size in sizes:
            slots, items = reservoir(capacity, before, size, random)
            memory[slots] = before + items
            before += size
        assert len(set(memory)) == capacity and memory.min() >= 0
        counts[memory] += 1
    # Draws without replacement scatter less than chi-square's; 1e-3 is on the safe side.
    assert chisquare(counts).pvalue > 1e-3


def test_both_halves_of_the_memory_are_drawn_alike_over_seeds():
    tasks = lambda seed: (Task(0, 6, seed), Task(1, 9, seed + 10000))
    values = np.concatenate([held(after(Replay(capacity=5), *tasks(s))) for s in range(1500)])
    names, counts = np.unique(values, return_counts=True)
    assert len(names) == 2 * (6 + 9) and chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("capacity, before, count", [(10, 0, 4), (10, 4, 3), (10, 4, 6), (10, 8, 9),
                                                     (1, 0, 1), (3, 3, 5), (3, 50, 1)])
def test_slots_fill_one_by_one_without_holes(capacity, before, count):
    for seed in range(20):
        slots, items = reservoir(capacity, before, count, np.random.default_rng(seed))
        assert len(set(slots)) == len(slots) == len(set(items)) == len(items)
        assert set(range(before, min(capacity, before + count))) <= set(slots)
        assert all(0 <= s < capacity for s in slots) and all(0 <= i < count for i in items)


def test_memory_holds_whole_pairs_of_the_tasks_seen_and_of_no_other():
    method = Replay(capacity=20)
    first, second = Task(0, 4), Task(1, 11)
    state = after(method, first)
    assert held(state) == sorted(first.values)  # all there is
    before = {k: v.copy() for k, v in state["memory"].items()}
    memory = method.end_task(state, 1, second)["memory"]
    assert memory["mask"].all() and {*memory["token_ids"][:, 0] // 100} == {0, 1}
    for row in range(20):
        value = int(memory["token_ids"][row, 0])
        task = (first, second)[value // 100]
        caption, clip = value % 100, value % 100 // 2
        assert (memory["audio"][row] == 100 * (value // 100) + clip).all()
        assert memory["clip_id"][row] == -1 - clip - (4 if value >= 100 else 0)
        assert memory["caption_key"][row] == hashes(task.split, np.array([caption]))[0]
    np.testing.assert_equal(state["memory"], before)  # the hook is pure
    assert {k: (v.dtype, v.shape) for k, v in memory.items()} == {
        k: (v.dtype, v.shape) for k, v in before.items()}


def test_same_seed_gives_the_same_memory_and_another_seed_another():
    runs = [held(after(Replay(capacity=5), Task(0, 9, seed))) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


# --- The batch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size, rows", [(128, 32), (8, 2), (7, 1), (3, 1), (2, 1), (1, 0)])
def test_a_quarter_of_the_batch_is_replayed_from_the_second_task_on(batch_size, rows):
    method = methods.build({"name": "er"})
    assert method.replay_rows(after(method), batch_size) == 0
    assert method.replay_rows(after(method, Task(0, 3)), batch_size) == rows


@pytest.mark.parametrize("method", [Replay(capacity=6), DarkReplay(capacity=6)])
def test_step_sees_the_same_arrays_in_every_task(method):
    def shapes(state, rows):
        batch = Task(2, 9).batch(16 - rows, 5)
        out = method.replay(state, batch, rows, Task(2, 9), np.random.default_rng(0))
        return {k: (v.shape, v.dtype) for k, v in out.items()}

    state = after(method)
    first = shapes(state, 0)
    assert first == shapes(state | {"memory": jax.tree.map(jnp.asarray, state["memory"])}, 4)
    assert {k: v.shape for k, v in method.replay_shapes(MODEL, 16).items()} == {
        k: v[0] for k, v in first.items() if k.startswith("stored_")}


def test_replayed_rows_follow_the_new_ones_and_are_drawn_uniformly():
    method, task = Replay(capacity=7), Task(1, 5)
    state = after(method, Task(0, 9))
    counts = dict.fromkeys(held(state), 0)
    for step in range(2000):
        batch = task.batch(6, 4)
        out = method.replay(state, batch, 2, task, np.random.default_rng([0, step]))
        np.testing.assert_array_equal(out["token_ids"][:6], batch["token_ids"])
        np.testing.assert_array_equal(out["clip_id"][:6], batch["clip_id"])
        assert out["mask"].tolist() == [True] * 4 + [False] * 2 + [True] * 2
        assert (out["clip_id"][6:] < 0).all()
        one, other = out["token_ids"][6:, 0]
        assert one != other
        counts[one] += 1
        counts[other] += 1
    assert chisquare([*counts.values()]).pvalue > 1e-3


def test_memory_smaller_than_its_rows_is_padded():
    method = Replay(capacity=50)
    out = method.replay(after(method, Task(0, 1)), Task(1, 5).batch(9, 9), 3, Task(1, 5),
                        np.random.default_rng(0))
    assert out["mask"].tolist() == [True] * 11 + [False]
    assert all(len(v) == 12 for v in out.values())
    # Two captions of one clip stay each other's positives.
    assert out["clip_id"][9] == out["clip_id"][10] == -1


def test_captions_share_a_key_across_tasks_where_they_are_equal_and_only_there():
    method, task = Replay(capacity=50), Task(1, 5)
    task.split.captions[3] = "sound: 4"  # of the first task, but for case and punctuation
    out = method.replay(after(method, Task(0, 4)), task.batch(10, 10), 8, task,
                        np.random.default_rng(0))
    values = out["token_ids"][:, 0]
    text = [task.split.captions[v - 100] if v >= 100 else f"Sound, {v}!" for v in values]
    for i in range(18):
        for j in range(18):
            same = normalise_caption(text[i]) == normalise_caption(text[j])
            assert (out["caption_key"][i] == out["caption_key"][j]) == same
    assert (out["caption_key"] >= 0).all() and len(set(out["caption_key"])) == 17
    # Clips of the memory are none of the task's.
    assert not set(out["clip_id"][:10]) & set(out["clip_id"][10:])


# --- DER ----------------------------------------------------------------------------------------


def test_der_adds_the_squared_distance_to_stored_embeddings_over_memory_rows():
    random = np.random.default_rng(0)
    a, t, a0, t0 = random.normal(size=(4, 7, 5)).astype(np.float32)
    batch = {"clip_id": np.array([0, 1, 0, -1, -3, -3, 0]), "caption_key": np.arange(7),
             "mask": np.array([1, 1, 0, 1, 1, 1, 0], bool), "stored_audio": a0, "stored_text": t0}
    trainable = {"logit_scale": jnp.float32(1)}

    def loss(name, **settings):
        method = methods.build({"name": name} | settings)
        return float(method.objective(MODEL, trainable, {}, {}, {"audio": a, "text": t}, batch)[0])

    expected = np.mean([((a[i] - a0[i]) ** 2).sum() + ((t[i] - t0[i]) ** 2).sum()
                        for i in (3, 4, 5)])
    assert loss("der", stored_weight=0.3) == pytest.approx(loss("er") + 0.3 * expected, rel=1e-5)
    batch["clip_id"] = np.arange(7)  # the first task: no rows of the memory
    assert loss("der") == loss("er")


@pytest.mark.usefixtures("quick_compilation")
def test_stored_embeddings_are_those_of_the_model_at_the_end_of_the_task_and_survive_a_checkpoint(
        tiny_config, tmp_path):
    run = open_run(tiny_config("der", tasks=1), tmp_path)
    reader = read(run.config, run.backbone.tokenizer, run.stream.tasks[0].train)
    state = run.initial_state()
    state["trainable"] = jax.tree.map(lambda x: x + 0.1, state["trainable"])
    ended = run.end_task(state, 0, run.task_data(reader, 0, 1))
    memory = ended["memory"]
    assert memory["mask"].all() and len(memory["mask"]) == run.method.capacity < len(reader.pairs)
    args = reader, state["trainable"], run.frozen, state["aux"]
    audio, text = run.embedder.audio(*args, training=True), run.embedder.text(*args)
    for row in range(run.method.capacity):
        [caption] = [i for i, ids in enumerate(reader.token_ids)
                     if (ids == memory["token_ids"][row]).all()]
        clip = reader.split.caption_clip[caption]
        assert memory["clip_id"][row] == -1 - clip
        np.testing.assert_allclose(memory["stored_audio"][row], audio[clip], atol=1e-6)
        np.testing.assert_allclose(memory["stored_text"][row], text[caption], atol=1e-6)
        [batch] = [b for b in reader.audio_batches(len(reader.split.clips), training=True)]
        np.testing.assert_array_equal(memory["audio"][row], batch["audio"][clip])
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, ended, {})
    restored = checkpoints.restore(run.initial_state())["memory"]
    checkpoints.close()
    np.testing.assert_equal({k: np.asarray(v) for k, v in restored.items()}, memory)
    assert {k: v.dtype for k, v in restored.items()} == {k: v.dtype for k, v in memory.items()}


@pytest.mark.usefixtures("quick_compilation")
def test_memory_holds_rows_of_audio_that_htsat_stretches_to_its_window(tiny_config, tmp_path):
    htsat = HTSATConfig(spec_size=32, mels=16, patch=4, width=8, depths=(1, 1), heads=(2, 2),
                        window=4)
    config = tiny_config("er", tasks=1)
    config["model"]["audio"] = {"kind": "htsat"} | dataclasses.asdict(htsat)
    run = open_run(config, tmp_path)
    reader = read(run.config, run.backbone.tokenizer, run.stream.tasks[0].train)
    state = run.end_task(run.initial_state(), 0, run.task_data(reader, 0, 1))
    batch = next(reader.train_batches(6, 0))
    out = run.method.replay(state, batch, 2, reader, np.random.default_rng(0))
    frames, mels = batch["audio"].shape[1:]
    assert frames < htsat.frames and out["audio"].shape == (8, frames, mels)
    assert out["audio"][6:].any()


@pytest.mark.parametrize("settings, message", [
    ({"capacity": 0}, "method.capacity is 0; expected 1 or more"),
    ({"replay_share": 1.0}, "method.replay_share is 1.0")])
def test_settings_out_of_range_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        methods.build({"name": "er"} | settings)
