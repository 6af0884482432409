"""Corpora of sounds whose table gives each file a class and one of several folds."""

import dataclasses
import pathlib

from data_pipelines.corpora import Clip, Corpus, make_corpus
from data_pipelines.corpora.sources import (
    AudioFiles,
    composed,
    drop_suffix,
    find_file,
    raise_faults,
)
from data_pipelines.corpora.tables import read_rows


@dataclasses.dataclass(frozen=True)
class FoldTable:
    """Where a table lies and what its columns are called.

    Attributes:
      folder, file: the table, below the folder of the corpus.
      name, fold, number, label, group: columns: audio file, fold, number and name of the class,
        source recording.
      folds: how many there are, numbered from 1.
      test: those that are the test split.
      audio: folder of the audio of a fold, `{fold}` replaced by its number.
    """

    folder: str
    file: str
    name: str
    fold: str
    number: str
    label: str
    group: str
    folds: int
    test: tuple[int, ...]
    audio: str


def read_folds(root, corpus: str, table: FoldTable) -> Corpus:
    """Reads a table, and looks for the audio below `root`, in its folder first.

    `Clip.id` is the name of the file in the table. A clip without audio keeps the path where it is
    expected, so that whoever opens it tells which file is missing.

    Raises:
      FileNotFoundError: the folder or the table is missing.
      ValueError: faulty rows, a file twice, or a class with two numbers or two names; all in one
        error.
    """
    path = find_file(root, table.file, (table.folder, "."))
    columns = (table.name, table.fold, table.number, table.label, table.group)
    files = AudioFiles(root)
    folds = {str(fold) for fold in range(1, table.folds + 1)}
    clips: dict[str, tuple[str, Clip]] = {}
    numbers: dict[str, str] = {}  # class -> its number
    labels: dict[str, str] = {}  # number -> its class
    faults = []
    for line, row in read_rows(path, columns):
        name, fold, number, label, group = (row[column].strip() for column in columns)
        name, where = composed(name), f"{path.name} line {line}"
        empty = [column for column in columns if not row[column].strip()]
        if empty:
            faults.append(f"{where}: no {', '.join(empty)}")
        elif fold not in folds:
            faults.append(f"{where}: {table.fold} is '{fold}', expected 1 to {table.folds}")
        elif name in clips:
            faults.append(f"{where}: '{name}' came before")
        elif numbers.setdefault(label, number) != number:
            faults.append(f"{where}: '{label}' has number {number}, but {numbers[label]} before")
        elif labels.setdefault(number, label) != label:
            faults.append(f"{where}: number {number} is '{label}', but '{labels[number]}' before")
        else:
            folder = pathlib.PurePath(table.audio.format(fold=fold))
            audio = files.find([drop_suffix(name)], [folder.name]) or files.root / folder / name
            clips[name] = (
                "test" if int(fold) in table.test else "train",
                Clip(name, pathlib.Path(audio), (label,), label, group),
            )
    raise_faults(path, faults)
    return make_corpus(corpus, clips.values())
