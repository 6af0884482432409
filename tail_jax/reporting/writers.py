"""Files a run writes as it goes, and the reader of its results."""

from collections.abc import Mapping
import json
import math
import os
import pathlib
from typing import Any

SCHEMA = 1

_REQUIRED = {
    "method": str,
    "stream": str,
    "tasks": list,
    "seed": int,
    "order": list,
    "backbone": dict,
    "trainable_parameters": int,
    "total_parameters": int,
    "matrices": dict,
    "summary": dict,
}
_KINDS = {str: "a string", list: "a list", int: "a whole number", dict: "an object"}


class ResultsError(ValueError):
    """Results that cannot be read or do not belong together; the message is for the user."""


class JsonLinesWriter:
    """Appends rows to a file of one JSON object a line, e.g. `metrics.jsonl`.

    A row has left the process when `write` returns. The half row of a killed run is dropped when
    the file is opened again.

    Args:
      path: the file; its folder is created.
      resume_step: None starts an empty file. A number keeps the rows whose "step" is at most that
        number, in their order, and drops the rest: a run that resumes from the checkpoint of step s
        writes the later rows again. Write the rows of a step before its checkpoint.

    Raises:
      ResultsError: if a whole line is no JSON object with a "step".
    """

    def __init__(self, path: str | os.PathLike, *, resume_step: int | None = None):
        self._path = pathlib.Path(path)
        kept = [] if resume_step is None else self._lines_up_to(resume_step)
        write_text_atomic(self._path, "".join(line + "\n" for line in kept))
        self._file = open(self._path, "a", encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        """Appends {"step": step, **values}; arrays become numbers and lists, NaN and Inf null."""
        row = _plain({"step": int(step), **values}, finite_only=False)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "JsonLinesWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _lines_up_to(self, step: int) -> list[str]:
        if not self._path.exists():
            return []
        # What follows the last newline is the half row of a killed run.
        *whole, _ = self._path.read_text(encoding="utf-8").split("\n")
        kept = []
        for number, line in enumerate(whole, start=1):
            try:
                row_step = int(json.loads(line)["step"])
            except (ValueError, TypeError, KeyError) as error:
                raise ResultsError(
                    f"{self._path}: line {number} is {line[:60]!r}; expected a JSON "
                    "object with a step; move the file away to start a new one"
                ) from error
            if row_step <= step:
                kept.append(line)
        return kept


def write_json_atomic(path: str | os.PathLike, value: Any) -> None:
    """Writes value as indented JSON to path; a reader finds the old or the new text, never half.

    numpy and JAX scalars and arrays become numbers and lists.

    Raises:
      ValueError: on NaN or Inf, which JSON does not know; the message names the entry.
    """
    text = json.dumps(_plain(value, finite_only=True), indent=1, allow_nan=False)
    write_text_atomic(path, text + "\n")


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Writes text to path, creating its folder; a reader finds the old or the new text."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def read_results(directory: str | os.PathLike) -> dict[str, Any]:
    """Reads directory/results.json.

    Raises:
      ResultsError: if the file is missing, is no JSON, has another schema or lacks an entry.
    """
    path = pathlib.Path(directory) / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(
            f"{path}: no such file; expected the folder of a finished run (the file is "
            "written at its end)"
        ) from None
    except ValueError as error:
        raise ResultsError(
            f"{path}: not JSON ({error}); expected what a run writes at its end"
        ) from None
    found = results.get("schema") if isinstance(results, Mapping) else None
    if found != SCHEMA:
        raise ResultsError(
            f"{path}: schema is {found!r}, expected {SCHEMA}; run the job again with this version"
        )
    for name, kind in _REQUIRED.items():
        if not isinstance(results.get(name), kind):
            raise ResultsError(
                f"{path}: {name} is {results.get(name)!r:.40}, expected {_KINDS[kind]}; "
                "run the job again"
            )
    return results


def _plain(value: Any, *, finite_only: bool, name: str = "value") -> Any:
    """Containers and arrays of anything to what JSON holds."""
    if isinstance(value, Mapping):
        return {
            str(k): _plain(v, finite_only=finite_only, name=f"{name}[{k!r}]")
            for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [
            _plain(v, finite_only=finite_only, name=f"{name}[{i}]") for i, v in enumerate(value)
        ]
    if hasattr(value, "tolist"):  # numpy and JAX
        return _plain(value.tolist(), finite_only=finite_only, name=name)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not math.isfinite(value):
        if finite_only:
            raise ValueError(
                f"{name} is {value}, which JSON cannot hold; expected a finite number or None"
            )
        return None
    return value
