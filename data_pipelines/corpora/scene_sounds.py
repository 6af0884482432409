"""The sounds of the embedded corpora: a scene goes in, 16-bit audio comes out.

A scene is one to three events in temporal order over an optional background. Every attribute of an event is
one audible quantity:

    pitch      low, mid, high          base frequency x 1/2, 1, 2 (an octave apart, +- 1 semitone)
    pace       once, twice, thrice     number of onsets          (kinds of pace "count")
               slow, fast              onsets per second, x 2.5  (kinds of pace "rate")
               short, long             seconds of sound          (kinds of pace "length")
    loudness   soft, loud              12 dB apart
    texture    clean, rough            rough: 50 Hz amplitude modulation and multiplicative noise

A `Profile` says how one corpus differs: which values it favours, where it puts the attribute scales (its "high"
may be another corpus's "mid") and through what channel it was recorded. All functions are pure; randomness comes
from the generator they are given.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable

import numpy as np
import scipy.fft

PITCHES = {"low": 0.5, "mid": 1.0, "high": 2.0}
PACES = {"count": ("once", "twice", "thrice"), "rate": ("slow", "fast"), "length": ("short", "long")}
LOUDNESSES = {"soft": 0.25, "loud": 1.0}
TEXTURES = ("clean", "rough")
BACKGROUNDS = ("none", "wind", "rain", "hum", "crowd")
EFFECTS = ("telephone", "echo", "distance", "drive", "music", "noise")

_ONSETS = {"once": 1, "twice": 2, "thrice": 3}
_LEVEL = 0.3  # peak of a loud event; leaves 10 dB for corpora that are louder and for the background
_ECHO_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Event:
    """One sound: a key of `KINDS` and one value of each attribute."""

    kind: str
    pitch: str
    pace: str
    loudness: str
    texture: str


@dataclasses.dataclass(frozen=True)
class Scene:
    """Events in temporal order, over a background (one of `BACKGROUNDS`)."""

    events: tuple[Event, ...]
    background: str

    def __str__(self) -> str:
        """The canonical description: equal for equal scenes, so splits and groups are hashed from it."""
        events = " > ".join(" ".join(dataclasses.astuple(event)) for event in self.events)
        return f"{events} | {self.background}"


@dataclasses.dataclass(frozen=True)
class Profile:
    """How the recordings of one corpus differ from those of the base corpus, at full shift.

    favours: kinds, attribute values and backgrounds that are three times as likely as the others.
    events: probabilities of one, two and three events.
    semitones, pace, decibels: shift of the pitch scale, factor on rates and durations, shift of the level. These
        move what the words mean: they belong to the `meaning` knob.
    channel: strength of each of `EFFECTS`, 0 to 1.
    """

    favours: tuple[str, ...] = ()
    events: tuple[float, float, float] = (0.35, 0.55, 0.10)
    semitones: float = 0.0
    pace: float = 1.0
    decibels: float = 0.0
    channel: tuple[float, ...] = (0.0,) * len(EFFECTS)


PROFILES = {
    "base": Profile(),
    "audiocaps_like": Profile(
        favours=("dog", "bird", "siren", "engine", "horn", "knock", "step", "hiss", "thrice", "crowd", "wind"),
        events=(0.20, 0.65, 0.15),
        semitones=3.0,
        pace=0.85,
        decibels=3.0,
        channel=(0.9, 0.0, 0.0, 0.2, 0.0, 0.7),
    ),
    "clotho_like": Profile(
        favours=("bird", "cricket", "drop", "step", "glass", "bell", "click", "whistle", "soft", "rain", "long"),
        events=(0.30, 0.55, 0.15),
        semitones=-3.0,
        pace=1.2,
        decibels=-2.0,
        channel=(0.0, 1.0, 0.1, 0.0, 0.0, 0.2),
    ),
    "bbc_like": Profile(
        favours=("bell", "engine", "horn", "drum", "knock", "click", "dog", "buzz", "low", "slow", "none"),
        events=(0.50, 0.50, 0.00),
        semitones=-6.0,
        pace=0.75,
        decibels=-4.0,
        channel=(0.0, 0.3, 1.0, 0.0, 0.0, 0.3),
    ),
    "audioset_like": Profile(
        favours=("alarm", "laser", "buzz", "siren", "drum", "whistle", "hiss", "cricket", "rough", "fast", "hum"),
        events=(0.10, 0.75, 0.15),
        semitones=5.0,
        pace=1.35,
        decibels=5.0,
        channel=(0.1, 0.0, 0.0, 1.0, 1.0, 0.2),
    ),
}


# --- drawing a scene ------------------------------------------------------------------------------------------------


def pick(rng: np.random.Generator, items, weights=None):
    """One of `items`, by weight; many times faster than `Generator.choice` on short lists."""
    if weights is None:
        return items[int(rng.random() * len(items))]
    totals = list(itertools.accumulate(weights))
    return items[min(bisect.bisect(totals, rng.random() * totals[-1]), len(items) - 1)]


def draw_scene(rng: np.random.Generator, profile: Profile, shift: float) -> Scene:
    """A scene whose value probabilities lie between the base corpus (`shift` 0) and the profile (1)."""

    def choose(values):
        return pick(rng, values, [3.0**shift if value in profile.favours else 1.0 for value in values])

    base = PROFILES["base"].events
    odds = [max(b + shift * (own - b), 0.0) for b, own in zip(base, profile.events, strict=True)]
    events, kinds = [], list(KINDS)
    for _ in range(pick(rng, (1, 2, 3), odds)):
        kind = choose(kinds)
        kinds.remove(kind)
        pace = choose(PACES[KINDS[kind].pace])
        events.append(Event(kind, choose(tuple(PITCHES)), pace, choose(tuple(LOUDNESSES)), choose(TEXTURES)))
    return Scene(tuple(events), choose(BACKGROUNDS))


# --- one grain of each kind -----------------------------------------------------------------------------------------
# A grain is one onset: (t, hz, rng) -> float32 [samples], where t is the time axis in seconds, float32.


def _tone(t, hz):
    """Sine whose frequency is a number or a track [samples] in Hz."""
    if np.ndim(hz) == 0:
        return np.sin(np.float32(2 * np.pi * hz) * t)
    step = float(t[1] - t[0]) if len(t) > 1 else 0.0
    return np.sin((2 * np.pi * step * np.cumsum(hz, dtype=np.float64)).astype(np.float32))


def _white(samples, rng):
    """Uniform white noise of unit power; four times as fast as Gaussian."""
    return (rng.random(samples, dtype=np.float32) - np.float32(0.5)) * np.float32(12**0.5)


def _noise(t, low, high, rng):
    """Gaussian noise between two frequencies in Hz, made in the frequency domain."""
    size = scipy.fft.next_fast_len(len(t), real=True)
    step = float(t[1] - t[0])
    first = round(low * size * step)
    last = min(max(round(high * size * step), first + 2), size // 2)
    spectrum = np.zeros(size // 2 + 1, np.complex64)
    spectrum[first:last] = rng.standard_normal(2 * (last - first), dtype=np.float32).view(np.complex64)
    return scipy.fft.irfft(spectrum, size)[: len(t)]


def _decay(t, seconds):
    return np.exp(t * np.float32(-1 / seconds))


def _gate(t, seconds=0.015):
    """Fades at both ends, so that a sustained sound starts and stops without a click."""
    return np.minimum(1, np.minimum(t, t[-1] - t) / np.float32(seconds))


def _saw(t, hz):
    return 2 * np.mod(t * np.float32(hz), 1) - 1


def _modes(t, hz, ratios, seconds):
    return sum(_tone(t, hz * r) * _decay(t, seconds / (1 + 0.4 * i)) for i, r in enumerate(ratios))


def _bell(t, hz, rng):
    index = 3 * _decay(t, 0.12)
    return np.sin(np.float32(2 * np.pi * hz) * t + index * _tone(t, 1.4 * hz)) * _decay(t, 0.22)


def _whistle(t, hz, rng):
    rise = 1 + 0.35 * t / t[-1]
    return _tone(t, hz * rise * (1 + 0.015 * _tone(t, 6.0))) * _gate(t, 0.04)


def _siren(t, hz, rng):
    wail = hz * (0.75 + 0.6 * np.sin(np.pi * t / t[-1]))
    return _tone(t, wail) + 0.5 * _tone(t, 2 * wail) + 0.3 * _tone(t, 3 * wail)


def _bird(t, hz, rng):
    return _tone(t, hz * (1.15 - 0.3 * t / t[-1] + 0.08 * _tone(t, 28.0))) * np.sin(np.pi * t / t[-1])


def _dog(t, hz, rng):
    track = hz * (1.2 - 0.5 * t / t[-1])
    voice = sum(_tone(t, k * track) * w for k, w in ((1, 0.5), (2, 0.8), (3, 1), (4, 0.7), (5, 0.4)))
    return (voice + 0.8 * _noise(t, 2 * hz, 6 * hz, rng) * len(t) ** 0.5) * _gate(t, 0.02) * _decay(t, 0.09)


def _engine(t, hz, rng):
    return (_modes(t, hz, (1, 1.5, 2.7), 0.015) + 0.2 * _noise(t, 60, 3 * hz, rng) * len(t) ** 0.5) * _decay(t, 0.05)


def _drum(t, hz, rng):
    skin = _tone(t, hz * (1 + 1.2 * _decay(t, 0.025))) * _decay(t, 0.12)
    return skin + 0.4 * _noise(t, 3 * hz, 12 * hz, rng) * len(t) ** 0.5 * _decay(t, 0.012)


def _click(t, hz, rng):
    return _tone(t, hz) * _decay(t, 0.0025) + 0.3 * _noise(t, hz, 2.5 * hz, rng) * len(t) ** 0.5 * _decay(t, 0.002)


def _knock(t, hz, rng):
    return _modes(t, hz, (1, 2.3, 3.9), 0.03) + 0.5 * _noise(t, hz, 4 * hz, rng) * len(t) ** 0.5 * _decay(t, 0.01)


def _drop(t, hz, rng):
    return _tone(t, hz * (0.8 + 1.0 * (t / t[-1]) ** 2)) * _decay(t, 0.03)


def _cricket(t, hz, rng):
    return _tone(t, hz) * np.maximum(_tone(t, 38.0), 0) * _gate(t)


def _horn(t, hz, rng):
    chord = sum(_tone(t, hz * k) / k**0.7 + 0.8 * _tone(t, 1.26 * hz * k) / k**0.7 for k in (1, 2, 3, 4, 5))
    return chord * _gate(t, 0.03)


def _buzz(t, hz, rng):
    return (_saw(t, hz) + _saw(t, 1.007 * hz)) * _gate(t)


def _hiss(t, hz, rng):
    return _noise(t, 0.7 * hz, 1.8 * hz, rng) * _gate(t, 0.03)


def _glass(t, hz, rng):
    ratios = (1, 1.37, 1.83, 2.21, 2.66) * rng.uniform(0.97, 1.03, 5)
    return _modes(t, hz, ratios, 0.09) + 0.6 * _noise(t, hz, 2.5 * hz, rng) * len(t) ** 0.5 * _decay(t, 0.02)


def _step(t, hz, rng):
    thump = _noise(t, 0.4 * hz, 1.6 * hz, rng) * len(t) ** 0.5
    return thump * (_decay(t, 0.02) + 0.6 * (t > 0.07) * _decay(np.maximum(t - 0.07, 0), 0.015))


def _alarm(t, hz, rng):
    return np.sign(_tone(t, hz)) * (t < 0.5 * t[-1]) * _gate(t, 0.004)


def _laser(t, hz, rng):
    return _tone(t, hz * (0.4 + 2.6 * _decay(t, 0.05))) * _decay(t, 0.1)


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a kind sounds: its pace family, grain, middle frequency (Hz), grain length (s), slow rate (onsets/s)."""

    pace: str
    grain: Callable
    hertz: float
    seconds: float = 0.0
    rate: float = 0.0


KINDS = {
    "bell": Kind("count", _bell, 700, 0.6),
    "dog": Kind("count", _dog, 300, 0.18),
    "drum": Kind("count", _drum, 110, 0.35),
    "knock": Kind("count", _knock, 260, 0.12),
    "glass": Kind("count", _glass, 1500, 0.25),
    "laser": Kind("count", _laser, 800, 0.24),
    "siren": Kind("rate", _siren, 620, 0.0, 1.6),
    "bird": Kind("rate", _bird, 2400, 0.11, 3.0),
    "engine": Kind("rate", _engine, 150, 0.09, 14.0),
    "click": Kind("rate", _click, 1800, 0.03, 6.0),
    "drop": Kind("rate", _drop, 800, 0.10, 3.0),
    "cricket": Kind("rate", _cricket, 2600, 0.10, 3.5),
    "step": Kind("rate", _step, 420, 0.14, 2.2),
    "alarm": Kind("rate", _alarm, 1000, 0.0, 2.5),
    "whistle": Kind("length", _whistle, 1300),
    "horn": Kind("length", _horn, 210),
    "buzz": Kind("length", _buzz, 120),
    "hiss": Kind("length", _hiss, 2200),
}


# --- events, backgrounds, channel -----------------------------------------------------------------------------------


def _axis(seconds, sampling_rate):
    return np.arange(max(round(seconds * sampling_rate), 16), dtype=np.float32) / np.float32(sampling_rate)


def render_event(event, room, profile, meaning, sampling_rate, rng):
    """One event -> float32 [samples], at most `room` seconds, on the attribute scales of the profile."""
    kind = KINDS[event.kind]
    hz = kind.hertz * PITCHES[event.pitch] * 2 ** ((profile.semitones * meaning + rng.uniform(-1, 1)) / 12)
    hz = min(hz, 0.36 * sampling_rate)
    speed = profile.pace**meaning * rng.uniform(0.92, 1.08)
    if kind.pace == "length":
        seconds = min((0.25 if event.pace == "short" else 0.75) / speed, room)
        starts, grain = [0.0], kind.grain(_axis(seconds, sampling_rate), hz, rng)
    elif kind.pace == "count":
        count = _ONSETS[event.pace]
        # Ringing tails may overlap, but the last onset still gets 0.2 s of its own.
        gap = min(0.27 / speed, (room - 0.2) / 2)
        starts = [i * gap * rng.uniform(0.97, 1.03) for i in range(count)]
        grain = kind.grain(_axis(kind.seconds, sampling_rate), hz, rng)
    else:
        rate = kind.rate * speed * (2.5 if event.pace == "fast" else 1.0)
        seconds = min(kind.seconds or 1 / rate, 1 / rate, room)  # 0: a grain that fills its period
        starts = [i / rate for i in range(max(1, int(room * rate + 1e-6)))]
        grain = kind.grain(_axis(seconds, sampling_rate), hz, rng)
    sound = np.zeros(round(room * sampling_rate), np.float32)
    for start in starts:
        at = round(start * sampling_rate)
        piece = grain[: len(sound) - at]
        sound[at : at + len(piece)] += piece * np.float32(rng.uniform(0.85, 1.0))
    sound *= 1 / np.max(np.abs(sound))
    if event.texture == "rough":
        t = _axis(room, sampling_rate)[: len(sound)]
        sound *= (0.55 + 0.45 * _tone(t, 50.0)) * (1 + 0.7 * _white(len(sound), rng))
        sound *= 1 / np.max(np.abs(sound))
    level = _LEVEL * LOUDNESSES[event.loudness] * 10 ** ((profile.decibels * meaning + rng.uniform(-1.5, 1.5)) / 20)
    return sound[: len(sound)] * np.float32(level)


def render_background(name, samples, sampling_rate, rng):
    """A background -> float32 [samples], about 25 dB under a loud event."""
    if name == "none":
        return np.zeros(samples, np.float32)
    t = _axis(samples / sampling_rate, sampling_rate)
    if name == "hum":
        sound = sum(_tone(t, 120.0 * k + rng.uniform(-1, 1)) / k for k in (1, 2, 3))
    else:
        low, high = {"wind": (60, 450), "rain": (2500, 7000), "crowd": (250, 1800)}[name]
        sound = _noise(t, low, high, rng)
        if name == "wind":
            sound *= 1 + 0.8 * _tone(t, rng.uniform(0.5, 1.0))
        elif name == "crowd":  # babble: noise in the band of speech, at the rate of syllables
            sound *= np.abs(_tone(t, rng.uniform(1.8, 2.4)) + 0.6 * _tone(t, rng.uniform(3.1, 3.9)))
    return sound * np.float32(0.02 * rng.uniform(0.8, 1.25) / np.sqrt(np.mean(sound**2)))


def draw_channel(rng, profile, shift):
    """Strength of each of `EFFECTS`: a mild random mixture (`shift` 0), the profile's own (1), or between."""
    mild = rng.uniform(0.0, 0.5, len(EFFECTS)) * (rng.random(len(EFFECTS)) < 0.4)
    own = np.array(profile.channel) * rng.uniform(0.85, 1.15, len(EFFECTS))
    return np.clip(mild + shift * (own - mild), 0.0, 1.5)


@functools.lru_cache(maxsize=4)
def _log_bands(size, sampling_rate):
    """Log magnitude of the telephone and the distance at strength 1, each float32 [size // 2 + 1]."""
    hz = scipy.fft.rfftfreq(size, 1 / sampling_rate)

    def shelf(weight):  # at most 25 dB down: what lies outside the band gets faint, never inaudible
        return np.log(0.056 + 0.944 * weight)

    telephone = shelf(1 / (1 + (hz / 3000) ** 4)) + shelf(hz**4 / (hz**4 + 300**4))
    distance = shelf(1 / (1 + (hz / 900) ** 2))
    return telephone.astype(np.float32), distance.astype(np.float32)


def apply_channel(audio, strengths, sampling_rate, rng):
    """Audio [samples] through the effects, each of strength 0 (absent) to 1 -> [samples], float32."""
    telephone, echo, distance, drive, music, noise = (float(s) for s in strengths)
    samples = len(audio)
    if music > 0:  # three notes of a pad that changes every 0.64 s
        t = _axis(samples / sampling_rate, sampling_rate)
        bars = (t / np.float32(0.64)).astype(int)
        for interval in (0, 4, 7):
            notes = 220 * 2 ** ((rng.integers(0, 12, bars[-1] + 1) + interval) / 12)
            audio = audio + np.float32(0.02 * music) * _tone(t, notes[bars])
    # Room for the tail, so that it does not wrap around.
    size = scipy.fft.next_fast_len(samples + round(_ECHO_SECONDS * sampling_rate), real=True)
    telephone_band, distance_band = _log_bands(size, sampling_rate)
    response = np.exp(np.float32(telephone) * telephone_band + np.float32(distance) * distance_band)
    if echo > 0:
        t = _axis(_ECHO_SECONDS, sampling_rate)
        tail = rng.standard_normal(len(t), dtype=np.float32) * _decay(t, 0.05 + 0.10 * echo)
        tail *= np.float32(echo / np.sqrt(np.sum(tail**2)))
        tail[0] = 1.0
        response = response * scipy.fft.rfft(tail, size)
    if telephone > 0 or distance > 0 or echo > 0:
        audio = scipy.fft.irfft(scipy.fft.rfft(audio, size) * response, size)[:samples]
    audio = audio * np.float32(1 - 0.4 * min(distance, 1))
    if drive > 0:  # pushed into a soft ceiling and brought back: quiet parts come up, loud ones are squared off
        gain = np.float32(1 + 5 * drive)
        audio = np.tanh(gain * audio) / gain**np.float32(0.6)
    if noise > 0:
        audio = audio + np.float32(0.012 * noise) * _white(samples, rng)
    return audio.astype(np.float32)


def render(scene, profile, meaning, acoustics, sampling_rate, samples, rng):
    """A scene as one corpus would have recorded it.

    Args:
        scene: what sounds.
        profile, meaning, acoustics: the corpus, how far its attribute scales move and how strong its channel is.
        sampling_rate, samples: Hz and length of the result.
        rng: the only source of randomness.

    Returns:
        int16 [samples]; the peak is below full scale.
    """
    seconds, count = samples / sampling_rate, len(scene.events)
    slot = (seconds - 0.1) / count
    room = min(slot - 0.06, 1.3)
    audio = render_background(scene.background, samples, sampling_rate, rng)
    for i, event in enumerate(scene.events):
        sound = render_event(event, room, profile, meaning, sampling_rate, rng)
        at = round((0.05 + i * slot + rng.uniform(0, slot - room - 0.01)) * sampling_rate)
        audio[at : at + len(sound)] += sound[: samples - at]
    audio = apply_channel(audio, draw_channel(rng, profile, acoustics), sampling_rate, rng)
    peak = np.max(np.abs(audio))
    return np.rint(audio * np.float32(32767 * min(1.0, 0.98 / max(peak, 1e-9)))).astype(np.int16)
