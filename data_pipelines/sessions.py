"""A labelled corpus -> sessions of disjoint classes.

Everything drawn here is a function of seeds, of the name of the stream and of the sorted ids and
class names: the order of files and rows has no part in it. Nor has what audio is at hand, where a
table lists the clips; where folders do, a file that is not there is no clip.
"""

import dataclasses
import pathlib
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines import listing
from data_pipelines.corpora import SPLIT_NAMES, Clip, Corpus, choose_clips, make_corpus
from data_pipelines.corpora.tables import read_lines

# One class's clips by split name.
Parts = Mapping[str, tuple[Clip, ...]]

_ORDER, _VALID = 1, 2  # the third word of the seeds of the class order and of the validation clips


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a corpus is cut into sessions.

    Attributes:
      classes: those that take part; () is all.
      sessions: how many, of equally many classes each; or
      classes_per_session: how many classes each has; the last session may have fewer.
      first: keep only so many sessions from the first on; 0 keeps all.
      order_seed: of the order of the classes.
      order_file: a file with one class a line, that order instead.
      split: "random", or the name of the split that the corpus brings.
      split_seed: of the random split and of the validation clips.
      valid: share of the training clips of each session that become its validation clips, where
        the split has none for it: 0.1 to choose settings, 0 to train on all.
      limit: most clips of a class; 0 is all.
    """

    classes: tuple[str, ...] = ()
    sessions: int = 0
    classes_per_session: int = 0
    first: int = 0
    order_seed: int = 0
    order_file: str = ""
    split: str = "random"
    split_seed: int = 0
    valid: float = 0.0
    limit: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is int and getattr(self, field.name) < 0:
                found = getattr(self, field.name)
                raise ValueError(f"stream.{field.name} is {found}, expected 0 or more")
        if bool(self.sessions) == bool(self.classes_per_session):
            raise ValueError(
                f"stream.sessions is {self.sessions} and stream.classes_per_session "
                f"{self.classes_per_session}; expected one of them, the other 0"
            )
        if not 0 <= self.valid <= 0.5:
            raise ValueError(f"stream.valid is {self.valid}, expected a share from 0 to 0.5")


def cut_sessions(
    corpus: Corpus, stream: str, cut: Cut
) -> tuple[tuple[str, ...], tuple[Corpus, ...]]:
    """Cuts a corpus into sessions.

    The random split draws from one generator, SeedSequence([split_seed, crc32(stream)]): for each
    class in sorted order, a permutation of its sorted ids, of which the first n // 5 are test.
    The order of classes is a permutation of the sorted names under SeedSequence([order_seed,
    crc32(stream), 1]).

    Args:
      corpus: its clips have labels; its splits are those that it brings.
      stream: name of the stream, part of all seeds (its CRC-32 in UTF-8).
      cut: how.

    Returns:
      classes: the names in the order of the stream.
      sessions: one corpus a session, STREAM_1, STREAM_2, ... with leading zeros; clips in the
        order of classes and ids, each with the class as its only caption.

    Raises:
      ValueError: clips without a class, classes that are not there, an order that is not a
        permutation, a number of sessions that does not divide the classes, a group on both sides
        of a split that the corpus brings, or classes without training or test clips.
      FileNotFoundError: no such `order_file`.
    """
    clips = _by_class(corpus, cut.classes)
    classes = class_order(tuple(clips), stream, cut)
    if cut.split == "random":
        parts = _random_split(clips, stream, cut)
    else:
        _check_groups(corpus.name, clips)
        parts = {label: _limit_parts(found, cut.limit) for label, found in clips.items()}
    _check_parts(corpus.name, parts, cut)
    ranks = _valid_ranks(parts, stream, cut.split_seed)
    chunks = _chunks(classes, cut)
    digits = len(str(len(chunks)))
    sessions = []
    for number, names in enumerate(chunks[: cut.first or None], 1):
        session = f"{stream}_{number:0{digits}d}"
        chosen = {label: parts[label] for label in names}
        if cut.valid and not any(part["valid"] for part in chosen.values()):
            chosen = _hold_out(session, chosen, ranks, cut.valid)
        sessions.append(
            make_corpus(
                session,
                (
                    (split, dataclasses.replace(clip, captions=(label,)))
                    for label, part in chosen.items()
                    for split in SPLIT_NAMES
                    for clip in sorted(part[split], key=lambda clip: clip.id)
                ),
            )
        )
    return tuple(label for names in chunks[: cut.first or None] for label in names), tuple(sessions)


def class_order(labels: Sequence[str], stream: str, cut: Cut) -> tuple[str, ...]:
    """Returns the classes in the order that a file or the seed tells (`cut_sessions`)."""
    labels = sorted(labels)
    if not cut.order_file:
        order = _generator(cut.order_seed, stream, _ORDER).permutation(len(labels))
        return tuple(labels[i] for i in order)
    path = pathlib.Path(cut.order_file)
    order = [line for _, line in read_lines(path)]
    faults = [f"'{label}' is not there" for label in labels if label not in order]
    faults += [f"'{label}' is no class of the stream" for label in order if label not in labels]
    faults += [f"'{label}' is there twice" for label in labels if order.count(label) > 1]
    if faults:
        raise ValueError(
            listing(f"{path}: expected the {len(labels)} classes of the stream once each", faults)
        )
    return tuple(order)


def _by_class(corpus: Corpus, wanted: Sequence[str]) -> dict[str, Parts]:
    """Returns the clips of the wanted classes (all for ()) by class, sorted, and by split."""
    found: dict[str, dict[str, list[Clip]]] = {}
    for split in SPLIT_NAMES:
        for clip in getattr(corpus, split).clips:
            parts = found.setdefault(clip.label, {name: [] for name in SPLIT_NAMES})
            parts[split].append(clip)
    if "" in found:
        nameless = [clip.id for part in found[""].values() for clip in part]
        raise ValueError(
            listing(f"corpus '{corpus.name}': {len(nameless)} clips have no class", nameless)
        )
    unknown = [label for label in wanted if label not in found]
    if unknown or not found:
        raise ValueError(
            f"stream.classes: corpus '{corpus.name}' has no {', '.join(unknown) or 'clips'}; it "
            f"has {', '.join(sorted(found)) or 'nothing'}"
        )
    return {
        label: {split: tuple(part) for split, part in found[label].items()}
        for label in sorted(wanted or found)
    }


def _random_split(clips: Mapping[str, Parts], stream: str, cut: Cut) -> dict[str, Parts]:
    """Returns `clips` (sorted by class) split anew, train and test 8:2."""
    generator = _generator(cut.split_seed, stream)
    parts = {}
    for label, found in clips.items():
        every = choose_clips([clip for part in found.values() for clip in part], cut.limit)
        every = sorted(every, key=lambda clip: clip.id)
        drawn = tuple(every[i] for i in generator.permutation(len(every)))
        tests = len(drawn) // 5
        parts[label] = {"train": drawn[tests:], "valid": (), "test": drawn[:tests]}
    return parts


def _limit_parts(parts: Parts, limit: int) -> Parts:
    """Returns at most `limit` clips of a class, each split its share, and one at least."""
    total = sum(map(len, parts.values()))
    if not limit or total <= limit:
        return parts
    share = {split: max(1, limit * len(part) // total) for split, part in parts.items() if part}
    if "train" in share:  # what the others leave
        share["train"] = limit - sum(share.values()) + share["train"]
    return {split: choose_clips(part, share[split]) if part and share[split] > 0 else ()
            for split, part in parts.items()}  # fmt: skip


def _check_groups(corpus: str, clips: Mapping[str, Parts]) -> None:
    """Raises where a group is in two splits."""
    splits: dict[str, set[str]] = {}
    for parts in clips.values():
        for split, part in parts.items():
            for clip in part:
                if clip.group:
                    splits.setdefault(clip.group, set()).add(split)
    parted = sorted(group for group, where in splits.items() if len(where) > 1)
    if parted:
        raise ValueError(
            listing(f"corpus '{corpus}': {len(parted)} groups are in more than one split", parted)
        )


def _check_parts(corpus: str, parts: Mapping[str, Parts], cut: Cut) -> None:
    """Raises where a class has no clips to train or to test on."""
    faults = [
        f"'{label}' has {len(part['train'])} training and {len(part['test'])} test clips"
        for label, part in parts.items()
        if not part["train"] or not part["test"]
    ]
    if faults:
        limit = f" and limit {cut.limit}" if cut.limit else ""
        raise ValueError(
            listing(
                f"corpus '{corpus}' with split '{cut.split}'{limit}: {len(faults)} of {len(parts)} "
                "classes cannot be trained and tested; take more clips, another split, or other "
                "classes",
                faults,
            )
        )


def _chunks(classes: Sequence[str], cut: Cut) -> list[tuple[str, ...]]:
    """Returns the classes of each session."""
    if cut.sessions and len(classes) % cut.sessions:
        divisors = [n for n in range(1, len(classes) + 1) if len(classes) % n == 0]
        raise ValueError(
            f"stream.sessions is {cut.sessions}, which does not divide {len(classes)} classes; "
            f"expected one of {', '.join(map(str, divisors))}, or classes_per_session instead"
        )
    size = cut.classes_per_session or len(classes) // cut.sessions
    return [tuple(classes[i : i + size]) for i in range(0, len(classes), size)]


def _valid_ranks(parts: Mapping[str, Parts], stream: str, seed: int) -> dict[str, tuple]:
    """Returns {id: rank} of the training clips that may become validation clips.

    The clips of a class are permuted; clip i of n has rank (i + 1/2) / n, so that the lowest ranks
    of a session are its classes in proportion. A class's last clip has none: it stays to be
    trained on. Ties between classes are broken by another permutation.
    """
    generator = _generator(seed, stream, _VALID)
    ties = generator.permutation(len(parts))
    ranks = {}
    for tie, part in zip(ties, parts.values()):
        ids = sorted(clip.id for clip in part["train"])
        for i, drawn in enumerate(generator.permutation(len(ids))[:-1]):
            ranks[ids[drawn]] = ((i + 0.5) / len(ids), int(tie))
    return ranks


def _hold_out(
    session: str, parts: Mapping[str, Parts], ranks: Mapping[str, tuple], share: float
) -> dict[str, Parts]:
    """Returns the parts of a session with a share of its training clips, one at least, in valid."""
    ids = [clip.id for part in parts.values() for clip in part["train"]]
    drawn = sorted((clip for clip in ids if clip in ranks), key=ranks.__getitem__)
    chosen = set(drawn[: max(1, round(share * len(ids)))])
    if not chosen:
        raise ValueError(
            f"stream.valid is {share}, but session '{session}' has one training clip a class; "
            "expected more, or valid 0"
        )
    return {
        label: {
            "train": tuple(clip for clip in part["train"] if clip.id not in chosen),
            "valid": tuple(clip for clip in part["train"] if clip.id in chosen),
            "test": part["test"],
        }
        for label, part in parts.items()
    }


def _generator(seed: int, stream: str, *more: int) -> np.random.Generator:
    words = [seed, zlib.crc32(stream.encode()), *more]
    return np.random.default_rng(np.random.SeedSequence(words))
