"""What the methods share that choose prompts for each clip and each caption from its own query."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tail_jax.methods.base import Stage
from tail_jax.methods.tuned import Tuned
from tail_jax.tuning import pools

SHOWN = 64  # largest pool whose entries' shares are among the metrics


@dataclasses.dataclass(frozen=True)
class Pool(Tuned):
    """Trains {pool: {audio, text}, heads, logit_scale}; each tower has a pool of its own (a model
    with classes: {pool: {audio}, heads}).

    A method that has to know the number of tasks seen keeps `task`, the number of the current one,
    in `aux`: an array, so that the step is the same program in all tasks.

    Attributes:
        epochs: of each task; 0 is as long as `config.train.duration` says.
    """

    epochs: int = 0

    group = "pool"
    own_encode = True
    queries = False  # True: training reads the query of each row

    def stages(self, task, sizes):
        return (Stage(duration=f"{self.epochs} epochs" if self.epochs else ""),)

    def kept(self, model, state, task, stage):
        return {pools.query_name(side): side for side in model.towers} if self.queries else {}

    def feature(self, name, model, trainable, frozen, aux, batch):
        side = next(side for side in model.towers if pools.query_name(side) == name)
        return pools.query(side, model, frozen, batch)

    def choose(self, side: str, model, trainable, frozen, aux, batch,
               training: bool) -> tuple[dict, dict[str, jax.Array]]:
        """(tuning of the tower `side` for each row, arrays [B, ...] that `objective` needs)."""
        raise NotImplementedError  # a hook without a default: every method has its own

    def encode(self, side, model, trainable, frozen, aux, batch, key=None, training=False):
        tuning, facts = self.choose(side, model, trainable, frozen, aux, batch, training)
        params, _ = self.resolve(model, trainable, frozen)
        return model.encode(side, params, {side: tuning}, batch) | {"choice": facts}

    def forward(self, model, trainable, frozen, aux, batch, key):
        outputs = {}
        for side in model.towers:
            out = self.encode(side, model, trainable, frozen, aux, batch, training=True)
            outputs |= self.row_outputs(side, out)
            outputs |= {f"{side}_{name}": value for name, value in out["choice"].items()}
        return outputs


@dataclasses.dataclass(frozen=True)
class KeyedPool(Pool):
    """A pool whose keys are drawn to the queries that chose them:

        L = L_task - lambda sum over both modalities of mean_x sum_{m in I(x)} cos(q(x), k_m)

    Facts of a row are `pull`, that sum over I(x), and `chosen` [m], entries that embedding takes.
    Metrics: the pull, and the share of rows that chose each entry, of pools that are not large.

    Attributes:
        pull_weight: lambda.
    """

    pull_weight: float = 1.0

    queries = True

    def objective(self, model, trainable, frozen, aux, outputs, batch):
        loss, metrics = super().objective(model, trainable, frozen, aux, outputs, batch)
        mean = lambda x: jnp.where(batch["mask"], x, 0).sum() / jnp.maximum(batch["mask"].sum(), 1)
        for side in model.towers:
            pull = metrics[f"{side}_pull"] = mean(outputs[f"{side}_pull"])
            loss -= self.pull_weight * pull
            entries = trainable["pool"][side]["keys"].shape[0]
            for entry in range(entries if entries <= SHOWN else 0):
                chose = (outputs[f"{side}_chosen"] == entry).any(1)
                metrics[f"{side}_share_{entry}"] = mean(chose)
        return loss, metrics


def with_task(state: dict, task: int) -> dict:
    """The state with `task` in `aux`."""
    return state | {"aux": state["aux"] | {"task": jnp.asarray(task, jnp.int32)}}


def task_mask(state: dict, tree: Any, rows_per_task: int = 1) -> Any:
    """Booleans [N, 1, ...] for the leaves [N, ...] of `tree`: the rows of the current task."""
    def mask(leaf):
        rows = jnp.arange(leaf.shape[0]) // rows_per_task == state["aux"]["task"]
        return rows.reshape(-1, *[1] * (leaf.ndim - 1))
    return jax.tree.map(mask, tree)
