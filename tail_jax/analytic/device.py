"""Ridge regression on accelerators: float32, a part of the sums on each device of the data axis.

    gram [devices, M, M], sums [devices, C, M], counts [devices, C]   all P("data")

A batch adds to the part of the device that its rows are on, so no batch waits for another device;
the parts are summed once a session, by `solve`. float32 bears no ill-conditioned G: gamma is raised
to gamma_rel = gamma M / tr G of at least 1e-2, where the error of W is about 1e-3 (at 1e-3 it is
8e-3, at 1e-5 the factorisation fails). `gather` gives the sums to the host, for float64.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from tail_jax.analytic import moments

LEAST_RELATIVE_GAMMA = 1e-2


def empty(mesh: Mesh, classes: int, width: int) -> dict[str, jax.Array]:
    """Sums over no clips, on the devices."""
    parts = mesh.shape["data"]
    shapes = {"gram": (parts, width, width), "sums": (parts, classes, width),
              "counts": (parts, classes)}
    make = jax.jit(lambda: {k: jnp.zeros(shape) for k, shape in shapes.items()},
                   out_shardings=NamedSharding(mesh, P("data")))
    return make()


@functools.lru_cache(maxsize=4)
def accumulator(mesh: Mesh):
    """accumulate(state, features [B, M], labels [B], mask [B]) -> state, compiled; donates `state`.

    Rows lie over the data axis (`sharding.put_batch`); those where the mask is False add nothing,
    whatever is in them. Labels are 0 to C - 1: no program on a device can refuse others.
    """
    def part(state, features, labels, mask):  # one device's share; its sums are [1, ...]
        z = jnp.where(mask[:, None], features.astype(jnp.float32), 0)
        y = jax.nn.one_hot(jnp.where(mask, labels, -1), state["counts"].shape[-1])
        product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        return {"gram": state["gram"] + product(z.T, z), "sums": state["sums"] + product(y.T, z),
                "counts": state["counts"] + y.sum(0)}

    split = jax.shard_map(part, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    return jax.jit(split, donate_argnums=0, out_shardings=NamedSharding(mesh, P("data")))


@functools.lru_cache(maxsize=4)
def solver(mesh: Mesh):
    """solve(state, gamma) -> (W [M, C], the gamma that was used), compiled, on every device.

    W = (G + gamma I)^-1 Q by Cholesky in float32, gamma raised to `LEAST_RELATIVE_GAMMA` of the
    mean diagonal of G where it is less: compare it with what was asked, and log it.
    """
    def solve(state, gamma):
        gram, sums = state["gram"].sum(0), state["sums"].sum(0)
        used = jnp.maximum(gamma, LEAST_RELATIVE_GAMMA * jnp.trace(gram) / len(gram))
        with jax.default_matmul_precision("highest"):
            factor = jax.scipy.linalg.cho_factor(gram + used * jnp.eye(len(gram)), lower=True)
            return jax.scipy.linalg.cho_solve(factor, sums.T), used

    return jax.jit(solve, out_shardings=NamedSharding(mesh, P()))


def gather(state: dict[str, jax.Array], mesh: Mesh) -> moments.State:
    """The sums as `moments.accumulate` keeps them, on the host (for `ridge.solve_ridge`)."""
    total = jax.jit(lambda tree: jax.tree.map(lambda x: x.sum(0), tree),
                    out_shardings=NamedSharding(mesh, P()))(state)
    return {name: np.asarray(value, np.float64) for name, value in total.items()}
