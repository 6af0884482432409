"""Speech Commands V2: a folder of one-second recordings for each of 35 words.

The archive of P. Warden, arXiv 1804.03209, as it unpacks: `WORD/SPEAKER_nohash_N.wav`,
`validation_list.txt`, `testing_list.txt`. `_background_noise_` is not read.
"""

import os
import pathlib

from data_pipelines.corpora import Clip, Corpus, make_corpus
from data_pipelines.corpora.sources import (
    AudioFiles,
    composed,
    drop_suffix,
    find_file,
    raise_faults,
)
from data_pipelines.corpora.tables import read_lines

WORDS = tuple(
    "backward bed bird cat dog down eight five follow forward four go happy house learn left "
    "marvin nine no off on one right seven sheila six stop three tree two up visual wow yes "
    "zero".split()
)
_LISTS = {"valid": "validation_list.txt", "test": "testing_list.txt"}
_MARK = "_nohash_"


def read_speech_commands(root) -> Corpus:
    """Reads the words; valid and test are those of the lists, groups are speakers.

    `Clip.id` is WORD/NAME without suffix. A file that a list names and that is not there keeps the
    path where it is expected, so that whoever opens it tells that it is missing.

    Raises:
      FileNotFoundError: the folder or a list is missing.
      ValueError: folders or lines of other words, names without `_nohash_`, a file in both lists,
        or twice in one place; all in one error.
    """
    splits, faults = {}, []
    for split, name in _LISTS.items():
        for number, line in read_lines(find_file(root, name, (".",))):
            key = drop_suffix(composed(line))
            if splits.setdefault(key, split) != split:
                faults.append(f"{name} line {number}: '{line}' is in {_LISTS[splits[key]]} too")
    files = AudioFiles(root)
    paths: dict[str, pathlib.Path] = {}
    for parts, path in files.entries():
        if parts[0].startswith(("_", ".")):  # _background_noise_, and what other systems leave
            continue
        key = "/".join(parts)
        if key in paths:
            faults.append(f"'{key}' is there twice: {paths[key].name} and {os.path.basename(path)}")
        paths[key] = pathlib.Path(path)
    clips, unknown = [], {}
    for key in sorted(paths.keys() | splits.keys()):
        word, _, name = key.partition("/")
        speaker, mark, _ = name.partition(_MARK)
        if word not in WORDS:
            unknown[word] = unknown.get(word, 0) + 1
        elif not mark or not speaker or "/" in name:
            faults.append(f"'{key}': expected WORD/SPEAKER{_MARK}N")
        else:
            path = paths.get(key) or files.root / f"{key}.wav"
            clips.append((splits.get(key, "train"), Clip(key, path, (word,), word, speaker)))
    faults += [f"'{word}' is none of the {len(WORDS)} words of version 2 (files: {n})"
               for word, n in unknown.items()]  # fmt: skip
    raise_faults(root, faults)
    return make_corpus("sc2", clips)
