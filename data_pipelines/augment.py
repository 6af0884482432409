"""Augmentation of training audio, a pure function of (seed, epoch, pair).

No generator lives longer than a call, so a run that resumes at any step draws what it would have
drawn.
"""

import dataclasses

import numpy as np

_CROP, _MASK = 0, 1


@dataclasses.dataclass(frozen=True)
class SpecAugment:
    """Masks of SpecAugment (Park et al. 2019, without time warping), policy of one example.

    Attributes:
      time_masks: number of masked stretches of frames.
      time_width: each is 0 to this many frames wide.
      frequency_masks: number of masked stretches of mel bands.
      frequency_width: each is 0 to this many bands wide.
    """

    time_masks: int = 2
    time_width: int = 64
    frequency_masks: int = 2
    frequency_width: int = 8

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise ValueError(
                    f"spec_augment.{field.name} is {getattr(self, field.name)}, expected 0 or more"
                )


def crop_start(frames: int, window: int, seed: int, epoch: int, pair: int) -> int:
    """Returns the first frame of a random window inside the clip, 0 for a shorter clip."""
    spare = max(frames - window, 0)
    return int(_generator(seed, epoch, pair, _CROP).integers(spare + 1))


def spec_augment(
    audio: np.ndarray, settings: SpecAugment, seed: int, epoch: int, pairs: np.ndarray
) -> np.ndarray:
    """Returns a copy of `audio` with masked stretches set to the mean of their example.

    Args:
      audio: float32 [batch, frames, mels].
      settings: how many masks, and how wide.
      seed, epoch: of the run.
      pairs: [batch], the row of each example in the list of pairs; with seed and epoch it alone
        decides on the masks, wherever the example stands in a batch.
    """
    audio = audio.copy()
    num_frames, num_mels = audio.shape[1:]
    for example, pair in zip(audio, pairs):
        generator = _generator(seed, epoch, int(pair), _MASK)
        mean = example.mean(dtype=np.float64)
        for start, width in _stretches(
            generator, settings.time_masks, settings.time_width, num_frames
        ):
            example[start : start + width] = mean
        for start, width in _stretches(
            generator, settings.frequency_masks, settings.frequency_width, num_mels
        ):
            example[:, start : start + width] = mean
    return audio


def _stretches(generator: np.random.Generator, number: int, width: int, length: int):
    for _ in range(number):
        drawn = int(generator.integers(min(width, length) + 1))
        yield int(generator.integers(length - drawn + 1)), drawn


def _generator(seed: int, epoch: int, pair: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, pair, purpose]))
