"""InfLoRA (Liang and Li, CVPR 2024): LoRA that may read only what earlier sessions did not use.

Row vectors, kernels [in, out]; u [d] is the attention input of a block, C = sum u^T u over the
tokens of a session's clips, U [d, k] an orthonormal basis of what earlier sessions used.

    start of session t    a = first r left singular vectors of (I - U U^T) C, over sqrt(3); frozen
    training              b, from 0, and the classifier
    end of session t      delta <- delta + a b (`session_lora.py`)
                          U <- [U, V], V the first n eigenvectors of (I - U U^T) C (I - U U^T), with
                          n the least number with tr(U^T C U) + e_1 + ... + e_n >= eps_t tr C
                          eps_t = eps_0 + (eps_1 - eps_0) (t - 1) / T                      (all lit)

So u U U^T = u, true of the share eps of the energy of old inputs, gives u a b = 0. C is that of the
model at the time: before the session for a, after it for U. Past d / 2 columns an orthonormal basis
of the complement takes the place of U: the same subspace in less memory.

The energy is that of the inputs, as in the paper (the public code squares eigenvalues of C once
more). The cross-entropy is among the session's own classes, and all classes seen are compared
afterwards.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from tail_jax.methods.session_lora import LAYERS, SessionLora


@dataclasses.dataclass(frozen=True)
class InfLoRA(SessionLora):
    """InfLoRA; `trainable` has b alone of LoRA, `aux` has `lora_in` [L, d, r], the a of a session.

    The optimizer is the run's, in the literature Adam with rate 5e-4; without decay (ours).

    Attributes:
        rank: r (10: lit).
        first_energy, last_energy: eps_0, eps_1 (0.95, 1: lit).
        tasks: T; 0 is filled in by the run.
    """

    first_energy: float = 0.95
    last_energy: float = 1.0
    tasks: int = 0

    embedding_aux = ("delta", "lora_in")

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.first_energy <= self.last_energy <= 1:
            raise ValueError(f"method.first_energy and last_energy are {self.first_energy} and "
                             f"{self.last_energy}; expected shares in order, more than 0 and at "
                             "most 1")

    def init(self, key, model, params):
        state = super().init(key, model, params)
        (layers, width), = model.audio.layer_widths
        empty = empty_basis(width)
        return state | {
            "aux": state["aux"] | {"lora_in": jnp.zeros((layers, width, self.rank))},
            "statistics": {name: np.stack([x] * layers) for name, x in empty.items()}}

    def _start(self, key, model):
        start = super()._start(key, model)
        second = {name: {"b": pair["b"]} for name, pair in start["lora"]["audio"].items()}
        return start | {"lora": {"audio": second}}

    def factors(self, trainable, aux):
        return {name: {"a": aux["lora_in"]} | trainable["lora"]["audio"][name] for name in LAYERS}

    def begin_task(self, state, task, data):
        moments, bases = self.input_moments(state, data), _bases(state["statistics"])
        a = np.stack([new_directions(*pair, self.rank) for pair in zip(bases, moments)])
        return state | {"aux": state["aux"] | {
            "lora_in": jnp.asarray(a / np.sqrt(3), jnp.float32)}}

    def end_task(self, state, task, data):
        state = super().end_task(state, task, data)
        energy = self.first_energy + (self.last_energy - self.first_energy) * (
            task / max(self.tasks, 1))
        moments, bases = self.input_moments(state, data), _bases(state["statistics"])
        grown = [grow(*pair, energy) for pair in zip(bases, moments)]
        return state | {"statistics": {name: np.stack([basis[name] for basis in grown])
                                       for name in grown[0]}}


def _bases(statistics: dict) -> list[dict]:
    """The basis of every block."""
    arrays = {name: np.asarray(x) for name, x in statistics.items()}
    return [{name: x[block] for name, x in arrays.items()}
            for block in range(len(arrays["columns"]))]


def empty_basis(width: int) -> dict[str, np.ndarray]:
    """{vectors [d, d // 2], columns: k, complement: whether these span what is *not* used}."""
    return {"vectors": np.zeros((width, width // 2)), "columns": np.zeros((), np.int64),
            "complement": np.zeros((), bool)}


def used(basis: dict) -> np.ndarray:
    """U U^T [d, d] of a basis."""
    v = _columns(basis)
    return np.eye(len(v)) - v @ v.T if basis["complement"] else v @ v.T


def _columns(basis: dict) -> np.ndarray:
    return basis["vectors"][:, :int(basis["columns"])]


def _unused(basis: dict, x: np.ndarray) -> np.ndarray:
    """(I - U U^T) x."""
    v = _columns(basis)
    return v @ (v.T @ x) if basis["complement"] else x - v @ (v.T @ x)


def new_directions(basis: dict, moments: np.ndarray, rank: int) -> np.ndarray:
    """First left singular vectors [d, r] of (I - U U^T) C; zeros where it has no more."""
    vectors, values, _ = np.linalg.svd(_unused(basis, moments))
    real = values[:rank] > len(moments) * np.finfo(np.float64).eps * np.linalg.norm(moments)
    # Once more: rounding of C, where nearly all of it is used, would be read as directions.
    found = _unused(basis, vectors[:, :rank]) * real
    return np.pad(found, ((0, 0), (0, rank - found.shape[1])))


def grow(basis: dict, moments: np.ndarray, energy: float) -> dict[str, np.ndarray]:
    """The basis with the directions that the share `energy` of tr C needs besides."""
    v, width, total = _columns(basis), len(moments), np.trace(moments)
    if not 0 < total < np.inf:
        raise ValueError(f"second moments have the trace {total}; expected a positive number, of "
                         "at least one clip whose tokens are not all zero")
    # Coordinates of the unused space, where there is a basis of it: smaller, and nothing is lost.
    inner = v.T @ moments @ v if basis["complement"] else _unused(
        basis, _unused(basis, moments).T)
    values, vectors = np.linalg.eigh((inner + inner.T) / 2)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    share = 1 - (values.sum() - np.r_[0, np.cumsum(values)]) / total  # with 0, 1, ... of them
    unused = v.shape[1] if basis["complement"] else width - v.shape[1]
    count = min(int(np.argmax(share >= energy - 1e-12)), unused)
    if not count:
        return basis
    if basis["complement"]:
        return _stored(v @ vectors[:, count:], width, True)
    grown = np.linalg.qr(np.hstack([v, vectors[:, :count]]), mode="complete")[0]
    k = v.shape[1] + count
    if k <= width // 2:
        return _stored(grown[:, :k], width, False)
    return _stored(grown[:, k:], width, True)


def _stored(vectors: np.ndarray, width: int, complement: bool) -> dict[str, np.ndarray]:
    room = np.zeros((width, width // 2))
    room[:, :vectors.shape[1]] = vectors
    return {"vectors": room, "columns": np.asarray(vectors.shape[1], np.int64),
            "complement": np.asarray(complement)}
