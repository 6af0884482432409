"""Log-mel spectrogram as TensorFlow operations, equal to librosa's."""

import dataclasses
import functools
import math

import numpy as np

from data_pipelines import load_tensorflow


@dataclasses.dataclass(frozen=True)
class LogMelSettings:
    """A log-mel front end: [..., samples] -> [..., num_frames(samples), n_mels].

    The defaults are those of CLAP's unfused model.

    Attributes:
      sampling_rate: of the waveform, Hz.
      n_fft: length of the periodic Hann window and of the transform, samples.
      hop_length: distance of frames, samples.
      n_mels: number of filters.
      fmin, fmax: band covered by the filters, Hz.
      mel_scale: "slaney" or "htk".
      norm: "slaney" (filters of equal area) or None (filters of height 1).
      floor: smallest power before the logarithm; 1e-10 is -100 dB.
      center: frame t is centred on sample t * hop_length, the ends being padded by n_fft // 2;
        otherwise it begins there and nothing is padded.
      pad_mode: "reflect" or "constant" (zeros).
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

    def __post_init__(self):
        for name in ("sampling_rate", "n_fft", "hop_length", "n_mels", "floor"):
            if getattr(self, name) <= 0:
                raise ValueError(f"log_mel.{name} is {getattr(self, name)}, expected more than 0")
        if not 0 <= self.fmin < self.fmax <= self.sampling_rate / 2:
            raise ValueError(
                f"log_mel.fmin {self.fmin} and fmax {self.fmax}: expected 0 <= fmin < fmax <= "
                f"{self.sampling_rate / 2} Hz, half the sampling rate"
            )
        choices = {
            "mel_scale": ("slaney", "htk"),
            "norm": ("slaney", None),
            "pad_mode": ("reflect", "constant"),
        }
        for name, expected in choices.items():
            if getattr(self, name) not in expected:
                found = getattr(self, name)
                raise ValueError(f"log_mel.{name} is {found!r}, expected one of {expected}")

    @property
    def padding(self) -> int:
        """Samples put before and after the waveform."""
        return self.n_fft // 2 if self.center else 0

    def num_frames(self, num_samples: int) -> int:
        """Returns the number of frames of so many samples; raises ValueError if there is none."""
        covered = num_samples + 2 * self.padding - self.n_fft
        if num_samples < 1 or covered < 0:
            raise ValueError(
                f"{num_samples} samples are too few for a frame; expected at least "
                f"{1 if self.center else self.n_fft}"
            )
        return 1 + covered // self.hop_length


def log_mel(waveform, settings: LogMelSettings):
    """Returns the log-mel spectrogram in dB, as a float32 tensor [..., frames, mels].

    10 log10(max(sum_f filter[m, f] |STFT[t, f]|^2, floor)), without a limit on the range below the
    maximum. Computed in float64: equal to `librosa.feature.melspectrogram` and `power_to_db(ref=1,
    amin=floor, top_db=None)` on float64 input, given the same `pad_mode`.

    Args:
      waveform: array or tensor [..., samples], in a tf.data function or outside.
      settings: the front end.

    Raises:
      ValueError: the waveform is known to be too short for a frame.
    """
    tf = load_tensorflow()
    waveform = tf.cast(tf.convert_to_tensor(waveform), tf.float64)  # [..., samples]
    if waveform.shape[-1] is not None:
        settings.num_frames(waveform.shape[-1])
    window, filters = _constants(settings)
    waveform = _pad(tf, waveform, settings)
    frames = tf.signal.frame(waveform, settings.n_fft, settings.hop_length)  # [..., frames, n_fft]
    spectrum = tf.signal.rfft(frames * window)  # [..., frames, frequencies]
    power = tf.math.real(spectrum) ** 2 + tf.math.imag(spectrum) ** 2
    mel = tf.tensordot(power, filters, axes=1)
    decibel = tf.math.log(tf.maximum(mel, settings.floor)) * (10.0 / math.log(10.0))
    return tf.cast(decibel, tf.float32)  # [..., frames, mels]


@functools.lru_cache(maxsize=16)
def _constants(settings: LogMelSettings) -> tuple[np.ndarray, np.ndarray]:
    """Returns the window [n_fft] and the filters [frequencies, mels], float64."""
    import librosa

    window = librosa.filters.get_window("hann", settings.n_fft, fftbins=True)
    filters = librosa.filters.mel(
        sr=settings.sampling_rate,
        n_fft=settings.n_fft,
        n_mels=settings.n_mels,
        fmin=settings.fmin,
        fmax=settings.fmax,
        htk=settings.mel_scale == "htk",
        norm=settings.norm,
        dtype=np.float64,
    )
    return window.astype(np.float64), filters.T


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
