"""LAION's own files: weights of transformers' CLAP, renamed to LAION's layout."""

import re

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tail_jax import pretrained  # noqa: E402
from tests.models.parity import close, randomise, tokens  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

# RoBERTa has heads 64 wide and an epsilon of 1e-5, which LAION's files do not say.
TEXT = dict(vocab_size=50, hidden_size=128, num_hidden_layers=2, intermediate_size=48,
            num_attention_heads=2, max_position_embeddings=100, layer_norm_eps=1e-5)
AUDIO = dict(spec_size=32, num_mel_bins=16, patch_size=2, patch_stride=[2, 2], window_size=4,
             patch_embeds_hidden_size=16, hidden_size=32, depths=[2, 1], num_hidden_layers=2,
             num_attention_heads=[2, 4])
FUSED = dict(enable_fusion=True, fusion_type="aff_2d")
# Of HTSAT's Swin blocks, its names of norms and projections.
SPELLING = (
    (r"^audio_model\.audio_encoder\.", "audio_branch."), (r"^text_model\.", "text_branch."),
    (r"batch_norm\.", "bn0."), (r"_projection\.linear1", "_projection.0"),
    (r"_projection\.linear2", "_projection.2"))
BLOCK = (
    (r"layernorm_before", "norm1"), (r"layernorm_after", "norm2"),
    (r"attention\.self\.relative", "attn.relative"), (r"attention\.output\.dense", "attn.proj"),
    (r"intermediate\.dense", "mlp.fc1"), (r"output\.dense", "mlp.fc2"))


def laion(theirs, prefix="module."):
    """The state dict of a ClapModel as LAION's training writes it."""
    out, parts = {}, {}
    for key, value in theirs.state_dict().items():
        for pattern, name in SPELLING:
            key = re.sub(pattern, name, key)
        if "audio_branch.layers" in key:
            for pattern, name in BLOCK:
                key = re.sub(pattern, name, key)
        match = re.fullmatch(r"(.*)attention\.self\.(query|key|value)\.(\w+)", key)
        if match and key.startswith("audio"):
            parts.setdefault(f"{match[1]}attn.qkv.{match[3]}", []).append(value)
        elif key != "text_branch.embeddings.token_type_ids":
            out[key] = value
    assert all(len(values) == 3 for values in parts.values())
    out |= {key: torch.cat(values) for key, values in parts.items()}  # query, key, value
    config = theirs.config.audio_config
    side = config.spec_size // config.patch_stride[0] // config.window_size
    if side > 1:
        area = config.window_size**2
        out["audio_branch.layers.0.blocks.1.attn_mask"] = torch.zeros(side**2, area, area)
    # The front end, the classifier, and heads of its training, all unused here.
    for key in ("audio_branch.spectrogram_extractor.stft.conv_real.weight",
                "audio_branch.logmel_extractor.melW", "audio_branch.tscam_conv.weight",
                "audio_branch.head.bias", "text_transform.sequential.0.weight",
                "audio_transform.sequential.3.bias"):
        out[key] = torch.zeros(2)
    return {prefix + key: value for key, value in out.items()}


def make(text={}, audio={}, both={}):
    return randomise(transformers.ClapModel(transformers.ClapConfig(
        text_config=TEXT | text, audio_config=AUDIO | audio, **dict(projection_dim=20) | both)), 0)


@pytest.mark.parametrize("text, audio, both", [
    ({}, {}, {}), ({}, FUSED, dict(projection_dim=9)),
    (dict(hidden_size=64, num_attention_heads=1, num_hidden_layers=1),
     dict(depths=[2, 3, 1], num_attention_heads=[1, 2, 8], hidden_size=96, mlp_ratio=2.5,
          patch_embeds_hidden_size=24, spec_size=24, num_mel_bins=12, window_size=3,
          qkv_bias=False, enable_patch_layer_norm=False, aff_block_r=3, **FUSED), {})],
    ids=["unfused", "fused", "odd sizes"])
def test_embeddings_equal_transformers(tmp_path, text, audio, both):
    theirs = make(text, audio, both)
    content = {"epoch": 3, "best": np.float64(0.5), "name": "x", "state_dict": laion(theirs)}
    torch.save(content, tmp_path / "630k.pt")
    description, params = pretrained.load(tmp_path / "630k.pt")
    model, fused = description.model, bool(audio.get("enable_fusion"))
    assert model.audio.fusion == description.front_end.fusion == fused
    shape = (3, *(4,) * fused, 43, model.audio.mels)
    features = np.random.default_rng(1).normal(-20, 15, shape).astype(np.float32)
    ids, mask = tokens(2, 50)
    expected = theirs(
        input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long(),
        input_features=torch.tensor(features if fused else features[:, None]),
        is_longer=torch.ones(3, 1).bool())
    close(jax.jit(model.encode_audio)(params, None, features)["embedding"], expected.audio_embeds)
    close(jax.jit(model.encode_text)(params, None, ids, mask)["embedding"], expected.text_embeds)
    assert description.max_tokens == 77


def test_a_file_is_the_same_bare_wrapped_and_prefixed(tmp_path):
    theirs = make()
    torch.save({"state_dict": laion(theirs)}, tmp_path / "x.pt")
    same = pretrained.load(tmp_path / "x.pt")[1]
    for prefix in ("", "model.", "module.model."):
        torch.save(laion(theirs, prefix), tmp_path / "x.pt")
        jax.tree.map(np.testing.assert_array_equal, pretrained.load(tmp_path / "x.pt")[1], same)


def test_published_sizes_are_those_of_the_paper():
    """HTSAT-tiny from shapes alone, without a mask that tells the size of the image."""
    config = transformers.ClapConfig(audio_config=FUSED)
    with torch.device("meta"):
        state = laion(transformers.ClapModel(config), "")
    tensors = pretrained.Tensors("x.pt", {k: tuple(v.shape) for k, v in state.items()
                                          if not k.endswith("attn_mask")}, None)
    from tail_jax.pretrained import laion_clap
    description = laion_clap.describe(None, None, tensors)
    model = description.model
    assert (model.audio.depths, model.audio.heads) == ((2, 2, 6, 2), (4, 8, 16, 32))
    assert (model.audio.width, model.audio.window, model.audio.spec_size) == (96, 8, 256)
    assert (model.audio.fusion_ratio, model.embedding, model.text.heads) == (4, 512, 12)
    assert description.front_end.input_shape == (4, 1001, 64)


@pytest.mark.parametrize("key, message", [
    ("text_branch.embeddings.word_embeddings.weight", "x.pt: has no text_branch.embeddings.word"),
    ("audio_branch.norm.weight", "x.pt: not the weights of the LAION CLAP.*: no audio_branch.norm"),
    ("logit_scale_a", "no logit_scale_a")])
def test_a_file_that_is_not_whole_is_named(tmp_path, key, message):
    state = laion(make(), "")
    del state[key]
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        pretrained.load(tmp_path / "x.pt")
    state = laion(make(), "") | {"audio_branch.novel": torch.zeros(2)}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt: not the weights .*unknown audio_branch.novel"):
        pretrained.load(tmp_path / "x.pt")
