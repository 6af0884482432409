"""The layers' functions beside dense ones, with derivatives of their own.

Automatic differentiation keeps every intermediate value and walks over memory once for each; on a
CPU that took as long as the products of matrices. These keep what the derivative needs and take
one or two passes.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def _kept(values):
    """What the forward pass kept, for the backward pass.

    On a CPU behind a barrier: without it XLA sees that the backward pass computes again what the
    forward pass did, and keeps that, too. A TPU's program read a few percent more with it.
    """
    return jax.lax.platform_dependent(values, cpu=jax.lax.optimization_barrier,
                                      default=lambda values: values)


@jax.custom_vjp
def gelu(x):
    """x Phi(x), Phi the normal distribution (Hendrycks & Gimpel, arXiv 1606.08415)."""
    # erf, not erfc: one polynomial where the other needs two and an exponential.
    normal = 0.5 + 0.5 * jax.lax.erf(x.astype(jnp.float32) * 0.5 ** 0.5)
    return (x * normal).astype(x.dtype)


def _gelu_backward(x, g):
    # Constants behind the barrier are of this layer: those of all layers became one array each as
    # large as x, written to memory and held from there on (0.3 GB of a CLAP's step on a CPU).
    constants = [jnp.float32(c) for c in (0.5, 0.5 ** 0.5, -0.5, (2 * jnp.pi) ** -0.5)]
    x, (half, root, minus_half, peak) = _kept((x, constants))
    wide = x.astype(jnp.float32)
    normal = half + half * jax.lax.erf(wide * root)
    density = peak * jnp.exp(minus_half * jnp.square(wide))
    return ((g * (normal + wide * density)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)

# 'gelu_tanh' is GELU's approximation by a tanh.
ACTIVATIONS = {"gelu": gelu, "gelu_tanh": nn.gelu, "relu": nn.relu, "silu": nn.silu}


class LayerNorm(nn.Module):
    """Layer normalisation of the last axis, statistics in float32 (Ba et al., arXiv 1607.06450).

        y = scale (x - mean(x)) / sqrt(var(x) + epsilon) + bias
    """

    epsilon: float = 1e-5
    dtype: Any = None  # of the result; None: of x and the parameters together
    affine: bool = True  # whether there are scale and bias

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1:]
        scale = bias = None
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, width)
            bias = self.param("bias", nn.initializers.zeros, width)
        kind = self.dtype or (x.dtype if scale is None else jnp.result_type(x, scale))
        return _layer_norm(self.epsilon, kind, x, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _layer_norm(epsilon, dtype, x, scale, bias):
    return _layer_norm_forward(epsilon, dtype, x, scale, bias)[0]


def _layer_norm_forward(epsilon, dtype, x, scale, bias):
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    rate = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + epsilon)
    y = (wide - mean) * rate
    y = y if scale is None else y * scale + bias
    return y.astype(dtype), (x, scale, mean, rate)


def _layer_norm_backward(epsilon, dtype, kept, g):
    x, scale, mean, rate = _kept(kept)
    y, g = (x.astype(jnp.float32) - mean) * rate, g.astype(jnp.float32)
    h = g if scale is None else g * scale
    dx = rate * (h - h.mean(-1, keepdims=True) - y * (h * y).mean(-1, keepdims=True))
    if scale is None:
        return dx.astype(x.dtype), None, None
    rows = tuple(range(x.ndim - 1))
    return (dx.astype(x.dtype), (g * y).sum(rows).astype(scale.dtype),
            g.sum(rows).astype(scale.dtype))


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@jax.custom_vjp
def attention(query, key, value, bias=None, mask=None):
    """softmax(q k^T / sqrt(d) + bias) v, the softmax in float32.

    Heads stand before tokens: products over neighbouring axes need no copies of the operands. With
    tokens first, the attention of HTSAT's first stage took twice as long on a CPU. What is divided
    by the softmax's sum is the product, which is smaller than the scores.

    Args:
        query: [..., h, S, d]; key, value: [..., h, K, d].
        bias: broadcastable to [..., h, S, K], added to the scores.
        mask: bool, broadcastable to [..., h, S, K]; False positions get no weight.
    """
    return _attention_forward(query, key, value, bias, mask)[0]


def _attention_forward(query, key, value, bias, mask):
    scores = _product("...qd,...kd->...qk", query * query.shape[-1] ** -0.5, key)
    if bias is not None:
        scores += bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    weights = weights.astype(value.dtype)
    out = (_product("...qk,...kd->...qd", weights, value) / total).astype(value.dtype)
    return out, (query, key, value, bias, mask, weights, total, out)


def _attention_backward(kept, g):
    query, key, value, bias, mask, weights, total, out = _kept(kept)
    g = g.astype(jnp.float32) / total
    inner = (g * out).sum(-1, keepdims=True)
    g = g.astype(value.dtype)
    dscores = weights * (_product("...qd,...kd->...qk", g, value) - inner)
    if mask is not None:
        dscores = jnp.where(mask, dscores, 0.0)
    dbias = None if bias is None else _sum_to(dscores, bias)
    dscores, scale = dscores.astype(query.dtype), query.shape[-1] ** -0.5
    dquery = _product("...qk,...kd->...qd", dscores, key) * scale
    dkey = _product("...qk,...qd->...kd", dscores, query * scale)
    dvalue = _product("...qk,...qd->...kd", weights, g)
    return (dquery.astype(query.dtype), dkey.astype(key.dtype), dvalue.astype(value.dtype), dbias,
            None)


attention.defvjp(_attention_forward, _attention_backward)
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _sum_to(x, like):
    """The gradient of an array that was broadcast to the shape of x."""
    axes = [i for i in range(x.ndim)
            if i < x.ndim - like.ndim or like.shape[i - x.ndim] != x.shape[i]]
    return x.sum(axes).reshape(like.shape).astype(like.dtype)
