"""Losses on batches of paired embeddings (pure functions, float32, global batch).

Notation: audio embeddings a [B, d] and text embeddings t [B, d] of unit length, row i of both from
one (clip, caption) pair; `mask` [B] is False on padding rows, which neither give nor receive loss.
What compares every row with every other does so in blocks, see `pairwise.py`: no device holds a
whole [B, B] where rows lie on several.
"""

from __future__ import annotations

from typing import Mapping

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from tail_jax.pairwise import by_blocks

Pairs = tuple[jax.Array, jax.Array, jax.Array]  # a [B, d], t [B, d], logit_scale []
DIRECTIONS = (("audio", "text"), ("text", "audio"))
FEATURE_FORMS = ("kl", "cosine", "mse")
NEGATIVE = -1e9  # instead of -inf: a fully masked row then has a finite log-softmax


def positives(own: Mapping, others: Mapping) -> jax.Array:
    """G [b, c]: 1 where rows share the clip or the normalised caption and both are real.

    Both have clip_id and caption_key, int32, and mask: `own` [b] and `others` [c].
    """
    same = own["clip_id"][:, None] == others["clip_id"][None, :]
    same |= own["caption_key"][:, None] == others["caption_key"][None, :]
    return (same & own["mask"][:, None] & others["mask"][None, :]).astype(jnp.float32)


def similarity(a: jax.Array, t: jax.Array, logit_scale: jax.Array) -> jax.Array:
    """S = min(e^logit_scale, 100) a t^T, [b, c] in float32, of a [b, d] and t [c, d]."""
    scale = jnp.minimum(jnp.exp(logit_scale), 100.0)
    return scale * jnp.matmul(a.astype(jnp.float32), t.astype(jnp.float32).T,
                              precision=jax.lax.Precision.HIGHEST)


def retrieval_loss(a: jax.Array, t: jax.Array, logit_scale: jax.Array, batch: Mapping) -> jax.Array:
    """Symmetric contrastive loss with several positives a row, of S = `similarity`.

        L = -1/(2B) sum_ij [ Q_ij log softmax_j(S_i.) + Q'_ij log softmax_i(S_.j) ]

    Q is G with rows of sum 1, Q' with columns of sum 1; B counts real rows. With one positive a
    row this is the InfoNCE loss of CLIP. As rows of Q have sum 1 and G is symmetric, a row's share
    is log sum_j e^S_ij - sum_j Q_ij S_ij, and the same of S^T: sums that blocks of S add to.

    Args:
        a, t: [B, d].
        batch: with clip_id, caption_key and mask, [B].
    """
    mask = batch["mask"]
    rows = {"audio": a, "text": t, "mask": mask} | {
        name: batch[name] for name in ("clip_id", "caption_key")}

    def block(own, others, logit_scale):
        g, parts = positives(own, others), {}
        for x, y in DIRECTIONS:
            s = similarity(own[x], others[y], logit_scale)
            shown = jnp.where(others["mask"][None, :], s, NEGATIVE)
            parts[x] = logsumexp(shown, axis=1), (g * s).sum(1)
        return parts | {"positives": g.sum(1)}

    parts = by_blocks(block, rows, logit_scale)
    count = jnp.maximum(parts["positives"].sum(0), 1.0)
    total = sum(logsumexp(norms, axis=0) - sums.sum(0) / count
                for norms, sums in (parts[x] for x, _ in DIRECTIONS))
    return jnp.where(mask, total, 0.0).sum() / (2 * jnp.maximum(mask.sum(), 1))


def similarity_distillation(student: Pairs, teacher: Pairs, mask: jax.Array,
                            temperature: float) -> jax.Array:
    """KL between the teacher's and the student's match distributions, both directions.

        L = T^2/(2B) [ sum_i KL(softmax(S'_i. / T) || softmax(S_i. / T)) + the same over columns ]

    Args:
        student, teacher: (a, t, logit_scale) of S and of S'.
        mask: bool [B].
    """

    def block(own, others, scales):
        parts = {}
        for x, y in DIRECTIONS:
            s, old = (similarity(own[who + x], others[who + y], scales[who]) / temperature
                      for who in ("", "teacher_"))
            parts[x] = kl_parts(old, s, others["mask"][None, :])
        return parts

    rows = {"audio": student[0], "text": student[1], "teacher_audio": teacher[0],
            "teacher_text": teacher[1], "mask": mask}
    parts = by_blocks(block, rows, {"": student[2], "teacher_": teacher[2]})
    total = sum(kl_of_parts(parts[x]) for x, _ in DIRECTIONS)
    return temperature**2 * jnp.where(mask, total, 0.0).sum() / (2 * jnp.maximum(mask.sum(), 1))


def kl_parts(old: jax.Array, new: jax.Array, on: jax.Array) -> dict[str, jax.Array]:
    """What a block of columns adds to KL(softmax(old) || softmax(new)) of each row.

    Args:
        old, new: scores [b, c].
        on: bool, broadcastable to [b, c]; the other columns take no part.

    Returns:
        {old, new: log sum e^score; gap: mean of old - new under softmax(old) of the block}, [b].
    """
    old, new = (jnp.where(on, s, NEGATIVE) for s in (old, new))
    return {"old": logsumexp(old, axis=1), "new": logsumexp(new, axis=1),
            "gap": (jax.nn.softmax(old, axis=1) * (old - new)).sum(1)}


def kl_of_parts(parts: Mapping[str, jax.Array]) -> jax.Array:
    """The KL [B] of rows from `kl_parts` of all blocks, [blocks, B].

        KL = sum_k p_k gap_k - log sum_k e^old_k + log sum_k e^new_k,   p = softmax(old)
    """
    share = jax.nn.softmax(parts["old"], axis=0)
    return ((share * parts["gap"]).sum(0) - logsumexp(parts["old"], axis=0)
            + logsumexp(parts["new"], axis=0))


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
