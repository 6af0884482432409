"""Losses on batches of paired embeddings (pure functions, float32, global batch).

Notation: audio embeddings a [B, d] and text embeddings t [B, d] of unit length, row i of both from
one (clip, caption) pair; `mask` [B] is False on padding rows, which neither give nor receive loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

FEATURE_FORMS = ("kl", "cosine", "mse")
NEGATIVE = -1e9  # instead of -inf: a fully masked row then has a finite log-softmax


def positives(clip_id: jax.Array, caption_key: jax.Array, mask: jax.Array) -> jax.Array:
    """G [B, B]: 1 where i and j share the clip or the normalised caption, both rows real."""
    same = clip_id[:, None] == clip_id[None, :]
    same |= caption_key[:, None] == caption_key[None, :]
    return (same & mask[:, None] & mask[None, :]).astype(jnp.float32)


def similarity(a: jax.Array, t: jax.Array, logit_scale: jax.Array) -> jax.Array:
    """S = min(e^logit_scale, 100) a t^T, [B, B] in float32."""
    scale = jnp.minimum(jnp.exp(logit_scale), 100.0)
    return scale * jnp.matmul(a.astype(jnp.float32), t.astype(jnp.float32).T,
                              precision=jax.lax.Precision.HIGHEST)


def _log_softmax_both(s: jax.Array, mask: jax.Array):
    """Row-wise log-softmax of S and of S^T over real columns."""
    return (jax.nn.log_softmax(jnp.where(mask[None, :], s, NEGATIVE), axis=1),
            jax.nn.log_softmax(jnp.where(mask[None, :], s.T, NEGATIVE), axis=1))


def retrieval_loss(s: jax.Array, g: jax.Array, mask: jax.Array) -> jax.Array:
    """Symmetric contrastive loss with several positives a row.

        L = -1/(2B) sum_ij [ Q_ij log softmax_j(S_i.) + Q'_ij log softmax_i(S_.j) ]

    Q is G with rows of sum 1, Q' with columns of sum 1; B counts real rows. With one positive a
    row this is the InfoNCE loss of CLIP.
    """
    rows, columns = _log_softmax_both(s, mask)
    q = g / jnp.maximum(g.sum(1, keepdims=True), 1.0)  # G is symmetric: Q'^T = Q
    return -(q * (rows + columns)).sum() / (2 * jnp.maximum(mask.sum(), 1))


def similarity_distillation(s: jax.Array, s_teacher: jax.Array, mask: jax.Array,
                            temperature: float) -> jax.Array:
    """KL between the teacher's and the student's match distributions, both directions.

        L = T^2/(2B) [ sum_i KL(softmax(S'_i. / T) || softmax(S_i. / T)) + the same over columns ]
    """
    student = _log_softmax_both(s / temperature, mask)
    teacher = _log_softmax_both(s_teacher / temperature, mask)
    total = sum(_masked_kl(p, q, mask) for p, q in zip(teacher, student))
    return temperature**2 * total / (2 * jnp.maximum(mask.sum(), 1))


def classification_loss(logits: jax.Array, label: jax.Array, classes: jax.Array,
                        mask: jax.Array) -> jax.Array:
    """Cross-entropy among some of the classes: the logits of all others count as -inf.

        L = -1/B sum_i log softmax(logits_i over the classes that are on)[label_i]

    Args:
        logits: [B, C].
        label: int [B], classes that are on.
        classes: bool [C], which are on.
    """
    log_p = jax.nn.log_softmax(jnp.where(classes, logits, NEGATIVE))
    rows = -jnp.take_along_axis(log_p, label[:, None], 1)[:, 0]
    return jnp.where(mask, rows, 0.0).sum() / jnp.maximum(mask.sum(), 1)


def _masked_kl(log_p, log_q, mask):
    """sum over real rows and columns of p (log p - log q)."""
    both = mask[:, None] & mask[None, :]
    return jnp.where(both, jnp.exp(log_p) * (log_p - log_q), 0.0).sum()


def feature_distillation(student: jax.Array, teacher: jax.Array, mask: jax.Array,
                         temperature: float, form: str = "kl") -> jax.Array:
    """Distance of one modality's embeddings [B, d] to the teacher's, mean over real rows.

        kl:      T^2 KL( softmax(sqrt(d) z'/T) || softmax(sqrt(d) z/T) ), softmax over features
        cosine:  1 - <z', z>
        mse:     ||z' - z||^2

    The sqrt(d) matters: on unit vectors the softmax is nearly flat and the KL has no force.
    """
    if form == "cosine":
        rows = 1.0 - (student * teacher).sum(-1)
    elif form == "mse":
        rows = ((student - teacher) ** 2).sum(-1)
    elif form == "kl":
        scale = student.shape[-1] ** 0.5 / temperature
        log_p, log_q = (jax.nn.log_softmax(z * scale, axis=-1) for z in (teacher, student))
        rows = temperature**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    else:
        raise ValueError(f"feature distillation form is {form!r}; "
                         f"expected one of {[*FEATURE_FORMS]}")
    return jnp.where(mask, rows, 0.0).sum() / jnp.maximum(mask.sum(), 1)
