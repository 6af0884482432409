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
from tail_jax.training.step import TrainStep
from tail_jax.train import train

pytestmark = pytest.mark.usefixtures("quick_compilation")
# Variants of a method differ from it in defaults alone.
NAMES = [name for name in methods.METHODS if name not in VARIANTS]
TRAINED = [name for name in NAMES if methods.METHODS[name].trains]
# 27 and 15 pairs in batches of 8; together or one after the other.
STEPS, KEPT = 4 + 2, 5


@pytest.fixture(scope="module")
def runs(tiny_config, tmp_path_factory):
    """runs(method) -> (config, workdir, results, calls of the step), each run done once.

    WORKDIR_killed is the folder as it was after step `KEPT`, with a checkpoint of that step.
    """
    done = {}

    def run(method):
        if method not in done:
            layers = {f"model.{side}.layers": 1 for side in ("audio", "text")
                      if issubclass(methods.METHODS[method], Sequential)}  # quicker to compile
            config = tiny_config(method, tasks=2, **{"train.duration": "1 epochs"} | layers)
            workdir = tmp_path_factory.mktemp(method)
            with watched_steps() as calls, pytest.MonkeyPatch.context() as patch:
                patch.setattr(train_module, "watch_signals", lambda: kept_step(calls, workdir))
                done[method] = config, workdir, train(config, workdir), calls
        return done[method]

    return run


@contextlib.contextmanager
def kept_step(calls, workdir):
    """Signals as the trainer watches them: one that has it save a step, and then does not stop."""
    asked = []

    def stop():
        if len(calls) == KEPT:
            asked.append(1)
            if len(asked) == 2:
                shutil.copytree(workdir, workdir.with_name(f"{workdir.name}_killed"))
        return len(asked) == 1

    yield stop


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


@pytest.mark.parametrize("method", NAMES)
def test_two_tasks_are_trained_in_one_program_and_measured(runs, method):
    _, _, results, calls = runs(method)
    kind = methods.METHODS[method]
    assert results["trace_count"] == int(kind.trains)
    assert len([call for call in calls if call["position"][0] == 0]) == (
        0 if not kind.trains else 1 if kind.joint else 2)
    assert len(calls) == STEPS * kind.trains
    last = results["matrices"]["text_to_audio/mAP@10/own/fresh"][-1]
    assert all(0 <= value <= 1 for value in last)
    assert (results["memory_bytes"] > 0) == (results["memory_pairs"] > 0)


@pytest.mark.parametrize("method", TRAINED)
def test_backbone_keeps_its_bits_while_every_step_moves_the_trainable_tree(runs, method):
    _, _, _, calls = runs(method)
    assert len({call["frozen"] for call in calls}) == 1
    assert tree_hash(calls[-1]["frozen_arrays"]) == calls[0]["frozen"]  # nobody wrote into it
    assert all(call["before"] != call["after"] for call in calls)


@pytest.mark.parametrize("method", TRAINED)
def test_what_the_loss_reads_beside_the_batch_is_constant_within_a_task(runs, method):
    _, _, _, calls = runs(method)
    for before, after in zip(calls, calls[1:]):
        if after["position"][0] > 0:
            assert after["aux"] == before["aux"]


@pytest.mark.parametrize("method", TRAINED)
def test_run_killed_in_its_last_task_ends_in_the_same_bits(runs, capsys, method):
    config, reference, expected, _ = runs(method)
    killed = reference.with_name(f"{reference.name}_killed")
    results = train(config, killed)
    where = (1, KEPT) if methods.METHODS[method].joint else (2, KEPT - 4)
    assert "resumes at task {}, step {}".format(*where) in capsys.readouterr().err
    assert results["trace_count"] == 1
    for name in ("matrices", "state_bytes", "memory_bytes", "memory_pairs"):
        assert results[name] == expected[name]
    assert (killed / "metrics.jsonl").read_text() == (reference / "metrics.jsonl").read_text()
    for file in sorted((reference / "tuning").iterdir()):
        np.testing.assert_equal(load_tree(killed / "tuning" / file.name)[0], load_tree(file)[0])


@pytest.mark.parametrize("method", TRAINED)
def test_evaluation_from_the_tuning_file_gives_the_last_row(runs, method):
    _, workdir, results, _ = runs(method)
    assert evaluate(workdir)["row"] == {k: v[-1] for k, v in results["matrices"].items()}


def test_joint_sees_every_pair_of_every_task(runs):
    _, _, _, calls = runs("joint")
    # 11 and 6 training clips, of 2 and 3 captions in turn.
    real = [call["batch"]["mask"] for call in calls]
    keys = np.concatenate([c["batch"]["caption_key"][m] for c, m in zip(calls, real)])
    clips = np.concatenate([c["batch"]["clip_id"][m] for c, m in zip(calls, real)])
    assert sorted(keys) == [*range(27 + 15)] and sorted(set(clips)) == [*range(11 + 6)]
