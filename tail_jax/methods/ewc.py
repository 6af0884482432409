"""Online elastic weight consolidation (Kirkpatrick et al., PNAS 2017; Schwarz et al., ICML 2018).

    L = L_ret + lambda/2 sum_k F_k (theta_k - theta*_k)^2
    at the end of task m:   F <- gamma F + F_m,   theta* <- theta

A dual encoder has no classifier. Its distributions are those of a batch, p(j|i) = softmax_j(S_i.)
for audio queries and the same over columns for text queries. With labels y drawn from them,

    F_m = 1/N sum over batches of ( grad sum_i log p(y_i|i) )^2,   N queries in all.

Labels are drawn independently and a score has mean zero under its own distribution, so the queries
of a batch are uncorrelated and the square of their sum is, in expectation, the sum of their
squares: one backward pass a batch is unbiased. With the observed labels it would not be.

Where there are classes, a row is one query, and p its softmax over the classes of the session.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tail_jax import losses
from tail_jax.methods.full import Sequential
from tail_jax.training.sharding import copied


@dataclasses.dataclass(frozen=True)
class EWC(Sequential):
    """Full fine-tuning held to the last optimum, by the Fisher information of all tasks before.

    `aux` has `fisher` and `optimum`, trees like `trainable`; the Fisher is zero in the first task.

    Attributes:
        penalty_weight: lambda.
        decay: gamma, of the Fisher of older tasks.
        queries: N, at the least; whole batches are used, each row of which is two queries (one,
            where there are classes).
    """

    penalty_weight: float = 1e4
    decay: float = 1.0
    queries: int = 2000

    def __post_init__(self):
        if self.queries < 1:
            raise ValueError(f"method.queries is {self.queries}; expected 1 or more")

    def init(self, key, model, params):
        return {"trainable": params,
                "aux": {"fisher": jax.tree.map(jnp.zeros_like, params), "optimum": params}}

    def end_task(self, state, task, data):
        total, count = jax.tree.map(jnp.zeros_like, state["trainable"]), 0
        each = 1 if data.model.classes else 2
        for number, batch in enumerate(data.batches(-(-self.queries // (each * data.batch_size)))):
            total = _added(self, data.model, total, state["trainable"], data.frozen, state["aux"],
                           batch, jax.random.fold_in(data.key, number))
            count += each * int(batch["mask"].sum())  # fewer in the last batch of an epoch
        fisher = jax.tree.map(lambda old, new: self.decay * old + new / count,
                              state["aux"]["fisher"], total)
        # A copy: an alias would be freed when the step donates the trainable tree.
        optimum = copied(state["trainable"])
        return state | {"aux": state["aux"] | {"fisher": fisher, "optimum": optimum}}

    def objective(self, model, trainable, frozen, aux, outputs, batch):
        loss, metrics = super().objective(model, trainable, frozen, aux, outputs, batch)
        penalty = self.penalty(trainable, aux)
        return loss + penalty, metrics | {"penalty": penalty}

    def penalty(self, trainable, aux) -> jax.Array:
        """lambda/2 sum_k F_k (theta_k - theta*_k)^2."""
        terms = jax.tree.map(lambda f, x, old: (f * (x - old) ** 2).sum(), aux["fisher"],
                             trainable, aux["optimum"])
        return self.penalty_weight / 2 * jax.tree.reduce(jnp.add, terms)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _added(method, model, total, *args):
    return jax.tree.map(jnp.add, total, squared_score(method, model, *args))


def squared_score(method, model, trainable, frozen, aux, batch, key):
    """( grad of sum over queries of log p(y|query) )^2, y drawn by `key`; like `trainable`."""
    mask = batch["mask"]

    def log_likelihood(trainable):
        out = method.forward(model, trainable, frozen, aux, batch, None)
        if model.classes:
            tables, answers = (out["logits"],), aux["classes"]["current"]
        else:
            params, _ = method.resolve(model, trainable, frozen)
            s = losses.similarity(out["audio"], out["text"], params["logit_scale"])
            tables, answers = (s, s.T), mask
        total = 0.0
        for logits, draw in zip(tables, jax.random.split(key)):
            logits = jnp.where(answers[None, :], logits, losses.NEGATIVE)
            labels = jax.random.categorical(draw, logits)
            drawn = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]
            total += jnp.where(mask, drawn, 0.0).sum()
        return total

    return jax.tree.map(jnp.square, jax.grad(log_likelihood)(trainable))
