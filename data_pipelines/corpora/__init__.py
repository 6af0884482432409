"""What a corpus is: clips with captions, in three splits."""

import dataclasses
import functools
import hashlib
import pathlib
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

SPLIT_NAMES = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class Clip:
    """One recording.

    Attributes:
      id: unique in its split.
      path: the audio file.
      captions: one or more sentences that describe it.
      label: class name, "" where the corpus has no classes.
      group: id of the source recording, "" where unknown; a group lies in one split, except where
        a stream of classes splits at random (`sessions`).
    """

    id: str
    path: pathlib.Path
    captions: tuple[str, ...]
    label: str = ""
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Split:
    """The clips of one of the three parts of a corpus (`name` is train, valid or test)."""

    corpus: str
    name: str
    clips: tuple[Clip, ...]

    @functools.cached_property
    def captions(self) -> tuple[str, ...]:
        """All captions, flat, in clip order; their rows are the `caption_id` of a batch."""
        return tuple(caption for clip in self.clips for caption in clip.captions)

    @functools.cached_property
    def caption_clip(self) -> np.ndarray:
        """int32 [captions], read-only: row in `clips` of the clip that each caption belongs to."""
        rows = np.repeat(
            np.arange(len(self.clips), dtype=np.int32),
            np.array([len(clip.captions) for clip in self.clips], np.int64),
        )
        rows.flags.writeable = False
        return rows


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A named data set with its three splits, any of which may have no clips."""

    name: str
    train: Split
    valid: Split
    test: Split


def make_corpus(name: str, clips: Iterable[tuple[str, Clip]]) -> Corpus:
    """Returns a corpus of (split name, clip), each split in the order given."""
    parts: dict[str, list[Clip]] = {split: [] for split in SPLIT_NAMES}
    for split, clip in clips:
        parts[split].append(clip)
    return Corpus(name, **{split: Split(name, split, tuple(parts[split])) for split in SPLIT_NAMES})


def choose_clips(clips: Sequence[Clip], limit: int) -> tuple[Clip, ...]:
    """Returns at most `limit` clips (all for 0), in their order.

    The choice depends on the ids alone, and a smaller one is part of a larger one.
    """
    if not limit or len(clips) <= limit:
        return tuple(clips)
    ranked = sorted(clips, key=lambda clip: hashlib.sha1(clip.id.encode()).hexdigest())
    chosen = {clip.id for clip in ranked[:limit]}
    return tuple(clip for clip in clips if clip.id in chosen)


def normalise_caption(text: str) -> str:
    """Returns `text` in lower case, without punctuation, with single spaces.

    Captions that agree in this form count as equal in training and in retrieval scores. Punctuation
    (Unicode category P) parts words, except the apostrophe, which is dropped: `rain,wind` is
    `rain wind`, `it's` is `its`. Compatibility forms are folded first (NFKC), so that the two ways
    to write an accented letter are one.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = text.replace("'", "").replace("\u2019", "")
    return " ".join("".join(" " if unicodedata.category(c)[0] == "P" else c for c in text).split())


def caption_keys(captions) -> np.ndarray:
    """Returns int32 [captions]: equal where, and only where, normalised captions are equal."""
    numbers: dict[str, int] = {}
    keys = [numbers.setdefault(normalise_caption(text), len(numbers)) for text in captions]
    return np.array(keys, np.int32)


def merge_splits(splits: Sequence[Split]) -> Split:
    """Returns one split with the clips of all, for training on all tasks jointly.

    Ids and groups are prefixed by the corpus (`esc10/audio/1.flac`), so that they stay unique.

    Raises:
      ValueError: no splits, splits of different names, or two of one corpus.
    """
    corpora = [split.corpus for split in splits]
    names = {split.name for split in splits}
    if len(names) != 1 or len(set(corpora)) != len(corpora):
        found = ", ".join(f"{split.corpus}/{split.name}" for split in splits) or "nothing"
        raise ValueError(f"cannot merge {found}; expected one split each of different corpora")
    clips = tuple(
        dataclasses.replace(
            clip,
            id=f"{split.corpus}/{clip.id}",
            group=f"{split.corpus}/{clip.group}" if clip.group else "",
        )
        for split in splits
        for clip in split.clips
    )
    return Split("+".join(corpora), names.pop(), clips)
