"""Replay of kept pairs: ER (Chaudhry et al., 2019) and DER++ style (Buzzega et al., NeurIPS 2020).

The memory is a reservoir (Vitter, 1985) of K pairs. At the end of a task each of its training pairs
is offered once; of the n pairs offered so far, over all tasks, the t-th takes slot j = a uniform
draw from 0..t-1 if j < K, so that the memory is always a uniform sample of min(n, K) of them. A
pair is kept as training sees it without augmentation: the middle of its clip, and its tokens.

In the first task a batch is new pairs alone; later a quarter of it is drawn from the memory without
replacement (padding, where the memory holds less). A batch keeps its size and a task its number of
updates, so fewer new pairs are seen.

    ER      L = L_task over the whole batch
    DER     L = L_task + alpha mean over rows of the memory ( ||a - a°||^2 + ||t - t°||^2 )

with ° for the embeddings that the model gave to the pair when it was stored, at the end of its
task. Where there are classes, a pair is a clip and its label, the loss compares all classes seen,
and DER keeps the logits o over all classes: alpha mean ||o - o°||^2 / C.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.corpora import normalise_caption
from tail_jax.methods.full import Sequential

# What the memory knows beside its rows.
COUNTS = ("pairs_offered", "clips_offered")


@dataclasses.dataclass(frozen=True)
class Replay(Sequential):
    """ER: full fine-tuning on new pairs and kept ones alike.

    Attributes:
        capacity: K, pairs.
        replay_share: part of a batch that comes from the memory, rounded down to whole rows; one at
            the least, where that leaves a new pair.
    """

    capacity: int = 500
    replay_share: float = 0.25

    loss_classes = "seen"

    def __post_init__(self):
        if self.capacity < 1:
            raise ValueError(f"method.capacity is {self.capacity}; expected 1 or more")
        if not 0 <= self.replay_share < 1:
            raise ValueError(f"method.replay_share is {self.replay_share}; expected at least 0 "
                             "and less than 1")

    def memory(self, model, audio_shape, max_tokens):
        empty = lambda dtype, *shape: np.zeros((self.capacity, *shape), dtype)
        other = {"label": empty(np.int32)} if model.classes else {
            "token_ids": empty(np.int32, max_tokens), "token_mask": empty(bool, max_tokens),
            "caption_key": empty(np.int32)}
        return {"audio": empty(np.float32, *audio_shape), "clip_id": empty(np.int32),
                "mask": empty(bool)} | other | {name: np.zeros((), np.int32) for name in COUNTS}

    def end_task(self, state, task, data):
        old, reader = state["memory"], data.reader
        memory = {name: np.array(values) for name, values in old.items()}
        slots, pairs = reservoir(self.capacity, int(old["pairs_offered"]), len(reader.pairs),
                                 np.random.default_rng(data.seed))
        rows = self.rows(state, data, reader.pairs[pairs])
        # Negative, and never used before: captions of one clip stay each other's positives.
        rows["clip_id"] = -1 - memory["clips_offered"] - reader.pairs[pairs, 0]
        for name, values in rows.items():
            memory[name][slots] = values
        memory["pairs_offered"] += np.int32(len(reader.pairs))
        memory["clips_offered"] += np.int32(len(reader.split.clips))
        return state | {"memory": memory}

    def rows(self, state, data, pairs) -> dict[str, np.ndarray]:
        """What the memory keeps of `pairs` [n, 2] (clip row, caption row), all but `clip_id`."""
        clips, captions = pairs.T
        reader = data.reader
        other = {"label": reader.labels[clips]} if "label" in state["memory"] else {
            "token_ids": reader.token_ids[captions], "token_mask": reader.token_mask[captions],
            "caption_key": hashes(reader.split, captions)}
        return {"audio": data.clips(clips), "mask": np.ones(len(pairs), bool)} | other

    def replay_rows(self, state, batch_size):
        if not self.replay_share or not np.asarray(state["memory"]["mask"]).any():
            return 0
        # One at least, or a small batch would replay nothing without a word; and one new pair.
        return min(max(int(batch_size * self.replay_share), 1), batch_size - 1)

    def replay(self, state, batch, rows, reader, random):
        memory = {name: np.asarray(values) for name, values in state["memory"].items()
                  if name not in COUNTS}
        chosen = random.permutation(np.flatnonzero(memory["mask"]))[:rows]
        missing = rows - len(chosen)
        new = dict(batch)
        if "caption_key" in memory:
            # A reader numbers the captions of one split; a hash means the same in all.
            new["caption_key"] = hashes(reader.split, batch["caption_id"])

        def joined(name):
            kept = memory[name][chosen]
            if name not in new:
                new[name] = np.zeros((len(batch["mask"]), *kept.shape[1:]), kept.dtype)
            padding = np.zeros((missing, *kept.shape[1:]), kept.dtype)
            return np.concatenate([new[name], kept, padding])

        return {name: joined(name) for name in memory}


@dataclasses.dataclass(frozen=True)
class DarkReplay(Replay):
    """DER++ style: ER, and kept pairs are drawn to where they were when stored.

    Attributes:
        stored_weight: alpha; the default is ours.
    """

    stored_weight: float = 0.5

    def memory(self, model, audio_shape, max_tokens):
        stored = {name: np.zeros(x.shape, x.dtype)
                  for name, x in self.replay_shapes(model, self.capacity).items()}
        return super().memory(model, audio_shape, max_tokens) | stored

    def replay_shapes(self, model, rows):
        shape = lambda width: jax.ShapeDtypeStruct((rows, width), jnp.float32)
        if model.classes:
            return {"stored_logits": shape(model.classes)}
        return {"stored_audio": shape(model.embedding), "stored_text": shape(model.embedding)}

    def rows(self, state, data, pairs):
        rows = super().rows(state, data, pairs)
        if "stored_logits" in state["memory"]:
            return rows | {"stored_logits": data.map_audio(self.scores, state)[pairs[:, 0]]}
        return rows | {"stored_audio": data.map_audio(self.embed_audio, state)[pairs[:, 0]],
                       "stored_text": data.map_text(self.embed_text, state)[pairs[:, 1]]}

    def objective(self, model, trainable, frozen, aux, outputs, batch):
        loss, metrics = super().objective(model, trainable, frozen, aux, outputs, batch)
        kept = batch["mask"] & (batch["clip_id"] < 0)
        if model.classes:
            distance = ((outputs["logits"] - batch["stored_logits"]) ** 2).mean(-1)
        else:
            distance = sum(((outputs[side] - batch[f"stored_{side}"]) ** 2).sum(-1)
                           for side in model.towers)
        stored = jnp.where(kept, distance, 0.0).sum() / jnp.maximum(kept.sum(), 1)
        return loss + self.stored_weight * stored, metrics | {"stored": stored}


def reservoir(capacity: int, before: int, count: int,
              random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(slots, items): which of `count` items lie in which slots after all have been offered.

    `before` items were offered earlier; slots that still hold one of these are not named.
    """
    draws = random.integers(0, before + np.arange(count) + 1)
    # The first items fill the slots one by one: draws among those would leave holes.
    filling = np.arange(before, min(capacity, before + count))
    draws[:len(filling)] = filling
    taken = {int(slot): item for item, slot in enumerate(draws) if slot < capacity}
    return np.array([*taken], np.int64), np.array([*taken.values()], np.int64)


def hashes(split, captions: np.ndarray) -> np.ndarray:
    """int32 [n], not negative: equal where normalised captions are, in whatever split."""
    return np.array([_hash(split.captions[row]) for row in captions], np.int32).reshape(-1)


@functools.lru_cache(maxsize=1 << 16)
def _hash(caption: str) -> int:
    digest = hashlib.sha256(normalise_caption(caption).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
