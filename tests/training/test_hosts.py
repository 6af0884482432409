"""Two processes of four devices are one of eight: the same losses, results and files."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from tail_jax import cli, hosts
from tail_jax.train import train
from tail_jax.training.checkpoints import flatten, load_tree
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("quick_compilation")
# Sums in another order: float32, of losses of about 3.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def launch(compilation_cache, run_python, tmp_path_factory):
    """launch(processes, jobs) -> the finished jobs of many_hosts.py, on eight devices in all."""

    def run(processes, jobs):
        file = tmp_path_factory.mktemp("jobs") / "jobs.json"
        file.write_text(json.dumps(jobs, default=str))
        if processes == 1:
            return run_python("-m", "tests.training.many_hosts", file, devices=8, timeout=900)
        environment = os.environ | {
            "PROCESSES": str(processes), "DEVICES": str(8 // processes), "PYTHONPATH": str(ROOT),
            "MODULE": "tests.training.many_hosts", "TAIL_JAX_PYTHON": sys.executable,
            "JAX_COMPILATION_CACHE_DIR": compilation_cache}
        return subprocess.run(["bash", "launch/multiprocess_cpu.sh", str(file)], cwd=ROOT,
                              env=environment, capture_output=True, text=True, timeout=900)

    return run


@pytest.fixture(scope="module")
def runs(tiny_config, tiny_classes_config, tmp_path_factory, launch):
    """{name: folder}, and the output of one process and of two."""
    folder = tmp_path_factory.mktemp("runs")
    fields = {"train.duration": "4 steps"}
    text, classes = tiny_config("ptat", tasks=2, **fields), tiny_classes_config("l2p", 2, **fields)
    # Every host has a part of what is trained, frozen and saved.
    parts = tiny_config("sequential", tasks=2, **fields | {"mesh.fsdp": 8})
    often = tiny_config("ptat", tasks=2, **fields | {"train.save_seconds": 0.0})
    job = lambda name, config, **more: {"config": config, "workdir": folder / name} | more
    stop = {"signal": "SIGTERM", "process": 0, "step": 5}
    one = launch(1, [job("text", text), job("classes", classes), job("one_to_two", text, **stop),
                     job("parts", parts)])
    assert one.returncode == 0, one.stderr
    two = launch(2, [
        {"trouble": True},
        job("one_to_two", text),
        job("classes_two", classes, evaluate=str(folder / "row")),
        job("parts_to_one", parts, **stop),
        job("two_to_one", text, **stop | {"process": 1, "step": 2}),
        job("killed", often, **stop | {"signal": "SIGKILL", "process": 1, "step": 6})])
    return folder, one, two, {"two_to_one": text, "killed": often, "parts_to_one": parts}


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [[row["step"], row["loss"], row["gradient_norm"]] for row in map(json.loads, lines)]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def check_same(found, expected):
    """Losses, result matrices and what was learned."""
    np.testing.assert_allclose(losses(found), losses(expected), **CLOSE)
    a, b = results(found), results(expected)
    assert a["matrices"] == b["matrices"] and a["summary"] == b["summary"]
    assert a["backbone"] == b["backbone"]
    files = sorted(p.relative_to(expected) for p in expected.glob("*/*.safetensors"))
    assert files == sorted(p.relative_to(found) for p in found.glob("*/*.safetensors"))
    for file in files:
        trees = [flatten(load_tree(path / file)[0]) for path in (found, expected)]
        assert trees[0].keys() == trees[1].keys()
        for name, leaf in trees[1].items():
            np.testing.assert_allclose(trees[0][name], leaf, atol=1e-4, err_msg=f"{file}: {name}")


def test_two_processes_go_on_where_one_was_stopped(runs):
    folder, one, _, _ = runs
    assert "one_to_two: stopped after 5 steps" in one.stdout
    assert [row[0] for row in losses(folder / "one_to_two")] == [*range(1, 9)]
    check_same(folder / "one_to_two", folder / "text")


def test_two_processes_learn_classes_as_one(runs):
    folder = runs[0]
    check_same(folder / "classes_two", folder / "classes")
    last = {name: matrix[-1] for name, matrix in results(folder / "classes")["matrices"].items()}
    for process in (0, 1):  # measured again, on both
        assert json.loads((folder / f"row{process}").read_text()) == last


@pytest.mark.parametrize("name", ["two_to_one", "killed"])
def test_one_process_goes_on_where_two_were_stopped(runs, name, capsys):
    folder, _, two, configs = runs
    assert two.returncode != 0  # of the process that was killed
    assert not (folder / name / "results.json").exists()
    train(configs[name], folder / name)
    if name == "two_to_one":  # the signal reached one process alone, and both stopped a step later
        assert two.stdout.count("two_to_one: stopped after 3 steps") == 2, two.stdout
        assert "resumes at task 1, step 3" in capsys.readouterr().err
    else:
        assert "resumes at task 2" in capsys.readouterr().err
    check_same(folder / name, folder / "text")


def test_parts_that_two_processes_saved_are_one_process_state(runs, launch):
    folder, _, two, configs = runs
    run = folder / "parts_to_one"
    assert two.stdout.count("parts_to_one: stopped after 6 steps") == 2, two.stdout
    assert not (run / "results.json").exists()
    for process in (0, 1):  # both have written
        assert any(file.stat().st_size > 1000 for file in run.glob(
            f"checkpoints/*/state/ocdbt.process_{process}/**/*") if file.is_file())
    done = launch(1, [{"config": configs["parts_to_one"], "workdir": run}])
    assert done.returncode == 0 and "resumes at task 2, step 2" in done.stderr, done.stderr
    check_same(run, folder / "parts")


def test_an_error_of_one_process_ends_all_with_a_line(runs):
    out = runs[2].stdout
    for line in ("1: no such disk", "0: process 1 could not go on, see its message; this is proc"):
        assert out.count(line) == 2, out
    for process in (0, 1):
        assert f"{process}: the method came to other numbers in process 1 than in process 0" in out
        assert f"{process}: True, False" in out


def test_one_process_tells_and_writes(runs):
    folder, _, two, _ = runs
    assert two.stderr.count("one_to_two: resumes at task 2, step 1") == 1
    assert two.stderr.count("ptat: high: step 4/4") == 1
    assert results(folder / "one_to_two")["device"] == results(folder / "text")["device"]


@pytest.mark.slow
def test_methods_with_memories_and_statistics_are_the_same(
        tiny_config, tiny_classes_config, tmp_path, launch):
    fields = {"train.duration": "3 steps"}
    configs = {
        "er": tiny_config("er", tasks=2, **fields),  # a quarter of a batch from the memory
        "sequential": tiny_config("sequential", tasks=2, **fields | {"mesh.model": 2}),
        "pace": tiny_classes_config("pace", 2, **fields),
        "der": tiny_classes_config("der", 2, **fields),
        "icarl": tiny_classes_config("icarl", 2, **fields),
        "ranpac": tiny_classes_config("ranpac", 2, **fields)}
    for processes in (1, 2):
        done = launch(processes, [{"config": config, "workdir": tmp_path / f"{name}{processes}"}
                                  for name, config in configs.items()])
        assert done.returncode == 0, done.stderr[-3000:]
    for name in configs:
        check_same(tmp_path / f"{name}2", tmp_path / f"{name}1")


@pytest.mark.parametrize("given, message", [
    ({"PROCESSES": "2"}, "TAIL_JAX_PROCESSES is set without TAIL_JAX_COORDINATOR; set it to HOST"),
    ({"COORDINATOR": "auto", "PROCESS": "0"}, "is auto and TAIL_JAX_PROCESS is set, too; unset it"),
    ({"COORDINATOR": "a:1", "PROCESSES": "2"}, "TAIL_JAX_PROCESS is ''; expected a whole number"),
    ({"COORDINATOR": "a:1", "PROCESSES": "0", "PROCESS": "0"}, "TAIL_JAX_PROCESSES is '0'"),
    ({"COORDINATOR": "a:1", "PROCESSES": "2", "PROCESS": "2"}, "is 2; expected 0 to 1"),
    ({"COORDINATOR": "a", "PROCESSES": "2", "PROCESS": "1"}, "is 'a'; expected HOST:PORT"),
])
def test_faulty_settings_are_refused_before_jax_is_asked(monkeypatch, given, message):
    monkeypatch.setattr(jax.distributed, "initialize", None)
    for name, value in given.items():
        monkeypatch.setenv(f"TAIL_JAX_{name}", value)
    with pytest.raises(ValueError, match=message):
        hosts.join()


@pytest.mark.parametrize("error, raised, code", [
    (ValueError("coordinator_address should be defined."), ValueError, 2),
    (RuntimeError("DEADLINE_EXCEEDED: nobody"), ConnectionError, 4)])
def test_hosts_that_cannot_be_found_are_one_line(monkeypatch, capsys, error, raised, code):
    monkeypatch.setenv("TAIL_JAX_COORDINATOR", "auto")

    def nowhere(**_):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", nowhere)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(raised, match=f"jax could not join the other hosts: {error}"):
        hosts.join()
    monkeypatch.setattr(cli.app, "run", lambda main, **_: main([]))
    with pytest.raises(SystemExit) as ended:  # 4: scripts may try again
        cli.run(hosts.join, lambda: None)
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith("error: TAIL_JAX_COORDINATOR is auto")


def test_commands_of_one_host_refuse_more(monkeypatch):
    hosts.refuse()
    monkeypatch.setenv("TAIL_JAX_COORDINATOR", "auto")
    with pytest.raises(ValueError, match="only train and evaluate run on several hosts; unset it"):
        hosts.refuse()
