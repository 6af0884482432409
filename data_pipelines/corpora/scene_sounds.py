"""The sounds of the embedded corpora: a scene goes in, 16-bit audio comes out.

A scene is one to three events in temporal order over an optional background. Every attribute of an
event is one audible quantity:

    pitch      low, mid, high          base frequency x 0.72, 1, 1.39 (steps of 5.7 semitones, +- 1)
    pace       once, twice, thrice     number of onsets          (kinds of pace "count")
               slow, fast              onsets per second, x 2.5  (kinds of pace "rate")
               short, long             seconds of sound          (kinds of pace "length")
    loudness   soft, loud              12 dB apart
    texture    clean, rough            rough: 50 Hz amplitude modulation and multiplicative noise

A `Profile` says how one corpus differs: which values it favours, where it puts the attribute scales
(its "high" may be another corpus's "mid") and through what channel it was recorded. All functions
are pure; randomness comes from the generator they are given.
"""

import bisect
import dataclasses
import functools
import itertools

import numpy as np
import scipy.fft

from data_pipelines.corpora.scene_grains import KINDS, axis, decay, noise, tone, white

PITCHES = {"low": 0.72, "mid": 1.0, "high": 1.39}
PACES = {
    "count": ("once", "twice", "thrice"),
    "rate": ("slow", "fast"),
    "length": ("short", "long"),
}
LOUDNESSES = {"soft": 0.25, "loud": 1.0}
TEXTURES = ("clean", "rough")
# Weight of values that are the common case, against 1; a caption rarely says them.
USUAL = {"loud": 3.0, "clean": 4.0}
BACKGROUNDS = ("none", "wind", "rain", "hum", "crowd")
EFFECTS = ("telephone", "echo", "distance", "drive", "music", "noise")

_ONSETS = {"once": 1, "twice": 2, "thrice": 3}
_LEVEL = 0.3  # peak of a loud event; leaves 10 dB for louder corpora and for the background
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
        """The canonical description, from which splits and groups are hashed."""
        events = " > ".join(" ".join(dataclasses.astuple(event)) for event in self.events)
        return f"{events} | {self.background}"


@dataclasses.dataclass(frozen=True)
class Profile:
    """How the recordings of one corpus differ from those of the base corpus, at full shift.

    favours: kinds, attribute values and backgrounds that are three times as likely as the others.
    events: probabilities of one, two and three events.
    semitones, pace, decibels: shift of the pitch scale, factor on rates and durations, shift of the
        level. These move what the words mean: they belong to the `meaning` knob.
    channel: strength of each of `EFFECTS`, 0 to 1.
    """

    favours: tuple[str, ...] = ()
    events: tuple[float, float, float] = (0.35, 0.60, 0.05)
    semitones: float = 0.0
    pace: float = 1.0
    decibels: float = 0.0
    channel: tuple[float, ...] = (0.0,) * len(EFFECTS)


def _values(text):
    return tuple(text.split())


PROFILES = {
    "base": Profile(),
    "audiocaps_like": Profile(
        favours=_values("dog bird siren engine hiss thrice crowd wind"),
        events=(0.20, 0.75, 0.05),
        semitones=2.0,
        pace=0.85,
        decibels=3.0,
        channel=(0.9, 0.0, 0.0, 0.2, 0.0, 0.7),
    ),
    "clotho_like": Profile(
        favours=_values("bird cricket glass bell click soft rain long"),
        events=(0.30, 0.65, 0.05),
        semitones=-2.0,
        pace=1.2,
        decibels=-2.0,
        channel=(0.0, 1.0, 0.1, 0.0, 0.0, 0.2),
    ),
    "bbc_like": Profile(
        favours=_values("bell engine drum click dog low slow none"),
        events=(0.40, 0.60, 0.00),
        semitones=-3.0,
        pace=0.75,
        decibels=-4.0,
        channel=(0.0, 0.3, 1.0, 0.0, 0.0, 0.3),
    ),
    "audioset_like": Profile(
        favours=_values("alarm laser siren drum hiss cricket rough fast hum"),
        events=(0.10, 0.85, 0.05),
        semitones=3.0,
        pace=1.35,
        decibels=5.0,
        channel=(0.1, 0.0, 0.0, 1.0, 1.0, 0.2),
    ),
}


# --- drawing a scene ------------------------------------------------------------------------------


def pick(rng: np.random.Generator, items, weights=None):
    """One of `items`, by weight; many times faster than `Generator.choice` on short lists."""
    if weights is None:
        return items[int(rng.random() * len(items))]
    totals = list(itertools.accumulate(weights))
    return items[min(bisect.bisect(totals, rng.random() * totals[-1]), len(items) - 1)]


def draw_scene(rng: np.random.Generator, profile: Profile, shift: float) -> Scene:
    """A scene whose values are as likely as in base (`shift` 0), in the profile (1), or between."""

    def choose(values):
        weights = [
            USUAL.get(value, 1.0) * (3.0**shift if value in profile.favours else 1.0)
            for value in values
        ]
        return pick(rng, values, weights)

    base = PROFILES["base"].events
    odds = [max(b + shift * (own - b), 0.0) for b, own in zip(base, profile.events, strict=True)]
    events, kinds = [], list(KINDS)
    for _ in range(pick(rng, (1, 2, 3), odds)):
        kind = choose(kinds)
        kinds.remove(kind)
        scales = (tuple(PITCHES), PACES[KINDS[kind].pace], tuple(LOUDNESSES), TEXTURES)
        events.append(Event(kind, *map(choose, scales)))
    return Scene(tuple(events), choose(BACKGROUNDS))


# --- events, backgrounds, channel -----------------------------------------------------------------


def render_event(event, room, profile, meaning, sampling_rate, rng):
    """One event -> float32 [samples] of `room` seconds, on the attribute scales of the profile."""
    kind = KINDS[event.kind]
    semitones = profile.semitones * meaning + rng.uniform(-1, 1)
    hz = min(kind.hertz * PITCHES[event.pitch] * 2 ** (semitones / 12), 0.36 * sampling_rate)
    speed = profile.pace**meaning * rng.uniform(0.92, 1.08)
    if kind.pace == "length":
        seconds = min((0.25 if event.pace == "short" else 0.75) / speed, room)
        starts, grain = [0.0], kind.grain(axis(seconds, sampling_rate), hz, rng)
    elif kind.pace == "count":
        count = _ONSETS[event.pace]
        # Ringing tails may overlap, but the last onset still gets 0.2 s of its own.
        gap = min(0.27 / speed, (room - 0.2) / 2)
        starts = [i * gap * rng.uniform(0.97, 1.03) for i in range(count)]
        grain = kind.grain(axis(kind.seconds, sampling_rate), hz, rng)
    else:
        rate = kind.rate * speed * (2.5 if event.pace == "fast" else 1.0)
        seconds = min(kind.seconds or 1 / rate, 1 / rate, room)  # 0: a grain that fills its period
        starts = [i / rate for i in range(max(1, int(room * rate + 1e-6)))]
        grain = kind.grain(axis(seconds, sampling_rate), hz, rng)
    sound = np.zeros(round(room * sampling_rate), np.float32)
    for start in starts:
        at = round(start * sampling_rate)
        piece = grain[: len(sound) - at]
        sound[at : at + len(piece)] += piece * np.float32(rng.uniform(0.85, 1.0))
    sound *= 1 / np.max(np.abs(sound))
    if event.texture == "rough":
        t = axis(room, sampling_rate)[: len(sound)]
        sound *= (0.55 + 0.45 * tone(t, 50.0)) * (1 + 0.7 * white(len(sound), rng))
        sound *= 1 / np.max(np.abs(sound))
    decibels = profile.decibels * meaning + rng.uniform(-1.5, 1.5)
    return sound * np.float32(_LEVEL * LOUDNESSES[event.loudness] * 10 ** (decibels / 20))


def render_background(name, samples, sampling_rate, rng):
    """A background -> float32 [samples], about 25 dB under a loud event."""
    if name == "none":
        return np.zeros(samples, np.float32)
    t = axis(samples / sampling_rate, sampling_rate)
    if name == "hum":
        sound = sum(tone(t, 120.0 * k + rng.uniform(-1, 1)) / k for k in (1, 2, 3))
    else:
        low, high = {"wind": (60, 450), "rain": (2500, 7000), "crowd": (250, 1800)}[name]
        sound = noise(t, low, high, rng)
        if name == "wind":
            sound *= 1 + 0.8 * tone(t, rng.uniform(0.5, 1.0))
        elif name == "crowd":  # babble: noise in the band of speech, at the rate of syllables
            sound *= np.abs(tone(t, rng.uniform(1.8, 2.4)) + 0.6 * tone(t, rng.uniform(3.1, 3.9)))
    return sound * np.float32(0.02 * rng.uniform(0.8, 1.25) / np.sqrt(np.mean(sound**2)))


def draw_channel(rng, profile, shift):
    """Strength of each of `EFFECTS`: a mild random mixture (`shift` 0) to the profile's own (1)."""
    mild = rng.uniform(0.0, 0.5, len(EFFECTS)) * (rng.random(len(EFFECTS)) < 0.3)
    own = np.array(profile.channel) * rng.uniform(0.85, 1.15, len(EFFECTS))
    return np.clip(mild + shift * (own - mild), 0.0, 1.5)


@functools.lru_cache(maxsize=4)
def _log_bands(size, sampling_rate):
    """Log magnitude of telephone and distance at strength 1, float32 [size // 2 + 1]."""
    hz = scipy.fft.rfftfreq(size, 1 / sampling_rate)

    def shelf(weight):  # at most 25 dB down: what lies outside the band gets faint, never inaudible
        return np.log(0.056 + 0.944 * weight)

    telephone = shelf(1 / (1 + (hz / 3000) ** 4)) + shelf(hz**4 / (hz**4 + 300**4))
    distance = shelf(1 / (1 + (hz / 900) ** 2))
    return telephone.astype(np.float32), distance.astype(np.float32)


def apply_channel(audio, strengths, sampling_rate, rng):
    """Audio [samples] through the effects, each of strength 0 (absent) to 1 -> float32."""
    telephone, echo, distance, drive, music, floor = (float(s) for s in strengths)
    samples = len(audio)
    if music > 0:  # three notes of a pad that changes every 0.64 s
        t = axis(samples / sampling_rate, sampling_rate)
        bars = (t / np.float32(0.64)).astype(int)
        for interval in (0, 4, 7):
            notes = 220 * 2 ** ((rng.integers(0, 12, bars[-1] + 1) + interval) / 12)
            audio = audio + np.float32(0.02 * music) * tone(t, notes[bars])
    # Room for the tail, so that it does not wrap around.
    size = scipy.fft.next_fast_len(samples + round(_ECHO_SECONDS * sampling_rate), real=True)
    telephone_band, distance_band = _log_bands(size, sampling_rate)
    response = np.exp(np.float32(telephone) * telephone_band + np.float32(distance) * distance_band)
    if echo > 0:
        t = axis(_ECHO_SECONDS, sampling_rate)
        tail = rng.standard_normal(len(t), dtype=np.float32) * decay(t, 0.05 + 0.10 * echo)
        tail *= np.float32(echo / np.sqrt(np.sum(tail**2)))
        tail[0] = 1.0
        response = response * scipy.fft.rfft(tail, size)
    if telephone > 0 or distance > 0 or echo > 0:
        audio = scipy.fft.irfft(scipy.fft.rfft(audio, size) * response, size)[:samples]
    audio = audio * np.float32(1 - 0.4 * min(distance, 1))
    if drive > 0:  # a soft ceiling: quiet parts come up, loud ones are squared off
        gain = np.float32(1 + 5 * drive)
        audio = np.tanh(gain * audio) / gain ** np.float32(0.6)
    if floor > 0:
        audio = audio + np.float32(0.012 * floor) * white(samples, rng)
    return audio.astype(np.float32)


def render(scene, profile, meaning, acoustics, sampling_rate, samples, rng):
    """A scene as one corpus would have recorded it.

    Args:
        scene: what sounds.
        profile, meaning, acoustics: the corpus, how far its attribute scales move and how strong
            its channel is.
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
