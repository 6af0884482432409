"""Augmentation of training audio, a pure function of (seed, epoch, pair).

No generator lives longer than a call, so a run that resumes at any step draws what it would have
drawn.
"""

import dataclasses
import functools

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
    return int(_generator(seed, epoch, _CROP, pair).integers(spare + 1))


@functools.lru_cache(maxsize=4)
def mask_numbers(settings: SpecAugment, seed: int, epoch: int, num_pairs: int) -> np.ndarray:
    """Returns the random numbers of an epoch, [pairs, 2 * masks] in 0..1, read-only.

    Row i depends on settings, seed, epoch and i alone. Drawn for a whole epoch at once: a generator
    for each example costs as much as all the rest of a batch.
    """
    masks = settings.time_masks + settings.frequency_masks
    numbers = _generator(seed, epoch, _MASK).random([num_pairs, 2 * masks])
    numbers.flags.writeable = False
    return numbers


def spec_augment(audio: np.ndarray, settings: SpecAugment, numbers: np.ndarray) -> np.ndarray:
    """Returns `audio` with masked stretches set to the mean of their example.

    Args:
      audio: float32 [batch, frames, mels].
      settings: how many masks, and how wide.
      numbers: [batch, 2 * masks], rows of `mask_numbers`; they alone decide on the masks.
    """
    split = 2 * settings.time_masks
    times = _stretches(numbers[:, :split], settings.time_width, audio.shape[1])
    bands = _stretches(numbers[:, split:], settings.frequency_width, audio.shape[2])
    mean = audio.mean(axis=(1, 2), keepdims=True)
    return np.where(times[:, :, None] | bands[:, None, :], mean, audio)


def _stretches(numbers: np.ndarray, width: int, length: int) -> np.ndarray:
    """Returns bool [batch, length], True in stretches of 0..width drawn by [batch, 2 * masks]."""
    drawn = (numbers[:, 0::2] * (min(width, length) + 1)).astype(np.int64)  # [batch, masks]
    start = (numbers[:, 1::2] * (length - drawn + 1)).astype(np.int64)
    position = np.arange(length)[:, None] - start[:, None, :]  # [batch, length, masks]
    return ((position >= 0) & (position < drawn[:, None, :])).any(axis=-1)


def _generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(key))
