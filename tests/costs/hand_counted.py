"""What the compiler says of programs counted by hand; a program of test_collectives.py.

    python -m tests.costs.hand_counted

prints one JSON object, for a mesh of 4 x 2 devices and, of train steps, 8 x 1.
"""

import json

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tail_jax import cli
from tail_jax.costs import programs
from tail_jax.training import sharding
from tests import tiny


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def collectives(mesh):
    """{name: measured} of one collective each, on arrays that every device has whole."""

    def looped(x):
        total, _ = jax.lax.scan(lambda c, _: (jax.lax.psum(c * 2, "data"), None), x, length=5)
        return total

    cases = {
        "psum": lambda x: jax.lax.psum(x, "data"),
        "psum of all": lambda x: jax.lax.psum(x, ("data", "model")),
        "all_gather": lambda x: jax.lax.all_gather(x, "model", tiled=True),
        "psum_scatter": lambda x: jax.lax.psum_scatter(x, "data", tiled=True),
        "all_to_all": lambda x: jax.lax.all_to_all(x, "data", 0, 1, tiled=True),
        "ppermute": lambda x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)]),
        "looped": looped}
    return {name: jax.jit(jax.shard_map(case, mesh=mesh, in_specs=P(), out_specs=P(),
                                        check_vma=False)).lower(shape(64, 32))
            for name, case in cases.items()}


def product(mesh):
    """A product of rows split over `data`, and its gradient for a matrix on every device."""

    def loss(w, x):
        return jnp.sum((x @ w) ** 2)

    here, rows = sharding.replicated(mesh), sharding.by_row(mesh)
    return {"gradient": jax.jit(jax.grad(loss), in_shardings=(here, rows), out_shardings=here)
            .lower(shape(128, 256), shape(512, 128))}


def models():
    """{name: shapes} of train steps of small models, the second of a method with wider layers."""
    found = {}
    for method in ("ptat", "sequential"):
        for hidden in (32, 96):
            config = cli.plain(tiny.get_config(f"method={method}"))
            for tower in ("audio", "text"):
                config["model"][tower]["hidden"] = hidden
            found[f"{method} {hidden}"] = programs.shapes_of(config)
    return found


def sizes(shapes):
    """(parameters, trained parameters)."""
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    return count(shapes.params), count(shapes.state["trainable"])


if __name__ == "__main__":
    both, data = sharding.make_mesh(4, 2), sharding.make_mesh(8, 1)
    steps = {name: programs.lower_step(shapes, data) for name, shapes in models().items()}
    lowered = collectives(both) | product(both) | steps
    config = cli.plain(tiny.get_config())
    batch = config["train"]["batch_size"], config["model"]["embedding"]
    print(json.dumps({"sizes": {n: sizes(s) for n, s in models().items()}, "batch": batch} | {
        name: programs.measure(program.compile()) for name, program in lowered.items()}))
