"""Killed at any moment and started again, a run ends in the bits of one that was never killed."""

import json

import numpy as np
import pytest

from tail_jax.train import train
from tail_jax.training.checkpoints import load_tree

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def config(tiny_config):
    """Two tasks of 8 and 4 steps, a checkpoint after every one."""
    return tiny_config("ptat", tasks=2, **{"train.save_seconds": 0.0})


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, train(config, workdir)


@pytest.fixture
def crash(config, tmp_path, run_python):
    """crash(signal, where, count) -> finished process of a run that was hit at that moment."""
    (tmp_path / "config.json").write_text(json.dumps(config))

    def run(number, where, count):
        return run_python("-m", "tests.training.crash", tmp_path / "config.json",
                          tmp_path / "run", number, where, count)

    return run


def steps(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().split("\n")
            if line]


def check_same(workdir, results, undisturbed):
    reference, expected = undisturbed
    assert results["matrices"] == expected["matrices"]
    assert results["summary"] == expected["summary"]
    assert steps(workdir) == steps(reference) == [*range(1, 13)]
    assert (workdir / "metrics.jsonl").read_text() == (reference / "metrics.jsonl").read_text()
    for row in (1, 2):
        for folder in ("tuning", "galleries"):
            name = f"{folder}/task_{row}.safetensors"
            trees = [load_tree(path / name)[0] for path in (workdir, reference)]
            np.testing.assert_equal(*trees)


# Checkpoints: 1 is row 0; 2..9 the steps of the first task, 10 its end; 11..14 and 15 the second.
@pytest.mark.parametrize("where, count", [
    ("save", 4),   # in the first task, right after a checkpoint
    ("step", 10),  # in the second task, with steps since the last checkpoint
    ("row", 2),    # the first task is done and measured, not saved
    pytest.param("save", 1, marks=pytest.mark.slow),   # before the first task
    pytest.param("save", 10, marks=pytest.mark.slow),  # between the tasks
    pytest.param("half", 9, marks=pytest.mark.slow),   # while a checkpoint is renamed
    pytest.param("half", 26, marks=pytest.mark.slow),
    pytest.param("save", 15, marks=pytest.mark.slow),  # all done but results.json
])
def test_killed_run_ends_in_the_same_bits(config, crash, undisturbed, tmp_path, where, count):
    process = crash("SIGKILL", where, count)
    assert process.returncode == -9, process.stderr
    assert not (tmp_path / "run" / "results.json").exists()
    results = train(config, tmp_path / "run")
    check_same(tmp_path / "run", results, undisturbed)
    assert results["trace_count"] <= 1  # what was restored lies where the step wants it


@pytest.mark.slow
def test_run_killed_several_times_ends_in_the_same_bits(config, crash, undisturbed, tmp_path):
    for where, count in (("step", 3), ("save", 5), ("row", 1), ("step", 2)):
        assert crash("SIGKILL", where, count).returncode == -9
    check_same(tmp_path / "run", train(config, tmp_path / "run"), undisturbed)


@pytest.mark.slow
def test_half_row_of_metrics_is_written_again(config, crash, undisturbed, tmp_path):
    assert crash("SIGKILL", "step", 6).returncode == -9
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    check_same(tmp_path / "run", train(config, tmp_path / "run"), undisturbed)


@pytest.mark.parametrize("number", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.slow)])
def test_signal_saves_the_state_and_leaves(tiny_config, undisturbed, crash, tmp_path, capsys,
                                           number):
    config = tiny_config("ptat", tasks=2)  # no checkpoint within a task but the one of the signal
    (tmp_path / "config.json").write_text(json.dumps(config))
    process = crash(number, "step", 3)
    assert process.returncode == 143, process.stderr
    results = train(config, tmp_path / "run")
    assert "resumes at task 1, step 3" in capsys.readouterr().err
    check_same(tmp_path / "run", results, undisturbed)
