"""A few steps of PACE with an active boundary; a program of test_pace_devices.py.

    python -m tests.training.pace_steps '[[[2, 2], 1], [[4, 1], 2, true]]'

prints one JSON object a case: a mesh, parts of a batch, and whether features are kept.
"""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np

from tail_jax.methods.pace import PACE
from tail_jax.training import sharding
from tail_jax.training.checkpoints import flatten
from tail_jax.training.kept import Kept, Limits, keep
from tail_jax.training.optimizers import OptimizerConfig, make_optimizer
from tail_jax.training.step import cast_frozen, make_train_step
from tail_jax.training.task_data import TaskData
from tests.methods import tiny_pace as tiny

ROWS, STEPS = 8, 3


def run(shape, accumulation, keeps=False):
    """Metrics of the last step, and the tree after it."""
    method = PACE(**tiny.SETTINGS | {"reg_on_fsa": True, "tune_from": 2})
    mesh = sharding.make_mesh(*shape)
    here = sharding.replicated(mesh)
    frozen = sharding.place(cast_frozen(method.frozen(tiny.params()), "float32"), mesh)
    data = TaskData(tiny.MODEL, frozen, tiny.Reader(0), jax.random.key(5), 3, ROWS, mesh)
    state = tiny.with_classes(method.init(jax.random.key(1), tiny.MODEL, tiny.params()), 0)
    state = method.begin_stage(method.begin_task(state, 0, data), 0, 1, data)
    head = state["trainable"]["heads"]["classes"]
    head["kernel"] += np.random.default_rng(0).normal(size=head["kernel"].shape)  # as if warm
    trainable = sharding.place(state["trainable"], mesh)
    aux, mask = jax.device_put(state["aux"], here), method.update_mask(state)
    optimizer = make_optimizer(OptimizerConfig(kind="sgd", warmup=0.0), method, trainable)
    step = make_train_step(tiny.MODEL, method, optimizer, mesh, trainable, frozen, accumulation)
    opt_state = step.init_optimizer(trainable)
    batch, kept = next(data.reader.audio_batches(ROWS)), Kept({})
    if keeps:
        data.reader.split = types.SimpleNamespace(clips=[*data.labels], captions=[])
        kept = keep(method, state, 0, 1, data, Limits(10**9, 0))
        assert [*kept.arrays] == ["hidden_1", "copies_1"]
    batch = sharding.put_batch(batch | kept.rows(batch), mesh)
    for number in range(STEPS):
        trainable, opt_state, metrics = step(
            trainable, opt_state, frozen, aux, mask, batch, jax.random.key(7),
            jnp.asarray([number, STEPS], jnp.int32))
    return {"metrics": {k: float(v) for k, v in metrics.items()}, "traces": step.traces,
            "tree": {k: v.tolist() for k, v in flatten(jax.device_get(trainable)).items()}}


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        print(json.dumps(run(*case)), flush=True)
