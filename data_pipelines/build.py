"""Builds a corpus from its official distribution: what training and TFDS read.

    python -m data_pipelines.build --corpus=clotho --source=DIR --check
    python -m data_pipelines.build --corpus=clotho --source=DIR --data_dir=DIR

DATA_DIR/clotho is a caption folder afterwards (`data_pipelines.building` says what lies in it).
Killed at any moment, it goes on when the same command is given again; clips whose audio has come
since are added. Two processes must not build one corpus at the same time. `--check` writes nothing:
it reports on stderr what the source folder has, lists on stdout what is missing, and exits with 1
where anything is.
"""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence

from absl import app, flags

from data_pipelines import building, cores, progress
from data_pipelines.audio import header_length
from data_pipelines.corpora import SPLIT_NAMES
from data_pipelines.corpora.published import CORPORA, Published, built_name
from data_pipelines.corpora.sources import Listing, SourceClip
from data_pipelines.corpora.wavcaps import OVERLAPS


def define_flags() -> None:
    """The flags of the command; defined when it runs, not on import."""
    flags.DEFINE_enum("corpus", None, sorted(CORPORA), "What --source holds.", required=True)
    flags.DEFINE_string("source", None, "Folder with the official distribution.", required=True)
    flags.DEFINE_string("data_dir", None, "Folder for what is built, one folder a corpus.")
    flags.DEFINE_bool("check", False, "Report what is missing in --source; write nothing.")
    flags.DEFINE_integer("rate", 48000, "Of the audio that is written, Hz.", lower_bound=8000,
                         upper_bound=192000)  # fmt: skip
    flags.DEFINE_enum("overlap", None, sorted(OVERLAPS), "Which clips of AudioCaps to remove from "
                      "audioset_sl; by default all.")  # fmt: skip
    flags.DEFINE_list("audiocaps", [], "Folders with the tables of AudioCaps, for --overlap.")
    flags.DEFINE_list("blacklist", [], "Blacklists of WavCaps: what they name is left out.")
    flags.DEFINE_bool("group_by_caption", False, "Clips of one caption share a split (WavCaps).")
    flags.DEFINE_integer("workers", cores(), "Clips written at once.", lower_bound=1)
    flags.DEFINE_multi_string("beam", [], "An option of Apache Beam, such as "
                              "--beam=--runner=FlinkRunner; may be given again.")  # fmt: skip


def main() -> int:
    values = flags.FLAGS
    corpus = CORPORA[values.corpus]
    options = _reader_options(corpus, values)
    if not values.check and not values.data_dir:
        raise ValueError("--data_dir is missing: where to build, or --check to look only")
    listing = corpus.read(values.source, **options)
    name = built_name(values.corpus, values.source)
    if values.check:
        return report(name, listing, corpus.seconds)
    folder = os.path.join(values.data_dir, name)
    if os.path.realpath(folder) == os.path.realpath(values.source):
        raise ValueError(f"--data_dir: '{folder}' would be built into its own source")
    settings = {key: options[key] for key in ("overlap", "group_by_caption") if key in options}
    counts, skipped = building.build(
        name,
        listing.clips,
        values.data_dir,
        values.rate,
        settings | {"metadata": metadata_hash(listing.clips)},
        corpus.description,
        values.beam,
        values.workers,
    )
    missing = sum(one.clip.audio is None for one in skipped)
    tail = [f"{missing:,} missing, {len(skipped) - missing:,} that cannot be read, listed in "
            f"{os.path.join(folder, 'report.csv')}"] if skipped else []  # fmt: skip
    print(_summary(name, counts, [*listing.notes, *tail]), file=sys.stderr)
    return 0


def report(name: str, listing: Listing, seconds: tuple[float, float]) -> int:
    """Prints what a source folder has, and line by line what it has not; returns the exit code.

    Files are opened but not decoded.
    """
    counts = {split: [0, 0] for split in SPLIT_NAMES}
    problems = 0
    for clip in progress(listing.clips, len(listing.clips), f"checking {name}"):
        problem = _problem(clip, seconds)
        counts[clip.split][0] += not problem
        counts[clip.split][1] += 1
        problems += bool(problem)
        if problem:
            print(f"{clip.split}\t{clip.id}\t{problem}")
    print(_summary(name, counts, listing.notes), file=sys.stderr)
    return int(problems > 0)


def metadata_hash(clips: Sequence[SourceClip]) -> str:
    """Returns a hash of ids, splits and captions, whatever audio is there."""
    digest = hashlib.sha256()
    for clip in clips:
        digest.update(json.dumps([clip.id, clip.split, clip.captions]).encode())
    return digest.hexdigest()[:16]


def _problem(clip: SourceClip, seconds: tuple[float, float]) -> str:
    if clip.audio is None:
        return "missing"
    length = header_length(clip.audio)
    if length is None:
        return f"{clip.audio}: cannot be opened, or has no samples"
    found = length.frames / length.rate
    if seconds[0] <= found <= seconds[1]:
        return ""
    return f"{clip.audio}: lasts {found:.1f} s, expected {seconds[0]:g} to {seconds[1]:g}"


def _summary(name: str, counts: Mapping[str, Sequence[int]], notes: Sequence[str]) -> str:
    splits = [f"{split} {found:,} of {total:,} clips" for split, (found, total) in counts.items()]
    return f"{name}: {', '.join(splits)}{''.join(f'; {note}' for note in notes)}"


def _reader_options(corpus: Published, values) -> dict:
    given = {
        "overlap": values.overlap,
        "audiocaps": values.audiocaps,
        "blacklists": values.blacklist,
        "group_by_caption": values.group_by_caption,
    }
    useless = [key for key, value in given.items() if value and key not in corpus.options]
    if useless:
        flag = "blacklist" if useless[0] == "blacklists" else useless[0]
        raise ValueError(f"--{flag} has no meaning for --corpus={values.corpus}")
    given["overlap"] = values.overlap or "all"
    return {key: given[key] for key in corpus.options}


def run(argv: Sequence[str] | None = None) -> None:
    """Parses flags and runs `main`; errors of the user's making become one line and exit code 2."""
    define_flags()

    def parse(arguments):
        try:
            rest = flags.FLAGS(arguments)
        except flags.Error as error:
            _fail(error)
        if len(rest) > 1:
            _fail(f"unexpected argument {rest[1]!r}; flags start with --")
        return rest

    def guarded(_):
        logging.getLogger().setLevel(logging.CRITICAL)  # Beam's are pages; errors are told once
        try:
            return main()
        except (ValueError, OSError, ImportError) as error:
            if os.environ.get("TAIL_JAX_TRACEBACK"):
                raise
            _fail(error)

    app.run(guarded, argv=argv, flags_parser=parse)


def _fail(error) -> None:
    print("error:", *str(error).split(), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    run()
