"""CLAP-Adapter against its formula; tuning files of methods that encode in a way of their own."""

import functools

import jax
import numpy as np
import pytest

import tail_jax
from tail_jax import backbone as backbones
from tail_jax import methods
from tail_jax.models.ast import ASTConfig
from tail_jax.models.bert import TextConfig
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.run import open_run
from tail_jax.train import train
from tail_jax.training.checkpoints import load_tree

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = DualEncoder(
    ASTConfig(frames=12, mels=8, patch=4, stride=4, width=8, layers=1, heads=2, hidden=12,
              epsilon=1e-5),
    TextConfig(vocab_size=20, width=8, layers=1, heads=2, hidden=12, max_positions=16),
    embedding=7)


@functools.cache
def params():
    return jax.device_get(jax.jit(MODEL.init)(jax.random.key(0)))


@pytest.mark.parametrize("learned", [False, True])
def test_the_adapter_by_its_formula(learned):
    method = methods.build({"name": "clap_adapter", "reduction": 3, "ratio": 0.3,
                            "learn_ratio": learned})
    trainable = method.init(jax.random.key(1), MODEL, params())["trainable"]
    assert set(trainable) == {"adapters"}  # heads and temperature stay
    rng = np.random.default_rng(0)
    batch = {"audio": rng.normal(size=(3, 12, 8)).astype(np.float32),
             "token_ids": rng.integers(0, 20, (3, 5)).astype(np.int32),
             "token_mask": np.ones((3, 5), bool)}
    for side, embed in (("audio", method.embed_audio), ("text", method.embed_text)):
        own = trainable["adapters"][side]
        assert own["down"]["kernel"].shape == (7, 2) and ("ratio" in own) == learned
        r = 0.3
        if learned:
            assert 1 / (1 + np.exp(-own["ratio"])) == pytest.approx(0.3)
            own["ratio"], r = own["ratio"] + 1, 1 / (1 + np.exp(-float(own["ratio"]) - 1))
        e = np.asarray(jax.jit(functools.partial(MODEL.encode, side))(params(), None, batch)
                       ["embedding"], np.float64)
        hidden = np.maximum(e @ np.asarray(own["down"]["kernel"], np.float64), 0)
        mixed = r * np.maximum(hidden @ np.asarray(own["up"]["kernel"]), 0) + (1 - r) * e
        expected = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
        got = jax.jit(functools.partial(embed, MODEL))(trainable, params(), {}, batch)
        np.testing.assert_allclose(got, expected, atol=1e-5)
        assert np.abs(got - e).max() > 1e-3


@pytest.mark.parametrize("settings", [{"ratio": 1.0}, {"ratio": 0.0}, {"reduction": 0}])
def test_wrong_adapter_settings_are_errors(settings):
    with pytest.raises(ValueError, match="method.ratio is"):
        methods.build({"name": "clap_adapter"} | settings)


@pytest.mark.parametrize("name", ["l2p", "sprompts", "clap_adapter"])
def test_a_loaded_tuning_file_embeds_as_its_run_did(name, tiny_config, tmp_path):
    settings = {"train.duration": "2 steps", "method.learning_rate": 0.05}
    if name == "sprompts":
        settings["method.centroids"] = 2
    config = tiny_config(name, tasks=2, **settings)
    train(config, tmp_path / "run")
    run = open_run(config, tmp_path / "run")
    backbones.save_backbone(tmp_path / "backbone", run.backbone)
    model = tail_jax.load(tmp_path / "backbone",
                          tuning=tmp_path / "run" / "tuning" / "task_2.safetensors")
    split = run.stream.tasks[1].test
    gallery, _ = load_tree(tmp_path / "run" / "galleries" / "task_2.safetensors")
    audio = model.embed_audio([clip.path for clip in split.clips], policy="chunk_mean")
    np.testing.assert_allclose(audio, gallery["audio"], atol=1e-5)
    np.testing.assert_allclose(model.embed_text(split.captions), gallery["text"], atol=1e-5)
    bare = tail_jax.load(tmp_path / "backbone").embed_text(split.captions)
    assert np.abs(bare - gallery["text"]).max() > 1e-3  # the tuning does something
