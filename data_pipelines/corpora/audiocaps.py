"""AudioCaps: `train.csv`, `val.csv`, `test.csv`, and ten seconds of audio for each row.

The tables are those of https://github.com/cdjkim/audiocaps (`dataset/`: version 1, `dataset2.0/`)
with the columns audiocap_id, youtube_id, start_time (s), caption. Version 1 has one caption a clip
in train and five in the others. The audio is not part of it; whoever fetches it names it by the
YouTube id, and some of it is always gone.
"""

import pathlib

from data_pipelines.corpora.sources import (
    AudioFiles,
    Listing,
    SourceClip,
    find_file,
    raise_faults,
)
from data_pipelines.corpora.tables import read_rows

_SECONDS = 10
_TABLES = {"train": "train.csv", "valid": "val.csv", "test": "test.csv"}
_FOLDERS = {"train": ("train",), "valid": ("val", "valid", "validation"), "test": ("test",)}
_CAPTIONS = {"train": 1, "valid": 5, "test": 5}


def read_audiocaps(source, tables: str = "dataset", counts: bool = True) -> Listing:
    """Reads the tables, and looks for each clip's audio in `source` and below.

    A file is found under `ID`, `ID_START` or `ID_START_END`, each also with a `Y` before it, times
    in seconds or milliseconds. `Clip.id` is `ID_START` with the start in seconds.

    Args:
      source: folder that holds the tables, in itself or in a folder of the name `tables`.
      tables: "dataset" or "dataset2.0", as in the repository.
      counts: whether clips must have one caption in train and five in the others.

    Raises:
      FileNotFoundError: a table is missing.
      ValueError: faulty rows, a clip in two splits, or with another number of captions; all in one
        error.
    """
    captions = _read_captions(source, tables, counts)
    files = AudioFiles(source)
    starts: dict[str, set[int]] = {}
    for video, start in captions:
        starts.setdefault(video, set()).add(start)
    clips = []
    for (video, start), (split, texts) in captions.items():
        # A name without times is of no use where a video gave several clips.
        stems = _stems(video, start, timeless=len(starts[video]) == 1)
        audio = files.find(stems, _FOLDERS[split])
        clips.append(SourceClip(f"{video}_{start}", split, tuple(texts), audio))
    return Listing(tuple(clips))


def read_video_ids(source, splits=tuple(_TABLES)) -> set[str]:
    """Returns the YouTube ids of some splits, of all versions whose tables lie in `source`.

    Raises:
      FileNotFoundError: a table is missing.
    """
    places = [name for name in (".", "dataset", "dataset2.0")
              if (pathlib.Path(source) / name / _TABLES["train"]).is_file()]  # fmt: skip
    return {
        row["youtube_id"].strip()
        for place in places or ["."]
        for split in splits
        for _, row in read_rows(find_file(source, _TABLES[split], [place]), ["youtube_id"])
    }


def _read_captions(source, tables: str, counts: bool):
    """Returns {(video, start): (split, captions)} in the order of the tables."""
    clips: dict[tuple[str, int], tuple[str, list[str]]] = {}
    faults = []
    paths = {split: find_file(source, name, (".", tables)) for split, name in _TABLES.items()}
    for split, path in paths.items():
        for line, row in read_rows(path, ("youtube_id", "start_time", "caption")):
            video, start, caption = (
                row[name].strip() for name in ("youtube_id", "start_time", "caption")
            )
            where = f"{path.name} line {line}"
            if not video or not caption:
                faults.append(f"{where}: no {'caption' if video else 'youtube_id'}")
            elif not start.isdecimal():
                faults.append(f"{where}: start_time is '{start}', expected whole seconds")
            else:
                first, texts = clips.setdefault((video, int(start)), (split, []))
                if first != split:
                    faults.append(f"{where}: {video} at {start} s is in {_TABLES[first]} too")
                else:
                    texts.append(caption)
    for (video, start), (split, texts) in clips.items():
        expected = _CAPTIONS[split]
        if expected == 1:
            texts[:] = dict.fromkeys(texts)  # a row told twice says nothing new
        if counts and len(texts) != expected:
            faults.append(
                f"{_TABLES[split]}: {video} at {start} s has {len(texts)} captions, expected "
                f"{expected}"
            )
    raise_faults(paths["train"].parent, faults)
    return clips


def _stems(video: str, start: int, timeless: bool) -> list[str]:
    end = start + _SECONDS
    times = [(f"_{start:06d}", f"_{end:06d}"), (f"_{1000 * start}", f"_{1000 * end}")]
    times += [(f"_{start}{zeros}", f"_{end}{zeros}") for zeros in ("", ".0", ".00", ".000")]
    tails = [first + last for first, last in times] + [first for first, _ in times]
    return [prefix + video + tail for tail in tails + [""] * timeless for prefix in ("", "Y")]
