"""What devices send each other in a compiled train step; a program of test_collectives.py.

    python -m tests.training.collectives ptat 32 128

prints one JSON object for each hidden width of the towers' blocks.
"""

import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from tail_jax.training import sharding
from tail_jax.tuning.masks import count
from tests.training import stepping

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2}


def collectives(text):
    """{kind: [bytes of what each one gives, ...]} of a compiled program, sorted."""
    found, text = {}, re.sub(r"/\*.*?\*/", "", text)  # long tuples number their entries
    for shapes, kind in re.findall(rf"= ([^=]*?) ({KINDS})(?:-start)?\(", text):
        size = sum(BYTES[dtype] * math.prod(int(n) for n in axes.split(",") if n)
                   for dtype, axes in re.findall(r"(\w+)\[([\d,]*)\]", shapes))
        found[kind] = sorted([*found.get(kind, []), size])
    return found


def run(method, hidden):
    """Collectives of the step on eight devices, and sizes of what is trained and what is not."""
    model, method, mesh, step, state, opt_state, frozen = stepping.setup(
        method, [8, 1], hidden=hidden)
    batch = sharding.put_batch(stepping.make_batch(model), mesh)
    compiled = step.function.lower(
        state["trainable"], opt_state, frozen, state["aux"], method.update_mask(state), batch,
        jax.random.key(0), jnp.asarray([0, 1], jnp.int32)).compile()
    return {"collectives": collectives(compiled.as_text()), "frozen": count(frozen),
            "trainable": count(state["trainable"]),
            "embeddings": int(np.prod([stepping.ROWS, model.embedding]))}


if __name__ == "__main__":
    for width in sys.argv[2:]:
        print(json.dumps(run(sys.argv[1], int(width))), flush=True)
