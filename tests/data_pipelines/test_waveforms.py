import math

import librosa
import numpy as np
import pytest

from conftest import write_tone
from data_pipelines.audio import read_audio
from data_pipelines.waveforms import chunk_starts, fill_up, to_mono


@pytest.mark.parametrize("samples, window, chunks, expected", [
    (50, 100, 1, (0,)), (50, 100, 3, (0,)), (100, 100, 3, (0,)), (101, 100, 1, (0,)),
    (107, 100, 1, (3,)), (101, 100, 3, (0, 1)), (200, 100, 3, (0, 100)),
    (201, 100, 3, (0, 50, 101)), (1000, 100, 3, (0, 450, 900)), (1000, 100, 1, (450,)),
])  # fmt: skip
def test_chunk_starts_by_hand(samples, window, chunks, expected):
    assert chunk_starts(samples, window, chunks) == expected


def test_chunks_are_as_many_as_asked_inside_the_clip_and_evenly_spaced():
    for samples in range(1, 400, 7):
        for window in (1, 33, 100):
            starts = chunk_starts(samples, window, 3)
            assert len(starts) == min(3, math.ceil(samples / window))
            assert starts[0] >= 0 and starts[-1] == max(samples - window, 0) or len(starts) == 1
            assert np.ptp(np.diff(starts)) <= 1 if len(starts) > 1 else True


def test_without_a_limit_a_clip_has_as_many_chunks_as_cover_it():
    assert chunk_starts(1001, 100, None) == tuple(i * 901 // 10 for i in range(11))
    assert chunk_starts(99, 100, None) == (0,)


@pytest.mark.parametrize("fill, expected", [
    ("zeros", [1, 2, 3, 0, 0, 0, 0, 0]), ("frames", [1, 2, 3, 0, 0, 0, 0, 0]),
    ("repeatpad", [1, 2, 3, 1, 2, 3, 0, 0]), ("repeat", [1, 2, 3, 1, 2, 3, 1, 2]),
])  # fmt: skip
def test_fill_up_by_hand(fill, expected):
    assert fill_up(np.array([1.0, 2.0, 3.0], np.float32), 8, fill).tolist() == expected
    assert fill_up(np.arange(8.0), 8, fill).tolist() == list(range(8))


def samples_of(shape, seed=0):
    return 0.3 * np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("kind, scale", [
    ("float16", 1), ("float32", 1), ("float64", 1), ("int16", 1 << 15), ("int32", 1 << 31),
])  # fmt: skip
def test_every_type_and_both_orders_of_axes_give_the_mean_of_the_channels(kind, scale):
    stereo = (np.clip(samples_of([501, 2]), -0.99, 0.99) * scale).astype(kind)
    expected = stereo.astype(np.float64).mean(axis=1) / scale
    for samples in (stereo, stereo.T, list(stereo)):
        found = to_mono(samples, 16000, 16000)
        assert found.dtype == np.float32 and found.shape == (501,)
        np.testing.assert_allclose(found, expected, atol=1e-7)
    for samples in (stereo[:, 0], stereo[:, :1], stereo[:, :1].T, stereo[:1, 0]):
        expected = samples.reshape(-1).astype(np.float64) / scale
        np.testing.assert_allclose(to_mono(samples, 8000, 8000), expected, atol=1e-7)


@pytest.mark.parametrize("rate, target", [(44100, 16000), (8000, 48000), (48000, 44100)])
def test_resampling_equals_librosa_and_that_of_a_file(tmp_path, rate, target):
    write_tone(tmp_path / "a.wav", 0.377, rate, 2)
    samples, _ = librosa.load(tmp_path / "a.wav", sr=None, mono=False)
    found = to_mono(samples, rate, target)
    np.testing.assert_array_equal(found, read_audio(tmp_path / "a.wav", target))
    expected = librosa.resample(
        samples.mean(axis=0), orig_sr=rate, target_sr=target, res_type="soxr_hq"
    )
    assert len(found) == math.ceil(samples.shape[1] * target / rate)
    np.testing.assert_allclose(found, expected[: len(found)], atol=2e-6)
    assert len(to_mono(samples[0, :1], rate, target)) == math.ceil(target / rate)


@pytest.mark.parametrize("samples, message", [
    (np.zeros([0]), r"shape \(0,\) has no samples"), (np.zeros([0, 2]), "no samples"),
    (np.zeros([]), r"shape \(\), expected"), (np.zeros([1, 2, 9]), "one clip at a time"),
    (np.zeros([2, 2]), "cannot be told"), ([0.0, np.nan], "not finite"),
    ([[0.0, 0.0, 0.0], [0.0, 0.0, np.inf]], "not finite"), ([0.0, 1e300], "not finite"),
    ([1, 2, 3], "type int64"), (np.zeros([9], np.uint8), "type uint8"),
    (np.zeros([9], complex), "type complex128"), ("a.wav", "type str"),
])  # fmt: skip
def test_what_is_no_clip_is_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        to_mono(samples, 16000, 16000)


@pytest.mark.parametrize("rate", [0, -8000, 44100.5, None, float("nan"), float("inf"), "16000"])
def test_what_is_no_rate_is_refused(rate):
    with pytest.raises(ValueError, match="sampling_rate is .*positive whole number of Hz"):
        to_mono(np.zeros([9]), rate, 16000)
    assert len(to_mono(np.zeros([9]), np.int64(8000), 16000.0)) == 18
