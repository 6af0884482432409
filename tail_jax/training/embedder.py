"""Embeds or scores the clips and captions of a split under a method's current state."""

from __future__ import annotations

import jax
import numpy as np

from tail_jax.training.sharding import by_row, local_rows, put_batch, replicated
from tail_jax.training.task_data import NUMBERS

# What the functions read of a batch.
AUDIO = ("audio", "clip_id", "mask")
TEXT = ("token_ids", "token_mask", "caption_id", "mask")


class Embedder:
    """Compiled embedding functions of one method; rows do not see each other, no randomness.

    A reader (see `data_pipelines.batches`) gives padded batches: one row a chunk of a clip, one a
    caption. A clip's embedding is the mean of its chunks' embeddings, brought to unit length.
    """

    def __init__(self, model, method, mesh, batch_size: int):
        self._batch, self._mesh, self._dimension = batch_size, mesh, model.embedding
        here, rows = replicated(mesh), by_row(mesh)

        def compiled(function):
            def run(trainable, frozen, aux, batch):
                numbers = {name: batch[name] for name in NUMBERS if name in batch}
                return function(model, trainable, frozen, aux, batch), numbers

            return jax.jit(run, in_shardings=(None, None, None, rows), out_shardings=here)

        self._model = model
        self._audio, self._text = compiled(method.embed_audio), compiled(method.embed_text)
        self._scores = compiled(method.scores)

    def audio(self, reader, trainable, frozen, aux, *, training: bool = False) -> np.ndarray:
        """[clips, d]: evaluation chunks of every clip, or the chunk that training sees."""
        total, _ = self._sum(self._audio, reader, (trainable, frozen, aux), training)
        return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)

    def scores(self, reader, trainable, frozen, aux) -> np.ndarray:
        """`method.scores` of every clip, [clips, k]: the mean over its evaluation chunks."""
        total, count = self._sum(self._scores, reader, (trainable, frozen, aux), False)
        return total / count[:, None]

    def lower(self, name: str, trainable, frozen, aux, audio_shape: tuple[int, ...],
              max_tokens: int) -> jax.stages.Lowered:
        """The program "embed_audio", "embed_text" or "scores" for batches of these shapes.

        Takes arrays, or shapes that say by their sharding where they would lie. `audio_shape` is
        that of a row.
        """
        rows, shape = self._batch, jax.ShapeDtypeStruct
        batch = self._model.input_shapes(rows, max_tokens) | {
            "audio": shape((rows, *audio_shape), np.float32), "mask": shape((rows,), np.bool_),
            "clip_id": shape((rows,), np.int32), "caption_id": shape((rows,), np.int32)}
        function, keys = {"embed_audio": (self._audio, AUDIO), "embed_text": (self._text, TEXT),
                          "scores": (self._scores, AUDIO)}[name]
        return function.lower(trainable, frozen, aux, {key: batch[key] for key in keys})

    def _sum(self, function, reader, state, training):
        """(sum over the chunks of each clip, [clips, k]; number of its chunks)."""
        clips, total = len(reader.split.clips), None
        count = np.zeros(clips, np.int32)
        for batch in reader.audio_batches(self._batch, training=training, rows=self._rows):
            row, number = self._run(function, *state, batch, AUDIO)
            if total is None:
                total = np.zeros((clips, row.shape[1]), np.float32)
            clip = number["clip_id"][number["mask"]]
            np.add.at(total, clip, row[number["mask"]])
            np.add.at(count, clip, 1)
        return total, count

    def text(self, reader, trainable, frozen, aux) -> np.ndarray:
        """[captions, d]."""
        out = np.zeros((len(reader.split.captions), self._dimension), np.float32)
        for batch in reader.text_batches(self._batch, rows=self._rows):
            row, number = self._run(self._text, trainable, frozen, aux, batch, TEXT)
            out[number["caption_id"][number["mask"]]] = row[number["mask"]]
        return out

    @property
    def _rows(self):
        return local_rows(self._mesh, self._batch)

    def _run(self, function, trainable, frozen, aux, batch, keys):
        """(rows, {name: what `NUMBERS` says of them}), of all hosts."""
        device_batch = put_batch({k: batch[k] for k in keys}, self._mesh)
        return jax.device_get(function(trainable, frozen, aux, device_batch))
