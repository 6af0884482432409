"""Best settings of every method on a benchmark: a JSON file that `sweep --tune` writes.

    {"common":  {"heads_learning_rate": 0.003},    in every trial of a method that has the setting
     "grids":   {"full": [{"learning_rate": 0.0005}, ...]},    trials that methods can share
     "methods": {"sequential": {"grid": "full",    or a list of its own
                                "settings": {...},    the best trial, on validation sets
                                "found": {...}},    how it was found
                 "ptat_short": {"like": "ptat"}}}    not tuned, takes another's settings

Settings are fields of `config.method`; inner ones have dots ("prompts.length"). `common`, `grids`,
`grid` and `like` are written by hand, `settings` and `found` by the search.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, Mapping

from ml_collections import ConfigDict

from tail_jax import methods
from tail_jax.reporting.writers import write_text_atomic

_KEYS = {"common": dict, "grids": dict, "methods": dict}
_ENTRY = {"grid": (list, str), "like": str, "settings": dict, "found": dict}


def read(path) -> dict:
    """The file's content with all three parts; all empty if there is no such file.

    Raises:
        ValueError: names everything that is wrong in it.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return {key: {} for key in _KEYS}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    problems = _problems(found) if isinstance(found, dict) else ["it holds no object"]
    if problems:
        raise ValueError(f"{path}: " + "; ".join(problems))
    return {key: found.get(key, {}) for key in _KEYS}


def write(path, content: Mapping) -> None:
    """Writes what `read` gives, sorted, short values on one line."""
    write_text_atomic(path, _text(content) + "\n")


def settings(content: Mapping, method: str, classes: bool = False) -> dict[str, Any]:
    """Settings of a method, flat; those of its `like`, where it has one; none if it is not tuned.

    Of another's settings a method takes those that both have with the same default: what differs is
    what makes it another method, and stays. `classes`, here and below: defaults are those for
    class-incremental streams.
    """
    entry = content["methods"].get(method, {})
    if "like" not in entry:
        return dict(entry.get("settings", {}))
    own, other = flat_defaults(method, classes), flat_defaults(entry["like"], classes)
    return {key: value for key, value in settings(content, entry["like"], classes).items()
            if key in own and own[key] == other.get(key)}


def apply(method: ConfigDict, path, classes: bool = False) -> None:
    """Sets the fields of a `config.method` to the settings that the file has for it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is wrong, or has a setting that the method has not.
    """
    if not pathlib.Path(path).exists():
        raise FileNotFoundError(f"no file of settings {path}; `sweep --tune={path}` makes one")
    found = settings(read(path), method.name, classes)
    unknown = sorted(found.keys() - flat_defaults(method.name, classes))
    if unknown:
        raise ValueError(f"{path}: method {method.name} has no settings {unknown}")
    method.update_from_flattened_dict(found)


def tuned_methods(content: Mapping, names) -> list[str]:
    """Those of `names` that have a search of their own: they train, and are `like` no other."""
    return [name for name in names if methods.METHODS[name].trains
            and "like" not in content["methods"].get(name, {})]


def grids(content: Mapping, names, trials: int,
          classes: bool = False) -> dict[str, list[dict[str, Any]]]:
    """The trials of every method of `names`, `common` not included.

    A method without a grid gets its default learning rate times 3^k, k around 0, to two digits.

    Raises:
        ValueError: names every method whose grid has not exactly `trials` different trials.
    """
    result, problems = {}, []
    for name in names:
        grid = content["methods"].get(name, {}).get("grid")
        if grid is None:
            rate = flat_defaults(name, classes)["learning_rate"]
            grid = [{"learning_rate": float(f"{rate * 3.0 ** (k - (trials - 1) // 2):.2g}")}
                    for k in range(trials)]
        elif isinstance(grid, str):
            grid = content["grids"][grid]
        different = {json.dumps(trial, sort_keys=True) for trial in grid}
        unknown = sorted({key for trial in grid for key in trial} - flat_defaults(name).keys())
        if len(grid) != trials or len(different) != trials:
            problems.append(f"{name} has {len(different)} different trials")
        if unknown:
            problems.append(f"{name} has no settings {unknown}")
        result[name] = grid
    if problems:
        raise ValueError(f"every method gets {trials} trials, no more and no fewer (--trials): "
                         + "; ".join(problems))
    return result


def common(content: Mapping, method: str) -> dict[str, Any]:
    """Those of the common settings that the method has."""
    own = flat_defaults(method)
    return {key: value for key, value in content["common"].items() if key in own}


def edges(grid: list[Mapping], best: Mapping) -> list[str]:
    """Names of the numbers that vary over a grid and are smallest or largest in its best trial."""
    result = []
    for key in sorted(best):
        values = [trial.get(key) for trial in grid]
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        if numbers and len(set(values)) > 1 and best[key] in (min(values), max(values)):
            result.append(key)
    return result


def flat_defaults(method: str, classes: bool = False) -> dict[str, Any]:
    """Defaults of a method with dotted names for inner fields."""

    def flatten(values, prefix=""):
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    defaults = methods.defaults(method, classes)
    return {key: value for key, value in flatten(defaults) if key != "name"}


def _problems(content: dict) -> list[str]:
    problems = [f"unknown part {key!r}, expected {[*_KEYS]}" for key in content if key not in _KEYS]
    problems += [f"{key} is no object" for key, kind in _KEYS.items()
                 if not isinstance(content.get(key, {}), kind)]
    if problems:
        return problems
    for name, grid in content.get("grids", {}).items():
        problems += [] if _is_grid(grid) else [f"grids.{name} is no list of objects"]
    entries = content.get("methods", {})
    for name, entry in entries.items():
        if name not in methods.METHODS:
            problems.append(f"no method {name!r}")
        if not isinstance(entry, dict):
            problems.append(f"{name} is no object")
            continue
        problems += [f"{name} has an unknown part {key!r}, expected {[*_ENTRY]}"
                     for key in entry if key not in _ENTRY]
        problems += [f"{name}.{key} is {entry[key]!r:.40}" for key, kind in _ENTRY.items()
                     if key in entry and not isinstance(entry[key], kind)]
        grid, like = entry.get("grid"), entry.get("like")
        if isinstance(grid, str) and grid not in content.get("grids", {}):
            problems.append(f"{name}.grid is {grid!r}, which grids has not")
        if isinstance(grid, list) and not _is_grid(grid):
            problems.append(f"{name}.grid is no list of objects")
        if like is not None and (like not in methods.METHODS or "like" in entries.get(like, {})):
            problems.append(f"{name}.like is {like!r}; expected a method that is tuned itself")
        if like is not None and len(entry) > 1:
            problems.append(f"{name} has like beside {sorted(entry.keys() - {'like'})}")
    return problems


def _is_grid(value) -> bool:
    return isinstance(value, list) and all(isinstance(trial, dict) for trial in value)


def _text(value: Any, indent: str = "", name: str = "") -> str:
    short = f"{name}{json.dumps(value, sort_keys=True, ensure_ascii=False)}"
    if not value or not isinstance(value, (dict, list)) or len(indent) + len(short) < 100:
        return indent + short
    inner = indent + " "
    if isinstance(value, list):
        opened, closed, lines = "[", "]", [_text(item, inner) for item in value]
    else:
        opened, closed = "{", "}"
        lines = [_text(value[key], inner, f"{json.dumps(key)}: ") for key in sorted(value)]
    return f"{indent}{name}{opened}\n" + ",\n".join(lines) + f"\n{indent}{closed}"
