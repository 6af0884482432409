"""Losses in blocks of pairs, on 1 to 8 devices, against the same losses of whole matrices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import pairs_on_devices
from tests.pairs_on_devices import DIMENSION, LOSSES, MESHES, ROWS

HIDDEN = -1e9


@pytest.fixture(scope="module")
def found(run_python):
    """What the program prints on eight devices."""
    process = run_python("-m", "tests.pairs_on_devices", devices=8)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def whole(name, z, scale, batch):
    """The losses by their definitions, of matrices [B, B]."""
    mask = batch["mask"]
    softmax = lambda s: jax.nn.log_softmax(jnp.where(mask[None, :], s, HIDDEN), axis=1)
    kl = lambda p, q: (jnp.exp(p) * (p - q) * mask[None, :]).sum(1)
    if name == "retrieval":
        same = batch["clip_id"][:, None] == batch["clip_id"][None, :]
        same |= batch["caption_key"][:, None] == batch["caption_key"][None, :]
        g = same * mask[:, None] * mask[None, :]
        q = g / np.maximum(g.sum(1, keepdims=True), 1)
        s = jnp.exp(scale) * z[0] @ z[1].T
        return -(q * (softmax(s) + softmax(s.T))).sum() / (2 * mask.sum())
    if name == "distillation":
        s, old = jnp.exp(scale) * z[0] @ z[1].T / 2, jnp.exp(scale / 2) * z[2] @ z[3].T / 2
        rows = sum(kl(softmax(b), softmax(a)) for a, b in ((s, old), (s.T, old.T)))
        return 4 * (rows * mask).sum() / (2 * mask.sum())
    total = 0.0
    for x, y in ((0, 1), (1, 0)):
        new, old = ((scale * z[i + x]) @ (scale * z[i + y]).T for i in (0, 2))
        first = jnp.diagonal(old) >= jnp.where(mask[None, :], old, HIDDEN).max(1)
        total += (kl(softmax(old), softmax(new)) * mask * first).sum() / 2
    return total


@pytest.mark.parametrize("loss", [*LOSSES])
@pytest.mark.parametrize("mesh", [*MESHES])
def test_value_and_gradient_are_those_of_the_whole_matrix(found, mesh, loss):
    z, scale, batch = pairs_on_devices.problem()
    with jax.default_matmul_precision("highest"):
        value, gradients = jax.value_and_grad(
            lambda z, scale: whole(loss, z, scale, batch), argnums=(0, 1))(z, scale)
    got, (by_rows, by_scale), _ = found[mesh][loss]
    assert abs(float(value)) > 0.01 and np.abs(gradients[0]).max() > 0.01
    assert got == pytest.approx(float(value), rel=2e-6, abs=2e-6)
    np.testing.assert_allclose(by_rows, gradients[0], atol=5e-6)
    assert by_scale == pytest.approx(float(gradients[1]), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("loss", [*LOSSES])
def test_no_device_holds_more_than_a_block_of_pairs(found, loss):
    for mesh, parts in (("2", 2), ("4", 4), ("8", 8), ("2x2x2", 4)):
        block, others = (ROWS // parts) ** 2, 4 * ROWS * DIMENSION  # embeddings of all rows
        assert found[mesh][loss][2] <= max(block, others)
    assert found["1"][loss][2] == ROWS**2
