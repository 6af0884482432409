"""Values and written-out derivatives against jax's, flax's and automatic differentiation's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from tail_jax.models.functions import LayerNorm, attention, gelu


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_same_gradients(function, expected, *arguments, atol=1e-5):
    """Values, and gradients of a sum with random weights, for every argument."""
    weights = normal(9, *jax.eval_shape(expected, *arguments).shape)
    both = []
    for f in (function, expected):
        loss = lambda *a, f=f: (f(*a) * weights).sum()
        both.append((f(*arguments), jax.grad(loss, tuple(range(len(arguments))))(*arguments)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5), *both)


def test_gelu_is_x_times_the_normal_distribution():
    x = np.r_[np.linspace(-12, 12, 1001), 0.0].astype(np.float32)
    np.testing.assert_allclose(gelu(jnp.asarray(x)), x * special.ndtr(np.float64(x)), atol=1e-6)
    density = np.exp(-0.5 * np.float64(x) ** 2) / np.sqrt(2 * np.pi)
    slope = jax.vmap(jax.grad(gelu))(jnp.asarray(x))
    np.testing.assert_allclose(slope, special.ndtr(np.float64(x)) + x * density, atol=1e-6)


@pytest.mark.parametrize("shape", [(7,), (1, 5), (3, 4, 11)])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_is_that_of_flax(shape, affine):
    ours, theirs = LayerNorm(1e-3, affine=affine), nn.LayerNorm(
        1e-3, use_scale=affine, use_bias=affine)
    x = 3 * normal(0, *shape) + 2
    params = {"scale": normal(1, shape[-1]), "bias": normal(2, shape[-1])} if affine else {}
    assert jax.tree.structure(ours.init(jax.random.key(0), x)) == jax.tree.structure(
        {"params": params} if affine else {})
    assert_same_gradients(*(lambda x, p, m=m: m.apply({"params": p}, x) for m in (ours, theirs)),
                          x, params)


def test_layer_norm_of_half_precision_has_statistics_in_float32():
    x = (normal(0, 4, 300) + 50).astype(jnp.bfloat16)
    out = LayerNorm(dtype=jnp.bfloat16, affine=False).apply({}, x)
    wide = np.float64(x)
    expected = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(out), expected, atol=0.02)


def plain_attention(query, key, value, bias=None, mask=None):
    scores = jnp.einsum("...qd,...kd->...qk", query, key) / query.shape[-1] ** 0.5
    scores = scores if bias is None else scores + bias
    scores = scores if mask is None else jnp.where(mask, scores, -1e30)
    return jax.nn.softmax(scores) @ value


@pytest.mark.parametrize("queries, keys", [(5, 9), (1, 1), (6, 6)])
@pytest.mark.parametrize("bias", [None, (2, 1, 1), (3, 1, 2, 1, 1), (1, 2, None, None)])
def test_attention_is_that_of_automatic_differentiation(queries, keys, bias):
    query, key, value = (normal(i, 3, 4, 2, n, 7) for i, n in enumerate((queries, keys, keys)))
    shape = bias and [(queries, keys)[i - 2] if n is None else n for i, n in enumerate(bias)]
    biases = [normal(3, *shape)] if bias else []
    mask = jnp.asarray(np.random.default_rng(4).random((3, 1, 1, 1, keys)) < 0.7).at[..., :1].set(
        True)
    for masks in ([], [mask]):
        def run(function, q, k, v, *b):
            return function(q, k, v, b[0] if b else None, masks[0] if masks else None)

        assert_same_gradients(lambda *a: run(attention, *a), lambda *a: run(plain_attention, *a),
                              query, key, value, *biases)


def test_a_row_that_sees_nothing_gives_no_gradient_to_keys_and_nothing_is_nan():
    query, key, value = (normal(i, 2, 1, 3, 4) for i in range(3))
    mask = jnp.asarray([[[[True] * 3]], [[[False] * 3]]])
    loss = lambda *a: attention(*a, None, mask).sum()
    gradients = jax.grad(loss, (0, 1, 2))(query, key, value)
    assert all(np.isfinite(g).all() for g in gradients)
    assert np.abs(gradients[1][0]).max() > 0 and not np.abs(gradients[1][1]).any()


def test_attention_in_half_precision_is_near_and_keeps_its_type():
    arguments = [normal(i, 2, 3, 5, 8, dtype=jnp.bfloat16) for i in range(3)]
    out = attention(*arguments)
    gradients = jax.grad(lambda *a: attention(*a).astype(jnp.float32).sum(), (0, 1, 2))(*arguments)
    wide = [x.astype(jnp.float32) for x in arguments]
    assert {x.dtype for x in (out, *gradients)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(out.astype(jnp.float32), plain_attention(*wide), atol=0.03)
    expected = jax.grad(lambda *a: plain_attention(*a).sum(), (0, 1, 2))(*wide)
    for found, value in zip(gradients, expected):
        np.testing.assert_allclose(found.astype(jnp.float32), value, atol=0.08)


def test_the_backward_pass_of_gelu_keeps_one_array_a_layer():
    """A layer more takes one array more, not also what both passes compute of it."""
    rows, width, hidden = 2048, 32, 128

    def temporaries(layers):
        def loss(x, weights):
            for up, down in weights:
                x = x + gelu(x @ up) @ down
            return x.sum()

        shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
        weights = [[shape(width, hidden), shape(hidden, width)]] * layers
        compiled = jax.jit(jax.grad(loss)).lower(shape(rows, width), weights).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(9) - temporaries(5) < 4 * 1.5 * 4 * rows * hidden
