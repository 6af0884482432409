"""One grain of each kind of sound: the audio of a single onset.

A grain is (t, hz, rng) -> float32 [samples], where t is the time axis in seconds, float32
[samples]. All grains start at t = 0; levels are set by whoever puts them into a scene.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.fft


def axis(seconds, sampling_rate):
    """Times in seconds, float32 [samples], of at least 16 samples."""
    samples = max(round(seconds * sampling_rate), 16)
    return np.arange(samples, dtype=np.float32) / np.float32(sampling_rate)


def tone(t, hz):
    """Sine whose frequency is a number or a track [samples] in Hz."""
    if np.ndim(hz) == 0:
        return np.sin(np.float32(2 * np.pi * hz) * t)
    step = float(t[1] - t[0])
    return np.sin((2 * np.pi * step * np.cumsum(hz, dtype=np.float64)).astype(np.float32))


def white(samples, rng):
    """Uniform white noise of unit power; four times as fast as Gaussian."""
    return (rng.random(samples, dtype=np.float32) - np.float32(0.5)) * np.float32(12**0.5)


def noise(t, low, high, rng):
    """Gaussian noise between two frequencies in Hz, made in the frequency domain."""
    size = scipy.fft.next_fast_len(len(t), real=True)
    step = float(t[1] - t[0])
    first = round(low * size * step)
    last = min(max(round(high * size * step), first + 2), size // 2)
    spectrum = np.zeros(size // 2 + 1, np.complex64)
    normal = rng.standard_normal(2 * (last - first), dtype=np.float32)
    spectrum[first:last] = normal.view(np.complex64)
    return scipy.fft.irfft(spectrum, size)[: len(t)]


def decay(t, seconds):
    """Exponential envelope that falls to 1/e in `seconds`."""
    return np.exp(t * np.float32(-1 / seconds))


def _gate(t, seconds=0.015):
    """Fades at both ends, so that a sustained sound starts and stops without a click."""
    return np.minimum(1, np.minimum(t, t[-1] - t) / np.float32(seconds))


def _modes(t, hz, ratios, seconds):
    return sum(tone(t, hz * r) * decay(t, seconds / (1 + 0.4 * i)) for i, r in enumerate(ratios))


def _bell(t, hz, rng):
    index = 3 * decay(t, 0.12)
    return np.sin(np.float32(2 * np.pi * hz) * t + index * tone(t, 1.4 * hz)) * decay(t, 0.22)


def _siren(t, hz, rng):
    wail = hz * (0.75 + 0.6 * np.sin(np.pi * t / t[-1]))
    return tone(t, wail) + 0.5 * tone(t, 2 * wail) + 0.3 * tone(t, 3 * wail)


def _bird(t, hz, rng):
    return tone(t, hz * (1.15 - 0.3 * t / t[-1] + 0.08 * tone(t, 28.0))) * np.sin(np.pi * t / t[-1])


def _dog(t, hz, rng):
    track = hz * (1.2 - 0.5 * t / t[-1])
    voice = sum(tone(t, k * track) * w for k, w in ((1, 0.5), (2, 0.8), (3, 1), (4, 0.7), (5, 0.4)))
    breath = 0.8 * noise(t, 2 * hz, 6 * hz, rng) * len(t) ** 0.5
    return (voice + breath) * _gate(t, 0.02) * decay(t, 0.09)


def _engine(t, hz, rng):
    exhaust = 0.2 * noise(t, 60, 3 * hz, rng) * len(t) ** 0.5
    return (_modes(t, hz, (1, 1.5, 2.7), 0.015) + exhaust) * decay(t, 0.05)


def _drum(t, hz, rng):
    skin = tone(t, hz * (1 + 1.2 * decay(t, 0.025))) * decay(t, 0.12)
    return skin + 0.4 * noise(t, 3 * hz, 12 * hz, rng) * len(t) ** 0.5 * decay(t, 0.012)


def _click(t, hz, rng):
    contact = 0.3 * noise(t, hz, 2.5 * hz, rng) * len(t) ** 0.5 * decay(t, 0.002)
    return tone(t, hz) * decay(t, 0.0025) + contact


def _cricket(t, hz, rng):
    return tone(t, hz) * np.maximum(tone(t, 38.0), 0) * _gate(t)


def _hiss(t, hz, rng):
    return noise(t, 0.7 * hz, 1.8 * hz, rng) * _gate(t, 0.03)


def _glass(t, hz, rng):
    ratios = (1, 1.37, 1.83, 2.21, 2.66) * rng.uniform(0.97, 1.03, 5)
    contact = 0.6 * noise(t, hz, 2.5 * hz, rng) * len(t) ** 0.5 * decay(t, 0.02)
    return _modes(t, hz, ratios, 0.09) + contact


def _alarm(t, hz, rng):
    beep = t[: len(t) // 2]
    sound = (tone(beep, hz) + 0.4 * tone(beep, 3 * hz)) * _gate(beep, 0.006)
    return np.pad(sound, (0, len(t) - len(beep)))


def _laser(t, hz, rng):
    return tone(t, hz * (0.4 + 2.6 * decay(t, 0.05))) * decay(t, 0.1)


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a kind sounds.

    pace: what its pace is: a "count", a "rate" or a "length".
    hertz: base frequency at middle pitch. seconds: length of a grain; 0 fills the time there is.
    rate: onsets per second when slow.
    """

    pace: str
    grain: Callable
    hertz: float
    seconds: float = 0.0
    rate: float = 0.0


KINDS = {
    "bell": Kind("count", _bell, 650, 0.6),
    "dog": Kind("count", _dog, 260, 0.18),
    "drum": Kind("count", _drum, 140, 0.35),
    "glass": Kind("count", _glass, 2000, 0.25),
    "laser": Kind("count", _laser, 1300, 0.24),
    "siren": Kind("rate", _siren, 420, 0.0, 1.6),
    "bird": Kind("rate", _bird, 2800, 0.11, 3.0),
    "engine": Kind("rate", _engine, 90, 0.09, 14.0),
    "click": Kind("rate", _click, 3400, 0.03, 6.0),
    "cricket": Kind("rate", _cricket, 4300, 0.10, 3.5),
    "alarm": Kind("rate", _alarm, 950, 0.0, 2.5),
    "hiss": Kind("length", _hiss, 3000),
}
