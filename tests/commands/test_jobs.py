"""Commands run as child processes, with small programs in the place of training."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tail_jax import jobs

ROOT = pathlib.Path(__file__).parents[2]
WORK = """
import pathlib, sys, time
folder, name, seconds = pathlib.Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
(folder / f"{name}.began").write_text(repr(time.time()))
time.sleep(seconds)
print("a word", "of its own", name, sep="\\n")
(folder / f"{name}.ended").write_text(repr(time.time()))
sys.exit(int(sys.argv[4]))
"""
SWEEP = """
import pathlib, sys
from tail_jax import jobs
folder = pathlib.Path(sys.argv[1])
with jobs.locked(folder) as lock:
    print("locked", flush=True)
    jobs.run([jobs.Job(name, "work", "work", (str(folder), name, seconds, "0"))
              for name, seconds in (("a", "2"), ("b", "0"))], 1, folder / "log", lock)
"""


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    (tmp_path / "work.py").write_text(WORK)
    (tmp_path / "small_sweep.py").write_text(SWEEP)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")


def run(tmp_path, *described, parallel=1):
    """Runs (name, seconds, exit code) and returns the failures."""
    with jobs.locked(tmp_path) as lock:
        return jobs.run([jobs.Job(name, "work", "work", (str(tmp_path), name, str(s), str(code)))
                         for name, s, code in described], parallel, tmp_path / "log", lock)


def test_a_job_has_the_variables_it_asks_for_and_those_of_this_process(tmp_path, monkeypatch):
    monkeypatch.setenv("ONE", "kept")
    monkeypatch.setenv("TWO", "replaced")
    (tmp_path / "tell.py").write_text("import os; print(os.environ['ONE'], os.environ['TWO'])")
    with jobs.locked(tmp_path) as lock:
        jobs.run([jobs.Job("a", "tell", "tell", (), {"TWO": "own"})], 1, tmp_path / "log", lock)
    assert (tmp_path / "log" / "a.log").read_text().splitlines()[-1] == "kept own"
    assert os.environ["TWO"] == "replaced"


def spans(tmp_path):
    return {path.stem: (float(path.read_text()), float(path.with_suffix(".ended").read_text()))
            for path in tmp_path.glob("*.began")}


def wait_for(path, seconds=30):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)


def test_a_failed_job_does_not_stop_the_others(tmp_path, capsys):
    (failure,) = run(tmp_path, ("a", 0, 0), ("b", 0, 7), ("c", 0, 0))
    assert failure.job.name == "b" and failure.code == 7
    assert failure.reason == f"exit code 7: b (see {tmp_path}/log/b.log)"
    assert {path.stem for path in tmp_path.glob("*.ended")} == {"a", "b", "c"}
    assert (tmp_path / "log" / "b.log").read_text().splitlines() == [
        f"$ python -m work {tmp_path} b 0 7", "a word", "of its own", "b"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("[1/3] a done in 0 s; ") and "left" in lines[0]
    assert "[2/3] b FAILED, exit code 7: b" in lines[1] and "left" not in lines[2]


@pytest.mark.parametrize("parallel", [1, 2])
def test_so_many_run_at_a_time_and_no_more(tmp_path, parallel):
    assert run(tmp_path, *((name, 0.5, 0) for name in "abcd"), parallel=parallel) == []
    found = spans(tmp_path).values()
    most = max(sum(a <= start < b for a, b in found) for start, _ in found)
    assert most == parallel


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_running_job_and_no_other_starts(tmp_path, number):
    process = subprocess.Popen([sys.executable, "-m", "small_sweep", tmp_path],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "a.began")
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 143
    assert error.splitlines()[-1] == "the same command goes on"
    assert not (tmp_path / "a.ended").exists() and not (tmp_path / "b.began").exists()


def test_after_sigkill_the_next_one_waits_for_the_job_that_was_left(tmp_path):
    process = subprocess.Popen([sys.executable, "-m", "small_sweep", tmp_path],
                               stdout=subprocess.PIPE)
    wait_for(tmp_path / "a.began")
    process.kill()
    process.wait()
    assert not (tmp_path / "a.ended").exists()
    run(tmp_path, ("c", 0, 0))
    found = spans(tmp_path)
    assert found["a"][1] <= found["c"][0]
