"""The configurations of class-incremental streams."""

import librosa
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common, pace, real_audio
from data_pipelines import streams
from data_pipelines.log_mel import LogMelSettings, window_and_filters
from tail_jax import best, cli, methods, settings
from tail_jax.models.dual_encoder import DualEncoder

NAMES = methods.for_streams("classifies", ablations=True)


@pytest.mark.parametrize("name", [*pace.PUBLISHED, "folder"])
def test_every_stream_is_a_whole_configuration(name):
    config = cli.plain(pace.get_config(f"stream={name},seed=3"))
    settings.check(config, 1)
    assert config["stream"]["order_seed"] == config["seed"] == 3
    model, data = settings.described_model(config), settings.data_settings(config["data"])
    assert model.text is None and data.audio_shape == model.audio.input_shape
    assert DualEncoder(model.audio, None, classes=5).classes == 5
    # It gets as far as the corpus, which is not there.
    with pytest.raises((FileNotFoundError, ValueError), match="runs/cache|does not exist|no "):
        streams.build_stream(settings.stream_spec(config | {
            "data": config["data"] | {"root": "no/such/folder"}}))


@pytest.mark.parametrize("method", NAMES)
def test_every_method_has_its_settings_for_class_streams(method):
    config = pace.get_config(f"stream=esc50,method={method}")
    assert config.method.name == method
    methods.build(config.method.to_dict(), 10, classes=50)
    assert config.optimizer.kind == ("sgd" if method.startswith(pace.SGD) else "adamw")


def test_settings_of_a_file_replace_those_of_the_method(tmp_path):
    """Of what the file has for PACE an ablation takes what it does not change itself."""
    path = tmp_path / "best.json"
    best.write(path, {"methods": {
        "pace": {"settings": {"learning_rate": 0.2, "warm_up": "2 epochs"}},
        "pace_naive": {"like": "pace"}}})
    of = lambda arg: pace.get_config(f"folder=x,settings={path},{arg}").method.to_dict()
    assert of("method=pace") == methods.defaults("pace", True) | {
        "learning_rate": 0.2, "warm_up": "2 epochs"}
    assert of("method=pace_naive") == methods.defaults("pace_naive", True) | {"learning_rate": 0.2}
    assert of("method=ncm") == methods.defaults("ncm", True)
    assert pace.get_config("folder=x,tasks=2").stream.first == 2


def test_published_streams_have_the_papers_sessions_and_epochs():
    found = {name: (pace.get_config(f"stream={name}").stream.sessions,
                    pace.get_config(f"stream={name}").train.duration) for name in pace.PUBLISHED}
    assert found == {
        "esc50": (10, "10 epochs"), "us8k": (5, "15 epochs"), "sc2": (7, "1 epochs"),
        "timit2": (315, "30 epochs"), "timit3": (210, "30 epochs"), "vocalset": (8, "6 epochs")}
    assert all(pace.get_config(f"stream={name}").method.multi_session == (name not in pace.COARSE)
               for name in pace.PUBLISHED)


def test_an_unknown_stream_is_an_error_that_lists_them():
    with pytest.raises(ValueError, match="stream=esc51; expected folder or one of esc50, us8k"):
        pace.get_config("stream=esc51")
    assert isinstance(pace.get_config(), ConfigDict)


def test_rates_of_methods_for_class_streams_alone_are_their_own():
    """Others, made for heads that are pretrained, have another rate for a head that is new."""
    rates = {name: pace.get_config(f"stream=esc50,method={name}").method.heads_learning_rate
             for name in ("l2p", "dualprompt", "joint_lora", "ranpac", "acil", "lda")}
    assert rates == {"l2p": 1e-3, "dualprompt": 1e-3} | dict.fromkeys(
        ("joint_lora", "ranpac", "acil", "lda"), 1e-2)
    assert methods.defaults("l2p")["heads_learning_rate"] == 1e-4
# 127.5 hops: 5.1 s x 16 kHz / 640, and so on.
@pytest.mark.parametrize("seconds, hop, n_fft, window", [
    (5.1, 640, 1280, 5.1), (2.55, 320, 640, 2.55), (1.28, 161, 400, 161 * 127.5 / 16000),
    (0.64, 80, 400, 0.6375), (0.1, 13, 400, 13 * 127.5 / 16000), (10.2, 1280, 2560, 10.2)])
def test_window_gives_the_front_end_of_128_frames(seconds, hop, n_fft, window):
    config = pace.get_config(f"seconds={seconds}")
    assert config.data.window_seconds == pytest.approx(window, abs=1e-12)
    found = LogMelSettings(**config.data.log_mel)
    assert (found.hop_length, found.n_fft) == (hop, n_fft)
    assert settings.data_settings(cli.plain(config.data)).audio_shape == (128, 32)
    _, filters = window_and_filters(found)
    expected = librosa.filters.mel(sr=16000, n_fft=n_fft, n_mels=32, fmin=50, fmax=8000).T
    np.testing.assert_allclose(filters, expected, atol=1e-8)
    # No two bands peak at one frequency, and none falls between two: Slaney's triangles have the
    # height 2 / width, and each reaches half of it.
    edges = librosa.mel_frequencies(34, fmin=50, fmax=8000)
    assert (np.diff(filters.argmax(0)) > 0).all()
    assert (filters.max(0) * (edges[2:] - edges[:-2]) > 1).all()


def test_default_windows_are_those_of_the_other_experiments():
    config = pace.get_config()
    assert LogMelSettings(**config.data.log_mel) == real_audio.LOG_MEL
    assert config.data.window_seconds == 5.1
    assert common.mini_front_end(2.55) == (common.MINI_LOG_MEL, 2.55)


def test_scenes_of_the_pretraining_fill_the_window():
    scenes = [pace.get_config(f"seconds={s}").backbone.pretrain.stream.scenes.to_dict()
              for s in (5.1, 2.55, 0.64)]
    assert scenes == [{"seconds": 5.1}, {}, {}]


@pytest.mark.parametrize("seconds", [0.05, 12.0])
def test_a_window_out_of_range_is_an_error(seconds):
    with pytest.raises(ValueError, match=f"seconds={seconds}; expected 0.1 to 10.2"):
        pace.get_config(f"seconds={seconds}")
