"""Self-supervised pretraining of an EAT encoder (Chen et al. 2024).

"EAT: Self-Supervised Pre-Training with Efficient Audio Transformer": the student sees a fifth of a
clip's patches, an average of its own past sees all of them, and the one predicts the other.

    Y, y   = the teacher's targets of every patch and of the whole clip, `masked_patches.targets`
    L_f    = mean over masked patches of ||decoder(student(visible patches)) - Y||^2 / d
    L_u    = ||CLS of the student - y||^2 / d
    L      = L_f + lambda L_u, the mean over clips and over several masks of each clip
    teacher <- tau teacher + (1 - tau) student   after every step

(EAT): inverse block masks, four fifths masked, several masks of a clip under one pass of the
teacher; targets that average the teacher's blocks, and for CLS the patches; both losses with
lambda = 1; the decoder of convolutions; tau that rises linearly. (ours): how targets are
normalised, one learned token at masked places, a mean over features in the losses, no dropout, and
every number that is not named here. Captions and labels are not used.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from tail_jax.methods.base import Method
from tail_jax.models import masked_patches
from tail_jax.models.eat import EATConfig, encode_patches


@dataclasses.dataclass(frozen=True)
class EAT(Method):
    """Masked prediction of a teacher's patches; trains {audio, decoder, teacher, updates}.

    `teacher` is like `audio` and follows it, `updates` counts the steps; neither has a gradient.
    What the run is for is `audio`: the backbone that it writes holds nothing else.

    Attributes:
        mask_ratio: share of the patches that are masked.
        block: side of the blocks that stay visible, in patches.
        clones: masks of each clip in a step.
        decoder_layers, decoder_width: convolutions of the decoder and their channels.
        utterance_weight: lambda.
        decay, last_decay: tau at the first step, and after `decay_steps` steps.
        decay_steps: over which tau rises, linearly; 0: it is `last_decay` throughout.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    mask_ratio: float = 0.8
    block: int = 3
    clones: int = 4
    decoder_layers: int = 3
    decoder_width: int = 48
    utterance_weight: float = 1.0
    decay: float = 0.99
    last_decay: float = 0.999
    decay_steps: int = 1000

    retrieves = False  # it reads no captions
    classifies = False  # and no labels

    def __post_init__(self):
        for name in ("block", "clones", "decoder_layers", "decoder_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"method.{name} is {getattr(self, name)}; expected 1 or more")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"method.mask_ratio is {self.mask_ratio}; expected a share between 0 "
                             "and 1")
        for name in ("decay", "last_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"method.{name} is {getattr(self, name)}; expected 0 to 1")

    def visible(self, grid: tuple[int, int]) -> int:
        """How many patches of a grid the student sees: one at least, and not all.

        Raises:
            ValueError: on a grid of one patch, where nothing can be both seen and masked.
        """
        patches = math.prod(grid)
        if patches < 2:
            raise ValueError(f"model.audio has a grid of {grid} patches; masking needs 2 or more, "
                             "a smaller patch gives them")
        return min(max(round((1 - self.mask_ratio) * patches), 1), patches - 1)

    # --- state -------------------------------------------------------------------------------

    def init(self, key, model, params):
        if not isinstance(model.audio, EATConfig) or model.text is not None:
            found = [f"{side} {type(tower).__name__.removesuffix('Config')}"
                     for side, tower in model.towers.items()]
            raise ValueError(f"method eat pretrains an EAT tower alone; model has {found}; take "
                             "model=mini-eat, or set model.audio.kind=eat and model.text=None")
        shown = self.visible(model.audio.grid)
        decoder = self._decoder(model).init(
            key, jnp.zeros((1, shown, model.audio.width)), jnp.arange(shown)[None])["params"]
        return {"trainable": {"audio": params["audio"], "decoder": decoder,
                              "teacher": params["audio"], "updates": jnp.zeros(())}, "aux": {}}

    def frozen(self, params):
        return {}

    def resolve(self, model, trainable, frozen):
        return {"audio": trainable["audio"]}, None

    def stored(self, state):
        return {"audio": state["trainable"]["audio"]}  # embedding reads nothing else

    # --- optimisation ------------------------------------------------------------------------

    def update_mask(self, state):
        mask = super().update_mask(state)
        still = jnp.asarray(False)
        return mask | {"teacher": jax.tree.map(lambda _: still, mask["teacher"]),
                       "updates": still}

    def teacher_decay(self, updates: jax.Array) -> jax.Array:
        """tau of the step after `updates` others."""
        share = jnp.minimum(updates / self.decay_steps, 1.0) if self.decay_steps else 1.0
        return self.decay + (self.last_decay - self.decay) * share

    def constrain(self, before, after, aux):
        new = 1 - self.teacher_decay(before["updates"])
        # As a difference: equal values, such as the input's statistics, keep their bits.
        teacher = jax.tree.map(lambda old, own: old + new * (own - old), before["teacher"],
                               after["audio"])
        return after | {"teacher": teacher, "updates": before["updates"] + 1}

    # --- the step ----------------------------------------------------------------------------

    def forward(self, model, trainable, frozen, aux, batch, key):
        """Errors of each row, its targets, and the prediction under the first of its masks.

        {frame [B], utterance [B], target [B, P, d], clip_target [B, d], prediction [B, P, d]}.
        """
        audio, grid, n = batch["audio"], model.audio.grid, self.clones
        rows, patches = audio.shape[0], math.prod(grid)
        encode = lambda params, *inputs: encode_patches(model.audio, params, *inputs,
                                                        dtype=jnp.dtype(model.dtype),
                                                        remat=model.remat)
        # [B, P, d] and [B, d]; one pass for all masks of a clip.
        target, clip_target = masked_patches.targets(
            encode(jax.lax.stop_gradient(trainable["teacher"]), audio)["hidden"])
        visible = masked_patches.visible_patches(key, n * rows, grid, self.visible(grid),
                                                 self.block)
        tokens = encode(trainable["audio"], jnp.repeat(audio, n, axis=0), visible)["tokens"]
        prediction = self._decoder(model).apply(
            {"params": trainable["decoder"]}, tokens[:, 1:], visible).astype(jnp.float32)
        of_clip = lambda x: x.reshape(rows, n, *x.shape[1:])
        frame = masked_patches.frame_error(prediction, jnp.repeat(target, n, axis=0),
                                           masked_patches.masked(visible, patches))
        utterance = masked_patches.utterance_error(tokens[:, 0].astype(jnp.float32),
                                                   jnp.repeat(clip_target, n, axis=0))
        return {"frame": of_clip(frame).mean(1), "utterance": of_clip(utterance).mean(1),
                "target": target, "clip_target": clip_target,
                "prediction": of_clip(prediction)[:, 0]}

    def objective(self, model, trainable, frozen, aux, outputs, batch):
        mask = batch["mask"]
        mean = lambda x: jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)
        frame, utterance = mean(outputs["frame"]), mean(outputs["utterance"])
        # They go to 0 where teacher and student agree on something that no clip changes. That of
        # the targets is also the frame loss of who knows each patch's mean, and no clip.
        spread = {f"{name}_variance": masked_patches.variance_over_rows(
            jax.lax.stop_gradient(outputs[name]), mask)
            for name in ("target", "clip_target", "prediction")}
        return frame + self.utterance_weight * utterance, {
            "frame": frame, "utterance": utterance} | spread

    def _decoder(self, model):
        return masked_patches.PatchDecoder(model.audio.grid, self.decoder_width,
                                           self.decoder_layers, jnp.dtype(model.dtype))
