"""What a method's hooks see of a task beside the steps: its training data, nothing of others."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable, Iterator

import jax
import numpy as np

from data_pipelines.batches import SplitReader
from tail_jax.training.kept import NOTHING, Kept
from tail_jax.training.sharding import by_row, local_rows, put_batch, replicated

# What says which clips or captions the rows of a batch are.
NUMBERS = ("clip_id", "caption_id", "mask")


@dataclasses.dataclass(frozen=True)
class TaskData:
    """The training split of one task, as `begin_task` and `end_task` may read it.

    Attributes:
        model: the dual encoder's description.
        frozen: what the method needs of the backbone, on the devices.
        reader: of the training split (`pairs`, `token_ids`, `caption_key`, ...).
        key: of this task and hook; fold numbers into it.
        seed: the same for NumPy.
        batch_size: rows of a training batch.
        mesh: where batches go.
        kept: what is kept in this stage; `map_audio` has its rows in the batches, too.
    """

    model: Any
    frozen: Any
    reader: SplitReader
    key: jax.Array
    seed: int
    batch_size: int
    mesh: Any
    kept: Kept = NOTHING

    def batches(self, count: int) -> Iterator[dict]:
        """`count` training batches in an order of their own, on the devices."""
        batches = self.reader.train_batches(self.batch_size, self.seed, rows=self._rows)
        keys = ("audio", "token_ids", "token_mask", "clip_id", "caption_key", "label", "mask")
        for _ in range(count):
            batch = next(batches)
            yield put_batch({k: batch[k] for k in keys if k in batch}, self.mesh)

    @property
    def _rows(self) -> np.ndarray | None:
        return local_rows(self.mesh, self.batch_size)

    @property
    def labels(self) -> np.ndarray:
        """int32 [clips], the number of each clip's class; of class-incremental streams."""
        return self.reader.labels

    def map_audio(self, function: Callable, state: dict, out: Any = None) -> Any:
        """function(model, trainable, frozen, aux, batch) [B, ...] of every clip, [clips, ...].

        A clip is seen as training sees it: its middle, where it is longer than the window. The
        function may give a tree of such arrays. With `out`, arrays of the result's shapes, values
        go there batch by batch: they may be more than memory holds.
        """
        batches = self.reader.audio_batches(self.batch_size, training=True, rows=self._rows)
        batches = (batch | self.kept.rows(batch) for batch in batches)
        keys = ("audio", "clip_id", "mask", *self.kept.arrays)
        return self._map(function, state, batches, "clip_id", keys, out)

    def fold_audio(self, function: Callable, state: dict, merge: Callable) -> Any:
        """merge(... merge(merge(None, part 1), part 2) ..., last part) on the host.

        A part is function(model, trainable, frozen, aux, batch) of a whole batch, its padding rows
        included (`batch["mask"]`): sums over clips, of which one a clip would not fit in memory.
        """
        run, total = _compiled(function, self.model, self.mesh), None
        for batch in self.reader.audio_batches(self.batch_size, training=True, rows=self._rows):
            rows = put_batch({k: batch[k] for k in ("audio", "clip_id", "mask")}, self.mesh)
            part, _ = run(state["trainable"], self.frozen, state["aux"], rows)
            total = merge(total, part)
        return total

    def map_text(self, function: Callable, state: dict, out: Any = None) -> Any:
        """The same of every caption, [captions, ...]."""
        batches = self.reader.text_batches(self.batch_size, rows=self._rows)
        return self._map(function, state, batches, "caption_id",
                         ("token_ids", "token_mask", "caption_id", "mask"), out)

    def map_rows(self, function: Callable, state: dict, audio: np.ndarray) -> np.ndarray:
        """The same of audio [n, frames, mels] from elsewhere, of a memory, say; n > 0."""
        def batches():
            for start in range(0, len(audio), self.batch_size):
                rows = np.arange(start, min(start + self.batch_size, len(audio)), dtype=np.int32)
                missing = self.batch_size - len(rows)
                batch = {"audio": np.pad(audio[rows], ((0, missing), (0, 0), (0, 0))),
                         "clip_id": np.pad(rows, (0, missing)),
                         "mask": np.arange(self.batch_size) < len(rows)}
                yield batch if self._rows is None else {
                    name: values[self._rows] for name, values in batch.items()}

        return self._map(function, state, batches(), "clip_id", ("audio", "clip_id", "mask"))

    def clips(self, rows: np.ndarray) -> np.ndarray:
        """Audio [n, frames, mels] of these rows of `reader.split.clips`, as training sees it.

        Every host reads all of it.
        """
        out = np.zeros((len(rows), *self.reader.settings.audio_shape), np.float32)
        for batch in self.reader.audio_batches(self.batch_size, training=True):
            place = {int(c): i for i, c in enumerate(batch["clip_id"]) if batch["mask"][i]}
            for i, row in enumerate(rows):
                if int(row) in place:
                    out[i] = batch["audio"][place[int(row)]]
        return out

    def _map(self, function, state, batches, id_key, keys, out=None):
        run, parts = _compiled(function, self.model, self.mesh), []

        def place(ids, rows):
            for whole, part in zip(jax.tree.leaves(out), jax.tree.leaves(rows)):
                whole[ids] = part

        for batch in batches:
            rows, numbers = run(state["trainable"], self.frozen, state["aux"],
                                put_batch({k: batch[k] for k in keys if k in batch}, self.mesh))
            numbers = jax.device_get(numbers)  # of all hosts' rows
            part = (numbers[id_key][numbers["mask"]],
                    jax.tree.map(lambda x: np.asarray(x)[numbers["mask"]], rows))
            if out is None:
                parts.append(part)
            else:
                place(*part)
        if out is None:
            ids, rows = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
            out = jax.tree.map(np.empty_like, rows)
            place(ids, rows)
        return out


@functools.lru_cache(maxsize=16)
def _compiled(function, model, mesh):
    """(what the function gives, {name: the batch's numbers of its rows}), of all hosts' rows.

    Kept, so that a function (the hook of a method, say) is compiled once for all tasks.
    """
    def run(trainable, frozen, aux, batch):
        numbers = {name: batch[name] for name in NUMBERS if name in batch}
        return function(model, trainable, frozen, aux, batch), numbers

    return jax.jit(run, in_shardings=(None, None, None, by_row(mesh)),
                   out_shardings=replicated(mesh))
