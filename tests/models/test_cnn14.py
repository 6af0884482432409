"""Cnn14's tower: sizes, what it returns and refuses (its numbers are in tests/pretrained)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tail_jax.models.cnn14 import Cnn14Config, Cnn14Tower
from tail_jax.models.dual_encoder import BUFFERS
from tail_jax.tuning.masks import count

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = Cnn14Config(frames=45, mels=16, channels=(4, 6, 8), width=10)


def shapes(config, rows=2):
    """(shapes of the parameters, shapes of the outputs)."""
    audio = jax.ShapeDtypeStruct((rows, *config.input_shape), jnp.float32)
    params = jax.eval_shape(Cnn14Tower(config).init, jax.random.key(0), audio)
    return params["params"], jax.eval_shape(Cnn14Tower(config).apply, params, audio)


@pytest.fixture(scope="module")
def tiny():
    """(random parameters, random audio)."""
    rng = np.random.default_rng(0)
    new = lambda path, x: (np.abs(rng.normal(0, 0.5, x.shape)) + 0.5
                           if path[-1].key in ("scale", "running_var")
                           else rng.normal(0, 0.3, x.shape)).astype(np.float32)
    return (jax.tree_util.tree_map_with_path(new, shapes(TINY)[0]),
            rng.normal(-20, 9, (3, *TINY.input_shape)).astype(np.float32))


def test_parameter_count_of_the_published_size():
    params, _ = shapes(Cnn14Config())
    assert count(params, BUFFERS) == 79_673_792
    head = 527 * (2048 + 1)  # AudioSet's, which a tower does not have
    assert count(params, BUFFERS) + head == 80_753_615
    assert count(params) - count(params, BUFFERS) == 2 * (64 + 2 * 4032)


@pytest.mark.parametrize("frames, steps", [(690, 21), (1379, 43)])
def test_maps_have_the_published_lengths(frames, steps):
    _, out = shapes(Cnn14Config(frames=frames))
    assert out["tokens"].shape == (2, steps, 2048)
    assert out["frames"].shape == (2, steps - 2, 2048)
    assert out["pooled"].shape == (2, 2048)
    assert [h.shape[1:] for h in out["hidden"][:2]] == [(frames // 2, 64), (frames // 4, 128)]


def test_frame_vectors_are_the_clip_vector_of_three_steps(tiny):
    params, audio = tiny
    out = jax.jit(Cnn14Tower(TINY).apply)({"params": params}, audio)
    tokens, fc1 = np.asarray(out["tokens"], np.float64), params["fc1"]
    assert tokens.shape[1] == 45 // 4
    head = lambda a: np.maximum(0, (a.max(1) + a.mean(1)) @ fc1["kernel"] + fc1["bias"])
    np.testing.assert_allclose(out["pooled"], head(tokens), rtol=1e-4, atol=1e-4)
    for i in range(tokens.shape[1] - 2):
        np.testing.assert_allclose(out["frames"][:, i], head(tokens[:, i:i + 3]), rtol=1e-4,
                                   atol=1e-4)


def test_a_row_does_not_depend_on_the_others(tiny):
    params, audio = tiny
    tower = jax.jit(Cnn14Tower(TINY).apply)
    whole, alone = (tower({"params": params}, a)["pooled"] for a in (audio, audio[1:2]))
    np.testing.assert_allclose(alone[0], whole[1], rtol=1e-5, atol=1e-5)


def test_statistics_get_no_gradient(tiny):
    params, audio = tiny
    loss = lambda p: Cnn14Tower(TINY).apply({"params": p}, audio)["pooled"].sum()
    for path, g in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert (np.abs(g).max() == 0) == (path[-1].key in BUFFERS), path


def test_tuning_is_refused_and_an_empty_tree_is_none(tiny):
    params, audio = tiny
    shape = lambda tuning: jax.eval_shape(Cnn14Tower(TINY).apply, {"params": params}, audio, None,
                                          tuning)["pooled"].shape
    assert shape({}) == shape(None) == (3, 10)
    with pytest.raises(ValueError, match="Cnn14 has no transformer blocks and takes no tuning"):
        shape({"prompts": np.zeros((1, 2, 8), np.float32)})


def test_wrong_sizes_are_errors():
    with pytest.raises(ValueError, match="31 frames and 64 mels; 6 blocks need at least 32"):
        Cnn14Config(frames=31)
    with pytest.raises(ValueError, match=r"shape \(44, 16\) .*takes \(45, 16\)"):
        Cnn14Tower(TINY).init(jax.random.key(0), np.zeros((1, 44, 16), np.float32))
