"""Class-incremental streams on the one trainer: stages, host statistics, predictions."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tail_jax import methods
from tail_jax import train as train_module
from tail_jax.backbone import tuned
from tail_jax.describe import describe
from tail_jax.evaluate import evaluate
from tail_jax.evaluate import text as report_text
from tail_jax.methods.base import Stage
from tail_jax.methods.full import Sequential
from tail_jax.run import open_run
from tail_jax.training.checkpoints import load_tree, tree_hash
from tail_jax.train import train
from tests import tiny_classes
from tests.training.stopping import stopped_after

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def config(tiny_classes_config):
    """config(method, sessions, **fields) of three steps a session."""
    return lambda *args, **fields: tiny_classes_config(
        *args, **{"train.duration": "3 steps"} | fields)


@dataclasses.dataclass(frozen=True)
class Staged(Sequential):
    """Warms its classifier up, then trains everything; counts clips on the host in float64."""

    hooks = []  # what was called

    def init(self, key, model, params):
        return super().init(key, model, params) | {
            "aux": {"stage": jnp.zeros((), jnp.int32)},
            "statistics": {"thirds": np.zeros(2), "moved": np.zeros((), np.float32)}}

    def stages(self, task, sizes):
        assert len(sizes) == task + 1
        return (Stage("head", "2 steps"), Stage()) if task < 2 else ()

    def begin_task(self, state, task, data):
        self.hooks.append(("begin", task, len(data.labels)))
        return state

    def begin_stage(self, state, task, stage, data):
        self.hooks.append(("stage", task, stage))
        return state | {"aux": state["aux"] | {"stage": jnp.asarray(stage, jnp.int32)}}

    def end_stage(self, state, task, stage, data):
        self.hooks.append(("stage ends", task, stage))
        return state

    def end_task(self, state, task, data):
        self.hooks.append(("end", task, len(data.labels)))
        # A third is not a float32: what is cut short on the way to disk shows.
        thirds = state["statistics"]["thirds"] + np.array([len(data.labels) / 3, 1 / 3])
        return state | {"statistics": state["statistics"] | {"thirds": thirds}}

    def update_mask(self, state):
        mask = super().update_mask(state)
        whole = state["aux"]["stage"] == 1
        return mask | {"audio": jax.tree.map(lambda m: m & whole, mask["audio"])}


@pytest.fixture
def staged(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "staged", Staged)
    Staged.hooks.clear()


def test_hooks_and_stages_come_in_order_and_a_session_may_train_nothing(config, staged, tmp_path):
    results = train(config("staged"), tmp_path)
    assert results["trace_count"] == 1  # one program for both stages of all sessions
    begun = [size for name, _, size in Staged.hooks if name == "begin"]
    assert sum(begun) == sum(train for train, _, _ in tiny_classes.SIZES.values())
    assert [(name, *where) for name, *where in Staged.hooks] == [
        hook for task in range(3) for hook in (
            ("begin", task, begun[task]),
            *((("stage", task, 0), ("stage ends", task, 0), ("stage", task, 1),
               ("stage ends", task, 1)) if task < 2 else ()),
            ("end", task, begun[task]))]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("stage")) for line in lines] == [
        (1, "head"), (2, "head"), (3, None), (4, None), (5, None),
        (6, "head"), (7, "head"), (8, None), (9, None), (10, None)]


def test_a_stage_moves_what_its_mask_lets_and_starts_a_fresh_optimizer(config, staged, tmp_path):
    states = []
    with pytest.MonkeyPatch.context() as patch:
        original = train_module.train_stage

        def spy(run, task, number, stage, state, opt_state, *rest):
            before = {k: tree_hash(v) for k, v in state["trainable"].items()}
            fresh = all(not np.any(x) for x in jax.tree.leaves(opt_state))
            state, opt_state = original(run, task, number, stage, state, opt_state, *rest)
            after = {k: tree_hash(v) for k, v in state["trainable"].items()}
            states.append((stage, fresh, {k for k in before if before[k] != after[k]}))
            return state, opt_state

        patch.setattr(train_module, "train_stage", spy)
        train(config("staged", sessions=2), tmp_path)
    assert states == [(0, True, {"heads"}), (1, True, {"heads", "audio"})] * 2


@pytest.mark.parametrize("stop_at", [1, 2, 4])  # in the first stage, at its end, in the second
def test_run_killed_in_a_stage_ends_in_the_same_bits(config, staged, tmp_path, stop_at):
    expected = train(config("staged", sessions=2), tmp_path / "whole")
    with stopped_after(stop_at):
        train(config("staged", sessions=2), tmp_path / "killed")
    results = train(config("staged", sessions=2), tmp_path / "killed")
    assert results["matrices"] == expected["matrices"]
    for task in (1, 2):
        whole, again = (load_tree(tmp_path / name / "tuning" / f"task_{task}.safetensors")[0]
                        for name in ("whole", "killed"))
        assert tree_hash(whole) == tree_hash(again)


def test_statistics_keep_their_float64_bits_through_a_checkpoint(tmp_path):
    values = {"gram": np.random.default_rng(0).normal(size=(3, 3)) / 3,  # no float32 holds these
              "counts": np.arange(4, dtype=np.int64), "single": np.float32([1 / 3])}
    saved = train_module.Checkpoints(tmp_path)
    saved.save(1, {"statistics": values}, {})
    saved.close()
    found = train_module.Checkpoints(tmp_path).restore({"statistics": values})["statistics"]
    for name, value in values.items():
        assert np.asarray(found[name]).dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_predictions_on_disk_give_the_matrix_and_evaluate_gives_its_last_row(config, tmp_path):
    results = train(config("sequential"), tmp_path)
    matrix = results["matrices"]["accuracy/seen"]
    assert matrix[0] == [None] * 3
    sizes, pooled = [], []
    for session in (1, 2, 3):
        tree, header = load_tree(tmp_path / "predictions" / f"task_{session}.safetensors")
        hit = tree["predicted"] == tree["label"]
        own = [float(hit[tree["session"] == j].mean()) for j in range(1, session + 1)]
        assert matrix[session] == own + [None] * (3 - session)
        assert tree["predicted"].max() < 2 * session  # two new classes a session, none before
        assert len(header["clips"]) == len(hit) and len(header["classes"]) == 6
        names = np.array(header["classes"])[tree["label"]]
        assert [clip[0] for clip in header["clips"]] == [*names]  # a0.wav is of class a
        pooled.append(hit.mean())
        sizes.append(len(hit))
    assert sizes[-1] == sum(test for _, _, test in tiny_classes.SIZES.values())
    assert results["summary"]["accuracy/pooled"]["average"] == pytest.approx(pooled[-1])
    assert results["summary"]["accuracy/pooled"]["incremental_average"] == pytest.approx(
        np.mean(pooled))
    report = evaluate(tmp_path)
    assert report["row"]["accuracy/seen"] == matrix[-1]
    assert evaluate(tmp_path, task=1)["row"]["accuracy/seen"] == matrix[1]
    assert "accuracy in %" in report_text(report)


def test_loading_what_a_class_incremental_run_learned_is_one_clear_error(config, tmp_path):
    train(config("l2p", sessions=1), tmp_path)
    run = open_run(config("l2p", sessions=1), tmp_path)
    with pytest.raises(ValueError, match="task_1.safetensors: of a class-incremental run"):
        tuned(run.backbone, tmp_path / "tuning" / "task_1.safetensors")


def test_training_learns_the_classes(config, tmp_path):
    results = train(config("joint", **{"train.duration": "60 epochs",
                                       "method.learning_rate": 3e-3}), tmp_path)
    assert results["summary"]["accuracy/pooled"]["average"] > 0.6  # chance is 1/6
    assert results["matrices"]["accuracy/seen"][:3] == [[None] * 3] * 3


def test_describe_counts_the_classes_of_the_stream(config):
    report = describe(config("ewc"))
    assert report["parameters"]["heads"] == 16 * 6 + 6  # width, classes
    assert report["trainable_parameters"] == report["total_parameters"]
    assert report["flops_per_step"] > 0


def test_methods_for_the_other_kind_of_stream_are_refused_by_name(config, tiny_config, tmp_path):
    with pytest.raises(ValueError, match="'ptat' is not for class-incremental.*sequential"):
        train(config("ptat"), tmp_path / "a")
    with pytest.raises(ValueError, match="'lwf' is not for audio-text streams.*ptat"):
        train(tiny_config("lwf"), tmp_path / "b")


def test_only_the_last_tuning_file_may_be_kept(config, tmp_path):
    results = train(config("l2p", sessions=2, **{
        "train.tuning_files": "last", "train.duration": "2 steps"}), tmp_path)
    assert [path.name for path in (tmp_path / "tuning").iterdir()] == ["task_2.safetensors"]
    assert not (tmp_path / "checkpoints").exists()
    assert evaluate(tmp_path)["row"]["accuracy/seen"] == results["matrices"]["accuracy/seen"][2]
    with pytest.raises(ValueError, match="train.tuning_files is 'first'; expected 'all'"):
        train(config("l2p", **{"train.tuning_files": "first"}), tmp_path / "other")
