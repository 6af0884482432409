"""Clotho v2.1: three tables of five captions a clip, and a folder of audio for each.

As on https://zenodo.org/records/4783391, archives unpacked: `clotho_captions_development.csv`,
`..._validation.csv`, `..._evaluation.csv` with the columns file_name, caption_1 ... caption_5, and
the folders `development`, `validation`, `evaluation`. Clips last 15 to 30 s.
"""

import unicodedata

from data_pipelines.corpora.sources import (
    AudioFiles,
    Listing,
    SourceClip,
    drop_suffix,
    find_file,
    raise_faults,
)
from data_pipelines.corpora.tables import read_rows

_PARTS = {"train": "development", "valid": "validation", "test": "evaluation"}
_CAPTIONS = tuple(f"caption_{i}" for i in range(1, 6))


def read_clotho(source) -> Listing:
    """Reads the three tables, and looks for the audio in the folder of each, in `source` or below.

    `Clip.id` is folder and file name: version 2.1 has four names twice, for different recordings.

    Raises:
      FileNotFoundError: a table is missing.
      ValueError: faulty rows, a name with other captions in a second row, or a clip in two splits
        (same name, same captions); all in one error.
    """
    paths = {
        split: find_file(source, f"clotho_captions_{part}.csv", (".",))
        for split, part in _PARTS.items()
    }
    rows: dict[tuple[str, str], tuple[str, ...]] = {}
    splits: dict[tuple, str] = {}
    faults = []
    for split, path in paths.items():
        for line, row in read_rows(path, ("file_name", *_CAPTIONS)):
            name = unicodedata.normalize("NFC", row["file_name"])
            captions = tuple(row[column].strip() for column in _CAPTIONS)
            where = f"{path.name} line {line}"
            empty = [column for column, text in zip(_CAPTIONS, captions) if not text]
            if not name.strip() or empty:
                faults.append(f"{where}: no {', '.join(empty) or 'file_name'}")
            elif rows.setdefault((split, name), captions) != captions:
                faults.append(f"{where}: '{name}' had other captions before")
            elif splits.setdefault((name, captions), split) != split:
                other = _PARTS[splits[name, captions]]
                faults.append(f"{where}: '{name}' with these captions is in {other} too")
    raise_faults(source, faults)
    files = AudioFiles(source)
    clips = []
    for (split, name), captions in rows.items():
        part = _PARTS[split]
        # Three names of the tables begin with a space, which some unpackers drop.
        stems = (drop_suffix(name), drop_suffix(name).strip())
        audio = files.find(stems, (part, f"clotho_audio_{part}"), elsewhere=False)
        clips.append(SourceClip(f"{part}/{name}", split, captions, audio))
    return Listing(tuple(clips))
