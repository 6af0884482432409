"""Random weights of transformers' models in our towers: what the parity tests share."""

import re

import jax
import numpy as np
import torch

from tail_jax.tuning.masks import leaf_name

TOLERANCE = 1e-4
DENSE = {"query": "attention.self.query", "key": "attention.self.key",
         "value": "attention.self.value", "out": "attention.output.dense",
         "up": "intermediate.dense", "down": "output.dense"}
# Ordered (our path, their name), of the whole name without kernel/scale/embedding/bias.
TEXT = [
    (r"word", "embeddings.word_embeddings"), (r"position", "embeddings.position_embeddings"),
    (r"token_type", "embeddings.token_type_embeddings"), (r"norm", "embeddings.LayerNorm"),
    (r"pooler", "pooler.dense"),
    (r"encoder/layer_0?(\d+)/norm1", r"encoder.layer.\1.attention.output.LayerNorm"),
    (r"encoder/layer_0?(\d+)/norm2", r"encoder.layer.\1.output.LayerNorm"),
    *((rf"encoder/layer_0?(\d+)/{ours}", rf"encoder.layer.\1.{theirs}")
      for ours, theirs in DENSE.items())]
AST = [
    (r"cls", "embeddings.cls_token"), (r"dist", "embeddings.distillation_token"),
    (r"position", "embeddings.position_embeddings"),
    (r"patch", "embeddings.patch_embeddings.projection"), (r"norm", "layernorm"),
    (r"encoder/layer_0?(\d+)/norm1", r"layers.\1.layernorm_before"),
    (r"encoder/layer_0?(\d+)/norm2", r"layers.\1.layernorm_after"),
    *((rf"encoder/layer_0?(\d+)/{ours}", rf"layers.\1.{theirs}") for ours, theirs in {
        "query": "attention.q_proj", "key": "attention.k_proj", "value": "attention.v_proj",
        "out": "attention.o_proj", "up": "mlp.fc1", "down": "mlp.fc2"}.items())]
BLOCK = r"stage_(\d)_0?(\d+)"
FUSED = "patch_embed.fusion_model"
HTSAT = [
    (r"input_norm", "batch_norm"), (r"patch", "patch_embed.proj"),
    (r"patch_norm", "patch_embed.norm"), (r"norm", "norm"),
    (r"fusion/patch", "patch_embed.mel_conv2d"),
    *((f"fusion/{side}_{name}_{i}", f"{FUSED}.{side}_att.{first + shift + 3 * i}")
      for side, first in (("local", 0), ("global", 1)) for i in (0, 1)
      for name, shift in (("conv", 0), ("norm", 1))),
    (r"merge_(\d)", r"layers.\1.downsample.reduction"),
    (r"merge_norm_(\d)", r"layers.\1.downsample.norm"),
    (rf"{BLOCK}/relative_position_bias",
     r"layers.\1.blocks.\2.attention.self.relative_position_bias_table"),
    (rf"{BLOCK}/block/norm1", r"layers.\1.blocks.\2.layernorm_before"),
    (rf"{BLOCK}/block/norm2", r"layers.\1.blocks.\2.layernorm_after"),
    *((rf"{BLOCK}/block/{ours}", rf"layers.\1.blocks.\2.{theirs}")
      for ours, theirs in DENSE.items())]
CLAP = [*((rf"audio/{a}", rf"audio_model.audio_encoder.{b}") for a, b in HTSAT),
        *((rf"text/{a}", rf"text_model.{b}") for a, b in TEXT),
        (r"heads/(audio|text)/(linear\d)", r"\1_projection.\2"), (r"logit_scale", "logit_scale_a")]


def randomise(model, seed):
    """Every weight and statistic random: nothing is 0 or 1 that could hide a missing term."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            new = rng.normal(0, 0.2, value.shape)
            if name.endswith("running_var"):
                new = rng.uniform(0.3, 3, value.shape)
            elif name.endswith("weight") and value.ndim == 1:
                new += 1
            value.copy_(torch.tensor(new))
    return model.eval()


def converted(ours, model, rules, skip=()):
    """`ours` filled from `model`; fails on a leaf of either side that the other does not have."""
    theirs = {k: v.numpy() for k, v in model.state_dict().items() if v.is_floating_point()}
    used = set(skip)

    def fill(path, leaf):
        name = leaf_name(path)
        if name in skip:
            return leaf
        *head, last = name.split("/")
        suffix = {"kernel": "weight", "scale": "weight", "embedding": "weight",
                  "bias": "bias", "running_mean": "running_mean", "running_var": "running_var"}
        stem, tail = ("/".join(head), "." + suffix[last]) if last in suffix else (name, "")
        target = next(re.sub(f"^{a}$", b, stem) for a, b in rules if re.fullmatch(a, stem)) + tail
        # Their merge belongs to the stage before it.
        target = re.sub(r"\d(?=\.downsample)", lambda m: str(int(m[0]) - 1), target)
        used.add(target)
        value = theirs[target]
        if last == "kernel":
            value = value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
        value = value.squeeze() if stem in ("cls", "dist", "position") else value
        assert value.shape == leaf.shape, (name, value.shape, leaf.shape)
        return np.ascontiguousarray(value)

    filled = jax.tree_util.tree_map_with_path(fill, ours)
    assert set(theirs) - used == set()
    return filled


def recorded(modules):
    """A list that their forward pass will fill with the output of each of `modules`, in order."""
    outputs = []
    for module in modules:
        module.register_forward_hook(lambda module, inputs, output: outputs.append(
            output if isinstance(output, torch.Tensor) else output[0]))
    return outputs


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), atol=TOLERANCE, rtol=0)


def tokens(seed, vocab, length=11, padding="right", pad=1):
    """(ids, mask) of three texts, two of them padded on one side; no other token is `pad`."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, vocab, (3, length))
    mask = np.arange(length) < np.array([length, 5, 1])[:, None]
    mask = mask if padding == "right" else mask[:, ::-1].copy()
    return np.where(mask, ids, pad).astype(np.int32), mask
