"""A listed corpus -> a caption folder of 16-bit FLAC, and TFDS records of it, through Apache Beam.

    FOLDER/audio/ab/abcdef....flac   one file a clip: mono, 16 bit, at one rate
    FOLDER/metadata.csv              what training reads (`corpora.folder`), with the published ids
    FOLDER/1.0.0/                    the same as TFDS records: captions, names, lengths
    FOLDER/report.csv                the clips that are not there, and why
    FOLDER/build.json                what it was built with

Audio is in files and not in the records, because training seeks in it (a chunk of a long clip, in
any order) and because records go through Beam's shuffle, which the direct runner holds in memory: a
few hundred bytes a clip instead of a megabyte. Files make it resumable too: each is written aside
and renamed, and one that is there, whole and no older than its source is not written again.
"""

import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import soundfile

from data_pipelines import load_tensorflow
from data_pipelines.audio import AudioError, read_blocks
from data_pipelines.corpora import SPLIT_NAMES
from data_pipelines.corpora.folder import COLUMNS
from data_pipelines.corpora.sources import SourceClip

VERSION = "1.0.0"
_TASKS = "clips.jsonl"
_TELL_SECONDS = 60.0
_BATCH = 64
_PROBLEM = ".problem"
_ASIDE = ".tmp"


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A clip that was not built, and why."""

    clip: SourceClip
    reason: str


def audio_name(clip_id: str) -> str:
    """Returns where the audio of a clip lies in the folder.

    A hash: ids hold spaces and letters of all alphabets, those of YouTube differ by case alone
    (which some file systems do not see), and 108,000 files want more than one folder.
    """
    name = hashlib.sha1(clip_id.encode()).hexdigest()
    return f"audio/{name[:2]}/{name}.flac"


def load_beam():
    """Returns the `apache_beam` module.

    Raises:
      ImportError: it is not installed; says what to do.
    """
    try:
        import apache_beam
    except ImportError as error:
        raise ImportError(
            "building corpora needs Apache Beam, which training does not: "
            "pip install 'tail_jax[corpora]' or launch/install.sh corpora"
        ) from error
    return apache_beam


def beam_options(arguments: Sequence[str]):
    """Returns (options, runner) from Beam's own arguments, e.g. ["--runner=FlinkRunner"].

    Without a runner it is the direct one of Python.
    """
    load_beam()
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

    options = PipelineOptions(list(arguments))
    if options.view_as(StandardOptions).runner:
        return options, None
    # By default Beam would try to download a runner written in Go.
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    return options, FnApiRunner()


def write_clips(clips: Sequence[SourceClip], folder: str, rate: int, workers: int) -> int:
    """Writes the audio of clips (`write_clip`), `workers` at once; returns how many they are.

    In threads: decoding, resampling and encoding leave Python's lock. Not the threads of Beam's
    direct runner (direct_running_mode=multi_threading), which lost 500 of 108,000 elements each
    time it was tried (2.77).
    """
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return sum(1 for _ in pool.map(lambda clip: write_clip(clip, folder, rate), clips))


def write_clip(clip: SourceClip, folder: str, rate: int) -> None:
    """Writes the audio of a clip to `folder`, or a note why that cannot be done.

    Samples are round(32768 x), cut to 16 bit, of the mean of the channels at `rate` Hz. Nothing is
    done where the file is there and no older than its source, or where the source is gone.

    Raises:
      RuntimeError: the file cannot be written (libsndfile's error).
    """
    target = pathlib.Path(folder, audio_name(clip.id))
    if _is_built(target, rate, clip.audio) or clip.audio is None:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(f".{uuid.uuid4().hex}{_ASIDE}")
    try:
        _check_size(clip.audio)
        with soundfile.SoundFile(aside, "w", rate, 1, "PCM_16", format="FLAC") as file:
            for block in read_blocks(clip.audio, rate):
                scaled = np.rint(block.astype(np.float64) * 32768)
                file.write(np.clip(scaled, -32768, 32767).astype(np.int16))
        os.replace(aside, target)
        target.with_suffix(_PROBLEM).unlink(missing_ok=True)
    except AudioError as error:
        _write_aside(target.with_suffix(_PROBLEM), str(error))
        target.unlink(missing_ok=True)
    finally:
        aside.unlink(missing_ok=True)


def build(
    name: str,
    clips: Sequence[SourceClip],
    data_dir,
    rate: int,
    settings: dict,
    description: str,
    beam_arguments: Sequence[str] = (),
    workers: int = 2,
) -> tuple[dict[str, list[int]], list[Skipped]]:
    """Builds `data_dir`/`name`; begun before, it is gone on with.

    Args:
      name: of the corpus.
      clips: all clips of the metadata, those without audio included.
      data_dir: where corpora are built.
      rate: of the audio, Hz.
      settings: what decides which clips there are; part of `build.json`.
      description: of the corpus, for TFDS.
      beam_arguments: as in `beam_options`. Workers elsewhere must see source and `data_dir` under
        the same paths.
      workers: clips written at once by each worker of Beam.

    Returns:
      counts: {split: [clips built, clips of the metadata]}.
      skipped: the other clips, in the order of the metadata.

    Raises:
      ValueError: the folder was built with another rate or other settings, or no clip could be
        built.
      OSError: audio cannot be written, or the runner lost clips.
      ImportError: Beam is not installed.
    """
    folder = pathlib.Path(os.path.abspath(data_dir)) / name
    _check_settings(folder, {"corpus": name, "rate": rate, **settings})
    options, runner = beam_options(beam_arguments)
    _remove_leftovers(folder)
    lines = (json.dumps(dataclasses.asdict(clip)) for clip in clips)
    _write_aside(folder / _TASKS, "".join(f"{line}\n" for line in lines))
    _write_audio(folder, rate, workers, len(clips), options, runner)
    built, skipped = _outcome(clips, folder)
    if not built:
        first = skipped[0].reason if skipped else "its metadata is empty"
        raise ValueError(f"{name}: none of {len(clips)} clips could be built; the first: {first}")
    _write_records(
        name, folder, collections.Counter(c.split for c in built), description, options, runner
    )
    _write_table(
        folder / "metadata.csv",
        [*COLUMNS, "id"],
        (
            [audio_name(clip.id), caption, clip.label, clip.group, clip.split, clip.id]
            for clip in built
            for caption in clip.captions
        ),
    )
    write_report(folder / "report.csv", skipped)
    (folder / _TASKS).unlink()
    return _count(clips, skipped), skipped


def write_report(path, skipped: Sequence[Skipped]) -> None:
    """Writes the table of the clips that were not built."""
    rows = ([s.clip.split, s.clip.id, s.clip.audio or "", s.reason] for s in skipped)
    _write_table(path, ["split", "id", "source", "reason"], rows)


def _outcome(
    clips: Sequence[SourceClip], folder: pathlib.Path
) -> tuple[list[SourceClip], list[Skipped]]:
    """Returns the clips whose audio lies in the folder, and the others.

    Raises:
      OSError: nobody has tried some of them.
    """
    built, skipped, lost = [], [], []
    for clip in clips:
        target = folder / audio_name(clip.id)
        problem = target.with_suffix(_PROBLEM)
        if target.is_file():
            built.append(clip)
        elif clip.audio is None:
            skipped.append(Skipped(clip, "missing: no audio file in the source folder"))
        elif problem.is_file():
            skipped.append(Skipped(clip, problem.read_text(encoding="utf-8")))
        else:
            lost.append(clip.id)
    if lost:
        raise OSError(
            f"{folder}: Beam's runner ended without {len(lost)} of {len(clips)} clips, the first "
            f"'{lost[0]}'; start again, or choose another runner or mode"
        )
    return built, skipped


def _count(clips: Sequence[SourceClip], skipped: Sequence[Skipped]) -> dict[str, list[int]]:
    counts = {split: [0, 0] for split in SPLIT_NAMES}
    for clip in clips:
        counts[clip.split][0] += 1
        counts[clip.split][1] += 1
    for one in skipped:
        counts[one.clip.split][0] -= 1
    return counts


# --- Beam ------------------------------------------------------------------------------------


def _write_audio(
    folder: pathlib.Path, rate: int, workers: int, total: int, options, runner
) -> None:
    beam = load_beam()
    try:
        with _counting(folder, total), beam.Pipeline(options=options, runner=runner) as pipeline:
            (
                pipeline
                | beam.io.ReadFromText(str(folder / _TASKS))
                | beam.Map(_parse_clip)
                | beam.Reshuffle()  # else one worker has all clips of the one file
                | beam.BatchElements(min_batch_size=_BATCH, max_batch_size=_BATCH)
                | beam.Map(write_clips, folder=str(folder), rate=rate, workers=workers)
            )
    except RuntimeError as error:  # the direct runner's, with the text of the worker's traceback
        raise OSError(f"audio cannot be written: {str(error).strip().splitlines()[-1]}") from error


def _write_records(
    name: str, folder: pathlib.Path, counts: Mapping[str, int], description: str, options, runner
) -> None:
    load_tensorflow()
    import tensorflow_datasets as tfds

    tasks, version = str(folder / _TASKS), VERSION

    # Made here, because TFDS and with it TensorFlow are imported by those alone who build. Not
    # registered: what was built is opened by its files.
    class Recordings(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """TFDS builder of a corpus whose audio is written."""

        VERSION = tfds.core.Version(version)

        def _info(self):
            features = {
                "id": tfds.features.Text(doc="of the published metadata"),
                "file_name": tfds.features.Text(doc="of the audio, beside the folder of records"),
                "captions": tfds.features.Sequence(tfds.features.Text()),
                "label": tfds.features.Text(),
                "group": tfds.features.Text(),
                "samples": tfds.features.Scalar(np.int64),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=description,
                features=tfds.features.FeaturesDict(features),
            )

        def _split_generators(self, dl_manager):
            chosen = [split for split in SPLIT_NAMES if counts[split]]
            return {split: self._generate_examples(split) for split in chosen}

        def _generate_examples(self, split):
            beam = load_beam()
            return (
                beam.io.ReadFromText(tasks)
                | beam.Map(_parse_clip)
                | beam.FlatMap(_examples, folder=str(folder), split=split)
            )

    Recordings.name = name
    config = tfds.download.DownloadConfig(
        # Clips may have come since: records are written anew.
        download_mode=tfds.GenerateMode.REUSE_CACHE_IF_EXISTS,
        compute_stats=tfds.download.ComputeStatsMode.SKIP,
        try_download_gcs=False,
        beam_options=options,
        beam_runner=runner,
    )
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it downloads
        builder = Recordings(data_dir=folder.parent)
        builder.download_and_prepare(download_dir=folder / "downloads", download_config=config)
    shutil.rmtree(folder / "downloads", ignore_errors=True)
    written = {split: info.num_examples for split, info in builder.info.splits.items()}
    if written != dict(counts):
        raise OSError(
            f"{folder}: Beam's runner wrote records of {written} of {dict(counts)} clips; start "
            "again, or choose another runner or mode"
        )


def _parse_clip(line: str) -> SourceClip:
    values = json.loads(line)
    return SourceClip(**values | {"captions": tuple(values["captions"])})


def _examples(clip: SourceClip, folder: str, split: str) -> Iterator[tuple[str, dict]]:
    path = os.path.join(folder, audio_name(clip.id))
    if clip.split == split and os.path.isfile(path):
        yield clip.id, {
            "id": clip.id,
            "file_name": audio_name(clip.id),
            "captions": list(clip.captions),
            "label": clip.label,
            "group": clip.group,
            "samples": soundfile.info(path).frames,
        }


# --- Files -----------------------------------------------------------------------------------


def _check_size(path: str) -> None:
    """Raises AudioError for an empty file, and for a WAV that was cut, which libsndfile accepts."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError as error:  # a link to nowhere, or no right to read
        raise AudioError(f"{path}: cannot be opened: {error.strerror}") from error
    if not size:
        raise AudioError(f"{path}: no samples, the file has 0 bytes")
    told = 8 + int.from_bytes(head[4:8], "little")
    # 0xFFFFFFFF: written to a pipe, length unknown. A last odd byte may be unpadded.
    if head[:4] == b"RIFF" and head[8:] == b"WAVE" and size + 1 < told < 1 << 32:
        raise AudioError(f"{path}: truncated, {size} of {told} bytes")


def _is_built(target: pathlib.Path, rate: int, source: str | None) -> bool:
    try:
        info = soundfile.info(str(target))
    except soundfile.LibsndfileError:
        return False
    whole = info.samplerate == rate and info.frames > 0
    if source is None or not os.path.isfile(source):
        return whole
    return whole and os.path.getmtime(source) <= target.stat().st_mtime


def _check_settings(folder: pathlib.Path, settings: dict) -> None:
    path = folder / "build.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changes = [
            f"{key} was {before.get(key)!r}, is {settings.get(key)!r}"
            for key in sorted({*before, *settings})
            if before.get(key) != settings.get(key)
        ]
        if changes:
            raise ValueError(
                f"{folder} was built with other settings: {'; '.join(changes)}. Use another "
                "data_dir, or remove this folder"
            )
    _write_aside(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _remove_leftovers(folder: pathlib.Path) -> None:
    """Removes what a build that was killed had begun."""
    for path in [*folder.glob(f"audio/*/*{_ASIDE}"), *folder.glob(f"*{_ASIDE}")]:
        path.unlink(missing_ok=True)
    for path in folder.glob(f"*{VERSION}*"):
        if path.name != VERSION:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _counting(folder: pathlib.Path, total: int):
    """Tells on stderr now and then how many clips are there: a runner is silent for hours."""
    done = threading.Event()

    def tell():
        while not done.wait(_TELL_SECONDS):
            written = sum(1 for _ in folder.glob("audio/*/*.flac"))
            print(f"{folder.name}: audio of {written:,} of {total:,} clips", file=sys.stderr)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _write_table(path: pathlib.Path, header: Sequence[str], rows) -> None:
    aside = path.with_suffix(_ASIDE)
    with open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    os.replace(aside, path)


def _write_aside(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{uuid.uuid4().hex}{_ASIDE}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
