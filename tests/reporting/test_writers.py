import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from tail_jax.reporting import writers


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_readable_while_the_run_goes_on(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    with writers.JsonLinesWriter(path) as writer:
        writer.write(1, loss=np.float32(0.5), task="rain")
        assert rows_of(path) == [{"step": 1, "loss": 0.5, "task": "rain"}]
        writer.write(
            np.int64(2),
            loss=jnp.float32(np.nan),
            norms=jnp.array([1.0, np.inf]),
            path=pathlib.Path("a"),
        )
    assert rows_of(path)[1] == {"step": 2, "loss": None, "norms": [1.0, None], "path": "a"}


def test_resumed_file_equals_that_of_a_run_that_was_never_killed(tmp_path):
    def write(path, steps, resume_step):
        with writers.JsonLinesWriter(path, resume_step=resume_step) as writer:
            for step in steps:
                writer.write(step, loss=1 / step)

    write(tmp_path / "whole.jsonl", range(1, 8), None)
    killed = tmp_path / "killed.jsonl"
    write(killed, range(1, 6), None)
    with open(killed, "a") as file:
        file.write('{"step": 6, "lo')
    write(killed, range(4, 8), 3)
    assert killed.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_fresh_start_empties_the_file_and_resuming_without_one_is_fine(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    writers.JsonLinesWriter(path).close()
    assert path.read_text() == ""
    path.unlink()
    writers.JsonLinesWriter(path, resume_step=3).close()
    assert path.read_text() == ""


@pytest.mark.parametrize("line", ["not json", '{"loss": 1}', "[]"])
def test_a_broken_line_is_named_and_the_file_left_alone(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    before = path.read_text()
    with pytest.raises(
        writers.ResultsError, match=r"metrics.jsonl: line 2 is .*expected a JSON object"
    ):
        writers.JsonLinesWriter(path, resume_step=3)
    assert path.read_text() == before


def test_json_holds_exact_numbers_and_leaves_no_other_file(tmp_path):
    value = {"a": np.float64(0.1), "b": (np.int32(3), None, True), 4: jnp.arange(2), "c": 1 / 3}
    writers.write_json_atomic(tmp_path / "results.json", value)
    assert json.loads((tmp_path / "results.json").read_text()) == {
        "a": 0.1,
        "b": [3, None, True],
        "4": [0, 1],
        "c": 1 / 3,
    }
    assert os.listdir(tmp_path) == ["results.json"]


def test_the_old_file_survives_what_cannot_be_written(tmp_path):
    path = tmp_path / "results.json"
    writers.write_json_atomic(path, {"a": 1})
    with pytest.raises(
        ValueError, match=r"value\['m'\]\[1\] is nan, .*expected a finite number or None"
    ):
        writers.write_json_atomic(path, {"m": [0.0, float("nan")]})
    assert json.loads(path.read_text()) == {"a": 1}


def test_results_are_read_back(run_folders):
    assert writers.read_results(run_folders / "ptat-1")["seed"] == 1


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no such file; expected the folder of a finished run"),
        ("{", "not JSON"),
        ("[]", "schema is None, expected 1"),
        ('{"schema": 2}', "schema is 2, expected 1"),
        ('{"schema": 1, "method": "ptat", "stream": 3}', "stream is 3, expected a string"),
    ],
)
def test_what_is_wrong_with_results_is_said_in_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(writers.ResultsError, match=message) as error:
        writers.read_results(tmp_path)
    assert "results.json" in str(error.value) and "\n" not in str(error.value)


def test_reporting_is_light_to_import():
    code = (
        "import sys, tail_jax.reporting.plots, tail_jax.reporting.writers\n"
        "heavy = {'tensorflow', 'matplotlib', 'jax'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
