"""The sweep command on tiny runs, and its search for settings."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from configs import common, quickstart, tail_embedded
from data_pipelines.streams import build_stream
from tail_jax import best, cli, jobs, methods, settings, sweep
from tail_jax.evaluation import continual
from tail_jax.reporting.columns import DIRECTIONS
from tail_jax.reporting.writers import read_results
from tail_jax.train import train
from tests import tiny, tiny_classes

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = "tests/commands/tiny_benchmark.py"


@pytest.fixture
def own_root(tmp_path):
    """Folders of this test alone: the cache with the backbones lies in them."""
    tiny.write_folders(tmp_path / "corpora")
    return tmp_path / "corpora"


@pytest.fixture
def sweep_command(run_python, own_root, tmp_path):
    def run(*arguments):
        return run_python("-m", "tail_jax.sweep", f"--config={CONFIG}:root={own_root}",
                          f"--workdir={tmp_path / 'sweep'}", *arguments)

    return run


def results_of(folder):
    return {path.parent.name: read_results(path.parent) for path in folder.glob("*/results.json")}


def test_a_sweep_is_killed_goes_on_and_reports_what_failed(sweep_command, own_root, tmp_path,
                                                           compilation_cache):
    folder, chosen = tmp_path / "sweep", ["--methods=frozen,sequential", "--seeds=0,1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tail_jax.sweep", f"--config={CONFIG}:root={own_root}",
         f"--workdir={folder}", *chosen], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": compilation_cache})
    metrics = folder / "sequential-0" / "metrics.jsonl"
    for _ in range(6000):
        if metrics.exists() and metrics.stat().st_size:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=200)
    assert process.returncode == 143, error
    assert error.splitlines()[-1] == "the same command goes on"
    assert [*results_of(folder)] == ["frozen-0"] and not (folder / "report").exists()

    done = sweep_command(*chosen, "--jobs=2")
    assert done.returncode == 1, done.stderr
    assert "4 runs, 1 of them done" in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert line.startswith("failed: frozen-1, exit code 2: error: train.duration is 'forever'")
    assert line.endswith(f"(see {folder}/log/frozen-1.log)")
    results = results_of(folder)
    assert sorted(results) == ["frozen-0", "sequential-0", "sequential-1"]
    assert "resumes at task 1" in (folder / "log" / "sequential-0.log").read_text()
    # One backbone a seed, made once, before the runs.
    hashes = {name: r["backbone"]["sha256"] for name, r in results.items()}
    assert hashes["frozen-0"] == hashes["sequential-0"] != hashes["sequential-1"]
    assert len([*(own_root / "cache" / "backbones").iterdir()]) == 2
    for name in results:
        assert "pretraining" not in (folder / "log" / f"{name}.log").read_text()
    report = (folder / "report" / "report.md").read_text()
    assert (folder / "report" / "headline.md").read_text() in done.stdout
    assert all(hashes[f"sequential-{seed}"][:16] in report for seed in (0, 1))
    assert "- seeds: 0, 1 (but frozen: 0)" in report

    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/results.json")}
    shutil.rmtree(folder / "report")
    again = sweep_command("--methods=sequential", "--seeds=0,1")
    assert again.returncode == 0 and "2 runs, 2 of them done" in again.stderr
    assert (folder / "report" / "report.md").read_text() == report
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/results.json")} == before

    other = sweep_command("--methods=sequential", "--seeds=0,1", "--set=eval.batch_size=4")
    (line,) = other.stderr.splitlines()
    assert other.returncode == 2 and "eval.batch_size was 8, is 4" in line
    assert "(and 1 more such folders)" in line


def test_orders_have_folders_and_reports_of_their_own(tiny_root, tmp_path):
    expected = {"paper": ["low", "high", "noisy"], "reverse": ["noisy", "high", "low"],
                "high+low+noisy": ["high", "low", "noisy"]}
    plans = sweep.plans(f"{CONFIG}:root={tiny_root}", ["frozen", "ptat"], [3], expected, [])
    for plan, order in zip(plans[::2], expected, strict=True):
        stream = cli.parse_config(plan.arguments)["stream"]
        assert stream["order"] == ([] if order == "paper" else expected[order])
        assert [task["name"] for task in stream["tasks"]] == expected["paper"]
        matrix = [[0.1, 0.2, 0.3]] * 4
        finish(tmp_path, plan, 0, order=expected[order], tasks=expected[order], matrices={
            f"{way}/R@1/own/fresh": matrix for way in DIRECTIONS})
    assert [plan.name for plan in plans] == [
        "frozen-3", "ptat-3", "frozen-3-reverse", "ptat-3-reverse", "frozen-3-high+low+noisy",
        "ptat-3-high+low+noisy"]
    sweep.write_reports(tmp_path)
    for name, order in (("report", "paper"), ("report-reverse", "reverse"),
                        ("report-high+low+noisy", "high+low+noisy")):
        assert " → ".join(expected[order]) in (tmp_path / name / "report.md").read_text()


@pytest.mark.parametrize("arguments, words", [
    (["--methods=ptat,nope,nor"], ["no methods ['nope', 'nor']", "or some of frozen,"]),
    (["--methods=ptat,ptat"], ["one twice"]),
    (["--seeds=0,x"], ["--seeds=0,x", "whole numbers"]),
    (["--seeds=1,1"], ["--seeds=1,1", "different"]),
    (["--orders=sideways"], ["order=sideways", "low, high, noisy"]),
    (["--set=train.durationn=3"], ["--config.train.durationn", "'duration'"]),
    (["--tune=FILE", "--set=eval.split=test"], ["--set=eval.split=test", "sets this itself"]),
    (["--tune=FILE", "--methods=frozen"], ["nothing to tune", "frozen"]),
], ids=lambda x: x[0])
def test_mistakes_are_one_line_before_anything_runs(sweep_command, tmp_path, arguments, words):
    process = sweep_command(*(a.replace("FILE", str(tmp_path / "f.json")) for a in arguments))
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert not (tmp_path / "sweep").exists() and not (tmp_path / "f.json").exists()


# --- The search -------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch):
    """Jobs are trained in this process: a search as it is, but for the time that starts take."""

    def run(wanted, *_):
        for job in wanted:
            *arguments, workdir = job.arguments
            train(cli.parse_config(arguments), workdir.removeprefix("--workdir="))
        return []

    monkeypatch.setattr(jobs, "run", run)


def test_a_search_reads_validation_sets_of_two_tasks_and_nothing_else(in_process, own_root,
                                                                     tmp_path):
    """Test clips, and the third task, hold no audio: whoever reads them fails."""
    poisoned = 0
    for task, sizes in tiny.SIZES.items():
        for clip in range(sum(sizes[:2]) if task != "noisy" else 0, sum(sizes)):
            (own_root / task / f"{clip}.wav").write_bytes(b"no audio")
            poisoned += 1
    assert poisoned == 5 + 4 + 18
    path = tmp_path / "best.json"
    path.write_text(json.dumps({
        "common": {"weight_decay": 0.02, "heads_learning_rate": 1e-3},  # sequential has no second
        "methods": {"sequential": {"grid": [{"learning_rate": 1e-9},
                                            {"learning_rate": 1e-2, "dropout": False}]}}}))
    folder = tmp_path / "sweep"
    failures = sweep.tune(f"{CONFIG}:root={own_root}", ["frozen", "sequential"], [7], 2,
                          ["backbone.kind=random", "train.save_seconds=60"], path, folder, 1)
    assert failures == []
    runs = results_of(folder)
    assert sorted(runs) == ["sequential-7-dropout=False,learning_rate=0.01",
                            "sequential-7-learning_rate=1e-09"]
    scores = {}
    for name, results in runs.items():
        config = json.loads((folder / name / "config.json").read_text())
        assert config["eval"]["split"] == results["evaluation_split"] == "valid"
        assert results["tasks"] == ["low", "high"] and config["seed"] == 7
        assert config["method"]["weight_decay"] == 0.02
        rows = [results["matrices"][f"{way}/R@1/own/fresh"][2] for way in DIRECTIONS]
        scores[config["method"]["learning_rate"]] = 100 * sum(map(sum, rows)) / 4
    entry = best.read(path)["methods"]["sequential"]
    found = {trial["settings"]["learning_rate"]: trial["R@1"] for trial in entry["found"]["scores"]}
    assert found == pytest.approx(scores, abs=0.01)
    assert entry["settings"] == {"weight_decay": 0.02, **max(
        entry["found"]["scores"], key=lambda trial: trial["R@1"])["settings"]}
    assert entry["found"]["seeds"] == [7] and entry["found"]["split"] == "valid"
    assert entry["found"]["tasks"] == ["low", "high"] and entry["found"]["trials"] == 2


def test_a_search_on_sessions_of_classes_goes_by_their_accuracy(in_process, tmp_path):
    """Test clips of all classes hold no audio, nor do those of the third session."""
    tiny_classes.write_folder(tmp_path)
    config = f"tests/tiny_classes.py:root={tmp_path}"
    used = {str(clip.path) for task in build_stream(settings.stream_spec(cli.parse_config(
        [f"--config={config},tasks=2"]))).tasks for clip in (*task.train.clips, *task.valid.clips)}
    for path in (tmp_path / "tones").glob("*.wav"):
        if str(path) not in used:
            path.write_bytes(b"no audio")
    failures = sweep.tune(config, ["sequential", "l2p"], [0], 2, ["train.duration=2 steps"],
                          tmp_path / "best.json", tmp_path / "sweep", 1)
    assert failures == []
    found = best.read(tmp_path / "best.json")["methods"]
    for method, own in found.items():
        rate = methods.defaults(method, classes=True)["learning_rate"]
        trials = {t["settings"]["learning_rate"]: t["accuracy"] for t in own["found"]["scores"]}
        assert [*trials] == pytest.approx([rate, 3 * rate], rel=0.02)
        for rate, score in trials.items():
            results = read_results(tmp_path / "sweep" / f"{method}-0-learning_rate={rate}")
            assert results["tasks"] == ["tones_1", "tones_2"] == own["found"]["tasks"]
            last = results["matrices"]["accuracy/seen"][2]
            assert score == pytest.approx(50 * sum(last), abs=0.01)
        assert trials[own["settings"]["learning_rate"]] == max(trials.values())
    assert sorted(found) == ["l2p", "sequential"]


def finish(workdir, plan, score, **changes):
    """Leaves what a trial of mean R@1 `score` (a fraction) would."""
    matrices = {f"{way}/R@1/own/fresh": [[0, 0], [0.9, 0], [score + d, score - d]]
                for way, d in zip(DIRECTIONS, (0.01, 0.02))}
    results = {"schema": 1, "method": plan.method, "stream": "s", "tasks": ["a", "b"],
               "seed": plan.seed, "order": ["a", "b"], "backbone": {}, "evaluation_split": "valid",
               "trainable_parameters": 1, "total_parameters": 1, "matrices": matrices,
               "summary": {}} | changes
    results["summary"] = continual.summarize(results["matrices"])
    (workdir / plan.name).mkdir(parents=True)
    (workdir / plan.name / "results.json").write_text(json.dumps(results))


GRID = [{"learning_rate": rate} for rate in (1e-3, 2e-3, 4e-3)]


@pytest.fixture
def searched(tiny_root, tmp_path):
    """searched({method: scores of its trials}, seeds) -> what the file holds after a search."""

    def run(content, scores, seeds=(100,), **changes):
        path, config = tmp_path / "best.json", f"{CONFIG}:root={tiny_root}"
        best.write(path, {"common": {}, "grids": {}, "methods": {}} | content)
        content = best.read(path)
        grids = best.grids(content, best.tuned_methods(content, scores), 3)
        for plan in sweep.trial_plans(config, grids, content, seeds, []):
            shift = 0.01 * (plan.seed - 100)
            finish(tmp_path / "sweep", plan, scores[plan.method][plan.trial] + shift, **changes)
        failures = sweep.tune(config, [*scores], [*seeds], 3, [], path, tmp_path / "sweep", 1)
        assert failures == []
        return best.read(path)["methods"]

    return run


def test_the_trial_with_the_best_mean_is_chosen_for_every_method(searched, capsys):
    methods = {"sequential": {"grid": "three"}, "prompts": {"grid": GRID}}
    found = searched({"grids": {"three": GRID}, "methods": methods},
                     {"sequential": (0.2, 0.4, 0.3), "prompts": (0.1, 0.2, 0.5)}, (100, 102))
    assert found["sequential"]["settings"] == {"learning_rate": 2e-3}
    assert found["prompts"]["settings"] == {"learning_rate": 4e-3}
    # Seeds at +0 and +2 points.
    assert [t["R@1"] for t in found["sequential"]["found"]["scores"]] == [21.0, 41.0, 31.0]
    assert found["sequential"]["found"]["edge"] == []
    assert found["prompts"]["found"]["edge"] == ["learning_rate"]
    assert found["sequential"]["grid"] == "three" and found["prompts"]["grid"] == GRID
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert warnings == [
        "warning: prompts: the best learning_rate, 0.004, is at the edge of its grid"]


@pytest.mark.parametrize("change", [{"evaluation_split": "test"}, {"tasks": ["a", "b", "c"]}])
def test_a_choice_by_test_sets_or_by_other_tasks_is_refused(searched, change):
    with pytest.raises(ValueError, match="settings are chosen on the valid sets of 2"):
        searched({}, {"prompts": (0.1, 0.2, 0.3)}, **change)


def test_a_trial_that_diverged_loses_and_one_that_failed_leaves_the_method_out(tmp_path, tiny_root):
    grids = {"prompts": GRID, "ptat": GRID}
    empty = {"common": {}, "grids": {}, "methods": {}}
    plans = sweep.trial_plans(f"{CONFIG}:root={tiny_root}", grids, empty, [100], [])
    failures = []
    for plan in plans:
        if plan.trial == 2:
            job = jobs.Job(plan.name, plan.method, "", ())
            failures.append(jobs.Failure(job, 3 if plan.method == "prompts" else 2, ""))
        else:
            finish(tmp_path, plan, 0.3 - 0.1 * plan.trial)
    scores = sweep.choose(grids, plans, tmp_path, failures)
    assert scores == {"prompts": [pytest.approx(30), pytest.approx(20), None]}
    sweep.record(tmp_path / "best.json", empty, grids, scores)
    assert best.read(tmp_path / "best.json")["methods"]["prompts"]["settings"] == GRID[0]


def test_every_method_gets_the_same_number_of_trials():
    content = {"common": {}, "grids": {}, "methods": {
        "ptat": {"grid": GRID[:2]}, "prompts": {"grid": [*GRID[:2], GRID[0]]},
        "joint": {"grid": GRID}}}
    with pytest.raises(ValueError) as error:
        best.grids(content, ["ptat", "prompts", "joint", "sequential"], 3)
    assert "ptat has 2 different trials" in str(error.value)
    assert "prompts has 2 different trials" in str(error.value)
    assert "joint" not in str(error.value) and "sequential" not in str(error.value)
    default = methods.METHODS["sequential"]().learning_rate
    grid = best.grids({"common": {}, "grids": {}, "methods": {}}, ["sequential"], 3)["sequential"]
    assert [t["learning_rate"] for t in grid] == pytest.approx(
        [default / 3, default, default * 3], rel=0.02)


@pytest.mark.parametrize("content, words", [
    ({"methods": {"nope": {}}}, ["no method 'nope'"]),
    ({"method": {}, "grids": []}, ["unknown part 'method'", "grids is no object"]),
    ({"methods": {"ptat": {"grid": "x"}, "prompts": {"likes": "ptat"}}},
     ["ptat.grid is 'x', which grids has not", "prompts has an unknown part 'likes'"]),
    ({"methods": {"ptat": {"like": "prompts"}, "prompts": {"like": "ptat"}}}, ["ptat.like is"]),
    ({"methods": {"ptat": {"like": "prompts", "grid": GRID}}}, ["ptat has like beside ['grid']"]),
])
def test_all_that_is_wrong_with_the_file_is_said_at_once(tmp_path, content, words):
    (tmp_path / "best.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        best.read(tmp_path / "best.json")
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_method_like_another_keeps_what_makes_it_another():
    """Prompts and PTAT share rates; PTAT's weights are not Prompts' to take."""
    content = {"common": {}, "grids": {}, "methods": {
        "prompts": {"like": "ptat"}, "sequential": {"like": "ptat"},
        "ptat": {"settings": {"learning_rate": 0.02, "feature_weight": 3.0, "prompts.length": 8}}}}
    assert best.settings(content, "prompts") == {"learning_rate": 0.02, "prompts.length": 8}
    # Full fine-tuning has another default rate: it is another thing.
    assert best.settings(content, "sequential") == {}
    five = ("frozen", "sequential", "joint", "prompts", "ptat")
    assert best.tuned_methods(content, five) == ["joint", "ptat"]


def test_the_file_is_sorted_and_short_enough_to_read(tmp_path):
    content = {"common": {"b": 1, "a": 2}, "grids": {"full": GRID * 3},
               "methods": {"ptat": {"grid": "full"}, "joint": {"grid": GRID}}}
    best.write(tmp_path / "best.json", content)
    text = (tmp_path / "best.json").read_text()
    assert json.loads(text) == content and best.read(tmp_path / "best.json") == content
    assert text.index('"joint"') < text.index('"ptat"') and '"common": {"a": 2, "b": 1}' in text
    assert max(map(len, text.splitlines())) <= 100 and len(text.splitlines()) < 25


# --- The benchmark's configuration ------------------------------------------------------------


@pytest.mark.parametrize("method", methods.for_streams("retrieves", ablations=True))
def test_the_benchmark_is_the_quickstart_with_a_backbone_of_the_runs_seed(method):
    config = cli.plain(tail_embedded.get_config(f"method={method},seed=5"))
    quick = cli.plain(quickstart.get_config(f"method={method},seed=5"))
    assert config["backbone"]["pretrain"]["seed"] == 5 != quick["backbone"]["pretrain"]["seed"]
    quick["backbone"]["pretrain"]["seed"] = 5
    assert config | {"method": 0} == quick | {"method": 0}
    expected = cli.plain(methods.defaults(method))
    for key, value in best.settings(best.read(tail_embedded.BEST), method).items():
        assert "." in key or (key in expected and expected.update({key: value}) is None)
    assert {k: v for k, v in config["method"].items() if not isinstance(v, dict)} == {
        k: v for k, v in expected.items() if not isinstance(v, dict)}
    bare = tail_embedded.get_config(f"method={method},settings=default")
    assert cli.plain(bare)["method"] == cli.plain(methods.defaults(method))
    assert methods.build(config["method"]) is not None


def test_all_methods_are_those_for_the_stream_of_the_configuration():
    of = {name: sweep.chosen_methods("all", f"tests/{name}.py")
          for name in ("tiny", "tiny_classes")}
    assert {"ptat", "sequential", "ptat_shallow"} <= {*of["tiny"]}
    assert {"pace", "sequential", "pace_no_boundary"} <= {*of["tiny_classes"]}
    assert not {"pace", "lwf", "eat"} & {*of["tiny"]}
    assert not {"ptat", "frozen", "eat"} & {*of["tiny_classes"]}


def test_orders_and_numbers_of_tasks():
    names = quickstart.TASKS
    tasks = tuple({"name": name} for name in names)
    assert common.arrange(tasks, "paper") == (tasks, ())
    assert common.arrange(tasks, "reverse") == (tasks, names[::-1])
    assert common.arrange(tasks, "paper", 2) == (tasks[:2], ())
    assert common.arrange(tasks, "reverse", 2) == (tasks[2:], names[:1:-1])
    given = [names[i] for i in (2, 0, 3, 1)]
    config = tail_embedded.get_config(f"order={'+'.join(given)},tasks=3")
    assert [*config.stream.order] == given[:3]
    assert sorted(task["name"] for task in config.stream.tasks) == sorted(given[:3])
    for arguments in ("order=forward", f"order={names[0]}", "tasks=5", "settings=none"):
        with pytest.raises(ValueError, match=arguments.replace("+", r"\+")):
            tail_embedded.get_config(arguments)


def test_best_settings_reach_the_method(tmp_path):
    path = tmp_path / "best.json"
    path.write_text(json.dumps({"methods": {"ptat": {
        "settings": {"learning_rate": 1, "prompts.length": 9}}}}))
    config = tail_embedded.get_config("method=ptat,settings=default")
    best.apply(config.method, path)
    assert config.method.learning_rate == 1.0 and config.method.prompts.length == 9
    assert methods.build(config.method.to_dict()).prompts.length == 9
    with pytest.raises(FileNotFoundError, match="no file of settings .*none.json"):
        best.apply(config.method, tmp_path / "none.json")
    path.write_text(json.dumps({"methods": {"ptat": {"settings": {"rate": 1}}}}))
    with pytest.raises(ValueError, match=r"method ptat has no settings \['rate'\]"):
        best.apply(config.method, path)
