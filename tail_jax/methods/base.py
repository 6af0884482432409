"""What a method is: hooks around the one trainer.

A method is a frozen dataclass of hyper-parameters. Its state is data, a dict with

    trainable   the tree that is optimised (and nothing else is)
    aux         arrays the loss reads but does not change: teachers, switches, statistics
    memory      kept pairs, arrays on the host, `mask` True on rows in use; only of methods that
                replay
    statistics  other arrays on the host, float64 where it matters; only of methods that keep some

The backbone stands beside them as `frozen` and is never part of the state. The trainer calls

    init -> for each task: begin_task
                           for each stage: begin_stage -> (forward, objective) x steps -> end_stage
                           end_task -> evaluation

and most methods have one stage a task.

There are two kinds of streams. In one, tasks are corpora of audio and text, and what is measured is
retrieval. In the other, tasks are sessions with classes of their own, the model is an audio tower
with a classifier, and what is measured is accuracy. There `aux["classes"]` has two arrays of bool
[C], set by the run before `begin_task`: `current`, the classes of the session, and `seen`.

`forward` treats every row of the batch alone, `objective` sees the whole batch; the split is what
lets the trainer accumulate gradients over parts of a batch and still get the loss of the whole.
`begin_task` and `end_task` may read the task's training data (`training/task_data.py`).

A method whose arrays are made for a number of tasks has a field `tasks`; at 0 the run fills in how
many its stream has.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tail_jax import losses
from tail_jax.models.dual_encoder import BUFFERS, DualEncoder

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training within a task, with an optimizer state and a schedule of its own.

    Attributes:
        name: for people.
        duration: as '10 epochs'; empty for `config.train.duration`.
    """

    name: str = ""
    duration: str = ""


@dataclasses.dataclass(frozen=True)
class Method:
    """Contrastive training of `trainable`; subclasses say what that tree is.

    Attributes:
        learning_rate: peak rate of what no other rate names.
        weight_decay: decoupled, on matrices only (not biases, norms, prompts, temperature).
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.01

    trains = True    # False: the method is evaluated as it is
    joint = False    # True: one training on the union of all tasks, an upper bound
    embedding_aux = ()   # entries of `aux` that embedding reads; they go into the tuning file
    own_encode = False   # True: `encode` does more than `resolve` can say
    routes = False       # True: `tasks_of` says which task's part of the tree an item is given
    retrieves = True     # False: not for streams of audio-text corpora
    classifies = True    # False: not for class-incremental streams
    refreshes = False    # True: `aux` changes within a stage, see `begin_epoch`
    loss_classes = "current"  # of `aux["classes"]`: those among which the loss compares
    decision = ()        # entries of `statistics` that `decide` reads; they go into the tuning file
    class_defaults = {}  # of methods for both, defaults that are others on class streams

    # --- state -------------------------------------------------------------------------------

    def init(self, key: jax.Array, model: DualEncoder, params: dict) -> State:
        """The state before the first task; may alias `params`, which the trainer copies."""
        raise NotImplementedError  # a hook without a default: every method has its own

    def frozen(self, params: dict) -> dict:
        """What the step needs of the backbone beside `trainable`: an argument of the step."""
        return params

    def resolve(self, model: DualEncoder, trainable: dict,
                frozen: dict) -> tuple[dict, dict | None]:
        """(parameters, tuning) as the encoders take them."""
        raise NotImplementedError  # a hook without a default: every method has its own

    def memory(self, model: DualEncoder, audio_shape: tuple[int, ...], max_tokens: int) -> dict:
        """`state["memory"]` before the first task, of the shapes it keeps; {} is none.

        `audio_shape` is that of a row of audio as the reader gives it: HTSAT stretches rows shorter
        than its window, so it need not be the model's own.
        """
        del model, audio_shape, max_tokens
        return {}

    def begin_task(self, state: State, task: int, data) -> State:
        """State at the start of task 0, 1, ...; shapes stay, or the step is traced again.

        `data` is the `TaskData` of the task (None for a method that is not trained).
        """
        del task, data
        return state

    def end_task(self, state: State, task: int, data) -> State:
        """State after the last step of a task; `data` as in `begin_task`."""
        del task, data
        return state

    def stages(self, task: int, sizes: Sequence[int]) -> tuple[Stage, ...]:
        """What a task is trained in; () for a task without training.

        `sizes` are the numbers of training clips of the tasks up to this one.
        """
        del task, sizes
        return (Stage(),)

    def begin_stage(self, state: State, task: int, stage: int, data) -> State:
        """State at the start of stage 0, 1, ... of a task; shapes stay."""
        del task, stage, data
        return state

    def begin_epoch(self, state: State, data) -> State:
        """State at the start of every epoch of a stage but its first, of methods that `refreshes`.

        Only `aux` may change: what is computed anew of the training data as the tree moves.
        """
        del data
        return state

    def end_stage(self, state: State, task: int, stage: int, data) -> State:
        """State after the last step of a stage."""
        del task, stage, data
        return state

    def replay_rows(self, state: State, batch_size: int) -> int:
        """How many of a batch's rows `replay` adds in this task; the reader gives the others."""
        del state, batch_size
        return 0

    def replay_shapes(self, model: DualEncoder, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Entries that `replay` adds to a batch of `rows` rows for the step, in every task."""
        del model, rows
        return {}

    def replay(self, state: State, batch: dict, rows: int, reader, random) -> dict:
        """The batch, and after its rows `rows` of the memory.

        On the host, arrays of NumPy; `reader` is that of the task, `random` a Generator of this
        step. Clips of the memory have negative ids.
        """
        del state, rows, reader, random
        return batch

    def stored(self, state: State) -> dict:
        """What a tuning file holds: the trainable tree, under `aux` what embedding reads, and under
        `statistics` what classification reads."""
        kept = {"aux": {name: state["aux"][name] for name in self.embedding_aux},
                "statistics": {name: state["statistics"][name] for name in self.decision}}
        return state["trainable"] | {name: tree for name, tree in kept.items() if tree}

    def restored(self, tree: dict) -> State:
        """The parts of a state that `stored` gave."""
        kept = {name: tree.get(name, {}) for name in ("aux", "statistics")}
        return {"trainable": {k: v for k, v in tree.items() if k not in kept}} | kept

    # --- optimisation ------------------------------------------------------------------------

    def learning_rates(self) -> list[tuple[str, float]]:
        """Rules (name of a leaf of `trainable` -> peak learning rate)."""
        return [(r".*", self.learning_rate)]

    def weight_decays(self) -> list[tuple[str, float]]:
        """Rules (name of a leaf of `trainable` -> decoupled weight decay)."""
        decayed = r".*/(kernel|embedding)"
        return [(decayed, self.weight_decay), (rf"(?!{decayed}$).*", 0.0)]

    def update_mask(self, state: State) -> Any:
        """Booleans that multiply the updates: a tree like `trainable`, of scalars or arrays."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: jnp.asarray(getattr(path[-1], "key", None) not in BUFFERS),
            state["trainable"])

    def constrain(self, before: dict, after: dict, aux: dict) -> dict:
        """The trainable tree after a step, from those before and after the optimizer's update.

        In the step, so pure: projections of an update, copies that follow with a moving average.
        """
        del before, aux
        return after

    # --- what the steps of a stage do not change ---------------------------------------------

    def kept(self, model: DualEncoder, state: State, task: int, stage: int) -> dict[str, str]:
        """{name: side} of features that no step of this stage changes; {} for none.

        Where training sees its inputs the same way each time, they are computed once for all clips
        ('audio') or captions ('text') of the task, and batches have their rows under these names
        (`training/kept.py`). A step has to do with or without each of them. The first ones are kept
        before the others, where not all have room.
        """
        del model, state, task, stage
        return {}

    def feature(self, name, model, trainable, frozen, aux, batch) -> jax.Array:
        """The feature of that name, of those that `kept` tells, each row alone: [B, ...]."""
        raise NotImplementedError  # a hook without a default: few methods keep features

    # --- the step ----------------------------------------------------------------------------

    def encode(self, side, model, trainable, frozen, aux, batch, key=None) -> dict[str, Any]:
        """What the tower `side` ('audio' or 'text') gives for a batch, each row alone."""
        return model.encode(side, *self.resolve(model, trainable, frozen), batch, key=key)

    def tasks_of(self, side, model, trainable, frozen, aux, batch) -> jax.Array:
        """Weights [B, tasks] of the tasks' parts in what embeds each row; of methods that route."""
        raise NotImplementedError  # a hook without a default: few methods route

    def embed_audio(self, model, trainable, frozen, aux, batch, key=None) -> jax.Array:
        """Unit audio embeddings [B, d] of `batch['audio']`, each row alone."""
        return self.encode("audio", model, trainable, frozen, aux, batch, key)["embedding"]

    def embed_text(self, model, trainable, frozen, aux, batch, key=None) -> jax.Array:
        """Unit text embeddings [B, d] of `batch['token_ids'], batch['token_mask']`."""
        return self.encode("text", model, trainable, frozen, aux, batch, key)["embedding"]

    def forward(self, model, trainable, frozen, aux, batch, key) -> dict[str, jax.Array]:
        """Everything `objective` needs of each row: arrays with a leading batch axis."""
        keys = (None, None) if key is None else jax.random.split(key)
        outputs = {}
        for side, key in zip(model.towers, keys):
            out = self.encode(side, model, trainable, frozen, aux, batch, key)
            outputs |= self.row_outputs(side, out)
        return outputs

    def row_outputs(self, side: str, out: dict) -> dict[str, jax.Array]:
        """What `forward` keeps of a tower's outputs: its embedding, and logits if it has any."""
        return {side: out["embedding"]} | {k: out[k] for k in ("logits",) if k in out}

    def objective(self, model, trainable, frozen, aux, outputs, batch):
        """(loss, metrics): scalars, from the outputs of the whole batch."""
        if model.classes:
            loss = losses.classification_loss(outputs["logits"], batch["label"],
                                              aux["classes"][self.loss_classes], batch["mask"])
            return loss, {"classification": loss}
        params, _ = self.resolve(model, trainable, frozen)
        loss = losses.retrieval_loss(outputs["audio"], outputs["text"], params["logit_scale"],
                                     batch)
        return loss, {"retrieval": loss}

    # --- classification ------------------------------------------------------------------------

    def pooled(self, model, trainable, frozen, aux, batch) -> jax.Array:
        """What the classifier reads of each row, [B, d] float32."""
        out = self.encode("audio", model, trainable, frozen, aux, batch)
        return out["pooled"].astype(jnp.float32)

    def scores(self, model, trainable, frozen, aux, batch) -> jax.Array:
        """What `decide` needs of each row of a batch, [B, k]: the logits."""
        return self.encode("audio", model, trainable, frozen, aux, batch)["logits"]

    def decide(self, state: State, scores: np.ndarray) -> np.ndarray:
        """A score [n, C] for every class, the larger the likelier; on the host."""
        del state
        return scores
