"""S-Prompts (Wang et al., S-Prompts Learning with Pre-trained Transformers, NeurIPS 2022)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from tail_jax.methods.pool import Pool, task_mask, with_task
from tail_jax.tuning import pools
from tail_jax.tuning.pools import SIDES
from tail_jax.tuning.prompts import PromptConfig, init_prompts, prompt_tuning


@dataclasses.dataclass(frozen=True)
class SPrompts(Pool):
    """Prompts of their own for each task, learned from scratch; the nearest centroid picks one.

    Each task has the prompts of PTAT, audio and text coupled, in arrays [tasks, ...]; training
    touches those of the current task alone. At the start of a task, K-means of the queries of its
    training clips, and of those of its captions, gives K centroids each. A clip or caption is
    embedded with the prompts of the task that the nearest centroid belongs to (Euclidean, audio and
    text each for itself, tasks not begun left out).

    Heads and temperature are shared and frozen, or where asked for trained in the first task and
    frozen then (for backbones whose heads are new).

    Attributes:
        prompts: of each task.
        centroids: K.
        tasks: of the stream; 0 means as many as it has.
    """

    train_heads: bool = False
    train_scale: bool = False
    prompts: PromptConfig = PromptConfig()
    centroids: int = 5
    tasks: int = 0

    group = "prompts"
    embedding_aux = ("task", "centroids")
    classifies = False
    routes = True

    def __post_init__(self):
        if self.centroids < 1:
            raise ValueError(f"method.centroids is {self.centroids}; expected at least 1")

    def init_tuning(self, key, model):
        keys = jax.random.split(key, max(self.tasks, 1))
        return jax.vmap(lambda key: init_prompts(key, self.prompts, model))(keys)

    def init(self, key, model, params):
        state = with_task(super().init(key, model, params), 0)
        centres = {side: jnp.zeros((max(self.tasks, 1), self.centroids,
                                    pools.query_width(getattr(model, side)))) for side in SIDES}
        return state | {"aux": state["aux"] | {"centroids": centres}}

    # As `TaskData` takes them; the same functions in every task, so that they are compiled once.

    def _read_audio(self, model, trainable, frozen, aux, batch):
        return pools.query("audio", model, frozen, batch)

    def _read_text(self, model, trainable, frozen, aux, batch):
        return pools.query("text", model, frozen, batch)

    def begin_task(self, state, task, data):
        state = with_task(super().begin_task(state, task, data), task)
        if data is None:
            return state
        centres = dict(state["aux"]["centroids"])
        for side, read, function in (("audio", data.map_audio, self._read_audio),
                                     ("text", data.map_text, self._read_text)):
            features = read(function, state)
            own = pools.centroids(features, self.centroids, data.seed)
            centres[side] = centres[side].at[task].set(own)
        return state | {"aux": state["aux"] | {"centroids": centres}}

    def update_mask(self, state):
        first = state["aux"]["task"] == 0
        mask = jax.tree.map(lambda _: first, state["trainable"])
        return mask | {"prompts": task_mask(state, state["trainable"]["prompts"])}

    def choose(self, side, model, trainable, frozen, aux, batch, training):
        tasks = trainable["prompts"]
        if training:  # no batch axis: all rows are of the current task
            own = jax.tree.map(lambda x: x[aux["task"]], tasks)
            return prompt_tuning(self.prompts, model, own)[side], {}
        chosen = self._nearest(side, model, frozen, aux, batch)
        tuning = jax.vmap(lambda p: prompt_tuning(self.prompts, model, p))(tasks)[side]
        # Masks are the same for all tasks; prompts are [tasks, ...].
        return {name: jax.tree.map(lambda x: x[0] if name == "prompts_mask" else x[chosen], leaf)
                for name, leaf in tuning.items()}, {}

    def _nearest(self, side, model, frozen, aux, batch):
        """Tasks [B] whose centroid is nearest to the row's query."""
        return pools.nearest_task(pools.query(side, model, frozen, batch), aux["centroids"][side],
                                  aux["task"] + 1)

    def tasks_of(self, side, model, trainable, frozen, aux, batch):
        return jax.nn.one_hot(self._nearest(side, model, frozen, aux, batch), max(self.tasks, 1))
