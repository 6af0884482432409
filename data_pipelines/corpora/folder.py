"""The caption-folder reader: `metadata.csv` beside audio files.

`metadata.csv` is UTF-8 with one row per caption and the columns file_name, caption, label, group
and split (others are ignored). Rows with the same file_name are captions of one clip.
"""

import pathlib
from collections.abc import Sequence

from data_pipelines import listing
from data_pipelines.corpora import SPLIT_NAMES, Clip, Corpus, make_corpus
from data_pipelines.corpora.tables import read_rows

COLUMNS = ("file_name", "caption", "label", "group", "split")


def read_folder(
    root, name: str | None = None, labels: Sequence[str] | None = None, label: str = "label"
) -> Corpus:
    """Reads the metadata of a caption folder; audio files are not opened.

    Args:
      root: the folder that holds `metadata.csv`; file names in it are relative to this folder.
      name: name of the corpus, by default the name of the folder.
      labels: keep only clips with one of these labels; by default all clips.
      label: the column that becomes `Clip.label`, or several joined by +, as their values are then
        (`speaker+label`: `george+zero`).

    Returns:
      The corpus; clips in the order of their first row, `Clip.id` is the file name. A split
      without rows has no clips.

    Raises:
      FileNotFoundError: no such folder, or no metadata.csv in it.
      ValueError: the table is not as described above, a clip or a group contradicts itself, or a
        label is unknown. All faulty rows are named in one error (the first 20, and how many more).
    """
    root = pathlib.Path(root)
    table = root / "metadata.csv"
    if not root.is_dir():
        raise FileNotFoundError(
            f"caption folder '{root}' does not exist; expected a folder with metadata.csv and audio"
        )
    if not table.is_file() and (root / "build.json").is_file():
        raise FileNotFoundError(
            f"corpus '{root}' is not built to its end; give the command that began it again"
        )
    if not table.is_file():
        found = sorted(path.name for path in root.iterdir())[:10]
        raise FileNotFoundError(
            f"caption folder '{root}' has no metadata.csv; found {', '.join(found) or 'nothing'}, "
            f"expected a table with the columns {', '.join(COLUMNS)}"
        )
    name = name or root.resolve().name
    columns = label.split("+")
    rows = read_rows(table, tuple(dict.fromkeys((*COLUMNS, *columns))))
    clips = _collect([(line, row, _joined(row, columns)) for line, row in rows], table)
    if labels is not None:
        clips = _select(clips, labels, table)
    return make_corpus(
        name,
        (
            (
                clip["split"],
                Clip(
                    id=file_name,
                    path=root / file_name,
                    captions=tuple(clip["captions"]),
                    label=clip["label"],
                    group=clip["group"],
                ),
            )
            for file_name, clip in clips.items()
        ),
    )


def _joined(row: dict[str, str], columns: Sequence[str]) -> str:
    """Returns the values of `columns` joined by +, "" where one of them is empty."""
    values = [row[column].strip() for column in columns]
    return "+".join(values) if all(values) else ""


def _collect(rows, table: pathlib.Path) -> dict[str, dict]:
    """Groups rows into clips; raises one ValueError that names every faulty row."""
    clips: dict[str, dict] = {}
    group_split: dict[str, str] = {}
    problems = []
    for line, row, label in rows:
        file_name, caption, group, split = (
            row[column].strip() for column in COLUMNS if column != "label"
        )
        facts = {"label": label, "group": group, "split": split}
        if not file_name:
            problems.append(f"line {line}: empty file_name")
            continue
        if not caption:
            problems.append(f"line {line}: empty caption of {file_name}")
        if split not in SPLIT_NAMES:
            problems.append(
                f"line {line}: unknown split '{split}', expected {', '.join(SPLIT_NAMES)}"
            )
        clip = clips.setdefault(file_name, {"captions": [], **facts})
        for fact, value in facts.items():
            if clip[fact] != value:
                problems.append(
                    f"line {line}: {file_name} has {fact} '{value}', but '{clip[fact]}' before"
                )
        if group and group_split.setdefault(group, split) != split:
            problems.append(
                f"line {line}: group '{group}' is in split '{split}', but in "
                f"'{group_split[group]}' before; a group must stay in one split"
            )
        clip["captions"].append(caption)
    if problems:
        raise ValueError(listing(f"{table}: {len(problems)} faults; correct these rows", problems))
    return clips


def _select(clips: dict[str, dict], labels: Sequence[str], table: pathlib.Path) -> dict[str, dict]:
    known = sorted({clip["label"] for clip in clips.values()})
    unknown = [label for label in labels if label not in known]
    if unknown or not labels:
        raise ValueError(
            f"{table}: labels {', '.join(unknown) or 'is an empty list'}; "
            f"expected one or more of: {', '.join(known)}"
        )
    return {file_name: clip for file_name, clip in clips.items() if clip["label"] in labels}
