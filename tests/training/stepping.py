"""A few train steps on a made-up batch; a program of test_devices.py.

    python -m tests.training.stepping '[{"method": "ptat", "mesh": [8, 1], "accumulation": 1}, ...]'

prints one JSON object a case.
"""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np

from tail_jax import cli, methods, settings
from tail_jax.training import sharding
from tail_jax.training.checkpoints import flatten
from tail_jax.training.embedder import Embedder
from tail_jax.training.optimizers import OptimizerConfig, make_optimizer
from tail_jax.training.step import cast_frozen, make_train_step
from tests import tiny

ROWS = 32


def make_batch(model, rows=ROWS):
    """Random inputs; two clips and two captions occur twice, the last five rows are padding."""
    random = np.random.default_rng(0)
    mask = np.arange(rows) < rows - 5
    batch = {
        "audio": random.normal(-40, 20, (rows, model.audio.frames, model.audio.mels)),
        "token_ids": random.integers(5, model.text.vocab_size, (rows, 12)),
        "token_mask": np.arange(12) < random.integers(3, 13, (rows, 1)),
        "clip_id": np.r_[0, 1, 0, 1, 4:rows], "caption_key": np.r_[0, 1, 2, 3, 2, 3, 6:rows],
        "mask": mask}
    types = {"audio": np.float32, "token_mask": bool, "mask": bool}
    return {k: (v * mask.reshape(-1, *[1] * (v.ndim - 1))).astype(types.get(k, np.int32))
            for k, v in batch.items()}


def setup(method, mesh, accumulation=1, prompts=2, dtype="float32", hidden=32, layers=2,
          remat="none"):
    """(model, method, mesh, step, state, opt_state, frozen) on that mesh, of the first devices."""
    config = cli.plain(tiny.get_config(f"method={method}"))
    config["model"]["dtype"] = dtype
    for side in ("audio", "text"):
        config["model"][side] |= {"hidden": hidden, "layers": layers}
    model, method = settings.described_model(config), methods.build(config["method"])
    mesh = sharding.make_mesh(*mesh, devices=jax.devices()[:math.prod(mesh)])
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    state = method.init(jax.random.key(1), model, params)
    here = sharding.replicated(mesh)
    state = {"trainable": sharding.place(state["trainable"], mesh),
             "aux": sharding.put_tree(state["aux"], jax.tree.map(lambda _: here, state["aux"]))}
    if "teacher" in state["aux"]:
        state["aux"]["distil"] = jax.device_put(jnp.ones(()), here)
    frozen = sharding.place(cast_frozen(method.frozen(params), model.dtype), mesh)
    # Epsilon 1 makes Adam's first updates smooth in the gradient: rounding stays rounding.
    optimizer = make_optimizer(OptimizerConfig(epsilon=1.0), method, state["trainable"])
    step = make_train_step(model, method, optimizer, mesh, state["trainable"], frozen, accumulation,
                           remat)
    return model, method, mesh, step, state, step.init_optimizer(state["trainable"]), frozen


def run(method, mesh, accumulation=1, steps=3):
    """Losses, parameters and embeddings of a few steps, and how wide layers and moments lie."""
    model, method, mesh, step, state, opt_state, frozen = setup(method, mesh, accumulation)
    batch = make_batch(model)
    device_batch = sharding.put_batch(batch, mesh)
    trainable, losses = state["trainable"], []
    mask = method.update_mask(state)
    for number in range(steps):
        trainable, opt_state, metrics = step(
            trainable, opt_state, frozen, state["aux"], mask, device_batch, jax.random.key(2),
            jnp.asarray([number, steps], jnp.int32))
        losses.append(float(metrics["loss"]))
    embedder = Embedder(model, method, mesh, ROWS)
    parts = [embedder._run(f, trainable, frozen, state["aux"], batch, (*keys, "mask"))[0]
             for f, keys in ((embedder._audio, ["audio"]),
                             (embedder._text, ["token_ids", "token_mask"]))]
    params = frozen or trainable
    local = lambda x: list(x.addressable_shards[0].data.shape)
    layer = params["text"]["encoder"]["layer_00"]
    return {"losses": losses, "traces": step.traces,
            "parameters": {k: v.tolist() for k, v in flatten(jax.device_get(trainable)).items()},
            "embeddings": [x[batch["mask"]].tolist() for x in parts],
            "up": [list(layer["up"]["kernel"].shape), local(layer["up"]["kernel"])],
            "down": local(layer["down"]["kernel"]), "query": local(layer["query"]["kernel"]),
            "moments": [local(x) for x in jax.tree.leaves(opt_state)]}


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        print(json.dumps(run(**case)), flush=True)
