"""Ridge regression on all devices there are; a program of test_ridge_devices.py.

    python -m tests.analytic.ridge_devices FILE.npz

prints JSON: the collectives of the compiled programs, and what else is no array; the file gets the
weights.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from tail_jax.analytic import device, projection, random_features
from tail_jax.training import sharding
from tests.analytic.ridge_data import CLASSES, FEATURES, WIDTH, gamma_of, padded, sessions

ROWS = 40  # of a batch, over the devices
_COLLECTIVE = r"all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"


def collectives(compiled):
    """The kinds of collectives in a program."""
    return sorted(set(re.findall(_COLLECTIVE, compiled.as_text())))


def batches():
    """The stream in padded batches of `ROWS` rows, rubbish on the padding."""
    random = np.random.default_rng(2)
    for features, labels in sessions():
        for first in range(0, len(labels), ROWS - 3):
            rows = slice(first, first + ROWS - 3)
            z, y, mask = padded(features[rows], labels[rows], ROWS, random)
            z[~mask] = np.nan  # worse than any padding
            yield {"features": z.astype(np.float32), "labels": y.astype(np.int32), "mask": mask}


def main(path):
    mesh = sharding.make_mesh()
    state = device.empty(mesh, CLASSES, FEATURES)
    first = sharding.put_batch(next(batches()), mesh)
    accumulate, solve = device.accumulator(mesh), device.solver(mesh)
    programs = {"accumulate": accumulate.lower(state, *first.values()).compile(),
                "solve": solve.lower(state, 1.0).compile()}
    before = state
    for batch in batches():
        state = accumulate(state, *sharding.put_batch(batch, mesh).values())
    gamma = gamma_of(np.concatenate([z for z, _ in sessions()]), 1e-2)
    weights, used = solve(state, gamma)
    raised_weights, raised = solve(state, gamma / 1000)
    gathered = device.gather(state, mesh)
    w_p = projection(4, WIDTH, FEATURES)
    z = np.random.default_rng(3).normal(size=(ROWS, WIDTH)).astype(np.float32)
    on_device = random_features(jnp.asarray(z), w_p, jnp.arange(ROWS) < ROWS - 3)
    np.savez(path, weights=weights, raised_weights=raised_weights, features=on_device, z=z,
             **gathered)
    print(json.dumps({
        "collectives": {name: collectives(program) for name, program in programs.items()},
        "shapes": {name: array.shape for name, array in state.items()},
        "shards": {name: array.addressable_shards[0].data.shape for name, array in state.items()},
        "donated": all(array.is_deleted() for array in before.values()),
        "precision": "highest" if "HIGHEST" in accumulate.lower(state, *first.values()).as_text()
        else "default",
        "gamma": gamma, "used": float(used), "raised": float(raised),
        "replicated": weights.sharding.is_fully_replicated, "devices": jax.device_count()}))


if __name__ == "__main__":
    main(sys.argv[1])
