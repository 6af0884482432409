"""EAT's tower: what its tokens depend on (its numbers are compared in tests/pretrained)."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tail_jax.models.ast import ASTConfig
from tail_jax.models.dual_encoder import BUFFERS, DualEncoder
from tail_jax.models.eat import EATConfig, EATTower, encode_patches, sincos_positions
from tail_jax.models.transformer import BlockConfig, Stack
from tail_jax.tuning.masks import count

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = EATConfig(frames=12, mels=8, patch=4, width=12, layers=3, heads=3, hidden=20)


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    blank = jax.ShapeDtypeStruct((1, *config.input_shape), jnp.float32)
    shapes = jax.eval_shape(EATTower(config).init, jax.random.key(0), blank)["params"]
    new = lambda path, x: (rng.normal(0, 0.3, x.shape)
                           + (path[-1].key in ("scale", "input_std"))).astype(np.float32)
    return jax.tree_util.tree_map_with_path(new, shapes)


def random_audio(config, rows=3, seed=1):
    shape = (rows, *config.input_shape)
    return np.random.default_rng(seed).normal(-4, 4, shape).astype(np.float32)


def apply(config, params, audio, tuning=None):
    return jax.jit(EATTower(config).apply)({"params": params}, audio, None, tuning)


def test_positions_follow_the_formula_patch_by_patch():
    table = sincos_positions((5, 3), 16)
    assert table.shape == (15, 16) and table.dtype == np.float32
    for frame in range(5):
        for mel in range(3):
            rates = [10000 ** (-i / 4) for i in range(4)]
            expected = [f(p * w) for p in (mel, frame) for f in (math.sin, math.cos)
                        for w in rates]
            np.testing.assert_allclose(table[3 * frame + mel], expected, atol=1e-6)


def test_positions_of_a_short_input_begin_those_of_a_long_one():
    assert (sincos_positions((32, 8), 64) == sincos_positions((768, 8), 64)[:256]).all()


def test_parameter_counts():
    # Published files of the base size add positions: 768 * 8 * 768 more make 89,972,736.
    size = lambda config: count(jax.eval_shape(
        EATTower(config).init, jax.random.key(0),
        jnp.zeros((1, *config.input_shape)))["params"], BUFFERS)
    assert size(EATConfig()) == size(EATConfig(frames=512)) == 85_254_144
    large = EATConfig(width=1024, layers=24, heads=16, hidden=4096)
    assert size(large) == 24 * (12 * 1024**2 + 13 * 1024) + 257 * 1024 + 3 * 1024


def test_every_layer_is_returned_and_cls_stands_first_without_a_position():
    params, audio = random_params(CONFIG), random_audio(CONFIG)
    out = apply(CONFIG, params, audio)
    assert [h.shape for h in out["hidden"]] == [(3, 1 + 6, 12)] * 4
    assert (out["tokens"] == out["hidden"][-1]).all()
    np.testing.assert_allclose(out["pooled"], out["tokens"][:, 0], atol=1e-5)
    cls, norm = params["cls"].astype(np.float64), params["norm"]
    expected = (cls - cls.mean()) / np.sqrt(cls.var() + 1e-6) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(out["hidden"][0][:, 0], np.tile(expected, (3, 1)), atol=1e-5)


def test_mean_pooling_leaves_cls_out():
    params, audio = random_params(CONFIG), random_audio(CONFIG)
    out = apply(dataclasses.replace(CONFIG, pool="mean"), params, audio)
    np.testing.assert_allclose(out["pooled"], np.asarray(out["tokens"])[:, 1:].mean(1), atol=1e-6)


def test_one_set_of_parameters_serves_every_length():
    params, audio = random_params(CONFIG), random_audio(CONFIG)
    short = dataclasses.replace(CONFIG, frames=8)
    whole, part = apply(CONFIG, params, audio), apply(short, params, audio[:, :8])
    # Before the first block a patch knows nothing of the others.
    np.testing.assert_allclose(part["hidden"][0], whole["hidden"][0][:, :5], atol=1e-6)
    assert np.abs(part["pooled"] - whole["pooled"]).max() > 1e-3


def test_a_row_does_not_depend_on_the_others():
    params, audio = random_params(CONFIG), random_audio(CONFIG, rows=5)
    whole = apply(CONFIG, params, audio)["pooled"]
    alone = [apply(CONFIG, params, audio[i:i + 1])["pooled"][0] for i in (0, 3)]
    np.testing.assert_allclose(alone, whole[np.array([0, 3])], atol=1e-5)


def test_prompts_reach_the_blocks():
    params, audio = random_params(CONFIG), random_audio(CONFIG)
    prompts = np.random.default_rng(2).normal(0, 1, (3, 2, 12)).astype(np.float32)
    out = apply(CONFIG, params, audio, {"prompts": prompts})
    plain = apply(CONFIG, params, audio)
    assert out["tokens"].shape == plain["tokens"].shape
    assert np.abs(out["pooled"] - plain["pooled"]).max() > 1e-3


def test_statistics_get_no_gradient():
    params, audio = random_params(CONFIG), random_audio(CONFIG)
    loss = lambda p: EATTower(CONFIG).apply({"params": p}, audio)["pooled"].sum()
    grads = jax.jit(jax.grad(loss))(params)
    assert grads["input_mean"] == 0 and grads["input_std"] == 0
    assert np.abs(grads["cls"]).max() > 0


# --- A part of the patches --------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def encode(config, params, audio, visible=None):
    return encode_patches(config, params, audio, visible)


VISIBLE = np.array([[0, 3, 5], [1, 2, 4], [2, 3, 4]])


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_visible_patches_are_the_whole_tower_with_attention_to_them_alone(pool):
    config, audio = dataclasses.replace(CONFIG, pool=pool), random_audio(CONFIG)
    params = random_params(CONFIG)
    out = encode(config, params, audio, VISIBLE)
    seen = np.concatenate([np.zeros((3, 1), int), 1 + VISIBLE], 1)
    mask = np.zeros((3, 7), bool)
    np.put_along_axis(mask, seen, True, 1)
    block = BlockConfig(12, 3, 20, "post", CONFIG.epsilon)
    whole, *_ = jax.jit(Stack(block, 3).apply)(
        {"params": params["encoder"]}, encode(CONFIG, params, audio)["hidden"][0], mask)
    expected = [np.take_along_axis(np.asarray(h), seen[..., None], 1) for h in whole]
    for own, reference in zip(out["hidden"], expected):
        np.testing.assert_allclose(own, reference, atol=1e-5)
    last = expected[-1]
    np.testing.assert_allclose(out["pooled"], last[:, 0] if pool == "cls" else last[:, 1:].mean(1),
                               atol=1e-5)


def test_what_is_masked_has_no_influence():
    params, audio = random_params(CONFIG), random_audio(CONFIG)
    other = audio.copy()
    for row, shown in enumerate(VISIBLE):
        for patch in set(range(6)) - set(shown):
            frame, mel = 4 * (patch // 2), 4 * (patch % 2)
            other[row, frame:frame + 4, mel:mel + 4] += 5
    before, after = (encode(CONFIG, params, x, VISIBLE)["tokens"] for x in (audio, other))
    assert (before == after).all()
    whole = [encode(CONFIG, params, x)["tokens"] for x in (audio, other)]
    assert np.abs(whole[0] - whole[1]).max() > 0.1


def test_all_patches_visible_is_the_tower_and_their_order_is_that_of_the_tokens():
    params, audio = random_params(CONFIG), random_audio(CONFIG)
    order = np.array([4, 0, 5, 2, 1, 3])
    whole = encode(CONFIG, params, audio)
    turned = encode(CONFIG, params, audio, np.tile(order, (3, 1)))
    np.testing.assert_allclose(turned["tokens"], whole["tokens"][:, np.r_[0, 1 + order]], atol=1e-5)
    np.testing.assert_allclose(apply(CONFIG, params, audio)["tokens"], whole["tokens"], atol=1e-5)


@pytest.mark.parametrize("config", [
    CONFIG, dataclasses.replace(CONFIG, pool="mean"),
    ASTConfig(frames=12, mels=8, patch=4, stride=4, width=12, layers=3, heads=3, hidden=20)])
def test_a_tower_goes_on_from_the_inputs_of_any_block(config):
    model = DualEncoder(config, None, classes=4)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + random.normal(0, 0.2, x.shape).astype(np.float32), params)
    tuning = {"audio": {"prompts": random.normal(size=(3, 2, 12)).astype(np.float32)}}  # deep
    run = jax.jit(lambda batch: model.encode("audio", params, tuning, batch))
    whole = run({"audio": random_audio(config)})
    for block in range(3):
        part = run({f"hidden_{block}": whole["hidden"][block]})
        assert len(part["hidden"]) == 4 - block
        for name in ("tokens", "pooled", "embedding", "logits"):
            np.testing.assert_allclose(part[name], whole[name], atol=1e-5)
    part = run({"pooled": whole["pooled"]})
    np.testing.assert_allclose(part["logits"], whole["logits"], atol=1e-5)
    shallow = {"audio": {"prompts": tuning["audio"]["prompts"][:1]}}
    with pytest.raises(ValueError, match="enter at block 0 and the stack starts at 2"):
        model.encode("audio", params, shallow, {"hidden_2": whole["hidden"][2]})


@pytest.mark.parametrize("change, message", [
    ({"frames": 13}, "EAT frames is 13; expected a multiple of patch 4"),
    ({"mels": 0}, "EAT mels is 0"), ({"width": 18}, "must be a multiple of 4"),
    ({"pool": "max"}, "EAT pool is 'max'; expected 'cls' or 'mean'")])
def test_impossible_descriptions_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_an_input_of_another_size_is_an_error():
    with pytest.raises(ValueError, match=r"shape \(16, 8\) .*takes \(12, 8\)"):
        EATTower(CONFIG).init(jax.random.key(0), np.zeros((1, 16, 8), np.float32))
