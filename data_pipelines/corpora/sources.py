"""What the readers of published corpora share: their clips, and the audio files of a folder."""

import dataclasses
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Sequence

from data_pipelines import listing

# In order of preference. What libsndfile cannot decode is found all the same, to be reported as
# that and not as missing.
AUDIO_SUFFIXES = (
    *(".wav", ".flac", ".aif", ".aiff", ".ogg", ".opus", ".mp3"),
    *(".m4a", ".aac", ".mp4", ".mkv", ".webm"),
)


@dataclasses.dataclass(frozen=True)
class SourceClip:
    """A clip of a published corpus.

    Attributes:
      id: unique in the corpus, from the published metadata.
      split: train, valid or test.
      captions: one or more.
      audio: path of its file, None where the source folder has none.
      label, group: as in `corpora.Clip`.
    """

    id: str
    split: str
    captions: tuple[str, ...]
    audio: str | None
    label: str = ""
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Listing:
    """The clips of a corpus by its metadata, and what a user should know about the choice."""

    clips: tuple[SourceClip, ...]
    notes: tuple[str, ...] = ()


class AudioFiles:
    """The audio files in a folder and below, by name without suffix.

    Names are compared in Unicode's composed form (NFC): archives unpacked on a Mac have decomposed
    ones. Symbolic links are followed.

    Raises:
      FileNotFoundError: no such folder.
    """

    def __init__(self, root):
        self.root = pathlib.Path(os.path.abspath(root))
        if not self.root.is_dir():
            raise FileNotFoundError(f"source folder '{root}' does not exist")
        self._paths: dict[str, list[str]] = {}
        seen = set()
        for folder, folders, names in os.walk(self.root, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # a link to a folder above
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            for name in sorted(names):
                stem, suffix = os.path.splitext(name)
                # What archives of a Mac hold beside each file, ._NAME, is not audio.
                if suffix.lower() in AUDIO_SUFFIXES and not name.startswith("._"):
                    self._paths.setdefault(composed(stem), []).append(os.path.join(folder, name))

    def find(
        self, stems: Iterable[str], folders: Sequence[str] = (), elsewhere: bool = True
    ) -> str | None:
        """Returns the file of the first of `stems` (names without suffix) that has one.

        Args:
          stems: names, the best first.
          folders: names of folders; a file below one of them comes before others.
          elsewhere: whether a file below none of them counts.
        """
        for stem in stems:
            found = self._paths.get(composed(stem), ())
            ranked = sorted(
                (not self._is_below(path, folders), _preference(path)) for path in found
            )
            if ranked and (elsewhere or not ranked[0][0]):
                return ranked[0][1][1]
        return None

    def entries(self) -> list[tuple[tuple[str, ...], str]]:
        """Returns (folders below the root and name without suffix, path) of every file, sorted."""
        paths = (path for found in self._paths.values() for path in found)
        parts = ((pathlib.Path(path).relative_to(self.root).parts, path) for path in paths)
        return sorted(
            (tuple(map(composed, (*folders, os.path.splitext(name)[0]))), path)
            for (*folders, name), path in parts
        )

    def _is_below(self, path: str, folders: Sequence[str]) -> bool:
        return not set(folders).isdisjoint(pathlib.Path(path).relative_to(self.root).parts[:-1])


def composed(name: str) -> str:
    """Returns `name` in Unicode's composed form (NFC)."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _preference(path: str) -> tuple[int, str]:
    return AUDIO_SUFFIXES.index(os.path.splitext(path)[1].lower()), path


def drop_suffix(name: str) -> str:
    """Returns `name` without the suffix of an audio file, where it has one."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in AUDIO_SUFFIXES else name


def raise_faults(where, faults: Sequence[str]) -> None:
    """Raises one ValueError that names all faults (the first 20, and how many more), if any."""
    if faults:
        number = f"{len(faults)} fault" + "s" * (len(faults) > 1)
        raise ValueError(listing(f"{where}: {number}; correct these rows", faults))


def find_file(root, name: str, places: Sequence[str]) -> pathlib.Path:
    """Returns `root`/place/`name` of the first place that has it.

    Raises:
      FileNotFoundError: no such folder, or none has it.
    """
    root = pathlib.Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"source folder '{root}' does not exist")
    for place in places:
        if (root / place / name).is_file():
            return root / place / name
    looked = " or ".join(f"'{root / place}'" for place in places)
    found = ", ".join(sorted(path.name for path in root.iterdir())[:10])
    raise FileNotFoundError(f"no {name} in {looked}; '{root}' holds {found or 'nothing'}")
