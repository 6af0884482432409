"""What holds for every method there is: two short tasks, and again from a step in the second."""

import contextlib
import shutil

import jax
import numpy as np
import pytest

from tail_jax import methods
from tail_jax import train as train_module
from tail_jax.evaluate import evaluate
from tail_jax.methods.ablations import VARIANTS
from tail_jax.methods.full import Sequential
from tail_jax.training.checkpoints import load_tree, tree_hash
from tail_jax.training.loop import TaskLoop
from tail_jax.training.step import TrainStep
from tail_jax.train import make_plan, train

pytestmark = pytest.mark.usefixtures("quick_compilation")
# Every method on every kind of stream that it is for. Variants of a method differ from it in
# defaults alone.
CASES = [pytest.param((name, kind), id=name if kind == "retrieves" else f"{name}-classes",
                      marks=pytest.mark.xdist_group(f"{name}-{kind}"))
         for name, method in methods.METHODS.items() if name not in VARIANTS
         for kind in ("retrieves", "classifies") if getattr(method, kind)]
# Of these, those that take steps; NCM reads its training clips and that is all.
TRAINED = [case for case in CASES
           if methods.METHODS[case.values[0][0]].trains and case.values[0][0] != "ncm"]
# Settings that are for sizes of their own.
SMALL = {"capacity": 10, "queries": 40, "features": 32, "copies": 3, "reg_copies_per_step": 2,
         "frozen_epochs": 1, "adapt_epochs": 1}


@pytest.fixture(scope="module")
def runs(tiny_config, tiny_classes_config, tmp_path_factory):
    """runs(case) -> (config, workdir, results, calls of the step, plan), each run done once.

    The plan has the steps of each stage of each task. WORKDIR_killed is the folder as it was before
    the last step, with a checkpoint of then.
    """
    done = {}

    def run(case):
        if case not in done:
            method, kind = case
            small = issubclass(methods.METHODS[method], Sequential)  # quicker to compile
            layers = {"model.audio.layers": 1} if small else {}
            if kind == "retrieves":
                layers |= {"model.text.layers": 1} if small else {}
                config = tiny_config(method, tasks=2, **{"train.duration": "1 epochs"} | layers)
            else:
                config = tiny_classes_config(method, 2, **{"train.duration": "3 steps"} | layers)
            config["method"] |= {k: v for k, v in SMALL.items() if k in config["method"]}
            if config["method"].get("first_session", True) not in (True, ""):
                config["method"]["first_session"] = "3 steps"
            workdir, plan = tmp_path_factory.mktemp("-".join(case)), []

            def planned(run):
                tasks = make_plan(run)
                plan.extend([steps for _, steps in task.stages] for task in tasks)
                return tasks

            with (watched_steps() as calls, kept_step(calls, plan, workdir),
                  pytest.MonkeyPatch.context() as patch):
                patch.setattr(train_module, "make_plan", planned)
                done[case] = config, workdir, train(config, workdir), calls, plan
        return done[case]

    return run


@contextlib.contextmanager
def kept_step(calls, plan, workdir):
    """Has the trainer save the last step but one, and keeps a copy of what a kill would leave."""
    original = TaskLoop.run

    def run(loop, *args):
        total = sum(map(sum, plan))

        def stop():
            if total - len(calls) <= 2:
                loop.save_seconds = -1.0  # from the next step on
            if len(calls) == total:
                shutil.copytree(workdir, workdir.with_name(f"{workdir.name}_killed"))
            return False

        loop.stop = stop
        stop()
        return original(loop, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskLoop, "run", run)
        yield


@contextlib.contextmanager
def watched_steps():
    """A list that gets what each step sees and makes."""
    calls, original = [], TrainStep.__call__

    def spy(self, trainable, opt_state, frozen, aux, mask, batch, key, position):
        call = {"before": tree_hash(trainable), "frozen": tree_hash(frozen),
                "frozen_arrays": frozen, "aux": tree_hash(aux), "position": np.array(position),
                "batch": {k: np.array(v) for k, v in batch.items() if k != "audio"}}
        out = original(self, trainable, opt_state, frozen, aux, mask, batch, key, position)
        calls.append(call | {"after": tree_hash(out[0]), "metrics": jax.device_get(out[2])})
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", spy)
        yield calls


@pytest.mark.parametrize("case", CASES)
def test_two_tasks_are_trained_in_one_program_and_measured(runs, case):
    _, _, results, calls, plan = runs(case)
    kind = methods.METHODS[case[0]]
    assert len(plan) == (1 if kind.joint else 2)
    if case[1] == "retrieves":  # 27 and 15 pairs in batches of 8, together or one after the other
        assert plan == ([[6]] if kind.joint else [[4], [2]] if kind.trains else [[], []])
    # One for each set of entries: PACE keeps nothing under its probe, then the tower, and then the
    # blocks below the first that is tuned, in the second session of masked copies, too.
    assert results["trace_count"] == len({frozenset(call["batch"]) for call in calls})
    assert results["trace_count"] <= (4 if case[0] == "pace" else 1)
    assert [call["position"].tolist() for call in calls] == [
        [step, steps] for stages in plan for steps in stages for step in range(steps)]
    metric = {"retrieves": "text_to_audio/mAP@10/own/fresh", "classifies": "accuracy/seen"}[case[1]]
    last = results["matrices"][metric][-1]
    assert all(0 <= value <= 1 for value in last)
    assert (results["memory_bytes"] > 0) == (results["memory_pairs"] > 0)


@pytest.mark.parametrize("case", TRAINED)
def test_backbone_keeps_its_bits_while_every_step_moves_the_trainable_tree(runs, case):
    _, _, _, calls, _ = runs(case)
    assert len({call["frozen"] for call in calls}) == 1
    assert tree_hash(calls[-1]["frozen_arrays"]) == calls[0]["frozen"]  # nobody wrote into it
    assert all(call["before"] != call["after"] for call in calls)


@pytest.mark.parametrize("case", TRAINED)
def test_what_the_loss_reads_beside_the_batch_is_constant_within_a_task(runs, case):
    _, _, _, calls, _ = runs(case)
    again = methods.METHODS[case[0]].refreshes  # at the start of each epoch, after 2 steps
    for before, after in zip(calls, calls[1:]):
        if after["position"][0] > 0 and not (again and after["position"][0] == 2):
            assert after["aux"] == before["aux"]


@pytest.mark.parametrize("case", TRAINED)
def test_run_killed_in_its_last_task_ends_in_the_same_bits(runs, capsys, case):
    config, reference, expected, calls, plan = runs(case)
    killed = reference.with_name(f"{reference.name}_killed")
    results = train(config, killed)
    last = max(number for number, stages in enumerate(plan, 1) if stages)
    where = (last, calls[-2]["position"][0] + 1)
    assert "resumes at task {}, step {}".format(*where) in capsys.readouterr().err
    assert results["trace_count"] == 1
    for name in ("matrices", "state_bytes", "memory_bytes", "memory_pairs"):
        assert results[name] == expected[name]
    assert (killed / "metrics.jsonl").read_text() == (reference / "metrics.jsonl").read_text()
    for file in sorted((reference / "tuning").iterdir()):
        np.testing.assert_equal(load_tree(killed / "tuning" / file.name)[0], load_tree(file)[0])


@pytest.mark.parametrize("case", TRAINED)
def test_evaluation_from_the_tuning_file_gives_the_last_row(runs, case):
    _, workdir, results, _, _ = runs(case)
    assert evaluate(workdir)["row"] == {k: v[-1] for k, v in results["matrices"].items()}


@pytest.mark.xdist_group("joint-retrieves")
def test_joint_sees_every_pair_of_every_task(runs):
    _, _, _, calls, _ = runs(("joint", "retrieves"))
    # 11 and 6 training clips, of 2 and 3 captions in turn.
    real = [call["batch"]["mask"] for call in calls]
    keys = np.concatenate([c["batch"]["caption_key"][m] for c, m in zip(calls, real)])
    clips = np.concatenate([c["batch"]["clip_id"][m] for c, m in zip(calls, real)])
    assert sorted(keys) == [*range(27 + 15)] and sorted(set(clips)) == [*range(11 + 6)]


def test_joint_training_sees_every_clip_of_every_session(runs):
    _, _, _, calls, _ = runs(("joint_lora", "classifies"))
    rows = lambda name: np.concatenate([c["batch"][name][c["batch"]["mask"]] for c in calls])
    clips, labels = rows("clip_id"), rows("label")
    assert set(labels) == {0, 1, 2, 3} and set(clips) == {*range(max(clips) + 1)}
    assert len(set(clips)) >= 21  # no four classes of the six have fewer
