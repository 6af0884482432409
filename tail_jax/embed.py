"""Embeds audio files and texts with a checkpoint.

    python -m tail_jax.embed --checkpoint=DIR --audio=FOLDER|metadata.csv|FILE --output=out.npz \\
        [--text=captions.txt] [--tuning=FILE] [--policy=chunk_mean] [--dtype=bfloat16]

The result has `audio` [n, d] and `audio_paths` [n]; `text` [m, d] and `texts` [m]; with captions of
a table `text_audio` [m], the row of `audio` that a text belongs to (-1: left out); `checkpoint`,
`sha256` and `tuning` (hashes), `policy` and `dtype`. Killed and started again, the command goes on
with the next part: finished ones lie in `OUTPUT.parts/` until the result is written.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pathlib
import shutil
import sys

import numpy as np
from absl import flags

import tail_jax
from data_pipelines import listing, progress
from tail_jax import cli, settings
from tail_jax.backbone import content_hash
from tail_jax.training.checkpoints import tree_hash

# Of the formats that libsndfile reads.
SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au",
            ".snd", ".caf", ".w64", ".rf64")
CLIPS_PER_PART, TEXTS_PER_PART = 512, 16384
TABLE = "metadata.csv"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What to embed: paths, texts, and the path number of every text (None: texts of a file)."""

    paths: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    text_path: tuple[int, ...] | None = None


def read_inputs(audio: str | None, text: str | None) -> Inputs:
    """The files and texts that `--audio` and `--text` name; audio files are not opened.

    Args:
        audio: a file; a folder, all audio files below it in the order of their names; a table (or a
            folder with a metadata.csv) with the column file_name, relative to the table, and
            perhaps caption: its captions are the texts.
        text: UTF-8 file, a text a line; in place of captions.

    Raises:
        ValueError: neither is given, or one of them does not exist or holds nothing.
    """
    if not audio and not text:
        raise ValueError("neither --audio nor --text is given; expected one of them or both")
    found = _read_audio(pathlib.Path(audio)) if audio else Inputs()
    if text:
        lines = _read_text(pathlib.Path(text)).replace("\r\n", "\n").removesuffix("\n").split("\n")
        if lines == [""]:
            raise ValueError(f"{text}: is empty; expected a text a line")
        found = Inputs(found.paths, tuple(lines))
    return found


def _read_audio(path: pathlib.Path) -> Inputs:
    if path.is_dir() and (path / TABLE).is_file():
        path /= TABLE
    if path.suffix == ".csv" and path.is_file():
        return _read_table(path)
    if path.is_file():
        return Inputs((str(path),))
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder; expected audio files or a {TABLE}")
    paths = sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise ValueError(f"{path}: no audio files in it; expected {', '.join(SUFFIXES)} or a "
                         f"{TABLE}")
    return Inputs(tuple(paths))


def _read_table(path: pathlib.Path) -> Inputs:
    rows = csv.DictReader(_read_text(path).splitlines(keepends=True), strict=True)
    if "file_name" not in (rows.fieldnames or ()):
        raise ValueError(f"{path}: has the columns {rows.fieldnames or 'of an empty file'}; "
                         "expected file_name, and perhaps caption")
    numbers: dict[str, int] = {}
    texts, text_path = [], []
    try:
        for row in rows:
            if not (row["file_name"] or "").strip():
                raise ValueError(f"{path} line {rows.line_num}: empty file_name")
            name = str(path.parent / row["file_name"].strip())
            number = numbers.setdefault(name, len(numbers))
            if (row.get("caption") or "").strip():
                texts.append(row["caption"].strip())
                text_path.append(number)
    except csv.Error as error:
        raise ValueError(f"{path} line {rows.line_num}: not valid CSV: {error}") from None
    if not numbers:
        raise ValueError(f"{path}: no rows; expected one or more")
    return Inputs(tuple(numbers), tuple(texts), tuple(text_path))


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as "
                         "UTF-8") from None


def embed(backbone, inputs: Inputs, output, policy: str | None = None,
          batch_size: int | None = None, on_error: str = "raise") -> dict[int, str]:
    """Writes the result for `inputs` to `output`, see the top of the file.

    Args:
        backbone: `tail_jax.Backbone`.
        inputs: what to embed.
        output: file to write.
        policy: of clips that are not as long as the window.
        batch_size: None is each tower's own.
        on_error: "raise" or "skip": files that cannot be used are left out.

    Returns:
        {number of the path: why} of files that were left out.

    Raises:
        ValueError: with on_error="raise", one error that names all files that cannot be used:
            those without a readable header before anything is computed, others at the end; what
            was computed stays for the next try.
    """
    output = pathlib.Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    size = {} if batch_size is None else {"batch_size": batch_size}
    if inputs.paths:
        backbone.embed_audio([], policy=policy, **size)  # a mistake in the options shows at once
    if inputs.texts:
        backbone.embed_text([], **size)
    if on_error == "raise":
        _raise(inputs, _without_header(inputs.paths))
    parts = pathlib.Path(f"{output}.parts")
    tuning = tree_hash(backbone.tuning) if backbone.tuning else ""
    model = (backbone.sha256, backbone.model.dtype, tuning)

    def audio(paths, show):
        failures: dict[int, str] = {}
        rows = backbone.embed_audio(paths, policy=policy, progress=show, failures=failures, **size)
        return rows, dict(sorted(failures.items()))  # found by several threads

    def text(texts, show):
        return backbone.embed_text(texts, progress=show, **size), {}

    audio_rows, failures = _in_parts(parts, (*model, policy), inputs.paths, CLIPS_PER_PART, audio,
                                     _version)
    if on_error == "raise":
        _raise(inputs, failures)
    kept = np.array([n for n in range(len(inputs.paths)) if n not in failures], int)
    result = {}
    if inputs.paths:
        result = {"audio": audio_rows[kept],
                  "audio_paths": np.array([inputs.paths[n] for n in kept], str)}
    if inputs.texts:
        text_rows, _ = _in_parts(parts, model, inputs.texts, TEXTS_PER_PART, text)
        result |= {"text": text_rows, "texts": np.array(inputs.texts, str)}
        if inputs.text_path is not None:
            row = {number: row for row, number in enumerate(kept)}
            result["text_audio"] = np.array([row.get(n, -1) for n in inputs.text_path], np.int64)
    _write(output, result | {"checkpoint": backbone.name, "sha256": backbone.sha256,
                             "policy": policy or "", "dtype": backbone.model.dtype,
                             "tuning": tuning})
    shutil.rmtree(parts, ignore_errors=True)
    return failures


def _in_parts(folder: pathlib.Path, key, items, size: int, run,
              identity=str) -> tuple[np.ndarray, dict]:
    """(rows, failures) of `run(items, show)`, piece by piece; finished pieces are kept on disk."""
    starts, rows, failures = range(0, len(items), size), [np.zeros((0, 0), np.float32)], {}
    several = len(starts) > 1
    for first in progress(starts, len(starts), f"{len(items)} in parts") if several else starts:
        part = items[first:first + size]
        path = folder / f"{content_hash(key, [identity(item) for item in part])}.npz"
        if path.is_file():
            with np.load(path) as kept:
                found, failed = kept["rows"], json.loads(str(kept["failures"]))
        else:
            found, failed = run(part, not several)
            if several:
                folder.mkdir(exist_ok=True)
                _write(path, {"rows": found, "failures": json.dumps(failed)})
        rows.append(found)
        failures |= {first + int(number): why for number, why in failed.items()}
    return np.concatenate(rows[1:] or rows), failures


def _version(path: str) -> tuple:
    """A file and its state: one that was repaired is embedded again."""
    try:
        status = os.stat(path)
    except OSError:
        return path, None
    return path, status.st_size, status.st_mtime_ns


def _without_header(paths) -> dict[int, str]:
    from data_pipelines.audio import header_length
    shown = progress(paths, len(paths), "reading headers")
    return {number: f"{path}: no such file, empty, or none that libsndfile reads"
            for number, path in enumerate(shown) if header_length(path) is None}


def _raise(inputs: Inputs, failures: dict[int, str]) -> None:
    if failures:
        raise ValueError(listing(
            f"{len(failures)} of {len(inputs.paths)} audio files cannot be used; repair or remove "
            "them, or go on without them by --on_error=skip", [*failures.values()]))


def _write(path: pathlib.Path, arrays: dict) -> None:
    aside = path.with_name(path.name + ".aside")
    with open(aside, "wb") as file:
        np.savez(file, **arrays)
    os.replace(aside, path)


def main() -> None:
    """The command."""
    args = flags.FLAGS
    inputs = read_inputs(args.audio, args.text)
    settings.start_jax()
    backbone = tail_jax.load(args.checkpoint, tuning=args.tuning, dtype=args.dtype)
    failures = embed(backbone, inputs, args.output, args.policy, args.batch_size, args.on_error)
    if failures:
        print(listing(f"left out {len(failures)} of {len(inputs.paths)} audio files",
                      [*failures.values()]), file=sys.stderr)
    print(f"{args.output}: {len(inputs.paths) - len(failures)} clips, {len(inputs.texts)} texts")


def define_flags() -> None:
    """--checkpoint, --audio, --text, --output, --policy, --batch_size, --dtype and --on_error."""
    flags.DEFINE_string("checkpoint", None, "Checkpoint folder or file.", required=True)
    flags.DEFINE_string("tuning", None, "A run's tuning/task_K.safetensors, to embed with it.")
    flags.DEFINE_string("audio", None, "Audio file, folder of them, caption folder or metadata.csv")
    flags.DEFINE_string("text", None, "File with a text a line; by default the table's captions.")
    flags.DEFINE_string("output", None, "File to write, .npz.", required=True)
    flags.DEFINE_enum("policy", None, ["repeatpad", "center", "chunk_mean"],
                      "For clips not as long as the model's window; by default the checkpoint's.")
    flags.DEFINE_integer("batch_size", None, "Rows of a batch.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"],
                      "Of the towers' computation; by default the checkpoint's.")
    flags.DEFINE_enum("on_error", "raise", ["raise", "skip"], "What to do about unusable files.")


if __name__ == "__main__":
    cli.run(main, define_flags)
