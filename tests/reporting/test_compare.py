import os
import pathlib
import re
import subprocess
import sys

import pytest

from tail_jax.reporting import report
from tail_jax.reporting.writers import ResultsError

ROOT = pathlib.Path(__file__).parents[2]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tail_jax.compare", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_writes_the_report_and_prints_the_table(run_folders, tmp_path):
    output = tmp_path / "report"
    done = command(f"--runs={run_folders}/*", f"--output={output}", "--metric=R@5")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(output)) == [
        "curves.png",
        "headline.md",
        "matrices.png",
        "report.md",
        "table.csv",
        "table.md",
        "tradeoff.png",
    ]
    assert (output / "headline.md").read_text() in done.stdout
    assert done.stdout.rstrip().endswith(str(output / "report.md"))


def test_the_report_links_only_to_files_that_are_there_and_names_no_folder(run_folders, tmp_path):
    report.write_report(report.read_runs(f"{run_folders}/*"), tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) == 4 and all((tmp_path / "report" / link).is_file() for link in links)
    for name in ("table.md", "headline.md"):
        assert (tmp_path / "report" / name).read_text() in text
    assert "rain → machines → animals" in text
    assert "| ptat-1 | ptat | 1 | 50 | `abababababab` |" in text and "- seeds: 0, 1\n" in text
    assert str(tmp_path) not in text


def test_the_same_runs_give_the_same_bytes(run_folders, tmp_path):
    for name in "ab":
        report.write_report(report.read_runs(f"{run_folders}/*"), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_glob_without_runs_is_one_clear_line(tmp_path):
    done = command(f"--runs={tmp_path}/nothing*", f"--output={tmp_path}/report")
    assert done.returncode != 0 and not (tmp_path / "report").exists()
    (line,) = done.stderr.strip().splitlines()
    assert "0 folders match" in line and "expected a glob of folders" in line


def test_an_unfinished_run_is_left_out_aloud(run_folders, tmp_path, capsys):
    (run_folders / "killed").mkdir()
    (run_folders / "killed" / "config.json").write_text("{}")
    assert len(report.read_runs(f"{run_folders}/*")) == 10
    assert capsys.readouterr().err == f"left out, not finished: {run_folders}/killed\n"


def test_a_broken_run_stops_the_report(run_folders, tmp_path):
    (run_folders / "ptat-1" / "results.json").write_text("{")
    with pytest.raises(ResultsError, match="ptat-1/results.json: not JSON"):
        report.write_report(report.read_runs(f"{run_folders}/*"), tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_the_report_names_the_backbone_of_every_seed_and_who_lacks_a_seed(make_results, tmp_path):
    runs = {
        f"{method}-{seed}": make_results(method, seed, backbone={"sha256": f"{seed}f" * 32})
        for method, seed in (("frozen", 0), ("frozen", 1), ("joint", 0), ("joint", 1), ("ptat", 1))
    }
    report.write_report(runs, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "seed 0 `0f0f0f0f0f0f0f0f`, seed 1 `1f1f1f1f1f1f1f1f`" in text
    assert "- seeds: 0, 1 (but ptat: 1)\n" in text


def test_orders_are_not_mixed(make_results, tmp_path):
    order = ["animals", "machines", "rain"]
    runs = {"a": make_results(), "b": make_results(seed=1, order=order, tasks=order)}
    with pytest.raises(ResultsError, match="a and b cannot share a table: order is"):
        report.write_report(runs, tmp_path / "report")
    assert not (tmp_path / "report").exists()
