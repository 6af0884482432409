"""Properties of whole runs, seen at the step and in what they leave behind."""

import jax
import numpy as np
import pytest

from data_pipelines.batches import SplitReader
from data_pipelines.streams import build_stream
from tail_jax import cli, settings
from tail_jax import train as train_module
from tail_jax.evaluate import evaluate
from tail_jax.methods.ptat import Prompts
from tail_jax.run import Run, open_run, prepare_backbone
from tail_jax.training.checkpoints import tree_hash
from tail_jax.training.step import TrainStep
from tail_jax.train import train
from tests.commands import tiny_benchmark

pytestmark = pytest.mark.usefixtures("quick_compilation")
METHODS = ("ptat", "prompts", "sequential", "joint", "frozen")


@pytest.fixture(scope="module")
def runs(tiny_config, tmp_path_factory):
    """runs(method) -> (workdir, results, calls of the step), each run done once.

    A call is a dict of hashes and copies: what the step got and what it returned.
    """
    done = {}

    def run(method):
        if method in done:
            return done[method]
        calls, original = [], TrainStep.__call__

        def spy(self, trainable, opt_state, frozen, aux, mask, batch, key, position):
            call = {"before": jax.device_get(trainable), "aux": jax.device_get(aux),
                    "moments": [np.array(x) for x in jax.tree.leaves(opt_state)],
                    "frozen": tree_hash(frozen), "frozen_arrays": frozen,
                    "position": np.array(position)}
            out = original(self, trainable, opt_state, frozen, aux, mask, batch, key, position)
            calls.append(call | {"after": jax.device_get(out[0])})
            return out

        workdir = tmp_path_factory.mktemp(method)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainStep, "__call__", spy)
            results = train(tiny_config(method), workdir)
        done[method] = workdir, results, calls
        return done[method]

    return run


def by_task(calls):
    """The calls of each task: a new one begins at position 0."""
    tasks = []
    for call in calls:
        if call["position"][0] == 0:
            tasks.append([])
        tasks[-1].append(call)
    return tasks


@pytest.mark.parametrize("method", ["ptat", "prompts", "sequential", "joint"])
def test_step_is_traced_once_over_tasks_of_different_size_and_duration(runs, method):
    _, results, calls = runs(method)
    lengths = {int(call["position"][1]) for call in calls}
    assert len(lengths) == (1 if method == "joint" else 3)
    assert results["trace_count"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_results_have_every_field_and_matrices_a_row_before_the_first_task(runs, method):
    _, results, calls = runs(method)
    assert {"schema", "method", "stream", "tasks", "seed", "order", "backbone",
            "trainable_parameters", "total_parameters", "matrices", "summary", "wall_seconds",
            "peak_memory_bytes", "versions", "device"} <= results.keys()
    assert results["schema"] == 1 and results["method"] == method
    assert results["tasks"] == ["low", "high", "noisy"]
    assert {"name", "sha256", "parameters"} <= results["backbone"].keys()
    assert {"train", "hooks", "step", "evaluate", "total"} == results["wall_seconds"].keys()
    assert sum(results["wall_seconds"]["hooks"].values()) < results["wall_seconds"]["total"]
    assert results["summary"].keys() == results["matrices"].keys()
    assert results["total_parameters"] == results["backbone"]["parameters"]
    assert results["trainable_parameters"] == {
        "frozen": 0, "sequential": results["total_parameters"],
        "joint": results["total_parameters"]}.get(method, results["trainable_parameters"])
    for matrix in results["matrices"].values():
        assert [len(row) for row in matrix] == [3, 3, 3, 3]
    own = results["matrices"]["text_to_audio/R@1/own/fresh"]
    measured = [row for row, values in enumerate(own) if None not in values]
    assert measured == ([0, 3] if method == "joint" else [0, 1, 2, 3])
    assert bool(calls) == (method != "frozen")


def test_frozen_scores_the_same_after_every_task(runs):
    _, results, _ = runs("frozen")
    for key, matrix in results["matrices"].items():
        if key.endswith("own/fresh"):
            assert matrix[1:] == [matrix[0]] * 3


def test_frozen_scores_the_same_after_every_task_in_bfloat16(tiny_config, tmp_path):
    results = train(tiny_config("frozen", tasks=2, **{"model.dtype": "bfloat16"}), tmp_path)
    matrix = results["matrices"]["text_to_audio/mAP@10/own/fresh"]
    assert matrix[1:] == [matrix[0]] * 2


@pytest.mark.parametrize("method", METHODS)
def test_all_methods_share_the_row_before_the_first_task(runs, method):
    rows = [runs(m)[1]["matrices"]["audio_to_text/mAP@10/all/fresh"][0] for m in (method, "ptat")]
    assert rows[0] == rows[1]


def test_backbone_keeps_its_bits_while_the_trainable_tree_moves(runs):
    _, _, calls = runs("ptat")
    assert len({call["frozen"] for call in calls}) == 1
    assert tree_hash(calls[-1]["frozen_arrays"]) == calls[0]["frozen"]  # nobody wrote into it
    first, last = calls[0]["before"], calls[-1]["after"]
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), first, last)
    assert all(jax.tree.leaves(moved)), moved


def test_ptat_trains_its_own_tree_alone(runs):
    _, _, calls = runs("ptat")
    trainable = calls[0]["after"]
    assert set(trainable) == {"prompts", "heads", "logit_scale"}
    # Two moments of each leaf and one count.
    assert len(calls[0]["moments"]) == 2 * len(jax.tree.leaves(trainable)) + 1


def test_teacher_is_the_tree_of_the_task_before_and_constant_within_a_task(runs):
    tasks = by_task(runs("ptat")[2])
    assert len(tasks) == 3
    for number, calls in enumerate(tasks):
        teachers = {tree_hash(call["aux"]["teacher"]) for call in calls}
        before = calls[0]["before"] if number == 0 else tasks[number - 1][-1]["after"]
        assert teachers == {tree_hash(before)}
        assert {float(call["aux"]["distil"]) for call in calls} == {float(number > 0)}


@pytest.mark.parametrize("method", ["ptat", "sequential"])
def test_optimizer_state_is_fresh_at_each_task(runs, method):
    for calls in by_task(runs(method)[2]):
        assert not any(x.any() for x in calls[0]["moments"])
        assert any(x.any() for x in calls[1]["moments"])


def test_kept_teacher_trains_as_the_live_one(runs, tiny_config, tmp_path):
    config = tiny_config("ptat", **{"train.keep_features": False})
    train(config, tmp_path)
    for row in (1, 2, 3):
        name = f"tuning/task_{row}.safetensors"
        cached, live = (train_module.backbones.load_tree(folder / name)[0]
                        for folder in (runs("ptat")[0], tmp_path))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), cached, live)


def test_finished_run_is_not_opened_again(runs, tiny_config, monkeypatch):
    workdir, results, _ = runs("prompts")
    monkeypatch.setattr(train_module, "open_run", lambda *a, **k: pytest.fail("opened again"))
    assert train(tiny_config("prompts"), workdir) == results


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", [0, 2, 3])
def test_evaluate_reproduces_the_rows_of_the_results(runs, method, task):
    workdir, results, _ = runs(method)
    before = {p: p.stat().st_mtime_ns for p in sorted(workdir.rglob("*"))}
    if method == "joint" and task == 2:
        with pytest.raises(ValueError, match="task 2 is not there; expected one of 0, 3"):
            evaluate(workdir, task=2)
        return
    report = evaluate(workdir, task=None if task == 3 else task)
    expected = {key: matrix[task] for key, matrix in results["matrices"].items()}
    assert report["task"] == task and report["row"] == expected
    assert {p: p.stat().st_mtime_ns for p in sorted(workdir.rglob("*"))} == before


def test_evaluate_on_another_split_scores_other_clips(runs):
    workdir, _, _ = runs("ptat")
    report = evaluate(workdir, split="valid")
    row = report["row"]
    assert report["split"] == "valid"
    # Three, three and two clips: a median rank cannot be larger.
    assert max(row["text_to_audio/MedR/own/fresh"]) <= 3
    assert row["text_to_audio/R@1/own/stale"] == [None] * 3


def test_augmented_input_makes_every_task_use_the_live_teacher(tiny_config, tmp_path, monkeypatch):
    # Random crops matter in tasks with long clips only; the step must not be traced for both kinds.
    monkeypatch.setattr(SplitReader, "fixed_inputs",
                        property(lambda self: self.split.corpus == "low"))
    monkeypatch.setattr(train_module, "keep", lambda *a: pytest.fail("kept a teacher"))
    results = train(tiny_config("ptat", tasks=2, **{"train.duration": "2 steps"}), tmp_path)
    assert results["trace_count"] == 1


def test_mask_of_a_method_is_asked_for_at_each_task(tiny_config, tmp_path, monkeypatch):
    seen = []
    original = Prompts.update_mask
    monkeypatch.setattr(Prompts, "update_mask",
                        lambda self, state: seen.append(1) or original(self, state))
    train(tiny_config("prompts", tasks=2, **{"train.duration": "1 steps"}), tmp_path)
    assert len(seen) == 2


def test_opened_run_shares_no_memory_between_trainable_teacher_and_backbone(tiny_config, tmp_path):
    run: Run = open_run(tiny_config("ptat", tasks=1), tmp_path)
    state = run.begin_task(run.initial_state(), 0, None)
    trees = state["trainable"]["heads"], state["aux"]["teacher"]["heads"], run.frozen["heads"]
    pointers = [{x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)} for tree in trees]
    assert not (pointers[0] & pointers[1] or pointers[0] & pointers[2])


def test_a_pretrained_backbone_is_found_again_unless_what_makes_it_changes(tiny_root, tmp_path):
    def folder(**changes):
        config = cli.plain(tiny_benchmark.get_config(f"root={tiny_root}"))
        config["backbone"]["pretrain"]["train"] |= changes
        made = []

        def pretrain(inner, where):
            made.append(where)
            raise KeyboardInterrupt  # far enough

        with pytest.raises(KeyboardInterrupt):
            prepare_backbone(config, build_stream(settings.stream_spec(config)), tmp_path, pretrain)
        return made[0]

    assert folder() == folder(log_every=3, save_seconds=9.0, keep_features=False)
    assert len({folder(), folder(duration="9 steps"), folder(batch_size=16)}) == 3
