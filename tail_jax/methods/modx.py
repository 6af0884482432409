"""Mod-X style alignment (Ni et al., ICML 2023): who is how far from whom stays, where it was right.

With M = softmax over j of <a_i, t_j>, cosines without a scale, and ' for the teacher's, the model
of the task before,

    L = L_ret + alpha/2 sum_i KL( M~_i || M_i ),   in both directions,
    M~_i = M'_i if the teacher ranks pair i first among the batch, else M_i itself (no loss).

The sum is over the batch, not its mean. Rows are audio in one direction and text in the other;
equal scores count as first. A reconstruction: the paper keeps what is off the diagonal,
`offdiag_only` takes the diagonal out of the softmax altogether.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from tail_jax import losses
from tail_jax.methods.distillation import Taught
from tail_jax.methods.full import Sequential


@dataclasses.dataclass(frozen=True)
class ModX(Taught, Sequential):
    """Full fine-tuning that keeps the teacher's distribution of similarities.

    Attributes:
        alignment_weight: alpha.
        offdiag_only: leave each pair itself out of both distributions.
    """

    alignment_weight: float = 20.0
    offdiag_only: bool = False

    classifies = False

    def objective(self, model, trainable, frozen, aux, outputs, batch):
        loss, metrics = super().objective(model, trainable, frozen, aux, outputs, batch)
        new = losses.similarity(outputs["audio"], outputs["text"], jnp.zeros(()))
        old = losses.similarity(outputs["teacher_audio"], outputs["teacher_text"], jnp.zeros(()))
        align = sum(self._kept(x, y, batch["mask"]) for x, y in ((new, old), (new.T, old.T))) / 2
        loss += aux["distil"] * self.alignment_weight * align
        return loss, metrics | {"alignment": align}

    def _kept(self, new, old, mask):
        """sum_i KL(M'_i || M_i) over the real rows whose pair the teacher ranks first."""
        first = jnp.diagonal(old) >= jnp.where(mask[None, :], old, losses.NEGATIVE).max(1)
        among = mask[None, :] & ~(self.offdiag_only & jnp.eye(len(mask), dtype=bool))
        log_p, log_q = (jax.nn.log_softmax(jnp.where(among, s, losses.NEGATIVE), axis=1)
                        for s in (old, new))
        used = among & (mask & first)[:, None]
        return jnp.where(used, jnp.exp(log_p) * (log_p - log_q), 0.0).sum()
