"""EAT's tower: what its tokens depend on (its numbers are compared in tests/pretrained)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tail_jax.models.dual_encoder import BUFFERS
from tail_jax.models.eat import EATConfig, EATTower, sincos_positions
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
