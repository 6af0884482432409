"""Our towers against transformers on the same random weights (needs the torch extra)."""

import re

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tail_jax.models.ast import ASTConfig, ASTTower  # noqa: E402
from tail_jax.models.bert import TextConfig, TextTower  # noqa: E402
from tail_jax.models.dual_encoder import DualEncoder  # noqa: E402
from tail_jax.models.htsat import HTSATConfig  # noqa: E402
from tail_jax.tuning.masks import leaf_name  # noqa: E402

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
HTSAT = [
    (r"input_norm", "batch_norm"), (r"patch", "patch_embed.proj"),
    (r"patch_norm", "patch_embed.norm"), (r"norm", "norm"),
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
        return np.ascontiguousarray(value).reshape(leaf.shape)

    filled = jax.tree_util.tree_map_with_path(fill, ours)
    assert set(theirs) - used == set()
    return filled


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), atol=TOLERANCE, rtol=0)


def tokens(seed, vocab, rows=3, length=11):
    """Ids and mask with right padding of different lengths; id 1 is RoBERTa's padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, vocab, (rows, length))
    mask = np.arange(length) < np.array([length, 5, 1])[:, None]
    return np.where(mask, ids, 1).astype(np.int32), mask


@pytest.mark.parametrize("frames", [64, 59], ids=["full", "stretched"])
def test_clap_equals_transformers(frames):
    config = transformers.ClapConfig(
        text_config=dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, intermediate_size=48,
                         num_attention_heads=4, max_position_embeddings=20),
        # Grids of side 16, 8 and 4 with windows of 4: shifted, shifted, one window.
        audio_config=dict(spec_size=32, num_mel_bins=16, patch_size=2, patch_stride=[2, 2],
                          patch_embeds_hidden_size=16, hidden_size=64, depths=[2, 3, 2],
                          num_attention_heads=[2, 4, 4], window_size=4, num_hidden_layers=3,
                          enable_fusion=False, patch_embed_input_channels=1),
        projection_dim=24)
    theirs = randomise(transformers.ClapModel(config), 0)
    ours = DualEncoder(
        HTSATConfig(spec_size=32, mels=16, patch=2, width=16, depths=(2, 3, 2), heads=(2, 4, 4),
                    window=4),
        TextConfig(vocab_size=50, width=32, layers=2, heads=4, hidden=48, max_positions=20),
        embedding=24)
    shapes = jax.eval_shape(ours.init, jax.random.key(0))
    params = converted(shapes, theirs, CLAP, skip=("logit_scale_t",))
    rng = np.random.default_rng(1)
    audio = rng.normal(-20, 15, (3, frames, 16)).astype(np.float32)
    ids, mask = tokens(2, 50)
    expected = theirs(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long(),
                      input_features=torch.tensor(audio)[:, None])
    a = jax.jit(ours.encode_audio)(params, None, audio)
    t = jax.jit(ours.encode_text)(params, None, ids, mask)
    close(a["pooled"], expected.audio_model_output.pooler_output)
    close(t["pooled"], expected.text_model_output.pooler_output)
    close(a["embedding"], expected.audio_embeds)
    close(t["embedding"], expected.text_embeds)
    assert np.ptp(np.asarray(a["embedding"]), axis=0).max() > 0.01  # the inputs matter


def test_ast_equals_transformers():
    theirs = randomise(transformers.ASTModel(transformers.ASTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_length=50, num_mel_bins=27, patch_size=8, frequency_stride=5, time_stride=5)), 3)
    ours = ASTTower(ASTConfig(frames=50, mels=27, patch=8, stride=5, width=32, layers=2, heads=4,
                              hidden=48))
    # In dB: their feature extractor normalises with the same two constants before the model.
    audio = np.random.default_rng(4).normal(-4, 9, (3, 50, 27)).astype(np.float32)
    params = ours.init(jax.random.key(0), audio)["params"]
    params = converted(params, theirs, AST, skip=("input_mean", "input_std"))
    expected = theirs(torch.tensor((audio + 4.2677393) / (2 * 4.5689974)))
    out = jax.jit(ours.apply)({"params": params}, audio)
    close(out["tokens"], expected.last_hidden_state)
    close(out["pooled"], expected.pooler_output)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_text_towers_equal_transformers(kind):
    shape = dict(vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                 intermediate_size=48, max_position_embeddings=16, hidden_act="gelu")
    if kind == "bert":
        theirs = transformers.BertModel(transformers.BertConfig(**shape), add_pooling_layer=False)
        extra = dict(type_vocab_size=2, position_offset=0, pool="cls")
    else:
        theirs = transformers.RobertaModel(transformers.RobertaConfig(
            **shape, type_vocab_size=1, layer_norm_eps=1e-12))
        extra = {}
    theirs = randomise(theirs, 5)
    ours = TextTower(TextConfig(vocab_size=60, width=32, layers=3, heads=4, hidden=48,
                                max_positions=16, **extra))
    ids, mask = tokens(6, 60)
    params = converted(ours.init(jax.random.key(0), ids, mask)["params"], theirs, TEXT)
    expected = theirs(torch.tensor(ids).long(), torch.tensor(mask).long(),
                      output_hidden_states=True)
    out = jax.jit(ours.apply)({"params": params}, ids, mask)
    for mine, other in zip(out["hidden"], expected.hidden_states, strict=True):
        close(np.asarray(mine)[mask], other[torch.tensor(mask)])
    close(out["pooled"], expected.last_hidden_state[:, 0] if kind == "bert"
          else expected.pooler_output)
