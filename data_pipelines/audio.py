"""Audio files -> mono float32 waveforms at one sampling rate, in chunks of one length."""

import concurrent.futures
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import soundfile

from data_pipelines import cores, listing, progress
from data_pipelines.corpora import Clip
from data_pipelines.waveforms import chunk_starts, fill_up, fit, resample

_BLOCK_FRAMES = 1 << 18


class AudioError(ValueError):
    """An audio file that cannot be used; the message names the file and the reason."""


@dataclasses.dataclass(frozen=True)
class AudioProblem:
    """A clip that cannot be used: its row in the list that was checked, and why."""

    row: int
    message: str


@dataclasses.dataclass(frozen=True)
class AudioLength:
    """Length of a file before any conversion: frames (samples of one channel) at a rate in Hz."""

    frames: int
    rate: int


def read_audio(
    path, sampling_rate: int, offset: float = 0.0, seconds: float | None = None
) -> np.ndarray:
    """Returns a file, or `seconds` of it from `offset` on, as float32 mono [samples].

    Channels are averaged; other rates are resampled by soxr at high quality, to
    ceil(frames * sampling_rate / rate) samples. A part that begins inside the file and passes its
    end is returned as far as it goes.

    Raises:
      AudioError: the file is missing, empty or not decodable, has non-finite samples, or `offset`
        is not inside it.
    """
    with _open(path) as file:
        start = round(offset * file.samplerate)
        frames = file.frames - start
        if not 0 <= start < file.frames:
            raise AudioError(
                f"{path}: offset is {offset} s, expected 0 or more and less than the length, "
                f"{file.frames / file.samplerate} s"
            )
        if seconds is not None:
            frames = min(frames, round(seconds * file.samplerate))
        return resample(_read_part(file, path, start, frames), file.samplerate, sampling_rate)


def read_chunk(
    path,
    sampling_rate: int,
    window_samples: int,
    choose_start: Callable[[int, int], int],
    fill: str = "zeros",
) -> tuple[np.ndarray, int]:
    """Returns one chunk of a file.

    Args:
      path: the audio file.
      sampling_rate: of the result, Hz.
      window_samples: length of the result.
      choose_start: (frames of the file, frames of the window) -> first frame, at the file's own
        rate. Only the chunk is decoded.
      fill: what follows a file shorter than the window (`waveforms.fill_up`).

    Returns:
      chunk: float32 [window_samples].
      valid: how many of its samples are the file's, before anything was filled in.

    Raises:
      AudioError: as `read_audio`.
    """
    with _open(path) as file:
        window = _window_frames(file, sampling_rate, window_samples)
        start = choose_start(file.frames, window)
        part = _read_part(file, path, start, min(window, file.frames - start))
        return _chunk(part, file, sampling_rate, window_samples, fill)


def read_chunks(
    path, sampling_rate: int, window_samples: int, max_chunks: int, fill: str = "zeros"
) -> tuple[np.ndarray, int]:
    """Returns the chunks of a file, float32 [chunks, window_samples], and checks all of it.

    The same chunks as from `read_chunk`, but the whole file is decoded once, block by block. With
    them comes how many samples of each are the file's.

    Raises:
      AudioError: as `read_audio`, and where the file holds less than its header says.
    """
    with _open(path) as file:
        window = _window_frames(file, sampling_rate, window_samples)
        starts = chunk_starts(file.frames, window, max_chunks)
        parts = [np.zeros(min(window, file.frames - start), np.float32) for start in starts]
        for position, block in _checked_blocks(file, path):
            for start, part in zip(starts, parts):
                first = max(start, position)
                last = min(start + len(part), position + len(block))
                if first < last:
                    part[first - start : last - start] = block[first - position : last - position]
        chunks, valid = zip(
            *(_chunk(part, file, sampling_rate, window_samples, fill) for part in parts)
        )
        return np.stack(chunks), valid[0]


def read_blocks(path, sampling_rate: int) -> Iterator[np.ndarray]:
    """Yields all of a file as mono float32 blocks [samples], whatever its length, in little memory.

    Together they are what `read_audio` returns: channels averaged, resampled by soxr.

    Raises:
      AudioError: as `read_audio`, and where the file holds less than its header says.
    """
    with _open(path) as file:
        missing = -(-file.frames * sampling_rate // file.samplerate)
        if file.samplerate == sampling_rate:
            yield from (block for _, block in _checked_blocks(file, path))
            return
        import soxr

        stream = soxr.ResampleStream(
            file.samplerate, sampling_rate, 1, dtype="float32", quality="HQ"
        )
        for _, block in _checked_blocks(file, path):
            resampled = stream.resample_chunk(block)
            missing -= len(resampled)
            yield resampled
        yield fit(stream.resample_chunk(np.zeros(0, np.float32), last=True), missing)


def count_chunks(
    length: AudioLength, sampling_rate: int, window_samples: int, max_chunks: int
) -> int:
    """Returns how many chunks `read_chunks` makes of a file of this length."""
    window = round(window_samples / sampling_rate * length.rate)
    return len(chunk_starts(length.frames, window, max_chunks))


def header_length(path) -> AudioLength | None:
    """Returns the length that the header of a file tells, None where it cannot be read."""
    try:
        with _open(path) as file:
            return AudioLength(file.frames, file.samplerate)
    except AudioError:
        return None


def measure_audio(
    clips: Sequence[Clip], num_parallel: int | None = None
) -> tuple[tuple[AudioLength | None, ...], tuple[AudioProblem, ...]]:
    """Decodes all of every file, in threads, a block at a time.

    Returns:
      lengths: of every clip, None for one that cannot be used.
      problems: the clips that cannot be used, in order.
    """

    def measure(clip: Clip):
        try:
            with _open(clip.path) as file:
                for _ in _checked_blocks(file, clip.path):
                    pass
                return AudioLength(file.frames, file.samplerate), None
        except AudioError as error:
            return None, str(error)

    with concurrent.futures.ThreadPoolExecutor(num_parallel or cores()) as pool:
        results = list(progress(pool.map(measure, clips), len(clips), "checking audio"))
    problems = tuple(
        AudioProblem(row, message) for row, (_, message) in enumerate(results) if message
    )
    return tuple(length for length, _ in results), problems


def check_audio(
    clips: Sequence[Clip], on_error: str = "raise", num_parallel: int | None = None
) -> tuple[tuple[Clip, ...], tuple[AudioProblem, ...]]:
    """Decodes every file, and returns the clips that can be used and the problems of the others.

    Args:
      clips: what to check.
      on_error: "raise" or "skip".
      num_parallel: threads; by default one per core.

    Raises:
      AudioError: with on_error="raise", if a file is missing, empty, not decodable, shorter than
        its header says, or has samples that are not finite: one error that names all such files
        (the first 20, and how many more).
    """
    _, problems = measure_audio(clips, num_parallel)
    return usable_clips(clips, problems, on_error), problems


def usable_clips(
    clips: Sequence[Clip], problems: Sequence[AudioProblem], on_error: str
) -> tuple[Clip, ...]:
    """Returns the clips without problems; raises as `check_audio` where there are any."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}, expected 'raise' or 'skip'")
    if problems and on_error == "raise":
        raise AudioError(
            listing(
                f"{len(problems)} of {len(clips)} audio files cannot be used; repair or remove "
                "them, or set on_error='skip' to go on without them",
                [problem.message for problem in problems],
            )
        )
    bad = {problem.row for problem in problems}
    return tuple(clip for row, clip in enumerate(clips) if row not in bad)


@contextlib.contextmanager
def _open(path):
    if not os.path.isfile(path):
        raise AudioError(f"{path}: no such file")
    try:
        with soundfile.SoundFile(path) as file:
            if file.frames <= 0:
                raise AudioError(f"{path}: no samples")
            yield file
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: cannot be decoded: {error.error_string}") from error


def _checked_blocks(file: soundfile.SoundFile, path):
    """Yields (position, mono float32 [frames]) over all of the file."""
    position = 0
    while len(block := _read_mono(file, path, _BLOCK_FRAMES)):
        yield position, block
        position += len(block)
    _check_length(path, position, file.frames)


def _read_part(file: soundfile.SoundFile, path, start: int, frames: int) -> np.ndarray:
    file.seek(start)
    part = _read_mono(file, path, frames)
    _check_length(path, len(part), frames)
    return part


def _read_mono(file: soundfile.SoundFile, path, frames: int) -> np.ndarray:
    samples = file.read(frames, dtype="float32", always_2d=True)  # [frames, channels]
    if not np.isfinite(samples).all():
        raise AudioError(f"{path}: samples that are not finite (NaN or infinite)")
    return samples.mean(axis=1)


def _check_length(path, found: int, expected: int) -> None:
    if found != expected:
        raise AudioError(f"{path}: truncated, {found} of {expected} samples can be decoded")


def _window_frames(file: soundfile.SoundFile, sampling_rate: int, window_samples: int) -> int:
    return round(window_samples / sampling_rate * file.samplerate)


def _chunk(
    part: np.ndarray, file: soundfile.SoundFile, sampling_rate: int, window_samples: int, fill: str
) -> tuple[np.ndarray, int]:
    """Returns a part of a file as [window_samples], and how many of its samples are the file's."""
    samples = resample(part, file.samplerate, sampling_rate)
    if len(part) < file.frames:
        # Less than a window only by the rounding of its length at the rate of the file.
        return fit(samples, window_samples), window_samples
    valid = min(len(samples), window_samples)
    return fill_up(samples[:valid], window_samples, fill), valid
