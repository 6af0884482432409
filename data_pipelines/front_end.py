"""From a clip in memory to the rows that an audio encoder takes, in NumPy.

Training's pipeline computes the same features; importing this module imports neither TensorFlow nor
a reader of audio files.
"""

import dataclasses

import numpy as np

from data_pipelines.log_mel import LogMelSettings, log_mel
from data_pipelines.waveforms import chunk_starts, fill_up

POLICIES = (None, "repeatpad", "center", "chunk_mean")

# LAION CLAP without fusion, and with it (Wu et al., 2023).
CLAP = LogMelSettings(fill="repeatpad")
CLAP_FUSED = dataclasses.replace(CLAP, mel_scale="htk", norm=None)
# Kaldi's filterbank as AST (Gong et al., 2021) and EAT (Chen et al., 2024) call it, on samples in
# [-1, 1]. EAT subtracts the mean of the waveform before, which changes nothing: the mean of each
# frame is subtracted anyway. Rows are 1024 frames for AST, in EAT as many as its positions allow.
KALDI = LogMelSettings(
    sampling_rate=16000,
    n_fft=512,
    hop_length=160,
    n_mels=128,
    fmin=20.0,
    fmax=8000.0,
    mel_scale="kaldi",
    norm=None,
    floor=1.192092955078125e-07,  # float32's epsilon
    center=False,
    win_length=400,
    window="hann_symmetric",
    preemphasis=0.97,
    remove_dc=True,
    log="natural",
    fill="frames",
)
# The CNN14 of PANNs (Kong et al., 2020) as MS-CLAP 2022 (Elizalde et al., 2023) runs it.
PANNS = LogMelSettings(sampling_rate=44100, hop_length=320, fill="repeat")


@dataclasses.dataclass(frozen=True)
class WaveformSettings:
    """The front end of an encoder that takes the waveform itself, as wav2vec 2.0 does.

    Attributes:
      sampling_rate: of the waveform, Hz.
      normalize: each row becomes (x - mean) / sqrt(variance + 1e-7).
      min_samples: shortest clip that gives a frame; 400 for the convolutions of wav2vec 2.0.
    """

    sampling_rate: int = 16000
    normalize: bool = True
    min_samples: int = 400

    def __post_init__(self):
        for name in ("sampling_rate", "min_samples"):
            if getattr(self, name) <= 0:
                found = getattr(self, name)
                raise ValueError(f"waveform.{name} is {found}, expected more than 0")


@dataclasses.dataclass(frozen=True)
class FrontEnd:
    """Everything between a clip and an encoder's input: window, policy, features.

    A policy says what becomes of a clip that is not as long as the window:

    | policy | shorter | longer |
    |---|---|---|
    | None | `settings.fill` | the centre; with fusion, the four channels below |
    | "repeatpad" | whole repetitions, then zeros | as None |
    | "center" | zeros follow | the centre |
    | "chunk_mean" | as None | ceil(samples / window) equally spaced windows, a row each |

    Whoever embeds averages the embeddings of the rows of a clip. Encoders of waveforms mask what
    pads a batch, so a shorter clip stays as it is for them under every policy. No policy draws
    anything: equal clips have equal rows.

    Attributes:
      settings: the features.
      window_seconds: longest part of a clip that becomes one row, s.
      fusion: rows have the four channels of CLAP's feature fusion (Wu et al., 2023, section 3.3):
        the log-mel of the whole clip shrunk to the frames of a window, and three windows of it,
        from the front, the middle and the back: the middle one of each third of the possible
        starts, where the paper draws. All four are equal where there is one window.
    """

    settings: LogMelSettings | WaveformSettings
    window_seconds: float
    fusion: bool = False

    def __post_init__(self):
        if self.is_waveform:
            if self.fusion:
                raise ValueError("front end: fusion=True with waveforms, expected log-mel settings")
            if self.window_samples < self.settings.min_samples:
                raise ValueError(
                    f"front end: a window of {self.window_seconds} s has {self.window_samples} "
                    f"samples, expected at least min_samples, {self.settings.min_samples}"
                )
        else:
            self.settings.num_frames(self.window_samples)
            if self.fusion and self.settings.frames is not None:
                raise ValueError(
                    f"front end: fusion=True with log_mel.frames={self.settings.frames}, expected "
                    "None: fusion needs all frames of a clip"
                )

    @property
    def is_waveform(self) -> bool:
        """Whether rows are waveforms, of several lengths."""
        return isinstance(self.settings, WaveformSettings)

    @property
    def sampling_rate(self) -> int:
        """Of the waveforms it takes, Hz."""
        return self.settings.sampling_rate

    @property
    def window_samples(self) -> int:
        """Samples of the longest part of a clip that becomes one row."""
        return round(self.window_seconds * self.sampling_rate)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of a row; of the longest one for waveforms."""
        if self.is_waveform:
            return (self.window_samples,)
        frames = self.settings.num_frames(self.window_samples)
        return (4,) * self.fusion + (frames, self.settings.n_mels)

    def rows(self, waveform, policy: str | None = None) -> np.ndarray | list[np.ndarray]:
        """Returns the rows of a clip, float32 [rows, *input_shape]; for waveforms a list of [S_i].

        Args:
          waveform: mono samples [S] at `sampling_rate` (see `waveforms.to_mono`).
          policy: one of `POLICIES`.

        Raises:
          ValueError: another policy or shape, or a clip too short for a single frame.
        """
        if policy not in POLICIES:
            raise ValueError(f"policy is {policy!r}, expected one of {POLICIES}")
        waveform = np.asarray(waveform)
        if waveform.ndim != 1 or not len(waveform):
            raise ValueError(
                f"a clip of shape {waveform.shape}, expected [samples] with at least one sample"
            )
        window, settings = self.window_samples, self.settings
        starts = chunk_starts(len(waveform), window, None if policy == "chunk_mean" else 1)
        chunks = [waveform[start : start + window] for start in starts]
        if self.is_waveform:
            self._check_length(waveform, settings.min_samples)
            return [_normalize(c) if settings.normalize else c.astype(np.float32) for c in chunks]
        if len(waveform) < window:
            fill = {"repeatpad": "repeatpad", "center": "zeros"}.get(policy, settings.fill)
            if fill == "frames":
                self._check_length(waveform, settings.frame_length)
            else:
                chunks = [fill_up(waveform, window, fill)]
        elif len(waveform) > window and self.fusion and policy in (None, "repeatpad"):
            return _fuse(log_mel(waveform, settings), self.input_shape[1])[None]
        rows = np.zeros((len(chunks), *self.input_shape), np.float32)
        for row, chunk in zip(rows, chunks):
            mel = log_mel(chunk, settings)  # fewer frames than the row has with fill "frames"
            row[..., : len(mel), :] = mel
        return rows

    def to_dict(self) -> dict:
        """As plain values, for JSON."""
        kind = "waveform" if self.is_waveform else "log_mel"
        return {"kind": kind, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict) -> "FrontEnd":
        """The inverse of `to_dict`; a field that may be left out has its default.

        Raises:
          ValueError: unknown or missing fields, or values out of range.
        """
        values = dict(values)
        kinds = {"waveform": WaveformSettings, "log_mel": LogMelSettings}
        kind = values.pop("kind", None)
        if kind not in kinds:
            raise ValueError(f"front end: kind is {kind!r}, expected one of {tuple(kinds)}")
        try:
            return cls(**values | {"settings": kinds[kind](**values["settings"])})
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"front end: fields {values}, expected those of FrontEnd and {kinds[kind].__name__}"
            ) from error

    def _check_length(self, waveform: np.ndarray, samples: int) -> None:
        if len(waveform) < samples:
            raise ValueError(
                f"a clip of {len(waveform)} samples at {self.sampling_rate} Hz is too short for a "
                f"frame, expected at least {samples}; join it to others or pad it"
            )


def _normalize(samples: np.ndarray) -> np.ndarray:
    samples = samples.astype(np.float64)
    return ((samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)).astype(np.float32)


def _fuse(mel: np.ndarray, frames: int) -> np.ndarray:
    """Returns the four channels [4, frames, mels] of a log-mel [more frames, mels]."""
    spare = len(mel) - frames
    if not spare:  # longer than the window by less than a frame
        return np.stack([mel] * 4)
    # With fewer than three possible starts a third has none: the first is taken.
    thirds = np.array_split(np.arange(spare + 1), 3)
    starts = [third[len(third) // 2] if len(third) else 0 for third in thirds]
    return np.stack([_shrink(mel, frames), *(mel[start : start + frames] for start in starts)])


def _shrink(mel: np.ndarray, frames: int) -> np.ndarray:
    """Returns [frames, mels]: linear interpolation at the centres of equal parts of the time axis.

    Row i is taken at (i + 1/2) len(mel) / frames - 1/2.
    """
    position = (np.arange(frames) + 0.5) * (len(mel) / frames) - 0.5
    before = position.astype(np.int64)  # positions are not negative: there are more rows than asked
    after = np.minimum(before + 1, len(mel) - 1)
    weight = (position - before)[:, None]
    return ((1.0 - weight) * mel[before] + weight * mel[after]).astype(np.float32)
