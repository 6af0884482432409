"""Weight files of other projects, as named arrays that are read one at a time.

Safetensors are read by offset into the buffer that becomes the parameter. A memory map would be
shorter, but its pages count as memory of the process: a load would need the weights twice. PyTorch
files are mapped, since PyTorch offers nothing else, and mapped anew every few megabytes.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import pickle
import struct
import sys
from collections.abc import Mapping
from typing import Any, Callable

import ml_dtypes
import numpy as np

_SAFETENSORS_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_}
_LARGEST_HEADER = 100 << 20  # as the format's own reader has it
_TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# In this order: what a folder is read from.
_FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                 "pytorch_model.bin.index.json")
_MAPPED = 32 << 20  # bytes of a PyTorch file to read before mapping it anew
_ALIGNMENT = 64  # what XLA asks of a host buffer that it uses without a copy


class Tensors:
    """Named arrays of one or several files.

    Attributes:
        path: the file, or the index of several.
        shapes: key -> shape, of every array.
        extras: what else the file holds: a safetensors file's metadata, or all that stands beside
            the weights of a PyTorch file.
    """

    def __init__(self, path, shapes: Mapping[str, tuple[int, ...]],
                 read: Callable[[str], np.ndarray], extras: Mapping[str, Any] | None = None):
        self.path, self.shapes, self._read = pathlib.Path(path), dict(shapes), read
        self.extras = dict(extras or {})

    def read(self, key: str) -> np.ndarray:
        """The array called `key`, as stored, in memory of its own."""
        return self._read(key)


def open_tensors(path) -> Tensors:
    """Opens a weight file, or that of a folder in the Hugging Face layout.

    Reads `.safetensors` (one file, or several with an index) and, with the `torch` extra, `.bin`,
    `.pt`, `.pth` and `.ckpt`: tensors only, nothing in the file is executed.

    Raises:
        ValueError: no such file, a damaged one, or one that is more than tensors.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a checkpoint folder or weight file")
    if path.name.endswith(".index.json"):
        return _open_index(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in _TORCH_SUFFIXES:
        return _open_torch(path)
    raise ValueError(f"{path}: cannot tell what kind of file this is; expected .safetensors or "
                     f"{', '.join(_TORCH_SUFFIXES)}")


def empty(shape: tuple[int, ...], dtype=np.float32) -> np.ndarray:
    """An uninitialised array that XLA on the CPU can use without copying it."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start:start + size].view(dtype).reshape(shape)


def _in_folder(folder: pathlib.Path) -> pathlib.Path:
    for name in _FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    others = sorted(p for p in folder.iterdir()
                    if p.suffix in (".safetensors", *_TORCH_SUFFIXES)
                    and not p.name.startswith("training_args"))
    if len(others) == 1:
        return others[0]
    found = f"{len(others)} weight files, {', '.join(p.name for p in others[:5])}; pass one of " \
        "them" if others else "no weights"
    raise ValueError(f"{folder}: has {found}; expected one of {', '.join(_FOLDER_FILES)}, or one "
                     "single weight file")


def _open_index(path: pathlib.Path) -> Tensors:
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name) for name in files.values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: not an index of weights (no 'weight_map'); copy the folder "
                         "again") from None
    parts: dict[str, Tensors] = {}
    for name in sorted(names):
        # An index names its neighbours; a path that leaves the folder is somebody's trick.
        if pathlib.PurePath(name).name != name or name.endswith(".index.json") \
                or not (path.parent / name).is_file():
            raise ValueError(f"{path}: names the file {name!r}, which is not in {path.parent} "
                             "or holds no weights; copy the whole folder")
        parts[name] = open_tensors(path.parent / name)
    lost = sorted(key for key, name in files.items() if key not in parts[name].shapes)
    if lost:
        raise ValueError(f"{path}: {files[lost[0]]} has no {lost[0]!r} ({len(lost)} such keys); "
                         "index and files do not belong together")
    return Tensors(path, {k: part.shapes[k] for part in parts.values() for k in part.shapes},
                   lambda key: parts[files[key]].read(key) if key in files
                   else next(p for p in parts.values() if key in p.shapes).read(key))


def _open_safetensors(path: pathlib.Path) -> Tensors:
    size = path.stat().st_size
    damaged = f"{path}: not a whole safetensors file"
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else size
        if 8 + length > size or length > _LARGEST_HEADER:
            raise ValueError(f"{damaged} ({size} bytes, its header asks for {8 + length}); copy "
                             "or download it again")
        try:
            header = json.loads(file.read(length))
            metadata = dict(header.pop("__metadata__", {}))
            entries = {key: (_SAFETENSORS_DTYPES[e["dtype"]], tuple(e["shape"]),
                             8 + length + e["data_offsets"][0], 8 + length + e["data_offsets"][1])
                       for key, e in header.items()}
            whole = all(stop - start == math.prod(shape) * np.dtype(dtype).itemsize
                        and all(type(n) is int and n >= 0 for n in (*shape, start - 8 - length))
                        for dtype, shape, start, stop in entries.values())
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            whole = False
        if not whole:
            raise ValueError(f"{damaged} (its header cannot be read, or has a type of number "
                             f"other than {', '.join(_SAFETENSORS_DTYPES)}); download it again")
    end = max((stop for *_, stop in entries.values()), default=8 + length)
    if end > size:
        raise ValueError(f"{path}: truncated: {size} bytes, its header promises {end}; copy or "
                         "download it again")

    def read(key: str) -> np.ndarray:
        dtype, shape, start, _ = entries[key]
        target = empty(shape, dtype)
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            view, done = memoryview(target.reshape(-1).view(np.uint8)), 0
            while done < len(view):  # one call reads 2 GiB at most
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError(f"{path}: ended while {key!r} was being read; was it "
                                     "replaced?")
                done += count
        return target

    return Tensors(path, {key: entry[1] for key, entry in entries.items()}, read, metadata)


def _open_torch(path: pathlib.Path) -> Tensors:
    try:
        import torch
    except ImportError:
        raise ValueError(f"{path}: a PyTorch file; reading it needs the extra: pip install "
                         "'tail_jax[torch]' (safetensors need nothing)") from None

    def load(mmap: bool):
        with torch.serialization.safe_globals(_numbers()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)

    try:
        try:
            content, mapped = load(True), True
        except RuntimeError:  # files from before 2020 cannot be mapped
            content, mapped = load(False), False
    except pickle.UnpicklingError as error:
        asked = str(error).partition("GLOBAL ")[2].split()
        what = f"asks for {asked[0]}" if asked else "is more than tensors, or damaged"
        raise ValueError(f"{path}: refused: a pickle that {what}, which could run code; get the "
                         "weights as safetensors, or save the state dict alone") from None
    except (RuntimeError, EOFError, ValueError, LookupError, OSError, AttributeError, TypeError,
            AssertionError, ArithmeticError) as error:  # a damaged pickle fails in many ways
        reason = str(error).strip().splitlines()[:1]
        raise ValueError(f"{path}: not a whole PyTorch file ({''.join(reason)}); copy or download "
                         "it again") from None
    weights, extras = _weights_of(content, torch.Tensor)
    if not weights:
        raise ValueError(f"{path}: holds no tensors; expected a state dict, alone or under "
                         "'state_dict' or 'model'")

    del content  # tensors beside the weights would keep the whole file mapped
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    touched = 0

    def part(key: str, start: int, stop: int) -> np.ndarray:
        nonlocal weights, touched
        if mapped and touched > _MAPPED:
            weights, touched = {}, 0
            weights = _weights_of(load(True), torch.Tensor)[0]
        numbers = weights[key].detach().reshape(-1)[start:stop]
        touched += numbers.nbytes
        if numbers.dtype == torch.bfloat16:  # unknown to NumPy
            numbers = numbers.to(torch.float32)
        return numbers.numpy()

    def read(key: str) -> np.ndarray:
        out = empty(shapes[key], part(key, 0, 0).dtype)
        flat, step = out.reshape(-1), _MAPPED // out.itemsize
        for start in range(0, flat.size, step):
            flat[start:start + step] = part(key, start, start + step)
        return out

    return Tensors(path, shapes, read, extras)


def _numbers() -> list:
    """What PyTorch may make of a file beside tensors: NumPy numbers, such as a trainer's best loss.

    LAION's checkpoints have some. They are data; the rule that nothing is executed stays.
    """
    scalar = np.float64(0).__reduce__()[0]
    return [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"),
            np.dtype, *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + "efd?"}]


def _weights_of(content: Any, tensor: type) -> tuple[dict, dict]:
    """(tensors, the rest) of what a file holds; training code puts weights one level down.

    Tensors elsewhere, as of an optimizer, are in neither.
    """
    if not isinstance(content, Mapping):
        return {}, {}
    inner = next((content[name] for name in ("state_dict", "model", "module")
                  if isinstance(content.get(name), Mapping)
                  and any(isinstance(v, tensor) for v in content[name].values())), content)
    weights = {str(k): v for k, v in inner.items() if isinstance(v, tensor)}
    return weights, {k: v for k, v in content.items() if v is not inner and not _holds(v, tensor)}


def _holds(value: Any, kind: type) -> bool:
    """Whether a value is of a kind, or contains one that is."""
    inner = value.values() if isinstance(value, Mapping) else \
        value if isinstance(value, (list, tuple, set)) else ()
    return isinstance(value, kind) or any(_holds(v, kind) for v in inner)


def read_json(path, kind: type = dict) -> Any:
    """A JSON object (or, of another `kind`, a list) from a file.

    Raises:
        ValueError: no such file, or not of that kind.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); copy or download it again") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path}: holds a {type(value).__name__}; expected "
                         f"{'an object' if kind is dict else 'a list'}")
    return value


class Options:
    """The entries of a JSON file, with errors that name the file."""

    def __init__(self, values: Mapping, path: os.PathLike | str):
        self.values, self.path = dict(values), pathlib.Path(path)

    def get(self, name: str, default: Any = None) -> Any:
        """The entry, or `default` where it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def section(self, name: str) -> "Options":
        """The object below `name`; empty where there is none.

        Raises:
            ValueError: if it is no object.
        """
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise ValueError(f"{self.path}: option {name} is {value!r}; expected an object")
        return Options(value, f"{self.path}: {name}")

    def choose(self, name: str, default: Any, choices: Mapping) -> Any:
        """What `choices` has for the entry.

        Raises:
            ValueError: on a value that `choices` does not have.
        """
        value = self.get(name, default)
        if isinstance(value, list):
            value = tuple(value)
        if value not in [*choices]:  # compared, not looked up: objects of JSON have no hash
            raise ValueError(f"{self.path}: option {name} is {value!r}, which is not supported; "
                             f"supported: {', '.join(repr(c) for c in choices)}")
        return choices[value]

    def count(self, name: str, default: int, least: int = 1) -> int:
        """The entry as a whole number from `least` to 2^31 - 1, as every size is one.

        Raises:
            ValueError: on anything else.
        """
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise ValueError(f"{self.path}: option {name} is {value!r}; expected a whole number "
                             f"above {least - 1} and below 2^31")
        return value

    def number(self, name: str, default: float, least: float = -sys.float_info.max) -> float:
        """The entry as a finite number, at least `least`.

        Raises:
            ValueError: on anything else.
        """
        value = self.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) \
                or not least <= value <= sys.float_info.max:
            raise ValueError(f"{self.path}: option {name} is {value!r}; expected a finite number, "
                             f"{least:g} or more")
        return float(value)

    def build(self, make: Callable, **values: Any) -> Any:
        """`make(**values)`, its complaints about them with the name of this file.

        Raises:
            ValueError: as `make`.
        """
        try:
            return make(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: not supported: {error}") from None
