"""VocalSet: `FULL/SINGER/CATEGORY/TECHNIQUE/*.wav`, 20 singers, 17 techniques.

The archive of J. Wilkins, P. Seetharaman, A. Wahl and B. Pardo, ISMIR 2018, as it unpacks (version
1.2 has the same below `data_by_singer`). Files are the clips: nothing is cut.
"""

import pathlib

from data_pipelines.corpora import Clip, Corpus, make_corpus
from data_pipelines.corpora.sources import AudioFiles, raise_faults
from data_pipelines.corpora.tables import read_lines

TECHNIQUES = tuple(
    "belt breathy fast_forte fast_piano forte inhaled lip_trill messa pp slow_forte slow_piano "
    "spoken straight trill trillo vibrato vocal_fry".split()
)
# Each line names a singer, as the folders do.
TEST_SINGERS = "test_singers_technique.txt"
_PLACES = ("FULL", "data_by_singer")


def read_vocalset(root) -> Corpus:
    """Reads the files of all singers; classes are techniques, groups singers.

    Singers that the distribution's `test_singers_technique.txt` names are test; where it has no
    such file, everything is train. `Clip.id` is the path below FULL without suffix.

    Raises:
      FileNotFoundError: the folder is missing, or holds no audio.
      ValueError: files elsewhere or of other techniques, or one twice; all in one error.
    """
    root = pathlib.Path(root)
    base = next((root / place for place in _PLACES if (root / place).is_dir()), root)
    tables = [folder / TEST_SINGERS for folder in (root, root.absolute().parent)]
    test = {name for table in tables if table.is_file() for _, name in read_lines(table)}
    clips: dict[str, tuple[str, Clip]] = {}
    faults = []
    for parts, path in AudioFiles(base).entries():
        key = "/".join(parts)
        if parts[0].startswith("__"):  # __MACOSX
            continue
        if len(parts) != 4 or parts[2] not in TECHNIQUES:
            faults.append(f"'{key}': expected SINGER/CATEGORY/TECHNIQUE/NAME with one of the "
                          f"{len(TECHNIQUES)} techniques")  # fmt: skip
        elif key in clips:
            faults.append(f"'{key}' is there twice")
        else:
            singer, _, technique, _ = parts
            clip = Clip(key, pathlib.Path(path), (technique,), technique, singer)
            clips[key] = ("test" if singer in test else "train", clip)
    raise_faults(base, faults)
    if not clips:
        raise FileNotFoundError(f"no audio below '{base}'; expected FULL/SINGER/CATEGORY/TECHNIQUE")
    return make_corpus("vocalset", clips.values())
