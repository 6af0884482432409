"""What methods have in common that learn a LoRA in each session and keep its product for good.

    kernels of session t     K_0 + delta + s a b          of keys and values, in every block
    end of session t         delta <- delta + s a b, and the next session starts with b = 0

No shape changes, so one program serves all sessions: `delta` is an argument of the step. Of these
methods some confine the updates of a and b to the subspace of the session's inputs in a model that
has unlearned what came before (`tuning/subspaces.py`):

    unlearned model          K_0 - u delta, u = 1         C over the session's clips -> P   (lit)
    start of session t       a = P Uniform(+-1/sqrt d), b = 0                              (ours)
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tail_jax.methods.base import Method
from tail_jax.tuning import subspaces
from tail_jax.tuning.lora import init_lora, lora_tuning

LAYERS = ("key", "value")  # what is tuned in a block (lit), and the order in `delta`

_PRECISE = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class SessionLora(Method):
    """A LoRA a session beside a classifier; subclasses say how it starts and what it may learn.

    `trainable` is {lora: {audio: {key, value: {a [L, d, r], b [L, r, d]}}}, heads: {classes}}, and
    `aux` has `delta` [L, 2, d, d].

    Attributes:
        learning_rate, head_learning_rate: peaks, of LoRA and of the classifier.
        weight_decay: of all but biases; where the classifier is kept, more than 0 would shrink the
            columns of old classes.
        rank, scale: r and s of LoRA.
    """

    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    head_learning_rate: float = 5e-4
    rank: int = 10
    scale: float = 1.0

    own_encode = True
    retrieves = False
    embedding_aux = ("delta",)

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"method.rank is {self.rank}; expected at least 1")

    # --- state -------------------------------------------------------------------------------

    def init(self, key, model, params):
        del params
        subspaces.check_tower(model)
        if not model.classes:
            raise ValueError(f"method {type(self).__name__} classifies and the model has no "
                             "classes; expected a class-incremental stream (stream.kind=classes)")
        (layers, width), = model.audio.layer_widths
        return {"trainable": self._start(key, model),
                "aux": {"delta": jnp.zeros((layers, len(LAYERS), width, width))}}

    def _start(self, key, model) -> dict:
        """Fresh factors, and a classifier of zeros."""
        return {"lora": init_lora(key, model, self.rank, LAYERS), "heads": {"classes": {
            "kernel": jnp.zeros((model.embedding, model.classes)),
            "bias": jnp.zeros(model.classes)}}}

    def _restarted(self, state, data) -> dict:
        """`trainable` with fresh factors; the classifier stays."""
        return state["trainable"] | {"lora": self._start(data.key, data.model)["lora"]}

    def frozen(self, params):
        return {name: tree for name, tree in params.items() if name != "heads"}

    def resolve(self, model, trainable, frozen):
        return frozen | {"heads": trainable["heads"]}, None  # the rest is added in `encode`

    def factors(self, trainable, aux) -> dict:
        """{key, value: {a, b}}."""
        del aux
        return trainable["lora"]["audio"]

    def _merged(self, state, data) -> dict:
        """The state with what was learned in `delta`, and factors that add nothing to it."""
        lora = self.factors(state["trainable"], state["aux"])
        change = jnp.stack([jnp.matmul(lora[name]["a"], lora[name]["b"], precision=_PRECISE)
                            for name in LAYERS], 1)
        aux = state["aux"] | {"delta": state["aux"]["delta"] + self.scale * change}
        return state | {"trainable": self._restarted(state, data), "aux": aux}

    def end_task(self, state, task, data):
        return self._merged(state, data)

    # --- optimisation ------------------------------------------------------------------------

    def learning_rates(self):
        return [(r"lora/.*", self.learning_rate), (r"heads/.*", self.head_learning_rate)]

    def weight_decays(self):
        return [(r".*/bias", 0.0), (r"(?!.*/bias$).*", self.weight_decay)]

    # --- the step ----------------------------------------------------------------------------

    def encode(self, side, model, trainable, frozen, aux, batch, key=None):
        del key  # a frozen tower runs without dropout
        params, _ = self.resolve(model, trainable, frozen)
        tuning = lora_tuning({"audio": self.factors(trainable, aux)}, self.scale)
        return model.encode(side, params | {"audio": _moved(params["audio"], aux["delta"])},
                            tuning, batch)

    # --- as `TaskData` takes them; the same in every task, so that they are compiled once --------

    def _input_moments(self, model, trainable, frozen, aux, batch):
        hidden = self.encode("audio", model, trainable, frozen, aux, batch)["hidden"]
        return subspaces.second_moments(subspaces.attention_inputs(model, frozen, hidden),
                                        batch["mask"])

    def input_moments(self, state, data) -> np.ndarray:
        """Sums of u^T u [L, d, d] over the inputs u of every block's attention, float64."""
        return data.fold_audio(self._input_moments, state, subspaces.add_moments)["sum"]


@dataclasses.dataclass(frozen=True)
class ConfinedLora(SessionLora):
    """`SessionLora` whose updates stay in the subspace of the session's inputs from session 2 on.

    `aux` has `projectors` [L, d, d] besides.

    Attributes:
        project_init: whether a also starts in the subspace (ours); without it ab leaves the
            subspace through its start.
        project_sides: 'in' (of a), or 'both' as LoRASub's code.
        scale_projection: P / ||P||_F in updates, as LoRASub's code; the start stays P's.
        reading: 'principal' or 'complement' (sources disagree; `tuning/subspaces.py`).
        energy: rho_svd, the share of the inputs' energy in the subspace.
        unlearn_scale: u; 0 takes P from the pretrained model.
    """

    project_init: bool = True
    project_sides: str = "in"
    scale_projection: bool = False
    reading: str = "principal"
    energy: float = 0.99
    unlearn_scale: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        choices = {"project_sides": subspaces.SIDES, "reading": subspaces.READINGS}
        for name, expected in choices.items():
            if getattr(self, name) not in expected:
                raise ValueError(f"method.{name} is {getattr(self, name)!r}; expected one of "
                                 f"{expected}")
        if not 0 < self.energy <= 1:
            raise ValueError(f"method.energy is {self.energy}; expected more than 0 and at most 1")

    def init(self, key, model, params):
        state = super().init(key, model, params)
        free = subspaces.identity(*model.audio.layer_widths[0])
        return state | {"aux": state["aux"] | {"projectors": free}}

    def _start(self, key, model, projectors=None):
        """Fresh factors, in the subspaces of these projectors, and a classifier of zeros."""
        start = super()._start(key, model)
        if projectors is not None and self.project_init:
            start["lora"] = {"audio": {
                name: pair | {"a": subspaces.project_start(pair["a"], projectors)}
                for name, pair in start["lora"]["audio"].items()}}
        return start

    def first_block(self, state) -> int:
        """Number, from 1, of the first block that learns."""
        del state
        return 1

    def _projectors(self, state, data) -> tuple[jax.Array, jax.Array]:
        """(P of the updates, P of the start), [L, d, d]; the identity for blocks held."""
        unlearned = state | {"aux": state["aux"] | {
            "delta": -self.unlearn_scale * state["aux"]["delta"]}}
        moments = self.input_moments(unlearned, data)
        exact = np.array(subspaces.identity(*data.model.audio.layer_widths[0]), np.float64)
        updates = exact.copy()
        for block in range(self.first_block(state) - 1, len(exact)):
            exact[block] = subspaces.projector(moments[block], self.energy, self.reading)
            updates[block] = (subspaces.scale_projection(exact[block]) if self.scale_projection
                              else exact[block])
        return jnp.asarray(updates, jnp.float32), jnp.asarray(exact, jnp.float32)

    def constrain(self, before, after, aux):
        lora = subspaces.project_update(before["lora"]["audio"], after["lora"]["audio"],
                                        aux["projectors"], self.project_sides)
        return after | {"lora": {"audio": lora}}


def _moved(tower: dict, delta: jax.Array) -> dict:
    """A tower's parameters with delta [L, 2, d, d] on the kernels of keys and values, float32."""
    blocks = dict(tower["encoder"])
    for i in range(len(delta)):
        name = f"layer_{i:02d}"
        blocks[name] = blocks[name] | {
            layer: blocks[name][layer] | {
                "kernel": blocks[name][layer]["kernel"].astype(jnp.float32) + delta[i, j]}
            for j, layer in enumerate(LAYERS)}
    return tower | {"encoder": blocks}
