"""Name tables: which array of a published checkpoint is which parameter of ours, as data.

A rule is (ours, theirs) or (ours, theirs, transform).

    ours        regular expression for the whole path of a parameter ("encoder/layer_03/query"),
                without its last part where that is one of `SUFFIXES`; or for the path with it
    theirs      template of their key without its suffix: <1> is the first group as a number
                (layer_03 -> 3), <1-1> that number less one, <1:s> the group as it stands; with
                [0/3] at its end the first of three equal parts of one array (fused projections);
                a tuple of templates where one parameter is made of several arrays
    transform   (load, save): load(*arrays) -> ours, or ValueError where they do not go together;
                save(ours) -> array or arrays; in place of the change of layout below

Kernels change from torch's layout to Flax's: [out, in] to [in, out], and for convolutions
[out, in, *window] to [*window, in, out]. Axes of length 1 in front of their arrays are dropped.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from tail_jax.pretrained.files import Tensors, empty
from tail_jax.tuning.masks import leaf_name

SUFFIXES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias",
            "running_mean": "running_mean", "running_var": "running_var"}
_GROUP = re.compile(r"<(\d+)([+-]\d+|:s)?>")
_PART = re.compile(r"\[(\d+)/(\d+)\](?=$|\.\w+$)")
_LISTED = 5  # keys an error names


@dataclasses.dataclass(frozen=True)
class NameTable:
    """The names of one kind of checkpoint.

    Attributes:
        kind: for messages.
        rules: see the top of the file; the first that matches counts.
        aliases: (regular expression, replacement), applied in order to every key of a file before
            anything else: older and prefixed spellings become those of the rules.
        ignored: regular expressions for keys (after `aliases`) that need not be used.
        constants: path of a parameter of ours that no file has -> the number that fills it, such
            as statistics that stand in the configuration of the front end.
    """

    kind: str
    rules: tuple[tuple, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    constants: Mapping[str, float] = dataclasses.field(default_factory=dict)


def under(ours: str, theirs: str, rules) -> tuple[tuple, ...]:
    """The rules one level down, below `ours/` here and behind the prefix `theirs` there."""
    def prefixed(template):
        return tuple(map(prefixed, template)) if isinstance(template, tuple) else theirs + template
    return tuple((f"{ours}/{rule[0]}", prefixed(rule[1]), *rule[2:]) for rule in rules)


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Where a parameter comes from: keys, the part of the one array, and the change of layout."""

    keys: tuple[str, ...]
    part: tuple[int, int] | None
    transform: tuple[Callable, Callable] | None
    last: str


def _origin(table: NameTable, name: str) -> _Origin:
    stem, _, last = name.rpartition("/")
    suffix = f".{SUFFIXES[last]}" if last in SUFFIXES else ""
    stem = stem if suffix else name
    for ours, theirs, *transform in table.rules:
        match = re.fullmatch(ours, stem) or re.fullmatch(ours, name)
        if match:
            break
    else:
        raise LookupError(f"the name table of {table.kind} has no rule for parameter {name!r}")

    def group(reference):
        value, change = match[int(reference[1])], reference[2]
        return value if change == ":s" else str(int(value) + int(change or 0))

    # A tuple of templates spells whole keys: its arrays have suffixes of their own.
    templates = theirs if isinstance(theirs, tuple) else (theirs + suffix,)
    keys = [_GROUP.sub(group, template) for template in templates]
    part = _PART.search(keys[0])
    return _Origin(tuple(_PART.sub("", key) for key in keys),
                   (int(part[1]), int(part[2])) if part else None,
                   transform[0] if transform else None, last)


def _float32(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.float32:
        return array
    out = empty(array.shape)
    out[...] = array
    return out


def _to_ours(array: np.ndarray, origin: _Origin, shape: tuple[int, ...]) -> np.ndarray:
    """Their array in our layout, in memory of its own (`array` itself where nothing changes)."""
    if origin.part:
        i, n = origin.part
        array = array.reshape((n, -1) + array.shape[1:])[i]
    if origin.last == "kernel":
        array = np.moveaxis(array, (0, 1), (-1, -2))
    array = array.reshape(shape)
    if not origin.part and array.flags.c_contiguous:
        return array
    out = empty(shape)
    out[...] = array
    return out


def _expected(origin: _Origin, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that their array must have, but for axes of length 1 in front."""
    if origin.last == "kernel":
        shape = shape[:-3:-1] + shape[:-2]
    return (shape[0] * origin.part[1],) + shape[1:] if origin.part else shape


def fill(table: NameTable, shapes: Any, tensors: Tensors) -> Any:
    """Parameters from a file: the tree `shapes` with NumPy arrays for leaves.

    All names and shapes are compared before anything is read.

    Args:
        table: the names.
        shapes: tree of arrays or `jax.ShapeDtypeStruct`.
        tensors: the file.

    Raises:
        ValueError: with the keys that the file lacks, those that the table does not know, and
            those of another shape.
    """
    found = collections.defaultdict(list)
    for key in tensors.shapes:
        name = key
        for pattern, replacement in table.aliases:
            name = re.sub(pattern, replacement, name)
        found[name].append(key)
    leaves = [(leaf_name(path), leaf) for path, leaf in
              jax.tree_util.tree_flatten_with_path(shapes)[0]]
    leaves = [(name, leaf) for name, leaf in leaves if name not in table.constants]
    origins = {name: _origin(table, name) for name, _ in leaves}
    wanted = {key for origin in origins.values() for key in origin.keys}
    twice = [keys for name, keys in found.items() if len(keys) > 1 and name in wanted]
    unknown = [keys[0] for name, keys in found.items() if name not in wanted
               and not any(re.fullmatch(pattern, name) for pattern in table.ignored)]
    wrong = []
    for name, leaf in leaves:
        origin = origins[name]
        if origin.transform is None and origin.keys[0] in found:
            key = found[origin.keys[0]][0]
            theirs, ours = tensors.shapes[key], _expected(origin, tuple(leaf.shape))
            padded = (1,) * (len(theirs) - len(ours)) + ours
            if tuple(theirs) != padded:
                wrong.append(f"{key} is {list(theirs)}, the configuration asks for {list(ours)}")
    problems = [f"{what} {_some(keys)}" for what, keys in (
        ("no", sorted(wanted - set(found))), ("unknown", unknown), ("wrong shape:", wrong),
        ("twice under two spellings", [" and ".join(sorted(keys)) for keys in twice])) if keys]
    if problems:
        raise ValueError(f"{tensors.path}: not the weights of the {table.kind} model that is "
                         f"asked for: {'; '.join(problems)}. Check that config.json and weights "
                         "belong together and are whole")

    def read(key):
        array = _float32(tensors.read(key))
        if not np.isfinite(array.sum()):  # a sum of sound weights stays far below float32's largest
            raise ValueError(f"{tensors.path}: {key} has values that are not finite; the file is "
                             "damaged or its training diverged")
        return array

    def take(path, leaf):
        name, shape = leaf_name(path), tuple(leaf.shape)
        if name in table.constants:
            return np.full(shape, table.constants[name], np.float32)
        origin = origins[name]
        arrays = [read(found[key][0]) for key in origin.keys]
        if origin.transform is None:
            return _to_ours(arrays[0], origin, shape)
        try:
            made = np.asarray(origin.transform[0](*arrays), np.float32)
            if made.shape == shape:
                return made
            what = f"make an array {list(made.shape)}"
        except ValueError as error:
            what = f"do not go together ({error})"
        theirs = " and ".join(f"{key} {list(array.shape)}"
                              for key, array in zip(origin.keys, arrays))
        raise ValueError(f"{tensors.path}: {theirs} {what}; the configuration asks for "
                         f"{list(shape)}")

    return jax.tree_util.tree_map_with_path(take, shapes)


def unfill(table: NameTable, params: Any) -> dict[str, np.ndarray]:
    """The reverse of `fill`: their keys and arrays, as `table.rules` spells them."""
    out: dict[str, np.ndarray] = {}
    parts: dict[str, list] = collections.defaultdict(list)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if leaf_name(path) in table.constants:
            continue
        origin = _origin(table, leaf_name(path))
        array = np.asarray(leaf, np.float32)
        if origin.transform:
            saved = origin.transform[1](array)
            saved = saved if isinstance(saved, tuple) else (saved,)
            out |= dict(zip(origin.keys, saved, strict=True))
            continue
        if origin.last == "kernel":
            array = np.moveaxis(array, (-1, -2), (0, 1))
        if origin.part:
            parts[origin.keys[0]].append((origin.part[0], array))
        else:
            out[origin.keys[0]] = array
    for key, pieces in parts.items():
        out[key] = np.concatenate([piece for _, piece in sorted(pieces, key=lambda p: p[0])])
    return {key: np.ascontiguousarray(array).reshape(array.shape) for key, array in out.items()}


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more
