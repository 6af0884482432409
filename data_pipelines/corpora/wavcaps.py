"""Two parts of WavCaps: BBC Sound Effects and the strongly labelled part of AudioSet (AudioSet-SL).

As on https://huggingface.co/datasets/cvssp/WavCaps, archives unpacked: `bbc_final.json`,
`as_final.json` ({"num_captions_per_audio": 1, "data": [{"id", "caption", ...}]}), and one audio
file an entry, named by its id. They have no splits; these are ours (`split_by_hash`).
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence

from data_pipelines.corpora import normalise_caption
from data_pipelines.corpora.audiocaps import read_video_ids
from data_pipelines.corpora.sources import (
    AudioFiles,
    Listing,
    SourceClip,
    drop_suffix,
    find_file,
    raise_faults,
)

OVERLAPS = {"all": ("train", "valid", "test"), "eval_only": ("valid", "test"), "none": ()}
_TEST = _VALID = 1000
# Corpus: name of the table, its folder, names of its list in a blacklist.
_PARTS = {
    "bbc": ("bbc_final.json", "BBC_Sound_Effects", ("BBC_Sound_Effects", "BBC")),
    "audioset_sl": ("as_final.json", "AudioSet_SL", ("AudioSet_SL", "AudioSet")),
}


def read_wavcaps(
    source,
    corpus: str,
    overlap: str = "none",
    audiocaps: Sequence = (),
    blacklists: Sequence = (),
    group_by_caption: bool = False,
) -> Listing:
    """Reads the table, decides the splits, and looks for the audio in `source` and below.

    Args:
      source: folder that holds the table, in itself, in `json_files/PART` or in `PART`.
      corpus: "bbc" or "audioset_sl".
      overlap: which clips of AudioCaps are removed from AudioSet-SL, whatever their time: "all",
        "eval_only" (valid and test), "none". They are removed before the splits are made.
      audiocaps: folders with the tables of AudioCaps.
      blacklists: files of WavCaps, {"AudioSet": [id, ...], ...}. What they name is removed after
        the splits are made: a blacklist lowers counts and moves no clip.
      group_by_caption: as in `split_by_hash`.

    Raises:
      FileNotFoundError: a table or a blacklist is missing.
      ValueError: a file is not as described; an id with two captions; all such ids in one error.
    """
    name, part, _ = _PARTS[corpus]
    captions = _read_captions(corpus, find_file(source, name, (".", f"json_files/{part}", part)))
    notes = []
    splits = OVERLAPS[overlap]
    if splits:
        if not audiocaps:
            raise ValueError(
                f"overlap is '{overlap}', which needs the tables of AudioCaps: name their folder, "
                "or set overlap to none"
            )
        taken = set().union(*(read_video_ids(folder, splits) for folder in audiocaps))
        before = len(captions)
        captions = {key: text for key, text in captions.items() if key not in taken}
        notes.append(f"{before - len(captions):,} clips of AudioCaps removed")
    split_of = split_by_hash(corpus, captions, group_by_caption)
    if blacklists:
        banned = set().union(*(_read_blacklist(corpus, path) for path in blacklists))
        before = len(captions)
        captions = {key: text for key, text in captions.items() if key not in banned}
        notes.append(f"{before - len(captions):,} clips of the blacklists removed")
    files = AudioFiles(source)
    clips = (
        SourceClip(key, split_of[key], (caption,), files.find(_stems(corpus, key), (part,)))
        for key, caption in captions.items()
    )
    return Listing(tuple(clips), tuple(notes))


def split_by_hash(
    corpus: str, captions: Mapping[str, str], group_by_caption: bool = False
) -> dict[str, str]:
    """Returns the split of every id: a function of corpus and ids, not of the files at hand.

    Ids in the order of sha1("tail-v1:<corpus>:<id>") as hexadecimal digits: the first 1,000 are
    test, the next 1,000 valid, the others train.

    Args:
      corpus: its key.
      captions: {normalised id: caption}.
      group_by_caption: hash the normalised caption instead of the id, so that takes of one sound
        under one caption share a split: that of the first of them.
    """
    digest = {
        key: hashlib.sha1(
            f"tail-v1:{corpus}:{normalise_caption(text) if group_by_caption else key}".encode()
        ).hexdigest()
        for key, text in captions.items()
    }
    splits, before, first = {}, None, 0
    for rank, key in enumerate(sorted(digest, key=lambda key: (digest[key], key))):
        if digest[key] != before:
            before, first = digest[key], rank
        splits[key] = (
            "test" if first < _TEST else "valid" if first < _TEST + _VALID else "train"
        )
    return splits


def normalise_id(corpus: str, name: str) -> str:
    """Returns an id without the suffix of a file and, for AudioSet, without YouTube's `Y`."""
    name = drop_suffix(name.strip())
    return name[1:] if corpus == "audioset_sl" and len(name) == 12 and name[0] == "Y" else name


def _stems(corpus: str, key: str) -> tuple[str, ...]:
    return (f"Y{key}", key) if corpus == "audioset_sl" else (key,)


def _read_captions(corpus: str, path: pathlib.Path) -> dict[str, str]:
    """Returns {normalised id: caption} in the order of the table."""
    table = _read_json(path)
    rows = table.get("data") if isinstance(table, dict) else None
    if not isinstance(rows, list) or table.get("num_captions_per_audio") != 1:
        raise ValueError(
            f"{path}: expected the layout of WavCaps, an object with num_captions_per_audio (1) "
            "and data (a list)"
        )
    captions: dict[str, str] = {}
    faults = []
    for number, row in enumerate(rows, 1):
        values = [row.get(field) if isinstance(row, dict) else None for field in ("id", "caption")]
        if not all(isinstance(value, str) and value.strip() for value in values):
            faults.append(f"entry {number}: no {'caption' if values[0] else 'id'}")
            continue
        key, caption = normalise_id(corpus, values[0]), values[1].strip()
        if captions.setdefault(key, caption) != caption:
            faults.append(f"entry {number}: '{values[0]}' had another caption before")
    raise_faults(path, faults)
    return captions


def _read_blacklist(corpus: str, path) -> set[str]:
    """Returns the normalised ids of one corpus; empty where the file has no list for it."""
    table = _read_json(pathlib.Path(path))
    if not isinstance(table, dict) or not all(isinstance(ids, list) for ids in table.values()):
        raise ValueError(f"{path}: expected a blacklist of WavCaps, an object of lists of ids")
    return {
        normalise_id(corpus, str(name)) for key in _PARTS[corpus][2] for name in table.get(key, ())
    }


def _read_json(path: pathlib.Path):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
