"""What frozen layers make of clips and captions, kept for a stage: the same training, less work."""

import contextlib
import errno
import functools
import json
import os
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tail_jax.methods import pace as pace_module
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.training import kept as kept_module
from tail_jax.training.checkpoints import load_tree, tree_hash
from tail_jax.training.kept import Kept, Limits, keep
from tail_jax.training.step import TrainStep
from tail_jax.training.task_data import TaskData
from tail_jax.train import train
from tests.methods import tiny_pace as tiny
from tests.training.stopping import stopped_after

pytestmark = pytest.mark.usefixtures("quick_compilation")

ALWAYS = {"audio", "clip_id", "label", "mask"}
# PACE with all of its stages, in the first two of three sessions at least; the last block is tuned.
PACE = {"method.tune_from": 0, "method.layer_threshold": 0.0, "method.warm_up": "1 epochs",
        "method.freeze_head": True, "method.wrong_share": 0.0, "method.n_stop": 10**6,
        "method.copies": 3, "method.reg_copies_per_step": 2, "method.boundary_capacity": 8,
        "method.features": 24, "method.learning_rate": 0.5, "method.head_learning_rate": 1.0,
        "train.duration": "2 epochs", "optimizer.kind": "sgd"}
LIVE = {"train.keep_features": False}
DISK = {"train.keep_memory_bytes": 0}


@contextlib.contextmanager
def entries():
    """A list that gets what each step's batch has beside what all have, with its bytes."""
    calls, original = [], TrainStep.__call__

    def spy(self, trainable, opt_state, frozen, aux, mask, batch, *rest):
        calls.append({k: (v.shape, v.dtype.name) for k, v in batch.items() if k not in ALWAYS})
        return original(self, trainable, opt_state, frozen, aux, mask, batch, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", spy)
        yield calls


def stages(calls):
    """Names of what is kept, in the order in which it changes."""
    names = [tuple(sorted(k for k in call if "token" not in k and "caption" not in k))
             for call in calls]
    return [name for i, name in enumerate(names) if not i or names[i - 1] != name]


@pytest.fixture(scope="module")
def runs(tiny_config, tiny_classes_config, tmp_path_factory):
    """runs(method, sessions, classes, **fields) -> (workdir, results, entries of each step)."""
    done = {}

    def run(method, sessions=2, classes=True, **fields):
        name = json.dumps([method, sessions, classes, fields])
        if name not in done:
            config = (tiny_classes_config(method, sessions, **fields) if classes
                      else tiny_config(method, tasks=sessions, **fields))
            workdir = tmp_path_factory.mktemp(method)
            with entries() as calls:
                done[name] = workdir, train(config, workdir), calls
        return done[name]

    return run


def learned(workdir, task):
    return load_tree(workdir / "tuning" / f"task_{task}.safetensors")[0]


# --- Whole runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("method, classes, names", [
    ("l2p", True, ("query_audio",)), ("l2p", False, ("query_audio", "query_text")),
    ("dualprompt", True, ("query_audio",)), ("coda", True, ("query_audio",)),
    ("lwf", True, ("teacher_audio", "teacher_logits"))])
def test_training_with_kept_features_is_training_without(runs, method, classes, names):
    fields = {"train.duration": "2 epochs"}
    kept, live = (runs(method, 2, classes, **fields | more) for more in ({}, LIVE))
    assert stages(kept[2]) == [names] and stages(live[2]) == [()]
    assert kept[1]["trace_count"] == live[1]["trace_count"] == 1
    for task in (1, 2):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4),
                     learned(kept[0], task), learned(live[0], task))
    begun, ended = learned(kept[0], 1), learned(kept[0], 2)
    assert tree_hash(begun) != tree_hash(ended)


def test_methods_that_replay_or_never_query_keep_nothing(runs):
    for method in ("icarl", "hide"):
        assert stages(runs(method, 2, **{"train.duration": "1 steps"})[2]) == [()]


def test_pace_keeps_more_as_less_is_trained_and_has_a_program_for_each_set(runs):
    _, results, calls = runs("pace", 3, **PACE)
    hidden, copies = ("hidden_1",), ("copies_1", "hidden_1")
    assert stages(calls) == [(), ("pooled",), hidden, ("pooled",), copies, ("pooled",), copies]
    # A batch has 8 rows, the tower 10 tokens of 16, a clip 3 copies.
    widest = next(call for call in calls if "copies_1" in call)
    assert widest["copies_1"] == ((8, 3, 10, 16), "float32")
    assert widest["hidden_1"] == ((8, 10, 16), "float32")
    assert results["trace_count"] == 4


def test_pace_with_kept_features_is_pace_without(runs):
    kept, live = (runs("pace", 3, **PACE | more) for more in ({}, LIVE))
    assert live[1]["trace_count"] == 1 and stages(live[2]) == [()]
    for task in (1, 2, 3):
        a, b = learned(kept[0], task), learned(live[0], task)
        np.testing.assert_allclose(a["aux"]["delta"], b["aux"]["delta"], atol=2e-5)
        assert np.abs(a["aux"]["delta"]).max() > 1e-3
    metrics = [[json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
               for run in (kept, live)]
    assert any(line["boundary"] > 0 for line in metrics[0])
    for a, b in zip(*metrics, strict=True):
        for name in ("loss", "classification", "boundary", "gradient_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4)


def test_features_on_disk_give_the_bits_of_those_in_memory_and_leave_no_file(runs, monkeypatch):
    mapped, original = [], kept_module._mapped

    def spy(shape, dtype, size, folder):
        before = {*folder.rglob("*")}
        array = original(shape, dtype, size, folder)
        assert {*folder.rglob("*")} == before  # it has no name
        mapped.append((size, str(folder) in maps()))
        return array

    monkeypatch.setattr(kept_module, "_mapped", spy)
    disk, memory = (runs("pace", 3, **PACE | more) for more in (DISK, {}))
    assert stages(disk[2]) == stages(memory[2])
    assert len(mapped) == 8 and all(size > 0 and there for size, there in mapped)
    for task in (1, 2, 3):
        assert tree_hash(learned(disk[0], task)) == tree_hash(learned(memory[0], task))
    assert str(disk[0]) not in maps()  # and when the stage is over, it is gone
    names = [sorted(p.relative_to(run[0]) for p in run[0].rglob("*") if "checkpoints" not in str(p))
             for run in (disk, memory)]
    assert names[0] == names[1]


def maps():
    """Files that this process has in its memory."""
    return pathlib.Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("stop_at", [9, 14])
def test_run_killed_in_a_stage_keeps_the_same_again(runs, tiny_classes_config, tmp_path, stop_at):
    # In the adaptation of the first session, and of the second: four steps, as the probe's; two of
    # the head.
    reference, expected, calls = runs("pace", 3, **PACE | DISK)
    config = tiny_classes_config("pace", 3, **PACE | DISK)
    with entries() as first, stopped_after(stop_at):
        train(config, tmp_path / "run")
    with entries() as second:
        results = train(config, tmp_path / "run")
    assert first + second == calls and len(first) == stop_at
    assert all("hidden_1" in call for call in (first[-1], second[0]))
    assert results["matrices"] == expected["matrices"]
    for task in (1, 2, 3):
        assert tree_hash(learned(tmp_path / "run", task)) == tree_hash(learned(reference, task))


# --- What is kept -----------------------------------------------------------------------------


@functools.cache
def pace(**settings):
    return pace_module.PACE(**tiny.SETTINGS | {"reg_on_fsa": True, "tune_from": 3} | settings)


def data_of(frozen, model=tiny.MODEL):
    data = tiny.data_of(0, 0, frozen, model)
    data.reader.split = types.SimpleNamespace(clips=[*data.labels], captions=[])
    return data


@functools.cache
def begun(method, stage=1):
    """(state, data) of a stage of a first session of 7 clips, in batches of 4."""
    data = data_of(method.frozen(tiny.params()))
    state = tiny.with_classes(method.init(jax.random.key(1), tiny.MODEL, tiny.params()), 0)
    return method.begin_stage(method.begin_task(state, 0, data), 0, stage, data), data


def features(method, state, data, *names):
    """Of all clips in one batch, computed for themselves."""
    batch = {"audio": jnp.asarray(data.reader.audio), "clip_id": jnp.arange(7)}
    run = jax.jit(lambda trainable, aux: {
        name: method.feature(name, tiny.MODEL, trainable, data.frozen, aux, batch)
        for name in names})
    return run(state["trainable"], state["aux"])


@pytest.mark.parametrize("memory, disk, names", [
    (10**9, 0, ("hidden_2", "copies_2")), (0, 10**9, ("hidden_2", "copies_2")),
    (0, 7 * 9 * 8 * 4, ("hidden_2",)), (7 * 9 * 8 * 4 - 1, 0, ()),
    (7 * 9 * 8 * 4, 5 * 7 * 9 * 8 * 4, ("hidden_2", "copies_2"))])
def test_every_clip_has_its_features_in_memory_or_past_the_limit_on_disk(tmp_path, memory, disk,
                                                                        names):
    method = pace()
    state, data = begun(method)
    kept = keep(method, state, 0, 1, data, Limits(memory, disk, tmp_path))
    assert tuple(kept.arrays) == names
    expected = features(method, state, data, *names)
    batch = {"clip_id": np.array([3, 6, 6, 0], np.int32)}
    for name, values in expected.items():
        np.testing.assert_allclose(kept.arrays[name][1], values, atol=1e-5)
        np.testing.assert_array_equal(kept.rows(batch)[name],
                                      kept.arrays[name][1][[3, 6, 6, 0]])
    assert not [*tmp_path.iterdir()]


def test_bfloat16_features_are_kept_as_such(tmp_path):
    model = DualEncoder(tiny.MODEL.audio, None, dtype="bfloat16", classes=tiny.CLASSES)
    method = pace()
    state, data = begun(method)
    data = data_of(data.frozen, model)
    kept = keep(method, state, 0, 1, data, Limits(0, 10**9, tmp_path))
    values = kept.arrays["hidden_2"][1]
    assert values.dtype == jnp.bfloat16
    exact = features(method, state, data, "hidden_2")["hidden_2"]
    np.testing.assert_allclose(values.astype(np.float32), exact, atol=0.1)


def test_rows_are_those_of_clips_or_of_captions():
    kept = Kept({"a": ("audio", np.arange(5)), "t": ("text", 10 * np.arange(9))})
    rows = kept.rows({"clip_id": np.array([4, 0]), "caption_id": np.array([8, 1])})
    assert {k: v.tolist() for k, v in rows.items()} == {"a": [4, 0], "t": [80, 10]}
    assert [*kept.rows({"clip_id": np.array([1])})] == ["a"]


def test_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    method = pace()
    with pytest.raises(ValueError, match="no room for 2016 bytes of kept features .*No space left"
                                         ".*train.keep_disk_bytes"):
        keep(method, *begun(method)[:1], 0, 1, begun(method)[1], Limits(0, 10**9, tmp_path))


def test_nothing_is_kept_where_the_first_block_is_tuned():
    method = pace(tune_from=1)
    assert method.kept(tiny.MODEL, {}, 0, 1) == {}
    assert pace(boundary_weight=0.0).kept(tiny.MODEL, {}, 0, 1) == {"hidden_2": "audio"}


# --- The step ---------------------------------------------------------------------------------


def flops(method, state, data, kept):
    """(loss and gradient, FLOPs of the compiled program) of a batch with these rows."""
    batch = next(data.reader.audio_batches(4))
    batch = batch | kept.rows(batch)

    def loss(trainable, frozen, aux, batch):
        args = tiny.MODEL, trainable, frozen, aux
        outputs = method.forward(*args, batch, jax.random.key(2))
        return method.objective(*args, outputs, batch)[0]

    args = state["trainable"], data.frozen, state["aux"], batch
    program = jax.jit(jax.value_and_grad(loss)).lower(*args).compile()
    return program(*args), program.cost_analysis()["flops"]


@pytest.mark.parametrize("settings, stage, name, share", [
    ({}, 0, "pooled", 0.02),  # the tower is not run at all
    ({"boundary_weight": 0.0}, 1, "hidden_2", 0.5)])  # one block of three, and no patches
def test_kept_features_give_loss_and_gradient_with_less_work(settings, stage, name, share):
    method = pace(**settings)
    state, data = begun(method, stage)
    head = state["trainable"]["heads"]["classes"]
    kernel = np.random.default_rng(0).normal(size=head["kernel"].shape).astype(np.float32)
    state = state | {"trainable": state["trainable"] | {
        "heads": {"classes": head | {"kernel": kernel}}}}
    kept = keep(method, state, 0, stage, data, Limits(10**9, 0))
    assert [*kept.arrays] == [name]
    (live, gradient), whole = flops(method, state, data, Kept({}))
    (again, same), part = flops(method, state, data, kept)
    assert float(live) == pytest.approx(float(again), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient, same)
    assert max(np.abs(x).max() for x in jax.tree.leaves(gradient)) > 1e-2
    assert part < share * whole


def test_boundary_is_encoded_anew_from_what_is_kept():
    method = pace()
    state, data = begun(method)
    assert bool(state["aux"]["boundary"]["active"])
    lora = state["trainable"]["lora"]["audio"]["key"]
    lora = lora | {"b": lora["b"].at[2].set(0.3)}  # the block that is tuned has moved
    trainable = state["trainable"] | {"lora": {"audio": state["trainable"]["lora"]["audio"]
                                              | {"key": lora}}}
    kept = keep(method, state, 0, 1, data, Limits(10**9, 0))
    state = state | {"trainable": trainable}
    live = method.begin_epoch(state, data)["aux"]["boundary"]
    data = TaskData(*(getattr(data, name) for name in (
        "model", "frozen", "reader", "key", "seed", "batch_size", "mesh")), kept)
    again = method.begin_epoch(state, data)["aux"]["boundary"]
    for name in ("features", "means"):
        np.testing.assert_allclose(again[name], live[name], atol=1e-5)
        assert np.abs(live[name] - state["aux"]["boundary"][name]).max() > 1e-3
