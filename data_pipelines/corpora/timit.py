"""TIMIT: `TRAIN|TEST/DR1..DR8/SPEAKER/SENTENCE.WAV`, ten sentences of each of 630 speakers.

As the Linguistic Data Consortium publishes it (LDC93S1): NIST SPHERE files, which libsndfile reads;
copies with RIFF files (`SA1.WAV.wav`) are read too. All names in any letter case.
"""

import pathlib
import re

from data_pipelines.corpora import Clip, Corpus, make_corpus
from data_pipelines.corpora.sources import AudioFiles, drop_suffix, raise_faults

_PART = re.compile("TRAIN|TEST")
_DIALECT = re.compile("DR[1-8]")


def read_timit(root) -> Corpus:
    """Reads the utterances of all speakers, the classes; looks below `root` for the folders.

    The published split parts speakers, so that it is none for naming them: everything is train
    here. `Clip.id` is SPEAKER/SENTENCE in capitals. Where a folder holds a sentence as SPHERE and
    as RIFF, the shorter name is taken.

    Raises:
      FileNotFoundError: no such folder, or no such files in it.
      ValueError: a sentence of a speaker in two places.
    """
    paths: dict[str, pathlib.Path] = {}
    faults = []
    for parts, found in AudioFiles(root).entries():
        *_, part, dialect, speaker, name = ("", "", "", *(part.upper() for part in parts))
        if not (_PART.fullmatch(part) and _DIALECT.fullmatch(dialect)):
            continue
        key, path = f"{speaker}/{drop_suffix(name)}", pathlib.Path(found)
        before = paths.setdefault(key, path)
        if before.parent != path.parent:
            faults.append(f"'{key}' is in {before.parent} and in {path.parent}")
        elif len(path.name) < len(before.name):
            paths[key] = path
    raise_faults(root, faults)
    if not paths:
        raise FileNotFoundError(
            f"no TRAIN|TEST/DR1..8/SPEAKER/*.WAV below '{root}'; expected the folders of TIMIT"
        )
    return make_corpus(
        "timit",
        (
            ("train", Clip(key, path, (speaker,), speaker))
            for key, path in sorted(paths.items())
            for speaker in [key.partition("/")[0]]
        ),
    )
