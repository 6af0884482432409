"""LoRA whose update is kept inside a subspace of each block's attention inputs.

PACE (Li, Zhou and Wang, ICLR 2026), which builds on LoRASub. Row vectors, kernels [in, out]; u [d]
is the attention input of a block, one row for each token of each clip:

    C = (1/n) sum over rows of u^T u                     uncentred second moments [d, d]   (paper)
    C = U diag(e) U^T,  e descending,  U_k = its first k columns
    k = least number with e_1 + ... + e_k >= rho (e_1 + ... + e_d)                         (paper)
    principal   P = U_k U_k^T            complement   P = I - U_k U_k^T       (sources disagree)
    a <- before + P (after - before)     after every step of the optimizer                 (ours)

`a` [d, r] is LoRA's first factor, the change of a kernel is a b. Once the start of a lies in the
subspace, a stays there, whatever the optimizer's momentum, preconditioning and decay do, because
what is projected is its final update; for plain gradient descent this is the projection of the
gradient (paper). Why it helps: x P = 0 makes x a b = 0, and always

    ||x a b|| <= ||x P|| ||a b||,

so outputs on old inputs move as far as these lie in the subspace, and no further.

With 'both' the second factor is projected too, b <- before + (after - before) P, and a projector
may be divided by its Frobenius norm, sqrt(k): what LoRASub's public code does. Both are off by
default in PACE here (ours).
"""

from __future__ import annotations

from typing import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tail_jax.models.ast import ASTConfig
from tail_jax.models.eat import EATConfig
from tail_jax.models.functions import LayerNorm

READINGS = ("principal", "complement")
SIDES = ("in", "both")

_PRECISE = jax.lax.Precision.HIGHEST  # TF32 and bfloat16 products would leave the subspace


def attention_inputs(model, params: dict, hidden: Sequence[jax.Array]) -> list[jax.Array]:
    """What the attention of every block of the audio tower reads: L arrays [B, S, d].

    A post-norm block (EAT) reads the output of the block before, `hidden[l]`; a pre-norm block
    (AST) reads it after its first norm.

    Args:
        model: the model's description.
        params: its parameters; only the norms of pre-norm blocks are read.
        hidden: L + 1 arrays, as the encoder returns them.

    Raises:
        ValueError: for a tower whose blocks do not all read one row a token of a full window:
            HTSAT has stages of other widths, wav2vec 2.0 has padding among its rows, Cnn14 no
            attention.
    """
    check_tower(model)
    if isinstance(model.audio, EATConfig):
        return list(hidden[:-1])
    norm = LayerNorm(model.audio.epsilon, dtype=hidden[0].dtype)
    blocks = params["audio"]["encoder"]
    return [norm.apply({"params": blocks[f"layer_{i:02d}"]["norm1"]}, h)
            for i, h in enumerate(hidden[:-1])]


def check_tower(model) -> None:
    """Raises a ValueError unless `attention_inputs` knows the model's audio tower."""
    if not isinstance(model.audio, (EATConfig, ASTConfig)):
        kind = type(model.audio).__name__.removesuffix("Config")
        raise ValueError(f"model.audio is {kind}; subspaces of attention inputs are known for the "
                         "towers 'eat' and 'ast', whose blocks have one width and no padding; "
                         "choose one of these as model.audio.kind")


def second_moments(inputs: Sequence[jax.Array], mask: jax.Array) -> dict[str, jax.Array]:
    """Sums over the tokens of one batch: {sum [L, d, d], rows []}, float32.

    Sums of several batches are added on the host in float64 (`add_moments`): a batch has some
    thousand rows, which float32 takes, a session may have millions, which it does not.

    Args:
        inputs: of `attention_inputs`.
        mask: bool [B], False on padding rows.
    """
    tokens = inputs[0].shape[1]

    def gram(x):
        x = jnp.where(mask[:, None, None], x, 0).astype(jnp.float32)
        return jnp.einsum("bsi,bsj->ij", x, x, precision=_PRECISE)

    return {"sum": jnp.stack([gram(x) for x in inputs]),
            "rows": mask.sum().astype(jnp.float32) * tokens}


def add_moments(total: dict | None, part: dict) -> dict:
    """The sums of `second_moments` over one more batch, NumPy float64; None is no batch yet."""
    part = jax.tree.map(lambda x: np.asarray(x, np.float64), part)
    return part if total is None else jax.tree.map(np.add, total, part)


def subspace(moments: np.ndarray, energy: float) -> tuple[np.ndarray, int]:
    """(eigenvectors [d, d] by descending eigenvalue, k) of symmetric moments [d, d], float64.

    k is the least number of directions with at least the share `energy` of the trace; a multiple
    of the moments has the same.

    Raises:
        ValueError: where there is no energy to share out, or a share outside (0, 1].
    """
    if not 0 < energy <= 1:
        raise ValueError(f"method.energy is {energy}; expected more than 0 and at most 1")
    moments = np.asarray(moments, np.float64)
    if not 0 < np.trace(moments) < np.inf:
        raise ValueError(f"second moments have the trace {np.trace(moments)}; expected a positive "
                         "number, of at least one clip whose tokens are not all zero")
    values, vectors = np.linalg.eigh((moments + moments.T) / 2)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]  # below 0 by rounding alone
    cumulative = np.cumsum(values) / values.sum()
    # The last bits of a sum of d terms: energy 1 must not ask for directions of no energy.
    return vectors, int(np.searchsorted(cumulative, energy - 1e-12) + 1)


def projector(moments: np.ndarray, energy: float, reading: str = "principal") -> np.ndarray:
    """P [d, d] in float64: U_k U_k^T, or I - U_k U_k^T for the reading 'complement'."""
    if reading not in READINGS:
        raise ValueError(f"method.reading is {reading!r}; expected one of {READINGS}")
    vectors, k = subspace(moments, energy)
    # The smaller product of the two, and of equal value: U is orthogonal.
    chosen = vectors[:, :k] if reading == "principal" else vectors[:, k:]
    return chosen @ chosen.T


def scale_projection(p: np.ndarray) -> np.ndarray:
    """P / ||P||_F, which is P / sqrt(rank) for a projector; zero stays zero."""
    return p / max(np.linalg.norm(p), np.finfo(np.float64).tiny)


def identity(layers: int, width: int) -> jax.Array:
    """Projectors [L, d, d] that hold nothing back: those of the first session."""
    return jnp.broadcast_to(jnp.eye(width, dtype=jnp.float32), (layers, width, width)).copy()


def project_start(a: jax.Array, p: jax.Array) -> jax.Array:
    """P a [L, d, r]: the start of the first factor, inside the subspace."""
    return jnp.matmul(p, a, precision=_PRECISE)


def project_update(before: dict, after: dict, p: jax.Array, sides: str = "in") -> dict:
    """A LoRA tree after a step whose update is confined to the subspaces.

        a = before_a + P (after_a - before_a);   'both': b = before_b + (after_b - before_b) P

    Factors that the step did not move keep their bits.

    Args:
        before, after: {dense layer: {a [L, d, r], b [L, r, d]}}, around the optimizer's update.
        p: [L, d, d].
        sides: 'in' projects a alone.
    """
    if sides not in SIDES:
        raise ValueError(f"method.project_sides is {sides!r}; expected one of {SIDES}")

    def confine(old, new):
        a = old["a"] + jnp.matmul(p, new["a"] - old["a"], precision=_PRECISE)
        if sides == "in":
            return {"a": a, "b": new["b"]}
        return {"a": a, "b": old["b"] + jnp.matmul(new["b"] - old["b"], p, precision=_PRECISE)}

    return {name: confine(before[name], after[name]) for name in after}
