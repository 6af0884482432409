"""The log-mel front end, in NumPy: of training's pipeline and, in `front_end`, of embedding."""

import dataclasses
import functools
import math

import numpy as np
import scipy.fft

from data_pipelines.waveforms import FILLS

# Frames worked on at once: their spectra fit a core's cache.
_BLOCK_FRAMES = 64
_BAND_MELS = 16


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


def log_mel(waveform, settings: LogMelSettings, valid: int | None = None) -> np.ndarray:
    """Returns the log-mel spectrogram of one clip [samples], float32 [frames, mels].

    log(max(sum_f filter[m, f] |STFT[t, f]|^2, floor)), in dB or natural, without a limit on the
    range below the maximum. Computed in float64: equal to `librosa.feature.melspectrogram` and
    `power_to_db(ref=1, amin=floor, top_db=None)` on float64 input, given the same `pad_mode`. In
    blocks of frames, on one core and mostly without the interpreter's lock, so that threads work on
    several clips at once.

    Args:
      waveform: samples [S].
      settings: the front end.
      valid: how many of the samples are the clip's; with fill="frames", frames that reach past them
        are 0. None is all of them.

    Raises:
      ValueError: the clip is too short for a frame.
    """
    waveform = np.asarray(waveform)
    length = settings.num_frames(len(waveform))
    window, bands = _window_and_bands(settings)
    if settings.padding:
        waveform = np.pad(waveform, settings.padding, mode=settings.pad_mode)
    frames = np.lib.stride_tricks.sliding_window_view(waveform, settings.frame_length)
    frames = frames[:: settings.hop_length][: settings.frames]  # [frames, frame_length], a view
    if valid is not None and settings.fill == "frames":
        inside = 1 + (valid - settings.frame_length) // settings.hop_length
        frames = frames[: max(inside, 0)]
    mel = np.zeros((length, settings.n_mels), np.float32)
    for first in range(0, len(frames), _BLOCK_FRAMES):
        block = frames[first : first + _BLOCK_FRAMES].astype(np.float64)
        if settings.remove_dc:
            block -= block.mean(axis=1, keepdims=True)
        if settings.preemphasis:
            block[:, 1:] -= settings.preemphasis * block[:, :-1]
            block[:, 0] *= 1.0 - settings.preemphasis
        block *= window
        spectrum = scipy.fft.rfft(block, settings.n_fft, overwrite_x=True)
        power = spectrum.real**2
        power += spectrum.imag**2
        energy = np.empty((len(block), settings.n_mels))
        for frequencies, mels, filters in bands:
            np.matmul(power[:, frequencies], filters, out=energy[:, mels])
        np.maximum(energy, settings.floor, out=energy)
        np.log(energy, out=energy)
        if settings.log == "db":
            energy *= 10.0 / math.log(10.0)
        mel[first : first + len(block)] = energy
    return mel


@functools.lru_cache(maxsize=16)
def _window_and_bands(settings: LogMelSettings):
    """Returns the window, and the filters as (frequencies, mels, filters) of neighbouring mels.

    Neighbours cover few frequencies: most zeros are left out, and the products stay so small that
    BLAS does not start threads, which would fight with those that work on other clips.
    """
    window, filters = window_and_filters(settings)
    bands = []
    for first in range(0, settings.n_mels, _BAND_MELS):
        mels = slice(first, first + _BAND_MELS)
        covered = np.flatnonzero(filters[:, mels].any(axis=1))
        frequencies = slice(covered[0], covered[-1] + 1) if len(covered) else slice(0, 1)
        bands.append((frequencies, mels, np.ascontiguousarray(filters[frequencies, mels])))
    return window, bands


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
