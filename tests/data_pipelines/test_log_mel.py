import dataclasses
import subprocess
import sys

import librosa
import numpy as np
import pytest

from conftest import write_tone
from data_pipelines import load_tensorflow
from data_pipelines.audio import read_audio
from data_pipelines.log_mel import LogMelSettings, log_mel

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
    found = log_mel(waveform, settings).numpy()
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
    np.testing.assert_allclose(log_mel(waveform, settings).numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("samples", [1, 2, 3, 7, 100, 199, 200, 201])
def test_clips_shorter_than_the_padding_reflect_as_numpy_does(samples):
    waveform = noise(samples)
    padded = np.pad(waveform, SPEECH.padding, mode="reflect")
    expected = reference(padded, dataclasses.replace(SPEECH, center=False))
    np.testing.assert_allclose(log_mel(waveform, SPEECH).numpy(), expected, atol=1e-3)


def test_ten_seconds_at_the_settings_of_clap_are_1001_by_64():
    assert log_mel(noise(480000), LogMelSettings()).shape == (1001, 64)
    assert LogMelSettings().num_frames(480000) == 1001


def test_silence_is_the_floor():
    found = log_mel(np.zeros([5000], np.float32), SPEECH).numpy()
    np.testing.assert_allclose(found, -100.0, atol=1e-4)


def test_stereo_file_equals_librosa_on_its_downmix(tmp_path):
    write_tone(tmp_path / "a.wav", 0.7, 44100, channels=2)
    expected, _ = librosa.load(tmp_path / "a.wav", sr=16000, mono=True, res_type="soxr_hq")
    found = log_mel(read_audio(tmp_path / "a.wav", 16000), SPEECH).numpy()
    np.testing.assert_allclose(found, reference(expected, SPEECH), atol=1e-3)


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_leading_axes_are_kept(shape):
    waveforms = noise(int(np.prod(shape)) * 1111).reshape(*shape, 1111)
    found = log_mel(waveforms, SPEECH).numpy()
    assert found.shape == (*shape, SPEECH.num_frames(1111), 80)
    for index in np.ndindex(shape):
        np.testing.assert_allclose(found[index], reference(waveforms[index], SPEECH), atol=1e-3)


def test_in_a_tf_data_map_of_unknown_length_it_is_the_same():
    tf = load_tensorflow()
    lengths = [50, 1234, 999]
    data = tf.data.Dataset.from_generator(
        lambda: (noise(length) for length in lengths), tf.float32, [None]
    ).map(lambda waveform: log_mel(waveform, SPEECH))
    for length, found in zip(lengths, data.as_numpy_iterator(), strict=True):
        np.testing.assert_allclose(found, log_mel(noise(length), SPEECH).numpy(), atol=1e-5)


@pytest.mark.parametrize("change, message", [
    ({"fmax": 9000.0}, "8000.0 Hz, half the sampling rate"), ({"fmin": 8000.0}, "fmin < fmax"),
    ({"mel_scale": "bark"}, "mel_scale is 'bark'"), ({"hop_length": 0}, "hop_length is 0"),
    ({"pad_mode": "wrap"}, "pad_mode is 'wrap'"), ({"norm": "none"}, "norm is 'none'"),
])  # fmt: skip
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SPEECH, **change)


def test_too_short_a_waveform_is_refused():
    with pytest.raises(ValueError, match="0 samples are too few"):
        log_mel(np.zeros([0], np.float32), SPEECH)
    with pytest.raises(ValueError, match="expected at least 400"):
        log_mel(np.zeros([399], np.float32), dataclasses.replace(SPEECH, center=False))


def test_importing_the_package_does_not_import_tensorflow():
    modules = "log_mel, audio, augment, batches, features, streams, text, corpora.folder"
    imports = ";".join(f"import data_pipelines.{name}" for name in modules.split(", "))
    code = f"import sys; {imports}; print('tensorflow' in sys.modules, 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_tensorflow_sees_no_gpu():
    assert load_tensorflow().config.get_visible_devices("GPU") == []
