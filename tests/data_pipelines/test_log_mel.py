import dataclasses
import subprocess
import sys

import librosa
import numpy as np
import pytest

from conftest import write_tone
from data_pipelines import load_tensorflow
from data_pipelines.audio import read_audio
from data_pipelines.log_mel import LogMelSettings, log_mel, window_and_filters

SPEECH = LogMelSettings(16000, 400, 160, 80, 0.0, 8000.0)


def reference(waveform, settings):
    mel = librosa.feature.melspectrogram(
        y=np.asarray(waveform, np.float64),
        sr=settings.sampling_rate,
        n_fft=settings.n_fft,
        hop_length=settings.hop_length,
        n_mels=settings.n_mels,
        fmin=settings.fmin,
        fmax=settings.fmax,
        htk=settings.mel_scale == "htk",
        norm=settings.norm,
        center=settings.center,
        pad_mode=settings.pad_mode,
        power=2.0,
    )
    return librosa.power_to_db(mel, ref=1.0, amin=settings.floor, top_db=None).T


def noise(samples, seed=0):
    generator = np.random.default_rng(seed)
    tone = np.sin(0.05 * np.arange(samples) ** 1.1)
    return (0.5 * tone + 0.1 * generator.normal(size=samples)).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("seconds", [0.1, 1.237, 10.0])
@pytest.mark.parametrize("scale, norm", [("slaney", "slaney"), ("htk", None)])
def test_equals_librosa(rate, seconds, scale, norm):
    settings = LogMelSettings(rate, fmax=min(14000.0, rate / 2), mel_scale=scale, norm=norm)
    waveform = noise(round(rate * seconds))
    found = log_mel(waveform, settings)
    assert found.dtype == np.float32
    assert found.shape == (settings.num_frames(len(waveform)), 64)
    np.testing.assert_allclose(found, reference(waveform, settings), atol=1e-3)


@pytest.mark.parametrize("change", [
    {}, {"pad_mode": "constant"}, {"center": False}, {"n_fft": 401, "hop_length": 97},
    {"floor": 1e-5}, {"hop_length": 700},
])  # fmt: skip
@pytest.mark.parametrize("samples", [401, 1601, 960000])
def test_every_setting_and_a_minute_equal_librosa(change, samples):
    settings = dataclasses.replace(SPEECH, **change)
    waveform = noise(samples)
    expected = reference(waveform, settings)
    assert settings.num_frames(samples) == len(expected)
    np.testing.assert_allclose(log_mel(waveform, settings), expected, atol=1e-3)


@pytest.mark.parametrize("n_fft", [400, 401, 512, 2048])
@pytest.mark.parametrize("scale, norm", [
    ("slaney", "slaney"), ("slaney", None), ("htk", None), ("htk", "slaney"),
])  # fmt: skip
def test_window_and_filters_are_those_of_librosa_to_the_bit(n_fft, scale, norm):
    settings = dataclasses.replace(SPEECH, n_fft=n_fft, mel_scale=scale, norm=norm, fmin=27.5)
    window, filters = window_and_filters(settings)
    np.testing.assert_array_equal(window, librosa.filters.get_window("hann", n_fft, fftbins=True))
    expected = librosa.filters.mel(
        sr=16000, n_fft=n_fft, n_mels=80, fmin=27.5, fmax=8000.0, htk=scale == "htk", norm=norm,
        dtype=np.float64,
    )  # fmt: skip
    np.testing.assert_array_equal(filters.T, expected)
    symmetric = window_and_filters(dataclasses.replace(settings, window="hann_symmetric"))[0]
    np.testing.assert_array_equal(
        symmetric, librosa.filters.get_window("hann", n_fft, fftbins=False)
    )


@pytest.mark.parametrize("samples", [1, 2, 3, 7, 100, 199, 200, 201])
def test_clips_shorter_than_the_padding_reflect_as_numpy_does(samples):
    waveform = noise(samples)
    padded = np.pad(waveform, SPEECH.padding, mode="reflect")
    expected = reference(padded, dataclasses.replace(SPEECH, center=False))
    np.testing.assert_allclose(log_mel(waveform, SPEECH), expected, atol=1e-3)


def test_a_frame_shorter_than_the_transform_is_followed_by_zeros():
    waveform, settings = noise(2000), dataclasses.replace(SPEECH, n_fft=512, win_length=301)
    padded = np.pad(waveform, 150, mode="reflect")  # half a frame
    window = np.pad(window_and_filters(settings)[0], (0, 211))
    frames = [padded[start : start + 301] for start in range(0, len(padded) - 300, 160)]
    mel = librosa.feature.melspectrogram(
        S=np.abs(np.fft.rfft([np.pad(frame, (0, 211)) * window for frame in frames])).T ** 2,
        sr=16000, n_mels=80, fmin=0.0, fmax=8000.0,
    )  # fmt: skip
    assert settings.num_frames(2000) == len(frames) == 13
    expected = librosa.power_to_db(mel, amin=1e-10, top_db=None).T
    np.testing.assert_allclose(log_mel(waveform, settings), expected, atol=1e-3)


def test_offset_removal_preemphasis_and_natural_logarithm_by_hand():
    settings = LogMelSettings(
        8000, n_fft=16, hop_length=5, n_mels=4, fmin=100.0, fmax=4000.0, center=False, floor=1e-8,
        preemphasis=0.9, remove_dc=True, log="natural",
    )  # fmt: skip
    waveform = noise(37) + 0.2
    window, filters = window_and_filters(settings)
    expected = []
    for start in (0, 5, 10, 15, 20):
        frame = waveform[start : start + 16].astype(np.float64)
        frame = frame - frame.mean()
        frame = [x - 0.9 * before for x, before in zip(frame, [frame[0], *frame[:-1]])]
        expected.append(np.log(np.abs(np.fft.rfft(frame * window)) ** 2 @ filters))
    np.testing.assert_allclose(log_mel(waveform, settings), expected, atol=1e-5)
    silence = log_mel(np.zeros([37], np.float32), settings)
    np.testing.assert_allclose(silence, np.log(1e-8), atol=1e-5)


def test_a_number_of_frames_cuts_or_fills_by_zeros():
    waveform = noise(1999)  # 13 frames
    whole = log_mel(waveform, SPEECH)
    for frames in (1, 12, 13, 14, 200):
        settings = dataclasses.replace(SPEECH, frames=frames)
        found = log_mel(waveform, settings)
        assert found.shape == (frames, 80) and settings.num_frames(1999) == frames
        np.testing.assert_array_equal(found[:13], whole[:frames])
        assert not found[13:].any()


def test_frames_that_reach_past_the_valid_samples_are_zero():
    settings = dataclasses.replace(SPEECH, center=False, fill="frames", frames=9)
    waveform = noise(1700)  # 9 frames
    whole = log_mel(waveform, settings)
    for valid, frames in zip([0, 399, 400, 559, 560, 1700], [0, 0, 1, 1, 2, 9]):
        found = log_mel(waveform, settings, valid)
        np.testing.assert_array_equal(found[:frames], whole[:frames])
        assert not found[frames:].any() and whole.all()
    other = dataclasses.replace(settings, fill="zeros")
    np.testing.assert_array_equal(
        log_mel(waveform, other, 400), log_mel(waveform, settings)
    )


def test_ten_seconds_at_the_settings_of_clap_are_1001_by_64():
    assert log_mel(noise(480000), LogMelSettings()).shape == (1001, 64)
    assert LogMelSettings().num_frames(480000) == 1001


def test_silence_is_the_floor():
    found = log_mel(np.zeros([5000], np.float32), SPEECH)
    np.testing.assert_allclose(found, -100.0, atol=1e-4)


def test_stereo_file_equals_librosa_on_its_downmix(tmp_path):
    write_tone(tmp_path / "a.wav", 0.7, 44100, channels=2)
    expected, _ = librosa.load(tmp_path / "a.wav", sr=16000, mono=True, res_type="soxr_hq")
    found = log_mel(read_audio(tmp_path / "a.wav", 16000), SPEECH)
    np.testing.assert_allclose(found, reference(expected, SPEECH), atol=1e-3)


@pytest.mark.parametrize("change, message", [
    ({"fmax": 9000.0}, "8000.0 Hz, half the sampling rate"), ({"fmin": 8000.0}, "fmin < fmax"),
    ({"mel_scale": "bark"}, "mel_scale is 'bark'"), ({"hop_length": 0}, "hop_length is 0"),
    ({"pad_mode": "wrap"}, "pad_mode is 'wrap'"), ({"norm": "none"}, "norm is 'none'"),
    ({"win_length": 401}, "frames of 401 samples .* 2 to n_fft, which is 400"),
    ({"win_length": 1}, "frames of 1 samples"), ({"window": "hamming"}, "window is 'hamming'"),
    ({"preemphasis": 1.0}, "preemphasis is 1.0"), ({"log": "log10"}, "log is 'log10'"),
    ({"fill": "pad"}, "fill is 'pad'"), ({"frames": 0}, "frames is 0"),
    ({"fill": "frames"}, "expected center=False"),
    ({"mel_scale": "kaldi"}, "norm is 'slaney', expected None"),
])  # fmt: skip
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SPEECH, **change)


def test_too_short_a_waveform_is_refused():
    with pytest.raises(ValueError, match="0 samples are too few"):
        log_mel(np.zeros([0], np.float32), SPEECH)
    for frames in (None, 7):
        settings = dataclasses.replace(SPEECH, center=False, frames=frames)
        with pytest.raises(ValueError, match="expected at least 400"):
            log_mel(np.zeros([399], np.float32), settings)


@pytest.mark.parametrize("modules, banned", [
    ("log_mel, audio, augment, batches, features, streams, text, corpora.folder",
     "tensorflow, librosa, jax"),
    ("front_end, waveforms", "tensorflow, librosa, jax, soundfile, soxr, tqdm"),
])  # fmt: skip
def test_importing_is_light(modules, banned):
    imports = ";".join(f"import data_pipelines.{name}" for name in modules.split(", "))
    code = f"import sys; {imports}; print({set(banned.split(', '))} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_tensorflow_sees_no_gpu():
    assert load_tensorflow().config.get_visible_devices("GPU") == []
