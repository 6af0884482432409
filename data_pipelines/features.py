"""Log-mel features of the clips of a split, computed once and kept on disk."""

import dataclasses
import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Sequence

import numpy as np

from data_pipelines import cores, map_ahead
from data_pipelines.audio import (
    AudioError,
    AudioLength,
    AudioProblem,
    count_chunks,
    header_length,
    measure_audio,
    progress,
    read_chunks,
)
from data_pipelines.corpora import Clip
from data_pipelines.log_mel import LogMelSettings, log_mel

# Part of every key: a change of how features are computed must not find those of before.
_VERSION = 2


@dataclasses.dataclass(frozen=True)
class ChunkPolicy:
    """How a clip becomes rows of features.

    Attributes:
      log_mel: the front end; its `fill` is what follows a clip shorter than a chunk.
      window_samples: length of a chunk, at the sampling rate of the front end.
      max_chunks: 1 takes the centre of a clip; more take so many equally spaced chunks at most.
    """

    log_mel: LogMelSettings
    window_samples: int
    max_chunks: int

    @property
    def row_shape(self) -> tuple[int, int]:
        """(frames, mels) of a row."""
        return self.log_mel.num_frames(self.window_samples), self.log_mel.n_mels

    def count(self, length: AudioLength) -> int:
        """Returns the number of rows of a clip of this length."""
        return count_chunks(
            length, self.log_mel.sampling_rate, self.window_samples, self.max_chunks
        )


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of a list of clips.

    Attributes:
      values: float32 [rows, frames, mels], log-mel, a read-only map of a file.
      rows_clip: int32 [rows], the clip of each row, ascending.
      problems: the clips that have no rows because their audio cannot be used.
    """

    values: np.ndarray
    rows_clip: np.ndarray
    problems: tuple[AudioProblem, ...]


class FeatureCache:
    """Features and audio checks of lists of clips, one file for each list and chunk policy.

    A file is found again by the paths, sizes and modification times of the audio and by the
    policy. Files are written aside and renamed, so processes that compute the same one at the same
    time do double work, but all end with a whole file. Nothing is ever deleted.

    Args:
      directory: where the files lie; None keeps nothing.
      max_bytes: largest file of features; more is not kept (see `features`).
      num_parallel: clips worked on at once; by default one per core.
    """

    def __init__(self, directory, max_bytes: int, num_parallel: int | None = None):
        self.directory = pathlib.Path(directory) if directory is not None else None
        self.max_bytes = max_bytes
        self.num_parallel = num_parallel or cores()

    def features(self, clips: Sequence[Clip], policy: ChunkPolicy) -> Features | None:
        """Returns the features of `clips`, computed if no file has them.

        Clips none of which is longer than the window have one file for all policies.

        Returns:
          None if the file would be larger than `max_bytes` or there is no directory: the caller
          computes rows as it needs them.
        """
        if self.directory is None:
            return None
        lengths = [header_length(clip.path) for clip in clips]
        counts = [policy.count(length) if length else 1 for length in lengths]
        policy = dataclasses.replace(policy, max_chunks=max(counts, default=1))
        if 4 * sum(counts) * int(np.prod(policy.row_shape)) > self.max_bytes:
            return None
        stem = self.directory / f"features-{_key(clips, dataclasses.asdict(policy))}"
        # The record is renamed after the array: where it is, the array is whole.
        record = _read_record(stem.with_suffix(".json"))
        if record is None or not stem.with_suffix(".npy").is_file():
            record = self._compute(clips, policy, stem)
        values = np.load(stem.with_suffix(".npy"), mmap_mode="r")
        return Features(
            # np.memmap checks a subclass at every indexing; a plain view of it does not.
            np.asarray(values),
            np.array(record["rows_clip"], np.int32),
            tuple(AudioProblem(row, message) for row, message in record["problems"]),
        )

    def check(
        self, clips: Sequence[Clip]
    ) -> tuple[tuple[AudioLength | None, ...], tuple[AudioProblem, ...]]:
        """Returns what `measure_audio` does, from a file if these clips were checked before."""
        path = self.directory and self.directory / f"check-{_key(clips, {})}.json"
        record = path and _read_record(path)
        if not record:
            lengths, problems = measure_audio(clips, self.num_parallel)
            if path:
                _write_record(
                    path,
                    lengths=[length and [length.frames, length.rate] for length in lengths],
                    problems=[[problem.row, problem.message] for problem in problems],
                )
            return lengths, problems
        return (
            tuple(AudioLength(*length) if length else None for length in record["lengths"]),
            tuple(AudioProblem(row, message) for row, message in record["problems"]),
        )

    def _compute(self, clips: Sequence[Clip], policy: ChunkPolicy, stem: pathlib.Path) -> dict:
        self.directory.mkdir(parents=True, exist_ok=True)
        aside = stem.with_name(f"{stem.name}.{uuid.uuid4().hex}.tmp")
        rows_clip: list[int] = []
        problems: list[list] = []
        try:
            with open(aside, "wb") as file:
                header = _write_header(file, (0, *policy.row_shape))
                # In threads of our own: tf.data, made to call Python, took a sixth longer.
                results = map_ahead(
                    lambda clip: _compute_clip(clip, policy), clips, threads=self.num_parallel
                )
                for row, (values, problem) in enumerate(
                    progress(results, len(clips), f"log-mel features of {len(clips)} clips")
                ):
                    if problem:
                        problems.append([row, problem])
                    else:
                        file.write(values)
                        rows_clip.extend([row] * len(values))
                file.seek(0)
                # NumPy leaves room in a header for the first axis to grow.
                if _write_header(file, (len(rows_clip), *policy.row_shape)) != header:
                    raise RuntimeError("NumPy changed the length of an .npy header")
            os.replace(aside, stem.with_suffix(".npy"))
        finally:
            aside.unlink(missing_ok=True)
        return _write_record(stem.with_suffix(".json"), rows_clip=rows_clip, problems=problems)


def _compute_clip(clip: Clip, policy: ChunkPolicy) -> tuple[np.ndarray | None, str]:
    """Returns (features [chunks, frames, mels], "") of a clip, or (None, why it has none)."""
    settings = policy.log_mel
    try:
        waveforms, valid = read_chunks(
            clip.path,
            settings.sampling_rate,
            policy.window_samples,
            policy.max_chunks,
            settings.fill,
        )
    except AudioError as error:
        return None, str(error)
    return np.stack([log_mel(waveform, settings, valid) for waveform in waveforms]), ""


def _key(clips: Sequence[Clip], policy: dict) -> str:
    digest = hashlib.sha256(json.dumps([_VERSION, policy], sort_keys=True).encode())
    for clip in clips:
        path = os.path.abspath(clip.path)
        try:
            status = os.stat(path)
            facts = [path, status.st_size, status.st_mtime_ns]
        except OSError:
            facts = [path, -1, -1]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()[:32]


def _write_header(file, shape: tuple[int, ...]) -> int:
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    return file.tell()


def _read_record(path: pathlib.Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write_record(path: pathlib.Path, **record) -> dict:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        aside.write_text(json.dumps(record), encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return record
