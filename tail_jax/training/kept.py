"""Features of frozen layers, computed once as a stage starts and kept: each batch has its rows.

A method says by `Method.kept` what no step of a stage changes (teachers, queries of a frozen tower,
the inputs of the first block that is tuned), and by `Method.feature` what it is. Where training
sees every clip the same way each time, that is computed for all clips or captions of the task; the
steps then begin where it ends. They come to the same as without, up to rounding.

What is kept lies in memory, up to a limit. Past it, it lies in a file that is mapped into memory,
which has no name, so that nothing is left of it when the stage ends, or the process dies. What has
no room there is not kept: each step computes it.

A step with other entries in its batches is another program. What is kept depends on the stage and
on the number of clips and not on their values, so these are few (one for each set of entries), and
a run that is resumed keeps the same.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import tempfile
from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

# What numbers the rows of each side in a batch.
ROWS = {"audio": "clip_id", "text": "caption_id"}


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much is kept.

    Attributes:
        memory, disk: bytes of a stage's features.
        folder: where the file goes.
    """

    memory: int
    disk: int
    folder: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Kept:
    """What is kept in a stage.

    Attributes:
        arrays: {name: (side, [clips or captions, ...])}.
    """

    arrays: Mapping[str, tuple[str, np.ndarray]]

    def rows(self, batch: Mapping) -> dict[str, np.ndarray]:
        """{name: [B, ...]} of the clips and captions of a batch, of padding those of some row."""
        return {name: values[batch[ROWS[side]]] for name, (side, values) in self.arrays.items()
                if ROWS[side] in batch}


NOTHING = Kept({})


@dataclasses.dataclass(frozen=True)
class Features:
    """Some features of a method as `TaskData` takes functions; equal ones are compiled once."""

    method: Any
    names: tuple[str, ...]

    def __call__(self, *args) -> dict[str, jax.Array]:
        """{name: [B, ...]} of (model, trainable, frozen, aux, batch)."""
        return {name: self.method.feature(name, *args) for name in self.names}

    def shapes(self, model, trainable, frozen, aux, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Of a batch of `rows` rows; arrays or shapes will do."""
        batch = model.input_shapes(rows, 1) | {
            "clip_id": jax.ShapeDtypeStruct((rows,), jnp.int32),
            "mask": jax.ShapeDtypeStruct((rows,), jnp.bool_)}
        return jax.eval_shape(lambda *args: self(model, *args), trainable, frozen, aux, batch)


def keep(method, state: dict, task: int, stage: int, data, limits: Limits) -> Kept:
    """Computes what a stage of a task keeps, from the state that the stage starts with.

    Args:
        data: the `TaskData` of the task, of fixed inputs.

    Raises:
        ValueError: if the disk has less room than the limit allows to take.
    """
    sides, arrays = method.kept(data.model, state, task, stage), {}
    left = {"memory": limits.memory, "disk": limits.disk}
    counts = {"audio": len(data.reader.split.clips), "text": len(data.reader.split.captions)}
    for side in dict.fromkeys(sides.values()):
        names = tuple(name for name in sides if sides[name] == side)
        shapes = Features(method, names).shapes(
            data.model, state["trainable"], data.frozen, state["aux"], data.batch_size)
        out = {}
        for name in names:
            shape, dtype = (counts[side], *shapes[name].shape[1:]), shapes[name].dtype
            size = math.prod(shape) * dtype.itemsize
            place = next((where for where, room in left.items() if size <= room), None)
            if place is not None:
                left[place] -= size
                out[name] = (np.empty(shape, dtype) if place == "memory"
                             else _mapped(shape, dtype, size, limits.folder))
        if out:
            compute = {"audio": data.map_audio, "text": data.map_text}[side]
            compute(Features(method, tuple(out)), state, out)
            arrays |= {name: (side, values) for name, values in out.items()}
    return Kept(arrays)


def _mapped(shape: tuple[int, ...], dtype, size: int, folder: pathlib.Path) -> np.ndarray:
    """An array in a file without a name, which lives as long as the array."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:  # room that is missing later, while the array is written, would kill the process
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise ValueError(f"{folder}: no room for {size} bytes of kept features "
                             f"({error.strerror}); make room there, or lower "
                             "train.keep_disk_bytes") from error
        return np.asarray(np.memmap(file, dtype, "r+", shape=shape))
