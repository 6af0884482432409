"""The cost of methods as tasks become many: what is run, read, and called flat."""

import dataclasses
import pathlib
import shutil

import pytest

from tail_jax import benchmark, cli
from tail_jax.benchmarks import Options, tasks
from tail_jax.benchmarks.tasks import Cost
from tail_jax.train import train

pytestmark = pytest.mark.usefixtures("quick_compilation")
METHODS = ("frozen", "ptat", "sprompts")


@pytest.fixture(scope="module")
def options(tiny_root, tmp_path_factory):
    return Options(config=f"tests/tiny.py:root={tiny_root}", methods=METHODS, tasks=(2, 3),
                   workdir=str(tmp_path_factory.mktemp("costs")))


@pytest.fixture(scope="module")
def measured(options, compilation_cache):
    """The suite's (report, Measured); all but one of its runs were done before, in this process."""
    folder, missing = pathlib.Path(options.workdir), "frozen-2"
    plans = tasks.plans(options.config, options.methods, options.tasks)
    for plan in sorted(plans, key=lambda plan: plan.name.startswith("warm-")):
        if plan.name.startswith("warm-"):  # only has to be there
            shutil.copytree(folder / plan.name.removeprefix("warm-"), folder / plan.name,
                            ignore=shutil.ignore_patterns("config.json"))
        elif plan.name != missing:
            train(cli.parse_config(plan.arguments), folder / plan.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", compilation_cache)
        report, measured = benchmark.benchmark("tasks", options)
    assert [path.stem for path in (folder / "log").iterdir()] == [missing]
    return report, measured


def cost(seconds=(1.0, 1.0), memory=(1e9, 1e9), state=(1000, 1000)):
    values = zip(tasks.QUANTITIES, (seconds, memory, state))
    return Cost("m", {name: dict(zip((2, 32), pair)) for name, pair in values})


def test_state_of_ptat_is_equal_for_all_numbers_of_tasks_and_that_of_sprompts_is_not(measured):
    state = {case["method"]: case["measured"]["state"] for case in measured[0]["cases"]}
    assert state["ptat"][2] == state["ptat"][3] > 0
    # Arrays of three tasks for those of two, beside heads and a number that stay.
    assert 1 < state["sprompts"][3] / state["sprompts"][2] <= 1.5
    assert state["frozen"] == {2: 0, 3: 0}


def test_every_run_has_times_of_its_steps_and_the_memory_of_its_process(measured):
    cases = {case["method"]: case["measured"] for case in measured[0]["cases"]}
    for method in ("ptat", "sprompts"):
        assert all(0 < value < 10 for value in cases[method]["seconds a step"].values())
    assert cases["frozen"]["seconds a step"] == {2: None, 3: None}
    assert all(value > 5e7 for case in cases.values() for value in case["peak memory"].values())


def test_table_has_a_row_a_method_and_names_what_grows(measured):
    report, shown = measured
    head, _, *rows = shown.table.splitlines()
    assert "state, kB, 2 tasks | 3 tasks" in head and shown.failed == ()
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in METHODS]
    assert {row.count("|") for row in rows} == {head.count("|")}
    frozen, ptat, sprompts = rows
    assert frozen.startswith("| frozen | – | – |") and "x 1.00" in ptat
    assert "state" not in ptat and "state" in sprompts.split("grows: ")[1]
    assert report["suite"] == "tasks" and {"machine", "date", "commit"} <= set(report)


@pytest.mark.parametrize("measured, grows", [
    ({}, []),
    ({"seconds": (1.0, 1.149), "memory": (1e9, 1.099e9)}, []),  # as two equal runs differ
    ({"seconds": (1.0, 0.5), "memory": (1e9, 0.5e9), "state": (1000, 999)}, []),
    ({"seconds": (1.0, 1.151)}, ["seconds a step"]),
    ({"memory": (1e9, 1.101e9)}, ["peak memory"]),
    ({"state": (10**9, 10**9 + 1)}, ["state"]),
    ({"state": (0, 1)}, ["state"]),
    ({"seconds": (None, None), "state": (0, 0)}, []),
    ({"seconds": (1.0, 9.0), "state": (1, 2)}, ["seconds a step", "state"]),
])
def test_flat_is_within_some_percent_for_times_and_memory_and_exact_for_bytes(measured, grows):
    assert cost(**measured).grows == grows


def test_the_most_tasks_decide_and_every_number_has_its_ratio():
    three = dataclasses.replace(cost(), measured={
        name: {2: 100.0, 8: 200.0, 32: 105.0} for name in tasks.QUANTITIES})
    assert three.ratio("peak memory", 8) == 2 and three.ratio("peak memory", 32) == 1.05
    assert three.grows == ["state"]
    assert tasks.table([three]).splitlines()[-1] == (
        "| m | 100,000 | x 2.00 | x 1.05 | 0 | x 2.00 | x 1.05 | 0 | x 2.00 | x 1.05 "
        "| grows: state |")


def test_programs_are_compiled_before_the_runs_that_are_measured():
    names = [plan.name for plan in tasks.plans("x.py", ["ptat", "sprompts"], (2, 8, 32))]
    assert names == ["warm-ptat-32", "ptat-2", "ptat-8", "ptat-32", "warm-sprompts-2",
                     "warm-sprompts-8", "warm-sprompts-32", "sprompts-2", "sprompts-8",
                     "sprompts-32"]


def test_repeated_tasks_are_the_embedded_corpora_under_names_of_their_own():
    stream = cli.parse_config(["--config=configs/task_costs.py:tasks=6"])["stream"]
    assert [(task["name"], task["folder"]) for task in stream["tasks"][3:]] == [
        ("audioset_like_1", "audioset_like"), ("audiocaps_like_2", "audiocaps_like"),
        ("clotho_like_2", "clotho_like")]


@pytest.mark.parametrize("tasks", ["2", "8,2", "0,2", "2,x", "2,2"])
def test_numbers_of_tasks_that_mean_nothing_are_refused(tasks):
    with pytest.raises(ValueError, match="--tasks=.*ascending"):
        benchmark._numbers(tasks.split(","))
