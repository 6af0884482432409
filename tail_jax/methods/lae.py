"""LAE (Gao et al., A Unified Continual Learning Framework with General Parameter-Efficient Tuning,
ICCV 2023) on class streams."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from tail_jax import losses
from tail_jax.methods.base import Stage
from tail_jax.methods.lora import Lora
from tail_jax.training.sharding import copied


@dataclasses.dataclass(frozen=True)
class LAE(Lora):
    """An online adapter that learns each session, and an offline one that follows it slowly.

        loss             CE of theta_on among the session's own classes                    (lit)
        after each step  theta_off <- alpha theta_off + (1 - alpha) theta_on               (lit)
        classification   elementwise max(softmax(theta_on), softmax(theta_off))            (lit)

    with one head for both, and both softmaxes among the classes seen. In later sessions theta_on
    stands still in the first 3 of 5 epochs, while the head meets its classes (lit); it is a stage
    of its own, so the schedule starts again after it (ours).

    The adapter is LoRA, of PACE's rank, scale and layers (ours). In the first session alpha is 0,
    so that theta_off starts from what was learned there (ours): at 0.9999 a step it would still be
    at its random start when a session of some hundred steps ends.

    Attributes:
        decay: alpha, 0.9999 (lit).
        frozen_epochs: epochs of a later session without the adapter, 3 (lit); 0 is without.
        adapt_epochs: epochs with it, 2 (lit); the first session has all 5 with it.
        rank, alpha, layers: of LoRA.
    """

    heads_learning_rate: float = 1e-3
    rank: int = 10
    alpha: float = 10.0
    layers: tuple[str, ...] = ("key", "value")
    decay: float = 0.9999
    frozen_epochs: int = 3
    adapt_epochs: int = 2

    embedding_aux = ("known",)
    retrieves = False

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.decay <= 1:
            raise ValueError(f"method.decay is {self.decay}; expected 0 to 1")
        if self.adapt_epochs < 1:
            raise ValueError(f"method.adapt_epochs is {self.adapt_epochs}; expected at least 1")

    # --- state -------------------------------------------------------------------------------

    def init(self, key, model, params):
        state = super().init(key, model, params)
        online = state["trainable"]["lora"]
        lora = {"online": online, "offline": copied(online)}
        # Classes seen, as classification reads them; whether theta_on moves; 1 - alpha.
        aux = {"known": jnp.zeros(model.classes, bool), "adapts": jnp.ones((), bool),
               "follow": jnp.ones(())}
        return {"trainable": state["trainable"] | {"lora": lora}, "aux": state["aux"] | aux}

    def stages(self, task, sizes):
        if task and self.frozen_epochs:
            return (Stage("head", f"{self.frozen_epochs} epochs"),
                    Stage("adapter", f"{self.adapt_epochs} epochs"))
        return (Stage(duration=f"{self.frozen_epochs + self.adapt_epochs} epochs"),)

    def begin_task(self, state, task, data):
        state = super().begin_task(state, task, data)
        follow = jnp.asarray(1 - self.decay if task else 1.0, jnp.float32)
        known = jnp.array(state["aux"]["classes"]["seen"])
        return state | {"aux": state["aux"] | {"known": known, "follow": follow}}

    def begin_stage(self, state, task, stage, data):
        state = super().begin_stage(state, task, stage, data)
        last = stage + 1 == len(self.stages(task, ()))
        return state | {"aux": state["aux"] | {"adapts": jnp.asarray(last)}}

    # --- the step ----------------------------------------------------------------------------

    def update_mask(self, state):
        mask = super().update_mask(state)
        moves = {"online": state["aux"]["adapts"], "offline": jnp.zeros((), bool)}
        return mask | {"lora": {name: jax.tree.map(lambda m: m & moves[name], tree)
                                for name, tree in mask["lora"].items()}}

    def constrain(self, before, after, aux):
        after = super().constrain(before, after, aux)
        rate = aux["follow"]
        # In this form the two stay equal where they are, and at rate 1 they become so to the bit.
        follow = lambda off, on: jnp.where(rate < 1, off + rate * (on - off), on)
        lora = after["lora"] | {"offline": jax.tree.map(
            follow, before["lora"]["offline"], after["lora"]["online"])}
        return after | {"lora": lora}

    def tuning(self, model, tree):
        return super().tuning(model, tree["online"])

    def scores(self, model, trainable, frozen, aux, batch):
        """max of both softmaxes among the classes known, [B, C]; 0 for all others."""
        def softmax(name):
            chosen = trainable | {"lora": {"online": trainable["lora"][name]}}
            logits = self.encode("audio", model, chosen, frozen, aux, batch)["logits"]
            return jax.nn.softmax(jnp.where(aux["known"], logits, losses.NEGATIVE))

        return jnp.maximum(softmax("online"), softmax("offline"))
