"""Losses between all rows of a batch on meshes of several sizes; a program of test_pairwise.py.

    python -m tests.pairs_on_devices

prints a JSON object {mesh: {loss: [value, gradients, largest array of the compiled program]}}.
"""

import json
import math
import re

import jax
import numpy as np

from tail_jax import losses
from tail_jax.methods.modx import ModX
from tail_jax.training import sharding

ROWS, DIMENSION = 64, 4
MESHES = {"1": (1, 1, 1), "2": (2, 1, 1), "4": (4, 1, 1), "8": (8, 1, 1), "4x2": (4, 2, 1),
          "2x2x2": (2, 2, 2)}  # data, model, fsdp


def problem():
    """Embeddings of two steps and a batch: rows with several positives, 21 rows of padding, so that
    one device in eight has padding alone and one has some."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(4, ROWS, DIMENSION))
    z = (z / np.linalg.norm(z, axis=-1, keepdims=True)).astype(np.float32)
    batch = {"clip_id": rng.integers(0, 20, ROWS).astype(np.int32),
             "caption_key": rng.integers(0, 30, ROWS).astype(np.int32),
             "mask": np.arange(ROWS) < ROWS - 21}
    return z, np.float32(np.log(9.0)), batch


def retrieval(z, scale, batch):
    return losses.retrieval_loss(z[0], z[1], scale, batch)


def distillation(z, scale, batch):
    return losses.similarity_distillation((z[0], z[1], scale), (z[2], z[3], 0.5 * scale),
                                          batch["mask"], 2.0)


def alignment(z, scale, batch, offdiag_only=False):
    outputs = dict(zip(("audio", "text", "teacher_audio", "teacher_text"), z * scale))
    return ModX(offdiag_only=offdiag_only).alignment(outputs, batch["mask"])


LOSSES = {"retrieval": retrieval, "distillation": distillation, "alignment": alignment}


def run(loss, shape):
    """[value, gradients by embeddings and scale, elements of the largest array on a device]."""
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[:math.prod(shape)])

    def under_mesh(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return loss(*args)

    z, scale, batch = problem()
    here, rows = sharding.replicated(mesh), sharding.by_row(mesh)
    by_second = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, *rows.spec))
    step = jax.jit(jax.value_and_grad(under_mesh, argnums=(0, 1)),
                   in_shardings=(by_second, here, rows), out_shardings=(here, (by_second, here)))
    compiled = step.lower(z, scale, batch).compile()
    sizes = [math.prod(map(int, shape.split(","))) for shape in
             re.findall(r"(?:f32|s32|pred)\[([\d,]+)\]", compiled.as_text())]
    value, gradients = compiled(jax.device_put(z, by_second), jax.device_put(scale, here),
                                jax.device_put(batch, rows))
    return [float(value), [np.asarray(g).tolist() for g in gradients], max(sizes)]


if __name__ == "__main__":
    print(json.dumps({name: {loss: run(function, shape) for loss, function in LOSSES.items()}
                      for name, shape in MESHES.items()}))
