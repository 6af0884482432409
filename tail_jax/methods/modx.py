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

import jax.numpy as jnp

from tail_jax import losses
from tail_jax.methods.distillation import Taught
from tail_jax.methods.full import Sequential
from tail_jax.pairwise import by_blocks


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
        align = self.alignment(outputs, batch["mask"])
        loss += aux["distil"] * self.alignment_weight * align
        return loss, metrics | {"alignment": align}

    def alignment(self, outputs, mask):
        """1/2 sum_i KL( M~_i || M_i ), in both directions; of what `forward` gives."""
        rows = {"mask": mask, "number": jnp.arange(len(mask))} | {
            name: outputs[name] for name in ("audio", "text", "teacher_audio", "teacher_text")}
        parts = by_blocks(self._block, rows, jnp.zeros(()))
        return sum(self._kept(parts[x], mask) for x, _ in losses.DIRECTIONS) / 2

    def _block(self, own, others, logit_scale):
        """What `_kept` needs of a block of pairs, in both directions."""
        parts, real = {}, others["mask"][None, :]
        itself = own["number"][:, None] == others["number"][None, :]
        for x, y in losses.DIRECTIONS:
            new, old = (losses.similarity(own[who + x], others[who + y], logit_scale)
                        for who in ("", "teacher_"))
            best = lambda among, old=old: jnp.where(among, old, losses.NEGATIVE).max(1)
            parts[x] = losses.kl_parts(old, new, real & ~(self.offdiag_only & itself)) | {
                "pair": best(itself), "best": best(real)}
        return parts

    def _kept(self, parts, mask):
        """sum_i KL(M'_i || M_i) over the real rows whose pair the teacher ranks first."""
        first = parts["pair"].max(0) >= parts["best"].max(0)
        return jnp.where(mask & first, losses.kl_of_parts(parts), 0.0).sum()
