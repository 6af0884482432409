import numpy as np
import pytest

from data_pipelines.augment import SpecAugment, crop_start, mask_numbers, spec_augment

AUDIO = np.random.default_rng(0).normal(size=[50, 37, 16]).astype(np.float32)
PAIRS = np.random.default_rng(1).permutation(1000)[:50]


def augment(audio, settings, seed, epoch, pairs, num_pairs=1001):
    return spec_augment(audio, settings, mask_numbers(settings, seed, epoch, num_pairs)[pairs])


def test_masks_do_not_depend_on_batch_composition():
    whole = augment(AUDIO, SpecAugment(2, 9, 1, 4), 3, 1, PAIRS)
    order = np.random.default_rng(2).permutation(50)[:17]
    part = augment(AUDIO[order], SpecAugment(2, 9, 1, 4), 3, 1, PAIRS[order], num_pairs=2000)
    np.testing.assert_array_equal(part, whole[order])


@pytest.mark.parametrize("seed, epoch, pairs", [(4, 1, PAIRS), (3, 2, PAIRS), (3, 1, PAIRS + 1)])
def test_masks_differ_with_seed_epoch_and_pair(seed, epoch, pairs):
    one = augment(AUDIO, SpecAugment(), 3, 1, PAIRS)
    two = augment(AUDIO, SpecAugment(), seed, epoch, pairs)
    assert (one != two).any(axis=(1, 2)).mean() > 0.9


def test_masked_cells_are_whole_stretches_within_the_widths_and_hold_the_mean():
    settings = SpecAugment(time_masks=1, time_width=9, frequency_masks=1, frequency_width=4)
    widths, heights = set(), set()
    for epoch in range(20):
        masked = augment(AUDIO, settings, 0, epoch, PAIRS)
        changed = masked != AUDIO
        means = np.broadcast_to(AUDIO.mean(axis=(1, 2), keepdims=True), AUDIO.shape)
        np.testing.assert_allclose(masked[changed], means[changed], atol=1e-6)
        for example in changed:
            frames, bands = example.all(axis=1), example.all(axis=0)
            assert (example == (frames[:, None] | bands[None])).all()
            for line in (frames, bands):
                assert np.abs(np.diff(line.astype(int))).sum() <= 2, "more than one stretch"
            widths.add(int(frames.sum()))
            heights.add(int(bands.sum()))
    assert widths == set(range(10)) and heights == set(range(5))


def test_masks_wider_than_the_audio_are_possible_and_the_input_is_kept():
    before = AUDIO.copy()
    augment(AUDIO, SpecAugment(3, 1000, 3, 1000), 0, 0, PAIRS)
    np.testing.assert_array_equal(AUDIO, before)
    np.testing.assert_array_equal(
        augment(AUDIO, SpecAugment(0, 9, 0, 9), 0, 0, PAIRS), AUDIO
    )
    with pytest.raises(ValueError, match="time_width is -1"):
        SpecAugment(time_width=-1)


def test_crops_are_inside_the_clip_repeatable_and_reach_both_ends():
    starts = [crop_start(13, 10, 5, epoch, 7) for epoch in range(200)]
    assert starts == [crop_start(13, 10, 5, epoch, 7) for epoch in range(200)]
    assert set(starts) == {0, 1, 2, 3}
    assert {crop_start(n, 10, 5, 0, 7) for n in (1, 9, 10)} == {0}
