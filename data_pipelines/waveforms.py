"""Waveforms in memory: mono at one sampling rate, filled up or cut to the length of a window.

Nothing here reads files: those are `data_pipelines.audio`'s.
"""

import math

import numpy as np

# What a clip shorter than the window gets; "frames" adds no samples and leaves it to the front end.
FILLS = ("zeros", "repeatpad", "repeat", "frames")
_FULL_SCALE = {"int16": 2.0**15, "int32": 2.0**31}


def chunk_starts(num_samples: int, window_samples: int, max_chunks: int | None) -> tuple[int, ...]:
    """Returns where the chunks of a clip begin, in samples.

    There are min(max_chunks, ceil(num_samples / window_samples)) chunks, at least one: a single one
    is the centre of the clip; several are equally spaced, the first at the begin of the clip, the
    last ending with it. A clip shorter than the window is one chunk, filled up by whoever cuts it.
    Training takes max_chunks = 1; None is as many as the clip needs.
    """
    spare = max(num_samples - window_samples, 0)
    needed = math.ceil(num_samples / window_samples)
    chunks = max(1, needed if max_chunks is None else min(max_chunks, needed))
    if chunks == 1:
        return (spare // 2,)
    return tuple(i * spare // (chunks - 1) for i in range(chunks))


def fill_up(samples: np.ndarray, length: int, fill: str) -> np.ndarray:
    """Returns a clip [samples] of at most `length` samples as [length].

    "repeatpad" is as many whole repetitions as fit, then zeros; "repeat" is repetitions, the last
    one cut; "zeros" and "frames" are zeros after the clip.
    """
    if fill == "repeat":
        return np.resize(samples, length)
    if fill == "repeatpad":
        samples = np.tile(samples, length // len(samples))
    return fit(samples, length)


def fit(samples: np.ndarray, length: int) -> np.ndarray:
    """Returns `samples` cut or zero-padded at the end to [length]."""
    return np.pad(samples[:length], (0, max(length - len(samples), 0)))


def resample(samples: np.ndarray, rate: int, target_rate: int) -> np.ndarray:
    """Returns mono float32 `samples` resampled from `rate` to `target_rate` (Hz).

    By soxr at high quality, to ceil(samples * target_rate / rate) samples.
    """
    if rate == target_rate:
        return samples
    import soxr

    expected = -(-len(samples) * target_rate // rate)
    return fit(soxr.resample(samples, rate, target_rate, quality="HQ"), expected)


def to_mono(samples, sampling_rate: int, target_rate: int) -> np.ndarray:
    """Returns a clip in memory as a model takes it: mono float32 [samples] at `target_rate`.

    Channels are averaged and other rates resampled, as for a file.

    Args:
      samples: array [S], [S, C] or [C, S], the shorter axis being the channels; float16, float32
        or float64 as they are, int16 and int32 divided by full scale (2^15, 2^31).
      sampling_rate: of `samples`, Hz.
      target_rate: of the result, Hz.

    Raises:
      ValueError: a rate that is not a positive whole number, another type or number of axes, as
        many samples as channels, no samples, or values that are not finite.
    """
    for name, rate in (("sampling_rate", sampling_rate), ("target_rate", target_rate)):
        if not isinstance(rate, int | float | np.number) or not rate > 0 or rate % 1:
            raise ValueError(f"{name} is {rate!r}, expected a positive whole number of Hz")
    samples = np.asarray(samples)
    kind, shape = samples.dtype.name, samples.shape
    if kind not in _FULL_SCALE and kind not in ("float16", "float32", "float64"):
        raise ValueError(
            f"audio of type {kind}, expected float16, float32, float64, int16 or int32; scale "
            "others to floats in [-1, 1]"
        )
    if samples.ndim not in (1, 2):
        raise ValueError(
            f"audio of shape {shape}, expected [samples] or two axes of which the shorter is the "
            "channels; pass one clip at a time"
        )
    if not samples.size:
        raise ValueError(f"audio of shape {shape} has no samples, expected at least one")
    if samples.ndim == 2 and shape[0] == shape[1] > 1:
        raise ValueError(
            f"audio of shape {shape}: which axis is the channels cannot be told, expected one "
            "longer than the other; average the channels and pass [samples]"
        )
    if kind in _FULL_SCALE:
        samples = (samples / _FULL_SCALE[kind]).astype(np.float32)
    else:
        with np.errstate(over="ignore"):  # what float32 cannot hold is told below
            samples = samples.astype(np.float32)
    if samples.ndim == 2:
        samples = samples.mean(axis=int(np.argmin(shape)))
    if not np.isfinite(samples).all():
        raise ValueError(
            "audio has samples that are not finite (NaN, infinite, or too large for float32), "
            "expected finite ones; repair the clip or leave it out"
        )
    return resample(samples, int(sampling_rate), int(target_rate))
