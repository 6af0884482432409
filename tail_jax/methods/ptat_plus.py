"""PTAT-plus: a small tree for every task, and for every item the one of the task it looks like.

PTAT keeps one tree for all tasks, so it must choose between learning and keeping; per-task trees
need not, if items find theirs. Specification, reasons and ablations: `ptat_plus.md` beside this.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from tail_jax.methods.pool import Pool, task_mask, with_task
from tail_jax.tuning import routers
from tail_jax.tuning.lora import DENSE, init_lora, lora_tuning
from tail_jax.tuning.pools import SIDES, query_width, unit
from tail_jax.tuning.prompts import PromptConfig, init_prompts, prompt_tuning

ROUTES = ("early", "final")


@dataclasses.dataclass(frozen=True)
class PTATPlus(Pool):
    """Prompts, LoRA and a low-rank map around the head for each task, chosen for each item.

    The tree of task m, arrays [tasks, ...] of which training touches row m alone:

        prompts   of every layer of both towers (`tuning/prompts.py`)
        lora      x W + (alpha / r) x a b on dense layers of both towers (`tuning/lora.py`)
        head      e = unit(e_0 + p a' b' + c'),  p what the tower pools, e_0 by the frozen head

    The loss is L_ret alone; nothing old changes, so nothing has to be distilled. At the start of a
    task its training data enters the routers (`tuning/routers.py`). A clip, and a caption, is
    embedded with the mean of all trees seen so far, weighted by the router's posterior for it.

    Attributes:
        learning_rate: of prompts and LoRA; `heads_learning_rate` is that of the map at the head.
        prompts: shape and coupling; all layers.
        rank, alpha, layers: of LoRA; rank 0 is without.
        head_rank: of a' b'; 0 is without the map.
        warm_start: a task begins with the tree of the task before instead of a fresh one.
        route: what the routers read, 'early' or 'final' (the towers' embeddings; for comparison).
        hard: the best tree alone instead of the mean.
        tasks: of the stream; 0 means as many as it has.
    """

    train_heads: bool = False
    train_scale: bool = False
    prompts: PromptConfig = PromptConfig(length=2, coupling="independent")
    rank: int = 4
    alpha: float = 4.0
    layers: tuple[str, ...] = ("query", "value", "up", "down")
    head_rank: int = 8
    warm_start: bool = False
    route: str = "early"
    hard: bool = False
    tasks: int = 0

    embedding_aux = ("task", "routers")
    classifies = False
    routes = True

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))  # a list where it came from a file
        for name in ("rank", "head_rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"method.{name} is {getattr(self, name)}; expected 0 or more")
        if not self.layers or set(self.layers) - set(DENSE):
            raise ValueError(f"method.layers is {self.layers}; expected some of {DENSE}")
        if self.route not in ROUTES:
            raise ValueError(f"method.route is {self.route!r}; expected one of {ROUTES}")
        if self.prompts.first_layer or self.prompts.last_layer:
            raise ValueError("method.prompts covers layers "
                             f"{self.prompts.first_layer} to {self.prompts.last_layer}; expected 0 "
                             "and 0: ptat_plus has prompts in all layers")

    # --- state -------------------------------------------------------------------------------

    def init_tuning(self, key, model):
        return jax.vmap(lambda key: self._init_task(key, model))(
            jax.random.split(key, max(self.tasks, 1)))

    def _init_task(self, key, model) -> dict:
        keys = jax.random.split(key, 4)
        tree = {"prompts": init_prompts(keys[0], self.prompts, model)}
        if self.rank:
            tree["lora"] = init_lora(keys[1], model, self.rank, self.layers)
        if self.head_rank:
            tree["head"] = {side: self._init_head(k, model, side)
                            for side, k in zip(SIDES, keys[2:])}
        return tree

    def _init_head(self, key, model, side) -> dict:
        width = query_width(getattr(model, side))
        return {"a": jax.random.normal(key, (width, self.head_rank)) * width**-0.5,
                "b": jnp.zeros((self.head_rank, model.embedding)), "c": jnp.zeros(model.embedding)}

    def init(self, key, model, params):
        state = with_task(super().init(key, model, params), 0)
        tasks, router, statistics = max(self.tasks, 1), {}, {}
        for side in SIDES:
            width = self._feature_width(side, model, params)
            router[side] = {"weight": jnp.zeros((tasks, width)), "bias": jnp.zeros(tasks)}
            if not self._counts_words(side):
                statistics[side] = routers.empty_statistics(tasks, width)
        return state | {"aux": state["aux"] | {"routers": router, "statistics": statistics}}

    def _counts_words(self, side: str) -> bool:
        return side == "text" and self.route == "early"

    def _feature_width(self, side, model, params) -> int:
        if self._counts_words(side):
            return model.text.vocab_size
        batch = model.input_shapes(1, 1)
        return jax.eval_shape(lambda p, b: self._features(side, model, p, b), params,
                              batch).shape[-1]

    def _features(self, side, model, frozen, batch):
        if self.route == "early":
            return routers.audio_features(model, frozen, batch)
        return routers.final_features(side, model, frozen, batch)

    # As `TaskData` takes them; the same functions in every task, so that they are compiled once.

    def _read_audio(self, model, trainable, frozen, aux, batch):
        return self._features("audio", model, frozen, batch)

    def _read_text(self, model, trainable, frozen, aux, batch):
        return self._features("text", model, frozen, batch)

    def begin_task(self, state, task, data):
        state = with_task(super().begin_task(state, task, data), task)
        if self.warm_start and task:
            pool = jax.tree.map(lambda x: x.at[task].set(x[task - 1]), state["trainable"]["pool"])
            state = state | {"trainable": state["trainable"] | {"pool": pool}}
        if data is None:
            return state
        router, statistics = dict(state["aux"]["routers"]), dict(state["aux"]["statistics"])
        for side, read, function in (("audio", data.map_audio, self._read_audio),
                                     ("text", data.map_text, self._read_text)):
            if self._counts_words(side):
                log_p = routers.word_log_probabilities(
                    data.reader.token_ids, data.reader.token_mask, data.model.text.vocab_size)
                weight = router[side]["weight"].at[task].set(jnp.asarray(log_p, jnp.float32))
                router[side] = router[side] | {"weight": weight}
                continue
            features = read(function, state)
            statistics[side] = routers.add_task(statistics[side], task, features)
            router[side] = routers.discriminant(statistics[side])
        return state | {"aux": state["aux"] | {"routers": router, "statistics": statistics}}

    def update_mask(self, state):
        first = state["aux"]["task"] == 0
        mask = jax.tree.map(lambda _: first, state["trainable"])
        return mask | {"pool": task_mask(state, state["trainable"]["pool"])}

    # --- optimisation ------------------------------------------------------------------------

    def learning_rates(self):
        return [(r"pool/(prompts|lora)/.*", self.learning_rate),
                (r"pool/head/.*|heads/.*", self.heads_learning_rate),
                (r"logit_scale", self.scale_learning_rate)]

    # --- the step ----------------------------------------------------------------------------

    def tasks_of(self, side, model, trainable, frozen, aux, batch):
        """Weights over tasks [B, M] of each row: the router's posterior, or one 1."""
        router = aux["routers"][side]
        if self._counts_words(side):
            scores = routers.word_scores(router, batch["token_ids"], batch["token_mask"])
        else:
            scores = routers.linear_scores(router, self._features(side, model, frozen, batch))
        return routers.posterior(scores, jnp.arange(scores.shape[-1]) <= aux["task"], self.hard)

    def choose(self, side, model, trainable, frozen, aux, batch, training):
        if training:  # no batch axis: all rows are of the current task
            own = jax.tree.map(lambda x: x[aux["task"]], trainable["pool"])
            return self._tuned(own, model, side)
        trees = jax.vmap(lambda tree: self._tuned(tree, model, side))(trainable["pool"])
        weights = self.tasks_of(side, model, trainable, frozen, aux, batch)
        return jax.tree.map(lambda x: jnp.einsum("bm,m...->b...", weights, x), trees)

    def _tuned(self, tree: dict, model, side: str) -> tuple[dict, dict | None]:
        """(tuning of the tower, map at its head) of one task's tree."""
        tuning = prompt_tuning(self.prompts, model, tree["prompts"])[side]
        if self.rank:
            tuning |= lora_tuning(tree["lora"], self.alpha / self.rank)[side]
        return tuning, tree["head"][side] if self.head_rank else None

    def encode(self, side, model, trainable, frozen, aux, batch, key=None, training=False):
        tuning, head = self.choose(side, model, trainable, frozen, aux, batch, training)
        params, _ = self.resolve(model, trainable, frozen)
        out = model.encode(side, params, {side: tuning}, batch) | {"choice": {}}
        if head is None:
            return out
        rows = "" if training else "b"  # of the map: one for all rows, or one a row
        moved = jnp.einsum(f"bi,{rows}ir,{rows}ro->bo", out["pooled"].astype(jnp.float32),
                           head["a"], head["b"])
        return out | {"embedding": unit(out["embedding"] + moved + head["c"])}
