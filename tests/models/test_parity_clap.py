"""HTSAT and CLAP against transformers on the same random weights (needs the torch extra)."""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tail_jax.models.bert import TextConfig  # noqa: E402
from tail_jax.models.dual_encoder import DualEncoder  # noqa: E402
from tail_jax.models.htsat import HTSATConfig, HTSATTower  # noqa: E402
from tail_jax.pretrained.clap import HTSAT, TABLE  # noqa: E402
from tests.models.parity import close, converted, randomise, recorded, tokens  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Grids of side 16, 8 and 4 with windows of 4: shifted, shifted, one window.
THEIRS = dict(spec_size=32, num_mel_bins=16, patch_size=2, patch_stride=[2, 2],
              patch_embeds_hidden_size=16, hidden_size=64, depths=[2, 3, 2],
              num_attention_heads=[2, 4, 4], window_size=4, num_hidden_layers=3)
OURS = HTSATConfig(spec_size=32, mels=16, patch=2, width=16, depths=(2, 3, 2), heads=(2, 4, 4),
                   window=4)
# One stage less compiles in half the time.
TWO = dict(depths=[1, 2], num_attention_heads=[2, 4], hidden_size=32, num_hidden_layers=2)
OUR_TWO = dict(depths=(1, 2), heads=(2, 4))
FUSED = dict(enable_fusion=True, fusion_type="aff_2d")

# name: (their options, ours, frames)
OPTIONS = {
    "plain": ({}, {}, 64),
    "stretched in time": ({}, {}, 59),
    "one frame": (TWO, OUR_TWO, 1),
    # 12 mels in two pieces of 16 bands.
    "stretched in frequency": (TWO | dict(num_mel_bins=12), OUR_TWO | dict(mels=12), 64),
    "one piece, stretched in frequency": (TWO | dict(num_mel_bins=17), OUR_TWO | dict(mels=17), 32),
    "one piece, stretched in time": (TWO | dict(num_mel_bins=32), OUR_TWO | dict(mels=32), 21),
    # Grids of 16 and 8 with windows of 5 and 3: filled to 20 and 10, to 18 and 9.
    "windows of 5": (dict(window_size=5, **TWO), dict(window=5, **OUR_TWO), 64),
    "windows of 3": (dict(window_size=3), dict(window=3), 64),
    # The last grid has side 5, which is odd, and is one window.
    "odd last grid": (dict(spec_size=40, num_mel_bins=40, window_size=5),
                      dict(spec_size=40, mels=40, window=5), 40),
    "overlapping patches": (TWO | dict(patch_size=4), OUR_TWO | dict(patch=4, stride=2), 64),
    "odd patches": (TWO | dict(spec_size=33, num_mel_bins=33, patch_size=3),
                    OUR_TWO | dict(spec_size=33, mels=33, patch=3, stride=2), 33),
    # Grids of 16 by 8 and 8 by 4, filled to 18 by 9 and 9 by 6.
    "rectangular patches": (
        TWO | dict(patch_size=[2, 6], patch_stride=[2, 4], window_size=3),
        OUR_TWO | dict(patch=(2, 6), stride=(2, 4), window=3), 64),
    # The second grid is a single window high, two wide: nothing is shifted.
    "flat grids": (TWO | dict(patch_size=[4, 2], patch_stride=[4, 2]),
                   OUR_TWO | dict(patch=(4, 2)), 64),
    "no biases, no norm": (
        TWO | dict(qkv_bias=False, enable_patch_layer_norm=False, layer_norm_eps=0.1,
                   mlp_ratio=2.7, hidden_act="gelu_new"),
        OUR_TWO | dict(qkv_bias=False, patch_norm=False, epsilon=0.1, mlp_ratio=2.7,
                       activation="gelu_tanh"), 64),
    "relu": (TWO | dict(hidden_act="relu"), OUR_TWO | dict(activation="relu"), 64),
    "silu": (TWO | dict(hidden_act="silu"), OUR_TWO | dict(activation="silu"), 64),
    "one stage": (dict(depths=[2], num_attention_heads=[2], hidden_size=16),
                  dict(depths=(2,), heads=(2,)), 64),
    "fused": (FUSED, dict(fusion=True), 64),
    "fused, stretched, overlapping": (
        FUSED | TWO | dict(patch_size=[6, 4], aff_block_r=2),
        OUR_TWO | dict(fusion=True, patch=(6, 4), stride=2, fusion_ratio=2), 59),
    # Three patches of 3 x 4 columns cover 12 of 14: zeros fill the rest.
    "fused, parts shorter than the whole": (
        FUSED | TWO | dict(spec_size=28, num_mel_bins=28, window_size=7),
        OUR_TWO | dict(fusion=True, spec_size=28, mels=28, window=7), 28),
}


def towers(theirs, ours, seed=0):
    """(their encoder, our tower applied with the same weights)."""
    config = transformers.ClapAudioConfig(**THEIRS | theirs)
    encoder = randomise(transformers.ClapAudioModel(config), seed).audio_encoder
    config = dataclasses.replace(OURS, **ours)
    tower = HTSATTower(config)
    shapes = jax.eval_shape(tower.init, jax.random.key(0), np.zeros((1, *config.input_shape)))
    params = converted(shapes["params"], encoder, HTSAT)
    return encoder, config, jax.jit(lambda *args: tower.apply({"params": params}, *args))


def spectrograms(config, frames, seed=1, rows=3):
    shape = (rows, 4, frames, config.mels) if config.fusion else (rows, frames, config.mels)
    return np.random.default_rng(seed).normal(-20, 15, shape).astype(np.float32)


@pytest.mark.parametrize("name", OPTIONS)
def test_htsat_equals_transformers_layer_by_layer(name):
    theirs, ours, frames = OPTIONS[name]
    encoder, config, apply = towers(theirs, ours)
    audio = spectrograms(config, frames)
    hidden = recorded([block for stage in encoder.layers for block in stage.blocks])
    longer = np.array([True, False, True])
    channels = torch.tensor(audio if config.fusion else audio[:, None])
    expected = encoder(channels, is_longer=torch.tensor(longer)[:, None])
    got = apply(audio, longer)
    assert len(hidden) == sum(config.depths)
    for mine, other in zip(got["hidden"], hidden, strict=True):
        close(mine, other)
    # Theirs is [B, d, frequency, piece and time]; the order of the mean does not matter.
    close(np.sort(np.asarray(got["tokens"]), 1),
          torch.sort(expected.last_hidden_state.flatten(2).transpose(1, 2), 1).values)
    close(got["pooled"], expected.pooler_output)
    assert got["pooled"].shape == (3, config.pooled_width)
    assert np.ptp(np.asarray(got["pooled"]), axis=0).max() > 0.01  # the inputs matter


def test_fused_htsat_takes_one_spectrogram_as_four_and_looks_at_the_parts():
    encoder, config, apply = towers(FUSED | TWO, OUR_TWO | dict(fusion=True))
    audio = spectrograms(config, 64)
    four = np.repeat(audio[:, :1], 4, 1)
    expected = encoder(torch.tensor(four), is_longer=torch.ones(3, 1).bool()).pooler_output
    close(apply(audio[:, 0])["pooled"], expected)
    close(apply(four)["pooled"], expected)
    short = encoder(torch.tensor(audio), is_longer=torch.zeros(3, 1).bool()).pooler_output
    close(apply(audio, np.zeros(3, bool))["pooled"], short)
    assert (short - expected).abs().max() > 0.1
    assert np.abs(apply(audio)["pooled"] - expected.detach().numpy()).max() > 0.1


@pytest.mark.parametrize("fusion", [False, True], ids=["unfused", "fused"])
def test_clap_equals_transformers(fusion):
    config = transformers.ClapConfig(
        text_config=dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, intermediate_size=48,
                         num_attention_heads=4, max_position_embeddings=20),
        audio_config=THEIRS | dict(enable_fusion=fusion), projection_dim=24)
    theirs = randomise(transformers.ClapModel(config), 0)
    ours = DualEncoder(
        dataclasses.replace(OURS, fusion=fusion),
        TextConfig(vocab_size=50, width=32, layers=2, heads=4, hidden=48, max_positions=20),
        embedding=24)
    shapes = jax.eval_shape(ours.init, jax.random.key(0))
    params = converted(shapes, theirs, TABLE.rules)
    audio = spectrograms(ours.audio, 59)
    ids, mask = tokens(2, 50)
    channels = torch.tensor(audio if fusion else audio[:, None])
    expected = theirs(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long(),
                      input_features=channels, is_longer=torch.ones(3, 1).bool())
    a = jax.jit(ours.encode_audio)(params, None, audio)
    t = jax.jit(ours.encode_text)(params, None, ids, mask)
    close(a["pooled"], expected.audio_model_output.pooler_output)
    close(t["pooled"], expected.text_model_output.pooler_output)
    close(a["embedding"], expected.audio_embeds)
    close(t["embedding"], expected.text_embeds)
    assert np.ptp(np.asarray(a["embedding"]), axis=0).max() > 0.01  # the inputs matter
