"""The train step: one program for all tasks, each set of kept features, each length of text."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from tail_jax.models.dual_encoder import BUFFERS
from tail_jax.training.optimizers import Optimizer
from tail_jax.training.sharding import by_row, parameter_shardings, replicated
from tail_jax.tuning.masks import leaf_name


REMAT = ("none", "blocks")


@dataclasses.dataclass
class TrainStep:
    """`step(trainable, opt_state, frozen, aux, mask, batch, key, position)`.

    Donates `trainable` and `opt_state`; the backbone is an argument, never a constant of the
    program and never returned. `position` is int32 [2]: step in the task, steps of the task.

    Attributes:
        function: the jitted step.
        init_optimizer: trainable -> fresh opt_state, placed as the step returns it (an array that
            lies elsewhere would have the step traced and compiled again).
        traces: how often it was traced; more than once a run for each set of entries that batches
            have (`training/kept.py`), and each length of their text, is a bug.
    """

    function: Any = None
    init_optimizer: Any = None
    traces: int = 0

    def __call__(self, *args):
        return self.function(*args)


def cast_frozen(frozen, dtype: str):
    """The towers of a frozen tree in `dtype`, the type they compute in; statistics stay float32."""

    def cast(path, leaf):
        name = leaf_name(path)
        tower = name.startswith(("audio/", "text/")) and name.rsplit("/", 1)[-1] not in BUFFERS
        return leaf.astype(dtype, copy=False) if tower else leaf

    return jax.tree_util.tree_map_with_path(cast, frozen)


def make_train_step(model, method, optimizer: Optimizer, mesh: Mesh, trainable, frozen,
                    accumulation: int = 1, remat: str = "none") -> TrainStep:
    """Builds the jitted step for these trees (arrays or shapes).

    With `accumulation` > 1 the rows pass the towers in that many parts, and again in the backward
    pass; the loss still sees the whole batch, so gradients equal those of one part.
    With `remat` 'blocks' the backward pass finds the inputs of the towers' blocks in memory, and
    computes what is inside them again.
    """
    result, options = TrainStep(), None
    if remat == "blocks":
        model = dataclasses.replace(model, remat=True)
        if mesh.devices.flat[0].platform == "cpu":
            # By this pass XLA drops, on CPUs, the barriers that have a block wait for the gradient
            # of its output; all blocks would be computed again before the first is gone through.
            options = {"xla_disable_hlo_passes": "cse_barrier_expander"}

    def forward(trainable, frozen, aux, batch, key):
        run = functools.partial(method.forward, model, trainable, frozen, aux)
        if accumulation == 1:
            return run(batch, key)
        # [B, ...] -> [parts, B / parts, ...], rows of a part strided so that each device keeps its
        # own; recomputed part by part in the backward pass.
        split = lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1)
        join = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
        part = jax.checkpoint(lambda args: run(args[0], args[1]))
        keys = jax.random.split(key, accumulation)
        return jax.tree.map(join, jax.lax.map(part, (jax.tree.map(split, batch), keys)))

    def step(trainable, opt_state, frozen, aux, mask, batch, key, position):
        result.traces += 1
        key = jax.random.fold_in(key, position[0])

        def loss(trainable):
            outputs = forward(trainable, frozen, aux, batch, key)
            # Losses that compare rows with each other ask for the mesh that they lie on.
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return method.objective(model, trainable, frozen, aux, outputs, batch)

        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(trainable)
        updated, opt_state, norm = optimizer.update(
            gradients, opt_state, trainable, mask, position[0], position[1])
        trainable = method.constrain(trainable, updated, aux)
        # The norm after the update, so that finite metrics mean a state that can be kept.
        return trainable, opt_state, metrics | {
            "loss": value, "gradient_norm": norm, "parameter_norm": optax.global_norm(trainable)}

    here, rows = replicated(mesh), by_row(mesh)
    small = parameter_shardings(trainable, mesh)
    moments = optax.tree_utils.tree_map_params(
        optimizer.init, lambda _, where: where, jax.eval_shape(optimizer.init, trainable), small,
        transform_non_params=lambda _: here)
    result.init_optimizer = jax.jit(optimizer.init, out_shardings=moments)
    result.function = jax.jit(
        step, donate_argnums=(0, 1), compiler_options=options,
        in_shardings=(small, moments, parameter_shardings(frozen, mesh), None, here, rows, here,
                      here),
        out_shardings=(small, moments, here))
    return result
