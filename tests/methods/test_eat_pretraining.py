"""EAT's pretraining: its losses, its teacher, that it learns, and what it leaves behind."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import pretrain_eat
from tail_jax import backbone as backbones
from tail_jax import cli, methods, settings
from tail_jax import run as run_module
from tail_jax.methods.eat import EAT
from tail_jax.models.ast import ASTConfig
from tail_jax.models.bert import TextConfig
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.eat import EATConfig, encode_patches
from tail_jax.models.masked_patches import PatchDecoder, targets, visible_patches
from tail_jax.models.presets import preset
from tail_jax.train import train
from tail_jax.training import sharding
from tail_jax.training.checkpoints import flatten, load_tree
from tail_jax.training.optimizers import OptimizerConfig, make_optimizer
from tail_jax.training.step import make_train_step
from tail_jax.tuning.masks import apply_rules
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

# A grid of 5 x 3 patches, of which 4 are seen.
MODEL = DualEncoder(EATConfig(frames=20, mels=12, patch=4, width=12, layers=2, heads=3, hidden=20),
                    None)
METHOD = EAT(mask_ratio=0.75, block=2, clones=3, decoder_layers=2, decoder_width=5, decay=0.6,
             last_decay=0.9, decay_steps=2, utterance_weight=0.5)
ROWS, REAL = 5, 4
KEY = jax.random.key(7)


@functools.cache
def params(model=MODEL):
    return jax.device_get(jax.jit(model.init)(jax.random.key(0)))


def state(method=METHOD, model=MODEL):
    return method.init(jax.random.key(1), model, params(model))


def batch(seed=0):
    audio = np.random.default_rng(seed).normal(-4, 4, (ROWS, 20, 12)).astype(np.float32)
    return {"audio": audio, "mask": np.arange(ROWS) < REAL}


@jax.jit
def loss(trainable, batch):
    outputs = METHOD.forward(MODEL, trainable, {}, {}, batch, KEY)
    return METHOD.objective(MODEL, trainable, {}, {}, outputs, batch)


def moved(tree, seed=2):
    """The tree some way off: what training might have made of it."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x + rng.normal(0, 0.1, np.shape(x)), np.float32), tree)


# --- Loss -------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_masked_patches_clones_and_real_clips():
    trainable = moved(state()["trainable"])
    value, metrics = loss(trainable, batch())
    audio = batch()["audio"]
    encode = jax.jit(functools.partial(encode_patches, MODEL.audio))
    target, clip = jax.device_get(targets(encode(trainable["teacher"], audio)["hidden"]))
    visible = np.asarray(visible_patches(KEY, 3 * ROWS, (5, 3), 4, 2)).reshape(ROWS, 3, 4)
    decode = jax.jit(PatchDecoder((5, 3), 5, 2).apply)
    frame, utterance = [], []
    for clone in range(3):
        shown = visible[:, clone]
        tokens = encode(trainable["audio"], audio, shown)["tokens"]
        prediction = np.asarray(decode({"params": trainable["decoder"]}, tokens[:, 1:], shown))
        for row in range(REAL):
            hid = sorted(set(range(15)) - set(shown[row]))
            frame.append(np.mean((prediction[row, hid] - target[row, hid]) ** 2))
            utterance.append(np.mean((tokens[row, 0] - clip[row]) ** 2))
    np.testing.assert_allclose(metrics["frame"], np.mean(frame), rtol=1e-4)
    np.testing.assert_allclose(metrics["utterance"], np.mean(utterance), rtol=1e-4)
    np.testing.assert_allclose(value, np.mean(frame) + 0.5 * np.mean(utterance), rtol=1e-4)
    for name, value in (("target_variance", target), ("clip_target_variance", clip)):
        np.testing.assert_allclose(metrics[name], value[:REAL].var(0).mean(), rtol=1e-4)


def test_padding_neither_gives_nor_receives_loss():
    trainable, other = state()["trainable"], batch()
    other["audio"][REAL:] = 1e3
    np.testing.assert_allclose(loss(trainable, other)[0], loss(trainable, batch())[0], rtol=1e-6)


def test_a_teacher_to_whom_all_clips_are_one_shows_in_the_variance_of_its_targets():
    trainable = state()["trainable"]
    deaf = jax.tree.map(np.copy, trainable["teacher"])
    deaf["patch"]["kernel"][:] = 0
    good, bad = (loss(t, batch())[1] for t in (trainable, trainable | {"teacher": deaf}))
    for name in ("target_variance", "clip_target_variance"):
        assert good[name] > 0.02 and bad[name] < 1e-6


# --- Teacher ----------------------------------------------------------------------------------


def test_teacher_gets_no_gradient_and_all_that_is_trained_gets_one():
    gradients = jax.jit(jax.grad(lambda t: loss(t, batch())[0]))(moved(state()["trainable"]))
    size = {name: float(np.abs(g).max()) for name, g in flatten(gradients).items()}
    for name, largest in size.items():
        still = name.startswith("teacher/") or name == "updates"
        # Keys share their bias in a softmax: its gradient is nothing but rounding.
        buffers = name.endswith(("input_mean", "input_std", "key/bias"))
        assert (largest == 0) if still else largest > 0 or buffers, name


def stepped(method, model, batches, rate=1e-2):
    """The trainable trees before and after each step of the one trainer, and the metrics."""
    mesh = sharding.make_mesh(1)
    method = dataclasses.replace(method, learning_rate=rate)
    first = state(method, model)
    trainable = sharding.place(first["trainable"], mesh)
    optimizer = make_optimizer(OptimizerConfig(), method, trainable)
    step = make_train_step(model, method, optimizer, mesh, trainable, {})
    opt_state, mask = step.init_optimizer(trainable), method.update_mask(first)
    trees, metrics = [jax.device_get(trainable)], []
    for number, rows in enumerate(batches):
        trainable, opt_state, values = step(
            trainable, opt_state, {}, {}, mask, sharding.put_batch(rows, mesh), KEY,
            jnp.asarray([number, len(batches)], jnp.int32))
        trees.append(jax.device_get(trainable))
        metrics.append(jax.device_get(values))
    assert step.traces == 1
    return trees, metrics


def test_teacher_is_the_exponential_average_of_the_students_so_far():
    trees, _ = stepped(METHOD, MODEL, [batch(seed) for seed in range(4)])
    # tau rises over two steps from 0.6 to 0.9 and stays; weights of the start and of steps 1 to 4.
    decays = [0.6, 0.75, 0.9, 0.9]
    weights = [np.prod(decays)] + [(1 - tau) * np.prod(decays[i + 1:])
                                   for i, tau in enumerate(decays)]
    assert sum(weights) == pytest.approx(1)
    students = [flatten(tree["audio"]) for tree in trees]
    for name, value in flatten(trees[-1]["teacher"]).items():
        expected = sum(w * s[name].astype(float) for w, s in zip(weights, students))
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=name)
        if name in ("input_mean", "input_std"):
            assert value == students[0][name]
    assert trees[-1]["updates"] == 4
    assert np.abs(students[-1]["cls"] - students[0]["cls"]).max() > 1e-3


def test_decay_is_the_last_throughout_without_steps_to_rise_in():
    assert dataclasses.replace(METHOD, decay_steps=0).teacher_decay(jnp.zeros(())) == 0.9


# --- Learning ---------------------------------------------------------------------------------


def test_sixty_steps_predict_clips_beyond_the_mean_target_and_do_not_collapse():
    # Spectrograms of two glides each: what is masked follows from what is seen. The teacher follows
    # fast: with each token's own normalisation alone, targets were one for all clips by then.
    rng = np.random.default_rng(0)
    time, band = np.arange(20)[:, None], np.arange(12)

    def clips():
        start, slope = rng.uniform(0, 12, (2, 32, 1, 1)), rng.uniform(-0.3, 0.3, (2, 32, 1, 1))
        gap = (band - start - slope * time) ** 2
        return {"audio": (-12 + 16 * np.exp(-gap / 4).sum(0)).astype(np.float32),
                "mask": np.ones(32, bool)}

    method = dataclasses.replace(METHOD, mask_ratio=0.6, decay=0.9, last_decay=0.99,
                                 decay_steps=60, decoder_width=16)
    model = dataclasses.replace(MODEL, audio=dataclasses.replace(
        MODEL.audio, width=24, hidden=48))
    _, metrics = stepped(method, model, [clips() for _ in range(60)])
    first, last = metrics[0], metrics[-1]
    assert last["frame"] < 0.8 * last["target_variance"] < first["frame"]
    for name in ("target_variance", "clip_target_variance"):
        assert last[name] > 0.5 * first[name]
    assert last["prediction_variance"] > 0.3 * last["target_variance"]


# --- What it leaves, and what it refuses -------------------------------------------------------


def test_a_run_leaves_an_eat_backbone_that_was_trained_without_captions(tiny_config, tmp_path):
    model = DualEncoder(dataclasses.replace(MODEL.audio, frames=32, mels=16, patch=8), None)
    config = tiny_config("eat", tasks=1, **{"train.duration": "3 steps"})
    config |= {"model": cli.plain(model.to_dict()) | {"checkpoint": ""}}
    config["method"] |= {"block": 2, "clones": 2, "decoder_layers": 1, "decoder_width": 4}
    results = train(config, tmp_path)
    assert results["matrices"] == {} and results["trace_count"] == 1
    loaded = backbones.load(tmp_path / "backbone")
    assert loaded.model == model and loaded.tokenizer is None
    assert loaded.params.keys() == {"audio"}
    start = run_module.open_run(config, tmp_path).backbone.params["audio"]
    assert loaded.params["audio"]["input_mean"] == start["input_mean"] != -4.268  # of the data
    assert np.abs(loaded.params["audio"]["cls"] - start["cls"]).max() > 1e-4
    tree, _ = load_tree(tmp_path / "tuning" / "task_1.safetensors")
    assert tree.keys() == {"audio"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"frame", "utterance", "target_variance", "prediction_variance"} <= lines[-1].keys()


def test_the_configuration_pretrains_the_mini_preset_without_text():
    config = cli.plain(pretrain_eat.get_config("seed=3"))
    model = settings.described_model(config)
    assert model == preset("mini-eat") and model.text is None and config["seed"] == 3
    assert methods.build(config["method"]).visible(model.audio.grid) == 5
    assert settings.data_settings(config["data"]).audio_shape == model.audio.input_shape
    assert cli.plain(pretrain_eat.inner())["method"] == config["method"]


def test_backbone_is_an_eat_without_decoder_and_teacher(tmp_path):
    config = tiny.get_config()
    trainable = moved(state()["trainable"])
    tree, tuning = METHOD.resolve(MODEL, trainable, METHOD.frozen(params()))
    saved = backbones.save_backbone(tmp_path, backbones.Backbone(
        "eat", MODEL, tree, *backbones.front_end_of(config.data.to_dict()), None))
    loaded = backbones.load(tmp_path)
    assert tuning is None and loaded.model == MODEL and saved.sha256 == loaded.sha256
    assert flatten(loaded.params).keys() == flatten(params()).keys()
    for name, value in flatten(loaded.params["audio"]).items():
        np.testing.assert_array_equal(value, flatten(trainable["audio"])[name])


def test_tuning_file_holds_what_embedding_reads():
    whole = state()
    stored = METHOD.stored(whole)
    assert stored.keys() == {"audio"}
    embed = jax.jit(lambda t: METHOD.embed_audio(MODEL, t, {}, {}, batch()))
    np.testing.assert_array_equal(embed(stored), embed(whole["trainable"]))


@pytest.mark.parametrize("settings, message", [
    ({"clones": 0}, "method.clones is 0; expected 1 or more"),
    ({"mask_ratio": 1.0}, "method.mask_ratio is 1.0; expected a share between 0 and 1"),
    ({"last_decay": 1.5}, "method.last_decay is 1.5; expected 0 to 1"),
    ({"learning_rate": -1.0}, "method.learning_rate is -1.0; expected 0 or more")])
def test_settings_out_of_range_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        methods.build({"name": "eat"} | settings)


@pytest.mark.parametrize("audio, text, found", [
    (ASTConfig(frames=16, mels=16, width=8, heads=2, layers=1), None, "audio AST"),
    (MODEL.audio, TextConfig(vocab_size=20, width=8, heads=2, layers=1), "audio EAT', 'text Text")])
def test_other_models_are_errors(audio, text, found):
    with pytest.raises(ValueError, match=f"pretrains an EAT tower alone; model has .*{found}"):
        METHOD.init(KEY, DualEncoder(audio, text), {})


def test_class_streams_and_captions_are_for_other_methods():
    for classes, kind in ((0, "audio-text"), (5, "class-incremental")):
        with pytest.raises(ValueError, match=f"method 'eat' is not for {kind} streams"):
            methods.build({"name": "eat"}, 1, classes)


def test_rules_cover_every_leaf_once_and_decay_kernels_alone():
    method, tree = dataclasses.replace(METHOD, weight_decay=0.3), state()["trainable"]
    apply_rules(tree, method.learning_rates())
    for name, decay in flatten(apply_rules(tree, method.weight_decays())).items():
        assert decay == (0.3 if name.endswith("/kernel") else 0.0), name
    still = {name for name, moves in flatten(method.update_mask(state())).items() if not moves}
    assert still == {"updates", "audio/input_mean", "audio/input_std"} | {
        name for name in flatten(tree) if name.startswith("teacher/")}


def test_one_patch_cannot_be_masked():
    with pytest.raises(ValueError, match=r"grid of \(1, 1\) patches; masking needs 2 or more"):
        METHOD.visible((1, 1))
    assert METHOD.visible((5, 3)) == 4 and METHOD.visible((2, 1)) == 1
    assert dataclasses.replace(METHOD, mask_ratio=0.01).visible((3, 1)) == 2
