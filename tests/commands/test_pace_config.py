"""The configurations of class-incremental streams."""

import pytest
from ml_collections import ConfigDict

from configs import pace
from data_pipelines import streams
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
