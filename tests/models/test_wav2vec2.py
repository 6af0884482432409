"""wav2vec 2.0 and data2vec-audio against transformers (needs the torch extra)."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tail_jax.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2Tower  # noqa: E402
from tail_jax.pretrained import load  # noqa: E402
from tests.models.parity import close, randomise  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
             conv_dim=[12, 16, 8], conv_kernel=[10, 3, 2], conv_stride=[5, 2, 2],
             num_conv_pos_embedding_groups=4)
CONFIGS = {
    "group": ("wav2vec2", dict(num_conv_pos_embeddings=16)),
    "group, odd positions, biases": ("wav2vec2", dict(
        num_conv_pos_embeddings=7, conv_bias=True, layer_norm_eps=0.1, hidden_act="relu",
        conv_kernel=[7, 5, 1], conv_stride=[3, 4, 1])),
    "layer, stable": ("wav2vec2", dict(
        num_conv_pos_embeddings=16, feat_extract_norm="layer", do_stable_layer_norm=True,
        conv_bias=True)),
    "group, stable": ("wav2vec2", dict(
        num_conv_pos_embeddings=3, do_stable_layer_norm=True, feat_extract_activation="gelu_new",
        num_conv_pos_embedding_groups=24)),
    "layer, post": ("wav2vec2", dict(
        num_conv_pos_embeddings=8, feat_extract_norm="layer", num_conv_pos_embedding_groups=1,
        conv_dim=[8, 8], conv_kernel=[10, 8], conv_stride=[5, 4], num_feat_extract_layers=2)),
    "data2vec": ("data2vec-audio", dict(conv_pos_kernel_size=19, num_conv_pos_embeddings=5)),
    "data2vec, even positions": ("data2vec-audio", dict(
        conv_pos_kernel_size=6, num_conv_pos_embeddings=2, conv_bias=True, layer_norm_eps=0.1,
        hidden_act="silu")),
}
MODELS = {"wav2vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model),
          "data2vec-audio": (transformers.Data2VecAudioConfig, transformers.Data2VecAudioModel)}
LENGTHS = (611, 260, 97)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(their model, our tower as a function of audio and mask, its configuration)."""
    kind, options = CONFIGS[request.param]
    config, model = MODELS[kind]
    theirs = randomise(model(config(**SIZES | options)), len(request.param))
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs.save_pretrained(folder)
    description, params = load(folder)
    tower = Wav2Vec2Tower(description.model.audio)
    apply = jax.jit(lambda *args: tower.apply({"params": params["audio"]}, *args))
    return theirs, apply, description.model.audio


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(7)
    return [(rng.normal(0, 1, n) + rng.normal()).astype(np.float32) for n in LENGTHS]


def padded(clips, total, fill=0.0):
    """Batch and mask; `fill` on padding."""
    audio = np.full((len(clips), total), fill, np.float32)
    for row, clip in zip(audio, clips):
        row[:len(clip)] = clip
    return audio, np.arange(total) < np.array([len(c) for c in clips])[:, None]


def test_every_layer_of_a_padded_batch_equals_transformers_on_each_clip_alone(pair, clips):
    theirs, apply, config = pair
    out = apply(*padded(clips, 700))
    for i, clip in enumerate(clips):
        with torch.inference_mode():
            expected = theirs(torch.tensor(clip)[None], output_hidden_states=True)
        frames = expected.last_hidden_state.shape[1]
        assert frames == config.frames(len(clip)) == out["frame_mask"][i].sum()
        assert out["frame_mask"][i, :frames].all()
        for mine, other in zip(out["hidden"], expected.hidden_states, strict=True):
            close(mine[i, :frames], other[0])
        close(out["tokens"][i, :frames], expected.last_hidden_state[0])
        close(out["pooled"][i], expected.last_hidden_state[0].mean(0))
    assert np.ptp(np.asarray(out["pooled"]), axis=0).max() > 0.01  # the inputs matter


def test_padding_its_content_and_its_neighbours_change_nothing(pair, clips):
    _, apply, _ = pair
    alone = np.asarray(apply(clips[1][None])["pooled"][0])
    for order, fill in (([0, 1, 2], 0.0), ([1, 2, 0], 3.0), ([2, 1, 1], np.inf)):
        pooled = np.asarray(apply(*padded([clips[i] for i in order], 700, fill))["pooled"])
        for row, i in enumerate(order):
            if i == 1:
                np.testing.assert_allclose(pooled[row], alone, atol=1e-5, rtol=0)


def test_a_row_without_samples_is_finite(pair, clips):
    out = pair[1](*padded([clips[0], clips[0][:0], clips[1]], 700))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    assert not np.asarray(out["frame_mask"])[1].any() and not np.asarray(out["pooled"])[1].any()


TINY = Wav2Vec2Config(feature_widths=(6, 8), feature_kernels=(10, 3), feature_strides=(5, 2),
                      position_kernel=4, position_groups=2, width=16, layers=2, heads=2, hidden=24)


def tiny(audio, mask, tuning=None, dtype=np.float32, **change):
    """What a tower of random parameters makes of a batch; equal parameters at every call."""
    tower = Wav2Vec2Tower(Wav2Vec2Config(**vars(TINY) | change), dtype)
    params = jax.jit(tower.init)(jax.random.key(0), audio)
    return jax.jit(tower.apply)(params, audio, mask, tuning)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_bfloat16_stays_near_float32(norm, clips):
    full, half = (tiny(*padded(clips, 700), dtype=dtype, norm=norm)
                  for dtype in (np.float32, jax.numpy.bfloat16))
    assert half["tokens"].dtype == half["pooled"].dtype == jax.numpy.bfloat16
    np.testing.assert_allclose(half["pooled"].astype(np.float32), full["pooled"], atol=0.03)


def test_prompts_enter_after_the_positions_and_act_on_every_layer_but_the_input(clips):
    batch = padded(clips, 700)
    prompts = np.random.default_rng(0).normal(0, 1, (2, 3, 16)).astype(np.float32)
    plain, prompted, turned = (tiny(*batch, tuning) for tuning in (
        None, {"prompts": prompts}, {"prompts": prompts[:, ::-1]}))
    np.testing.assert_array_equal(prompted["hidden"][0], plain["hidden"][0])
    assert prompted["tokens"].shape == plain["tokens"].shape
    assert np.abs(prompted["hidden"][1] - plain["hidden"][1]).max() > 1e-3
    # A set, not a sequence: no position reaches the prompts.
    np.testing.assert_allclose(turned["pooled"], prompted["pooled"], atol=1e-5)


@pytest.mark.parametrize("samples, frames", [(128 * 160, 63), (300 * 160, 149), (400 * 160, 199),
                                             (512 * 160, 255), (1024 * 160, 511), (400, 1),
                                             (399, 0), (480_000, 1499)])
def test_frames_of_the_published_sizes(samples, frames):
    assert max(Wav2Vec2Config().frames(samples), 0) == frames
    assert Wav2Vec2Config().min_samples == 400


def test_base_size_has_the_published_number_of_parameters():
    shapes = jax.eval_shape(Wav2Vec2Tower(Wav2Vec2Config()).init, jax.random.key(0),
                            np.zeros((1, 400), np.float32))
    # 94,371,712 with the mask embedding (768) and the gain of the weight norm (128).
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 94_371_712 - 768 - 128


@pytest.mark.parametrize("change, message", [
    ({"feature_norm": "batch"}, "feature_norm is 'batch'"), ({"heads": 5}, "divisible by heads 5"),
    ({"position_groups": 3}, "position_groups 3"), ({"feature_kernels": (10,)}, r"\[2, 1, 2\]"),
    ({"feature_activation": "x"}, "feature_activation is 'x'"), ({"samples": 9}, "samples is 9")])
def test_a_configuration_that_cannot_be_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        Wav2Vec2Config(**vars(TINY) | change)


def test_a_waveform_below_one_frame_says_how_long_it_must_be():
    with pytest.raises(ValueError, match="at least 20 samples"):
        Wav2Vec2Tower(TINY).init(jax.random.key(0), np.zeros((1, 19), np.float32))
