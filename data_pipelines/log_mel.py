"""Settings, window and filters of a log-mel front end, and the front end as TensorFlow operations.

`data_pipelines.front_end` has the same front end in NumPy.
"""

import dataclasses
import functools
import math

import numpy as np

from data_pipelines import load_tensorflow
from data_pipelines.waveforms import FILLS


@dataclasses.dataclass(frozen=True)
class LogMelSettings:
    """A log-mel front end: [..., samples] -> [..., num_frames(samples), n_mels].

    The defaults are those of CLAP's unfused model. Named settings of other models are in
    `data_pipelines.front_end`.

    Attributes:
      sampling_rate: of the waveform, Hz.
      n_fft: length of the transform, samples.
      hop_length: distance of frames, samples.
      n_mels: number of filters.
      fmin, fmax: band covered by the filters, Hz.
      mel_scale: "slaney", "htk", or "kaldi": HTK's scale with filters that are triangles over mel;
        those of the others are triangles over Hz.
      norm: "slaney" (filters of equal area) or None (filters of height 1).
      floor: smallest power before the logarithm; 1e-10 is -100 dB.
      center: frame t is centred on sample t * hop_length, the ends being padded by half a frame;
        otherwise it begins there and nothing is padded.
      pad_mode: "reflect" or "constant" (zeros).
      win_length: length of a frame and of its window, samples; zeros follow up to n_fft. None is
        n_fft.
      window: "hann" (periodic) or "hann_symmetric".
      preemphasis: p in x[i] - p x[i - 1], within each frame and before the window, x[-1] = x[0].
      remove_dc: the mean of each frame is subtracted, before the pre-emphasis.
      log: "db" (10 log10) or "natural".
      fill: what follows a clip shorter than the model's window: "zeros"; "repeatpad" (as many whole
        repetitions as fit, then zeros); "repeat" (repetitions, the last one cut); "frames" (no
        samples: the frames that would need them are 0 after the logarithm; `center` must be False).
      frames: number of frames of a row, cut or filled by zeros (after the logarithm) at the end;
        None leaves as many as there are.
    """

    sampling_rate: int = 48000
    n_fft: int = 1024
    hop_length: int = 480
    n_mels: int = 64
    fmin: float = 50.0
    fmax: float = 14000.0
    mel_scale: str = "slaney"
    norm: str | None = "slaney"
    floor: float = 1e-10
    center: bool = True
    pad_mode: str = "reflect"
    win_length: int | None = None
    window: str = "hann"
    preemphasis: float = 0.0
    remove_dc: bool = False
    log: str = "db"
    fill: str = "zeros"
    frames: int | None = None

    def __post_init__(self):
        for name in ("sampling_rate", "n_fft", "hop_length", "n_mels", "floor", "frames"):
            found = getattr(self, name)
            if found is not None and found <= 0:
                raise ValueError(f"log_mel.{name} is {found}, expected more than 0")
        if not 0 <= self.fmin < self.fmax <= self.sampling_rate / 2:
            raise ValueError(
                f"log_mel.fmin {self.fmin} and fmax {self.fmax}: expected 0 <= fmin < fmax <= "
                f"{self.sampling_rate / 2} Hz, half the sampling rate"
            )
        if not 2 <= self.frame_length <= self.n_fft:
            raise ValueError(
                f"log_mel: frames of {self.frame_length} samples (win_length, or else n_fft), "
                f"expected 2 to n_fft, which is {self.n_fft}"
            )
        if not 0 <= self.preemphasis < 1:
            raise ValueError(
                f"log_mel.preemphasis is {self.preemphasis}, expected 0 or more and less than 1"
            )
        choices = {
            "mel_scale": ("slaney", "htk", "kaldi"),
            "norm": ("slaney", None),
            "pad_mode": ("reflect", "constant"),
            "window": ("hann", "hann_symmetric"),
            "log": ("db", "natural"),
            "fill": FILLS,
        }
        for name, expected in choices.items():
            if getattr(self, name) not in expected:
                found = getattr(self, name)
                raise ValueError(f"log_mel.{name} is {found!r}, expected one of {expected}")
        if self.mel_scale == "kaldi" and self.norm is not None:
            raise ValueError(
                f"log_mel.norm is {self.norm!r}, expected None with mel_scale='kaldi': triangles "
                "over mel have no area in Hz to divide by"
            )
        if self.fill == "frames" and self.center:
            raise ValueError(
                "log_mel.fill is 'frames' with center=True, expected center=False: centred frames "
                "pass the end of every clip"
            )

    @property
    def frame_length(self) -> int:
        """Samples of a frame, those that the window weighs."""
        return self.n_fft if self.win_length is None else self.win_length

    @property
    def padding(self) -> int:
        """Samples put before and after the waveform."""
        return self.frame_length // 2 if self.center else 0

    def num_frames(self, num_samples: int) -> int:
        """Returns the number of frames of so many samples; raises ValueError if there is none."""
        covered = num_samples + 2 * self.padding - self.frame_length
        if num_samples < 1 or covered < 0:
            raise ValueError(
                f"{num_samples} samples are too few for a frame; expected at least "
                f"{1 if self.center else self.frame_length}"
            )
        return 1 + covered // self.hop_length if self.frames is None else self.frames


def log_mel(waveform, settings: LogMelSettings, valid=None):
    """Returns the log-mel spectrogram, as a float32 tensor [..., frames, mels].

    log(max(sum_f filter[m, f] |STFT[t, f]|^2, floor)), in dB or natural, without a limit on the
    range below the maximum. Computed in float64: equal to `librosa.feature.melspectrogram` and
    `power_to_db(ref=1, amin=floor, top_db=None)` on float64 input, given the same `pad_mode`.

    Args:
      waveform: array or tensor [..., samples], in a tf.data function or outside.
      settings: the front end.
      valid: integers [...], the samples of each waveform that are the clip's; with fill="frames",
        frames that reach past them are 0. None is all of them.

    Raises:
      ValueError: the waveform is known to be too short for a frame.
    """
    tf = load_tensorflow()
    waveform = tf.cast(tf.convert_to_tensor(waveform), tf.float64)  # [..., samples]
    if waveform.shape[-1] is not None:
        settings.num_frames(waveform.shape[-1])
    window, filters = window_and_filters(settings)
    waveform = _pad(tf, waveform, settings)
    # [..., frames, frame_length]
    frames = tf.signal.frame(waveform, settings.frame_length, settings.hop_length)
    if settings.remove_dc:
        frames -= tf.reduce_mean(frames, axis=-1, keepdims=True)
    if settings.preemphasis:
        before = tf.concat([frames[..., :1], frames[..., :-1]], axis=-1)
        frames -= settings.preemphasis * before
    spectrum = tf.signal.rfft(frames * window, [settings.n_fft])  # [..., frames, frequencies]
    power = tf.math.real(spectrum) ** 2 + tf.math.imag(spectrum) ** 2
    mel = tf.tensordot(power, filters, axes=1)
    mel = tf.math.log(tf.maximum(mel, settings.floor))  # [..., frames, mels]
    if settings.log == "db":
        mel *= 10.0 / math.log(10.0)
    if valid is not None and settings.fill == "frames":
        ends = tf.range(tf.shape(mel)[-2]) * settings.hop_length + settings.frame_length
        inside = ends <= tf.cast(valid, tf.int32)[..., None]  # [..., frames]
        mel = tf.where(inside[..., None], mel, tf.zeros([], mel.dtype))
    if settings.frames is not None:
        mel = mel[..., : settings.frames, :]
        missing = settings.frames - tf.shape(mel)[-2]
        mel = tf.pad(mel, [[0, 0]] * (mel.shape.rank - 2) + [[0, missing], [0, 0]])
    return tf.cast(mel, tf.float32)


@functools.lru_cache(maxsize=16)
def window_and_filters(settings: LogMelSettings) -> tuple[np.ndarray, np.ndarray]:
    """Returns the window [frame_length] and the filters [frequencies, mels], read-only float64.

    The filters are those of `librosa.filters.mel` (Slaney, HTK), and Kaldi's.
    """
    length = settings.frame_length
    points = length + 1 if settings.window == "hann" else length
    window = 0.5 + 0.5 * np.cos(np.linspace(-np.pi, np.pi, points)[:length])

    edges = np.linspace(
        _mel(settings.fmin, settings.mel_scale),
        _mel(settings.fmax, settings.mel_scale),
        settings.n_mels + 2,
    )
    points = np.fft.rfftfreq(settings.n_fft, 1.0 / settings.sampling_rate)  # Hz
    if settings.mel_scale == "kaldi":
        points = _mel(points, settings.mel_scale)
    else:
        edges = _hertz(edges, settings.mel_scale)
    distance = edges[:, None] - points  # [mels + 2, frequencies]
    width = np.diff(edges)[:, None]
    rising, falling = -distance[:-2] / width[:-1], distance[2:] / width[1:]
    filters = np.maximum(0.0, np.minimum(rising, falling))
    if settings.norm == "slaney":
        filters *= (2.0 / (edges[2:] - edges[:-2]))[:, None]
    filters = filters.T
    window.flags.writeable = filters.flags.writeable = False
    return window, filters


# Slaney's scale (Auditory Toolbox, 1998) is linear below 1000 Hz and logarithmic above.
_LINEAR_STEP = 200.0 / 3  # Hz per mel
_KNEE = 1000.0  # Hz
_LOG_STEP = math.log(6.4) / 27.0


def _mel(hertz, scale: str) -> np.ndarray:
    hertz = np.asarray(hertz, np.float64)
    if scale != "slaney":
        return 2595.0 * np.log10(1.0 + hertz / 700.0)
    above = _KNEE / _LINEAR_STEP + np.log(np.maximum(hertz, _KNEE) / _KNEE) / _LOG_STEP
    return np.where(hertz < _KNEE, hertz / _LINEAR_STEP, above)


def _hertz(mel: np.ndarray, scale: str) -> np.ndarray:
    if scale != "slaney":
        return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
    knee = _KNEE / _LINEAR_STEP
    above = _KNEE * np.exp(_LOG_STEP * (np.maximum(mel, knee) - knee))
    return np.where(mel < knee, mel * _LINEAR_STEP, above)


def _pad(tf, waveform, settings: LogMelSettings):
    """Returns [..., samples + 2 padding]."""
    padding = settings.padding
    if not padding:
        return waveform
    if settings.pad_mode == "constant":
        ends = [[0, 0]] * (waveform.shape.rank - 1) + [[padding, padding]]
        return tf.pad(waveform, ends)
    # tf.pad reflects once only; a shorter clip is reflected to and fro, as numpy does.
    samples = tf.shape(waveform)[-1]
    period = tf.maximum(2 * (samples - 1), 1)

    def reflected(positions):
        phase = tf.math.floormod(positions, period)
        return tf.gather(waveform, tf.minimum(phase, period - phase) % samples, axis=-1)

    before = reflected(tf.range(-padding, 0))
    after = reflected(tf.range(samples, samples + padding))
    return tf.concat([before, waveform, after], axis=-1)
