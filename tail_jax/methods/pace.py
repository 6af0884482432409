"""PACE (Li, Zhou and Wang, ICLR 2026, arXiv 2602.03355): class-incremental audio classification.

A pretrained audio transformer is tuned by LoRA in its first sessions and then left alone; classes
are told apart by ridge regression on its features, which forgets nothing (`ridge_head.py`).

    session 1           A probe     LoRA in all blocks and a head, thrown away: where does tuning
                                    move the outputs? (`tuning/depth.py`)                  (paper)
    sessions 1 .. T_3   B head      a linear head over the session's own classes, 1 epoch  (paper)
                        C adapt     LoRA in blocks L_tune .. L, the head frozen            (paper)
    all sessions        D           the classifier takes the session's clips; head dropped (paper)

From session 2 on the update of LoRA is confined to the subspace of the session's inputs in the
unlearned model (`tuning/subspaces.py`), and the boundary-aware loss is added (`boundary.py`):

    kernels of session t     K_0 + delta + scale a b     for keys and values of each block
    unlearned model          K_0 - s delta, s = 1        C over the session's clips -> P   (paper)
    start of session t       a = P Uniform(+-1/sqrt d), b = 0                              (ours)
    loss                     CE over own classes (paper) + weight L_reg, from session 2 on (*)
    end of session t         delta <- delta + scale a b

The paper's hyper-parameters are the defaults where they are known to us. Repeating B, and the
blocks and epochs of session 1, in later sessions is ours. (*) Sources disagree whether session 1
has L_reg, and whether P is U U^T or I - U U^T.

Epochs of C and of the probe are `train.duration`, the optimizer is the run's; SGD with momentum
0.9 and a cosine in each stage is ours, batches of 24 the paper's. On coarse streams, whose
frozen features already separate the classes, set `multi_session=False` (the stopping rule would
give two sessions on ESC-50, yet these streams are described as tuned once: sources disagree).
Pooling is `model.audio.pool` (CLS: ours).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tail_jax.methods import boundary, ridge_head
from tail_jax.methods.base import Stage
from tail_jax.methods.session_lora import ConfinedLora
from tail_jax.models.dual_encoder import HIDDEN
from tail_jax.tuning import depth, subspaces

CKA = ("tokens", "pooled_debiased")
PROBE, HEAD, ADAPT = "probe", "head", "adapt"
COPIES = "copies_"  # begins what is kept of the masked copies, before the number of a block


@dataclasses.dataclass(frozen=True)
class PACE(ConfinedLora):
    """PACE, each part of which can be switched off.

    `aux` has `delta` and `projectors` (`session_lora.py`), `trains` (which blocks, and whether the
    head, move) and `boundary`.

    Attributes:
        learning_rate, head_learning_rate: peaks, of LoRA and of the head (0.05, 0.01: paper).
        weight_decay: coupled under SGD (ours).
        rank, scale: of LoRA (10, 1: ours, as LoRASub).
        first_session: False tunes nothing at all.
        multi_session: False tunes on session 1 alone.
        n_stop: tuning ends with the session by which more training clips were seen (220: paper).
        warm_up: duration of stage B (1 epoch: paper); empty leaves it out.
        freeze_head: C trains LoRA alone (paper); False trains the head with it.
        tune_from: number, from 1, of the first block that is tuned; 0 is chosen by the probe.
        layer_threshold: rho_layer (0.94: paper).
        cka: 'tokens', or 'pooled_debiased' on the mean token of each clip (ours).
        project: False confines nothing; how it is done is said by `ConfinedLora`, with energy
            rho_svd (0.99: paper) and unlearn_scale s (1: paper).
        boundary_weight: of L_reg (1: ours); 0 is without.
        reg_on_fsa: L_reg in session 1, too.
        copies: N_p (20: paper).
        reg_copies_per_step: copies of a clip in one step, drawn anew in each (all: paper).
        wrong_share, margin: rho_p, delta (0.3, 0.25: paper).
        mask_least, mask_most: widths of the masks, shares of the axis (ours).
        boundary_ridge: of the classifier that judges copies, relative (ours).
        boundary_capacity: most copies in the boundary set; of more, a random choice (ours).
        boundary_refresh: the set and the class means are encoded anew in each epoch (ours), or
            once a session.
        features: M of the classifier (8192: paper).
        recursion: whether it is kept by recursion (paper) or by sums; for sessions of a thousand
            clips sums are faster.
        gamma: of the ridge; 0 chooses it by leave-one-out on session 1 (ours).
        one_se: that choice takes the largest gamma within a standard error of the best (ours).
    """

    learning_rate: float = 0.05
    weight_decay: float = 5e-4
    head_learning_rate: float = 0.01
    first_session: bool = True
    multi_session: bool = True
    n_stop: int = 220
    warm_up: str = "1 epochs"
    freeze_head: bool = True
    tune_from: int = 0
    layer_threshold: float = 0.94
    cka: str = "tokens"
    project: bool = True
    boundary_weight: float = 1.0
    reg_on_fsa: bool = False
    copies: int = 20
    reg_copies_per_step: int = 20
    wrong_share: float = 0.3
    margin: float = 0.25
    mask_least: float = 0.1
    mask_most: float = 0.3
    boundary_ridge: float = 1e-2
    boundary_capacity: int = 4096
    boundary_refresh: bool = True
    features: int = 8192
    recursion: bool = True
    gamma: float = 0.0
    one_se: bool = True

    refreshes = True
    decision = ridge_head.DECISION

    def __post_init__(self):
        super().__post_init__()
        if self.cka not in CKA:
            raise ValueError(f"method.cka is {self.cka!r}; expected one of {CKA}")
        for name in ("copies", "reg_copies_per_step", "boundary_capacity", "features"):
            if getattr(self, name) < 1:
                raise ValueError(f"method.{name} is {getattr(self, name)}; expected at least 1")
        if self.reg_copies_per_step > self.copies:
            raise ValueError(f"method.reg_copies_per_step is {self.reg_copies_per_step}; expected "
                             f"at most method.copies, {self.copies}")
        if not self.mask_least <= self.mask_most <= 1:
            raise ValueError(f"method.mask_least and mask_most are {self.mask_least} and "
                             f"{self.mask_most}; expected shares in order, at most 1")
        if self.freeze_head and not self.warm_up:
            raise ValueError("method.freeze_head is True and method.warm_up is empty: the head "
                             "would stay zero and nothing would be learned; expected a duration "
                             "such as '1 epochs', or freeze_head=False")

    # --- state -------------------------------------------------------------------------------

    def init(self, key, model, params):
        state = super().init(key, model, params)
        layers = model.audio.layers
        if self.tune_from > layers:
            raise ValueError(f"method.tune_from is {self.tune_from}; expected at most {layers}, "
                             "the blocks of model.audio, or 0 for a choice by the probe")
        aux = state["aux"] | {"first_block": jnp.asarray(max(self.tune_from, 1), jnp.int32),
                              "trains": _trains(jnp.ones(layers, bool), True)}
        if self.boundary_weight:
            aux["boundary"] = self._no_boundary(model)
        statistics = ridge_head.empty(model.classes, model.embedding, self.features,
                                      self.recursion)
        return state | {"aux": aux, "statistics": statistics | {
            "clips": np.zeros((), np.int64), "similarity": np.zeros(layers)}}

    def _restarted(self, state, data):
        del state
        return self._start(data.key, data.model)  # the head goes, too

    def _no_boundary(self, model) -> dict:
        return boundary.empty_set(self.boundary_capacity, model.classes, model.embedding)

    # --- sessions and stages --------------------------------------------------------------------

    def tunes(self, task: int, seen: int) -> bool:
        """Whether task 0, 1, ... tunes the tower, `seen` training clips after those before it."""
        later = self.multi_session and depth.still_tunes(seen, self.n_stop)
        return self.first_session and (task == 0 or later)

    def stages(self, task, sizes):
        if not self.tunes(task, sum(sizes[:-1])):
            return ()
        return tuple(Stage(name, self.warm_up if name == HEAD else "")
                     for name in self._names(task))

    def _names(self, task: int) -> list[str]:
        """Names of the stages of a task that tunes."""
        return ([PROBE] * (task == 0 and not self.tune_from) + [HEAD] * bool(self.warm_up)
                + [ADAPT])

    def begin_task(self, state, task, data):
        if data is None or not self.tunes(task, int(state["statistics"]["clips"])):
            return state  # to the bit: what was computed from it stays valid
        model, aux = data.model, state["aux"]
        if task and self.project:
            scaled, start = self._projectors(state, data)
        else:
            scaled, start = subspaces.identity(*model.audio.layer_widths[0]), None
        state = state | {"trainable": self._start(data.key, model, start),
                         "aux": aux | {"projectors": scaled}}
        if self.boundary_weight:
            aux = state["aux"] | {"boundary": self._boundary(state, task, data)}
            state = state | {"aux": aux}
        return state

    def begin_stage(self, state, task, stage, data):
        aux, name = state["aux"], self._names(task)[stage]
        layers = len(aux["trains"]["blocks"])
        blocks = {PROBE: jnp.ones(layers, bool), HEAD: jnp.zeros(layers, bool),
                  ADAPT: jnp.arange(1, layers + 1) >= aux["first_block"]}[name]
        aux = aux | {"trains": _trains(blocks, name != ADAPT or not self.freeze_head)}
        if self.boundary_weight:
            active = aux["boundary"]["present"].any() & (name == ADAPT)
            aux = aux | {"boundary": aux["boundary"] | {"active": active}}
        return state | {"aux": aux}

    def begin_epoch(self, state, data):
        found = state["aux"].get("boundary")
        if found is None or not self.boundary_refresh or not bool(found["active"]):
            return state
        fresh = boundary.encoded_set(found, *self._clips_and_copies(state, found, data),
                                     data.labels)
        return state | {"aux": state["aux"] | {"boundary": fresh}}

    def end_stage(self, state, task, stage, data):
        if self._names(task)[stage] != PROBE:
            return state
        if self.cka == "tokens":
            similarity = depth.token_cka(
                data.fold_audio(self._moments_of_both, state, depth.merge_moments))
        else:
            pooled = data.map_audio(self._pooled_of_both, state)  # [clips, 2, L, d]
            similarity = depth.debiased_cka(pooled[:, 0], pooled[:, 1])
        first = depth.first_below(similarity, self.layer_threshold)
        return state | {
            "trainable": self._start(data.key, data.model),
            "aux": state["aux"] | {"first_block": jnp.asarray(first, jnp.int32)},
            "statistics": state["statistics"] | {"similarity": np.asarray(similarity)}}

    def end_task(self, state, task, data):
        statistics = state["statistics"]
        if self.tunes(task, int(statistics["clips"])):
            state = self._merged(state, data)
        z = data.map_audio(self.pooled, state)
        own = ("clips", "similarity")
        head = {name: np.asarray(x) for name, x in statistics.items() if name not in own}
        head = ridge_head.learn(head, z, data.labels, data.seed, self.gamma, one_se=self.one_se)
        clips = np.asarray(statistics["clips"] + len(z), np.int64)
        return state | {"statistics": statistics | head | {"clips": clips}}

    def first_block(self, state):
        return self.tune_from or int(state["aux"]["first_block"])

    def _merged(self, state, data):
        state = super()._merged(state, data)
        if not self.boundary_weight:
            return state
        return state | {"aux": state["aux"] | {"boundary": self._no_boundary(data.model)}}

    # --- what is read of a session's clips ------------------------------------------------------

    def _boundary(self, state, task, data) -> dict:
        """The boundary set of the session, under the model it starts with."""
        found = self._no_boundary(data.model)
        if not task and not self.reg_on_fsa:
            return found
        found["key"] = jax.random.key_data(data.key).astype(jnp.uint32)
        clean, copies = self._clips_and_copies(state, found, data)
        wrong = boundary.boundary_copies(clean, data.labels, copies, self.wrong_share,
                                         self.boundary_ridge)
        found = boundary.chosen_set(found, wrong, data.seed)
        return boundary.encoded_set(found, clean, copies, data.labels)

    def _clips_and_copies(self, state, found, data) -> tuple[np.ndarray, np.ndarray]:
        """Unit features of the session's clips [n, d] and of all their copies [n, N_p, d]."""
        state = state | {"aux": state["aux"] | {"boundary": found}}
        units = data.map_audio(self._units, state)
        return units[:, -1], units[:, :-1]

    # As `TaskData` takes them; the same functions in every task, so that they are compiled once.

    def _units(self, model, trainable, frozen, aux, batch):
        parts = jax.lax.map(self._masked(model, trainable, frozen, aux, batch),
                            jnp.arange(self.copies + 1))
        return parts["audio"].swapaxes(0, 1)

    def _both(self, model, trainable, frozen, aux, batch):
        """Outputs of all blocks, probed and pretrained."""
        probed = self.encode("audio", model, trainable, frozen, aux, batch)["hidden"]
        params = self.resolve(model, trainable, frozen)[0]
        return probed[1:], model.encode("audio", params, None, batch)["hidden"][1:]

    def _moments_of_both(self, model, trainable, frozen, aux, batch):
        return depth.token_moments(*self._both(model, trainable, frozen, aux, batch),
                                   batch["mask"])

    def _pooled_of_both(self, model, trainable, frozen, aux, batch):
        pool = lambda hidden: jnp.stack([h.astype(jnp.float32).mean(1) for h in hidden], 1)
        return jnp.stack([*map(pool, self._both(model, trainable, frozen, aux, batch))], 1)

    # --- what the steps of a stage do not change ---------------------------------------------

    def kept(self, model, state, task, stage):
        """Under a head the whole tower stands still; then the blocks below L_tune, of clips and of
        the copies that the loss may read (which it does not where no clip is boundary-prone)."""
        name = self._names(task)[stage]
        if name != ADAPT:
            return {"pooled": "audio"} if name == HEAD else {}
        below = self.first_block(state) - 1
        if not below:
            return {}
        copies = self.boundary_weight and (task or self.reg_on_fsa)
        return {f"{kind}{below}": "audio" for kind in (HIDDEN, COPIES)[:1 + bool(copies)]}

    def feature(self, name, model, trainable, frozen, aux, batch):
        if name == "pooled":
            return self.pooled(model, trainable, frozen, aux, batch)
        block = int(name.removeprefix(HIDDEN).removeprefix(COPIES))

        def entering(audio):
            rows = batch | {"audio": audio}
            return self.encode("audio", model, trainable, frozen, aux, rows)["hidden"][block]

        if name.startswith(HIDDEN):
            return entering(batch["audio"])
        copies = jax.lax.map(lambda number: entering(self._copy(frozen, aux, batch, number)),
                             jnp.arange(self.copies))
        return copies.swapaxes(0, 1)

    # --- optimisation ------------------------------------------------------------------------

    def update_mask(self, state):
        return _like(state["trainable"], state["aux"]["trains"])

    # --- the step ----------------------------------------------------------------------------

    def _copy(self, frozen, aux, batch, number):
        """That masked copy of each clip. Masks are what normalisation turns into 0."""
        key, fill = jax.random.wrap_key_data(aux["boundary"]["key"]), frozen["audio"]["input_mean"]
        return boundary.masked_copy(batch["audio"], batch["clip_id"], number, key, fill,
                                    (self.mask_least, self.mask_most))

    def _masked(self, model, trainable, frozen, aux, batch):
        """number -> outputs of that masked copy of each clip, computed again on the way back.

        Number `copies` is the clip itself. Where they are kept, copies and clip enter the tower at
        the block that is.
        """
        kept = next((name for name in batch if name.startswith(COPIES)), None)
        name = kept and HIDDEN + kept.removeprefix(COPIES)

        @jax.checkpoint
        def one(number):
            if kept:
                copy = jax.lax.dynamic_index_in_dim(batch[kept], number, 1, keepdims=False)
                rows = {name: jnp.where(number < self.copies, copy, batch[name])}
            else:
                audio = jnp.where(number < self.copies, self._copy(frozen, aux, batch, number),
                                  batch["audio"])
                rows = {"audio": audio}
            return self.row_outputs("audio", self.encode("audio", model, trainable, frozen, aux,
                                                         rows))

        return one

    def forward(self, model, trainable, frozen, aux, batch, key):
        # What is held has no gradient: none is shared out to it where the norm is clipped.
        mask = _like(trainable, aux["trains"])
        trainable = jax.tree.map(lambda x, on: jnp.where(on, x, jax.lax.stop_gradient(x)),
                                 trainable, mask)
        alone = functools.partial(super().forward, model, trainable, frozen, aux, batch, key)
        if not self.boundary_weight:
            return alone()
        count = self.reg_copies_per_step
        nothing = jnp.zeros((len(batch["mask"]), count, model.embedding))
        if "pooled" in batch:  # a head alone is trained, and the loss has no copies
            return alone() | {"copies": nothing}

        def with_copies():
            # The clip first, then its copies: towers side by side would hold memory each, and
            # their collectives have no order on several devices.
            numbers = jax.random.permutation(key, self.copies)[:count]
            numbers = jnp.concatenate([jnp.full(1, self.copies, numbers.dtype), numbers])
            parts = jax.lax.map(self._masked(model, trainable, frozen, aux, batch), numbers)
            return {name: x[0] for name, x in parts.items()} | {
                "copies": parts["audio"][1:].swapaxes(0, 1)}

        return jax.lax.cond(aux["boundary"]["active"], with_copies,
                            lambda: alone() | {"copies": nothing})

    def objective(self, model, trainable, frozen, aux, outputs, batch):
        loss, metrics = super().objective(model, trainable, frozen, aux, outputs, batch)
        if not self.boundary_weight:
            return loss, metrics
        found, mask = aux["boundary"], batch["mask"]
        others = found["present"] & (found["clip"] != batch["clip_id"][:, None])
        rows = boundary.boundary_loss(outputs["audio"], outputs["copies"],
                                      found["means"][batch["label"]], found["features"], others,
                                      self.margin, self.copies)
        term = jnp.where(mask & found["active"], rows, 0.0).sum() / jnp.maximum(mask.sum(), 1)
        return loss + self.boundary_weight * term, metrics | {"boundary": term}

    # --- classification ------------------------------------------------------------------------

    def scores(self, model, trainable, frozen, aux, batch):
        return self.pooled(model, trainable, frozen, aux, batch)

    def decide(self, state, scores):
        return ridge_head.scores(state["statistics"], scores)


def _trains(blocks: jax.Array, head: bool) -> dict:
    """Which blocks [L] a stage moves, and whether the head."""
    return {"blocks": blocks, "head": jnp.asarray(head, bool)}


def _like(trainable: dict, trains: dict) -> dict:
    """`trains` as a tree like `trainable`."""
    blocks = trains["blocks"][:, None, None]
    return {"lora": jax.tree.map(lambda _: blocks, trainable["lora"]),
            "heads": jax.tree.map(lambda _: trains["head"], trainable["heads"])}
