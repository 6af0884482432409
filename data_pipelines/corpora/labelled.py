"""The corpora of streams of classes, by name."""

import dataclasses
from collections.abc import Callable, Mapping

from data_pipelines.corpora import SPLIT_NAMES, Corpus, make_corpus
from data_pipelines.corpora.esc50 import read_esc50
from data_pipelines.corpora.folder import read_folder
from data_pipelines.corpora.speech_commands import read_speech_commands
from data_pipelines.corpora.timit import read_timit
from data_pipelines.corpora.us8k import read_us8k
from data_pipelines.corpora.vocalset import TECHNIQUES, TEST_SINGERS, read_vocalset


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A corpus with one class a clip.

    Attributes:
      read: its folder -> its clips, each with one caption, the class.
      splits: the names of the split that it brings (besides "random"), and what makes it.
      classes: those that are taken where none are asked for; () is all.
      limit: most clips of a class where no number is asked for; 0 is all.
      columns: whether the class is in columns of a table that the caller names.
    """

    read: Callable[..., Corpus]
    splits: Mapping[str, str]
    classes: tuple[str, ...] = ()
    limit: int = 0
    columns: bool = False


def read_labelled_folder(root, label: str = "label") -> Corpus:
    """Reads a caption folder (`corpora.folder`) for its classes: each clip once.

    Args:
      root: the folder.
      label: the column that holds the class, or several joined by + (`speaker+label`).
    """
    corpus = read_folder(root, label=label)
    return make_corpus(
        corpus.name,
        (
            (split, dataclasses.replace(clip, captions=(clip.label,)))
            for split in SPLIT_NAMES
            for clip in getattr(corpus, split).clips
        ),
    )


CORPORA = {
    "esc50": Labelled(read_esc50, {"grouped": "fold 5"}),
    "us8k": Labelled(read_us8k, {"grouped": "folds 9 and 10"}),
    "sc2": Labelled(read_speech_commands, {"grouped": "testing_list.txt"}),
    "timit": Labelled(read_timit, {}),
    # 16 techniques of 79 + 19 clips fit most of the published figures; which 16 of the 17 is not
    # told. We leave out `spoken`, which is not singing.
    "vocalset": Labelled(
        read_vocalset,
        {"grouped": f"the singers of {TEST_SINGERS}"},
        classes=tuple(name for name in TECHNIQUES if name != "spoken"),
        limit=98,
    ),
    "folder": Labelled(read_labelled_folder, {"own": "rows with split 'test'"}, columns=True),
}
