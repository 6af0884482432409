"""The corpora that `python -m data_pipelines.build` knows, by name."""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable

from data_pipelines.corpora import SPLIT_NAMES
from data_pipelines.corpora.audiocaps import read_audiocaps
from data_pipelines.corpora.clotho import read_clotho
from data_pipelines.corpora.folder import read_folder
from data_pipelines.corpora.sources import Listing, SourceClip
from data_pipelines.corpora.wavcaps import read_wavcaps


@dataclasses.dataclass(frozen=True)
class Published:
    """A corpus.

    Attributes:
      read: source folder, and options of the reader by name -> its clips.
      options: the options that it takes.
      seconds: shortest and longest clip of the distribution.
      description: one sentence with the source to cite.
    """

    read: Callable[..., Listing]
    options: tuple[str, ...]
    seconds: tuple[float, float]
    description: str


def read_caption_folder(source) -> Listing:
    """Returns the clips of a caption folder (`corpora.folder`) of any origin."""
    corpus = read_folder(source)
    return Listing(
        tuple(
            SourceClip(
                clip.id,
                split,
                clip.captions,
                os.path.abspath(clip.path) if clip.path.is_file() else None,
                clip.label,
                clip.group,
            )
            for split in SPLIT_NAMES
            for clip in getattr(corpus, split).clips
        )
    )


_AUDIOCAPS = "AudioCaps {}: C. D. Kim et al., NAACL-HLT 2019."
_WAVCAPS = "{} with the captions of WavCaps: X. Mei et al., arXiv 2303.17395; academic use only."

CORPORA = {
    "audiocaps": Published(
        read_audiocaps,
        options=(),
        seconds=(0.0, 11.0),
        description=_AUDIOCAPS.format("1"),
    ),
    "audiocaps2": Published(
        functools.partial(read_audiocaps, tables="dataset2.0", counts=False),
        options=(),
        seconds=(0.0, 11.0),
        description=_AUDIOCAPS.format("2.0"),
    ),
    "clotho": Published(
        read_clotho,
        options=(),
        seconds=(14.5, 30.5),
        description="Clotho v2.1: K. Drossos, S. Lipping, T. Virtanen, ICASSP 2020.",
    ),
    "bbc": Published(
        functools.partial(read_wavcaps, corpus="bbc"),
        options=("blacklists", "group_by_caption"),
        seconds=(0.0, math.inf),
        description=_WAVCAPS.format("BBC Sound Effects"),
    ),
    "audioset_sl": Published(
        functools.partial(read_wavcaps, corpus="audioset_sl"),
        options=("overlap", "audiocaps", "blacklists", "group_by_caption"),
        seconds=(0.0, 11.0),
        description=_WAVCAPS.format("The strongly labelled part of AudioSet"),
    ),
    "folder": Published(
        read_caption_folder,
        options=(),
        seconds=(0.0, math.inf),
        description="A caption folder.",
    ),
}


def built_name(corpus: str, source) -> str:
    """Returns the name of what is built: that of the corpus, or of the caption folder."""
    return corpus if corpus != "folder" else pathlib.Path(source).resolve().name
