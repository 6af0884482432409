"""What a method's hooks see of a task beside the steps: its training data, nothing of others."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable, Iterator

import jax
import numpy as np

from data_pipelines.batches import SplitReader
from tail_jax.training.sharding import by_row, put_batch, replicated


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
    """

    model: Any
    frozen: Any
    reader: SplitReader
    key: jax.Array
    seed: int
    batch_size: int
    mesh: Any

    def batches(self, count: int) -> Iterator[dict]:
        """`count` training batches in an order of their own, on the devices."""
        batches = self.reader.train_batches(self.batch_size, self.seed)
        keys = ("audio", "token_ids", "token_mask", "clip_id", "caption_key", "label", "mask")
        for _ in range(count):
            batch = next(batches)
            yield put_batch({k: batch[k] for k in keys if k in batch}, self.mesh)

    @property
    def labels(self) -> np.ndarray:
        """int32 [clips], the number of each clip's class; of class-incremental streams."""
        return self.reader.labels

    def map_audio(self, function: Callable, state: dict) -> np.ndarray:
        """function(model, trainable, frozen, aux, batch) [B, ...] of every clip, [clips, ...].

        A clip is seen as training sees it: its middle, where it is longer than the window.
        """
        batches = self.reader.audio_batches(self.batch_size, training=True)
        return self._map(function, state, batches, "clip_id", ("audio", "clip_id", "mask"))

    def fold_audio(self, function: Callable, state: dict, merge: Callable) -> Any:
        """merge(... merge(merge(None, part 1), part 2) ..., last part) on the host.

        A part is function(model, trainable, frozen, aux, batch) of a whole batch, its padding rows
        included (`batch["mask"]`): sums over clips, of which one a clip would not fit in memory.
        """
        run, total = _compiled(function, self.model, self.mesh), None
        for batch in self.reader.audio_batches(self.batch_size, training=True):
            rows = put_batch({k: batch[k] for k in ("audio", "clip_id", "mask")}, self.mesh)
            total = merge(total, run(state["trainable"], self.frozen, state["aux"], rows))
        return total

    def map_text(self, function: Callable, state: dict) -> np.ndarray:
        """The same of every caption, [captions, ...]."""
        batches = self.reader.text_batches(self.batch_size)
        return self._map(function, state, batches, "caption_id",
                         ("token_ids", "token_mask", "mask"))

    def map_rows(self, function: Callable, state: dict, audio: np.ndarray) -> np.ndarray:
        """The same of audio [n, frames, mels] from elsewhere, of a memory, say; n > 0."""
        def batches():
            for start in range(0, len(audio), self.batch_size):
                rows = np.arange(start, min(start + self.batch_size, len(audio)), dtype=np.int32)
                missing = self.batch_size - len(rows)
                yield {"audio": np.pad(audio[rows], ((0, missing), (0, 0), (0, 0))),
                       "clip_id": np.pad(rows, (0, missing)),
                       "mask": np.arange(self.batch_size) < len(rows)}

        return self._map(function, state, batches(), "clip_id", ("audio", "clip_id", "mask"))

    def clips(self, rows: np.ndarray) -> np.ndarray:
        """Audio [n, frames, mels] of these rows of `reader.split.clips`, as training sees it."""
        out = np.zeros((len(rows), *self.reader.settings.audio_shape), np.float32)
        for batch in self.reader.audio_batches(self.batch_size, training=True):
            place = {int(c): i for i, c in enumerate(batch["clip_id"]) if batch["mask"][i]}
            for i, row in enumerate(rows):
                if int(row) in place:
                    out[i] = batch["audio"][place[int(row)]]
        return out

    def _map(self, function, state, batches, id_key, keys):
        run = _compiled(function, self.model, self.mesh)
        ids, values = [], []
        for batch in batches:
            rows = run(state["trainable"], self.frozen, state["aux"],
                       put_batch({k: batch[k] for k in keys}, self.mesh))
            ids.append(batch[id_key][batch["mask"]])
            values.append(np.asarray(rows)[batch["mask"]])
        values, ids = np.concatenate(values), np.concatenate(ids)
        out = np.empty_like(values)
        out[ids] = values
        return out


@functools.lru_cache(maxsize=8)
def _compiled(function, model, mesh):
    """Kept, so that a function (the hook of a method, say) is compiled once for all tasks."""
    return jax.jit(lambda *args: function(model, *args),
                   in_shardings=(None, None, None, by_row(mesh)), out_shardings=replicated(mesh))
