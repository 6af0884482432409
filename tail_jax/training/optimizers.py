"""Durations, the learning-rate schedule, AdamW and SGD with rates, decay and freezing by leaf."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Callable

import jax
import jax.numpy as jnp
import optax

from tail_jax.tuning.masks import apply_rules


def parse_duration(text: str, examples: int, batch_size: int) -> int:
    """Number of steps in a duration such as '10 epochs', '2000 steps' or '1e5 examples'.

    An epoch is every (clip, caption) pair once, the last batch padded.

    Raises:
        ValueError: unless it is one positive number and one of the three units.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?)\s+(step|epoch|example)s?\s*", text)
    if not match or float(match[1]) <= 0:
        raise ValueError(f"train.duration is {text!r}; expected a number and one of steps, epochs "
                         "or examples, for example '10 epochs'")
    number, unit = float(match[1]), match[2]
    per_epoch = -(-examples // batch_size)
    steps = {"step": number, "epoch": number * per_epoch, "example": number / batch_size}[unit]
    return max(1, round(steps))


def schedule(step, total, warmup: float):
    """Factor in (0, 1]: linear over the first `warmup` share of `total` steps, then half a cosine.

    A function of arrays, so that tasks of different length share one compiled step.
    """
    done = (step + 1.0) / jnp.maximum(total, 1)
    rise = done / max(warmup, 1e-9)
    fall = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((done - warmup) / (1 - warmup), 0, 1)))
    return jnp.where(done < warmup, rise, jnp.maximum(fall, 1e-3))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or SGD.

    Attributes:
        kind: 'adamw', whose weight decay is decoupled, or 'sgd', with momentum after the decay:
            v <- momentum v + (gradient + decay p),  p <- p - rate v.
        b1, b2, epsilon: of Adam.
        momentum: of SGD.
        clip: largest global gradient norm, frozen leaves included; 0 clips nothing.
        warmup: share of a task's steps.
    """

    kind: str = "adamw"
    b1: float = 0.9
    b2: float = 0.98
    epsilon: float = 1e-8
    momentum: float = 0.9
    clip: float = 1.0
    warmup: float = 0.1

    def __post_init__(self):
        if self.kind not in ("adamw", "sgd"):
            raise ValueError(f"optimizer.kind is {self.kind!r}; expected 'adamw' or 'sgd'")
        for name, least, below in (("b1", 0, 1), ("b2", 0, 1), ("warmup", 0, 1), ("momentum", 0, 1),
                                   ("epsilon", 0, float("inf")), ("clip", 0, float("inf"))):
            if not least <= getattr(self, name) < below:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; expected at least "
                                 f"{least} and less than {below}")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """`init(trainable)` and `update(...)`, both pure."""

    init: Callable[[Any], Any]
    update: Callable[..., Any]


def make_optimizer(config: OptimizerConfig, method, trainable) -> Optimizer:
    """An optimizer whose rates and decays follow the method's rules over leaves of `trainable`.

    update(gradients, state, trainable, mask, step, total) -> (trainable, state, gradient norm).
    The mask multiplies updates, not gradients: momentum and decay would move what has none.
    """
    rates = apply_rules(trainable, method.learning_rates(), "learning rates")
    decays = apply_rules(trainable, method.weight_decays(), "weight decays")
    decayed = optax.stateless(lambda updates, params: jax.tree.map(
        lambda u, p, decay: u + decay * p, updates, params, decays))
    rule = {"adamw": (optax.scale_by_adam(config.b1, config.b2, config.epsilon), decayed),
            "sgd": (decayed, optax.trace(config.momentum))}[config.kind]
    clip = (optax.clip_by_global_norm(config.clip),) if config.clip else ()
    transform = optax.chain(*clip, *rule)

    def update(gradients, state, trainable, mask, step, total):
        updates, new_state = transform.update(gradients, state, trainable)
        factor = schedule(step, total, config.warmup)
        new = jax.tree.map(lambda p, u, rate, m: p - (factor * rate * m) * u,
                           trainable, updates, rates, mask)
        return new, new_state, optax.global_norm(gradients)

    return Optimizer(transform.init, update)
