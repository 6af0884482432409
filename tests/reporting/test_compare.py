import os
import pathlib
import re
import subprocess
import sys

import pytest

from tail_jax import compare
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
        "matrices.png",
        "report.md",
        "table.csv",
        "table.md",
        "tradeoff.png",
    ]
    assert (output / "table.md").read_text() in done.stdout
    assert done.stdout.rstrip().endswith(str(output / "report.md"))


def test_the_report_links_only_to_files_that_are_there_and_names_no_folder(run_folders, tmp_path):
    compare.compare(f"{run_folders}/*", tmp_path / "report", "R@1")
    text = (tmp_path / "report" / "report.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) == 4 and all((tmp_path / "report" / link).is_file() for link in links)
    assert (tmp_path / "report" / "table.md").read_text() in text
    assert "rain → machines → animals" in text and "| ptat-1 | ptat | 1 | 50 |" in text
    assert str(tmp_path) not in text


def test_the_same_runs_give_the_same_bytes(run_folders, tmp_path):
    for name in "ab":
        compare.compare(f"{run_folders}/*", tmp_path / name, "R@1")
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
    assert len(compare.read_runs(f"{run_folders}/*")) == 10
    assert capsys.readouterr().err == f"left out, not finished: {run_folders}/killed\n"


def test_a_broken_run_stops_the_report(run_folders, tmp_path):
    (run_folders / "ptat-1" / "results.json").write_text("{")
    with pytest.raises(ResultsError, match="ptat-1/results.json: not JSON"):
        compare.compare(f"{run_folders}/*", tmp_path / "report", "R@1")
    assert not (tmp_path / "report").exists()
