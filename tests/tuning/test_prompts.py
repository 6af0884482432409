"""The coupled prompts: how they start, how audio prompts become text prompts, layer ranges."""

import types

import jax
import numpy as np
import pytest

from tail_jax.models.ast import ASTConfig
from tail_jax.models.bert import TextConfig
from tail_jax.models.htsat import HTSATConfig, HTSATTower
from tail_jax.tuning.prompts import PromptConfig, init_prompts, prompt_tuning

TEXT = TextConfig(vocab_size=30, width=12, layers=4, heads=3, hidden=20, max_positions=16)
AST = types.SimpleNamespace(
    audio=ASTConfig(frames=20, mels=12, patch=4, stride=4, width=6, layers=4, heads=3), text=TEXT)
HTSAT = types.SimpleNamespace(
    audio=HTSATConfig(spec_size=16, mels=8, patch=2, width=6, depths=(1, 3), heads=(2, 2),
                      window=4), text=TEXT)


def make(model, seed=0, **settings):
    """(config, random parameters with biases, tuning)."""
    config = PromptConfig(length=2, **settings)
    p = init_prompts(jax.random.key(seed), config, model)
    rng = np.random.default_rng(seed)
    p = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), p)
    return p, prompt_tuning(config, model, p)


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5, rtol=0)


def test_prompts_start_uniform_and_maps_normal():
    model = types.SimpleNamespace(
        audio=ASTConfig(patch=4, width=50, layers=12, heads=5), text=TEXT)
    p = init_prompts(jax.random.key(1), PromptConfig(length=9), model)
    bound = (6 / (4**2 + 50)) ** 0.5
    [audio], [pre], [post] = p["audio"], p["pre"], p["post"]
    assert audio.shape == (12, 9, 50) and pre["w"].shape == (50, 12)
    assert np.abs(audio).max() <= bound and np.abs(audio).max() > 0.99 * bound
    assert np.std(audio) == pytest.approx(bound / 3**0.5, rel=0.05)
    for one in (pre, post):
        assert np.std(one["w"]) == pytest.approx(50**-0.5, rel=0.1)
        assert (one["b"] == 0).all()
    assert np.abs(pre["w"] - post["w"]).max() > 0.01
    other = init_prompts(jax.random.key(2), PromptConfig(length=9), model)
    assert np.abs(audio - other["audio"][0]).max() > 0.01


def test_linear_shared_by_hand():
    p = {"audio": [np.array([[[1, 2]], [[3, 4]]], np.float32)],
         "pre": [{"w": np.array([[1, 0, 2], [0, 1, 0]], np.float32),
                  "b": np.array([10, 20, 30], np.float32)}],
         "post": [{"w": np.array([[0, 1, 0], [1, 0, 0]], np.float32),
                   "b": np.array([0, 0, 5], np.float32)}]}
    model = types.SimpleNamespace(
        audio=ASTConfig(width=2, layers=2, heads=1),
        text=TextConfig(vocab_size=5, width=3, layers=2, heads=1, hidden=4, max_positions=8))
    tuning = prompt_tuning(PromptConfig(length=1), model, p)
    close(tuning["text"]["prompts"], [[[11, 22, 32], [2, 1, 5]], [[13, 24, 36], [4, 3, 5]]])
    close(tuning["audio"]["prompts"], p["audio"][0])
    assert set(tuning["audio"]) == set(tuning["text"]) == {"prompts"}


def test_htsat_stages_have_their_own_maps():
    p, tuning = make(HTSAT)
    a, pre, post = p["audio"], p["pre"], p["post"]
    assert [x.shape for x in a] == [(1, 2, 6), (3, 2, 12)]
    for text_layer, (stage, i) in enumerate([(0, 0), (1, 0), (1, 1), (1, 2)]):
        close(tuning["text"]["prompts"][text_layer], np.concatenate(
            [a[stage][i] @ m[stage]["w"] + m[stage]["b"] for m in (pre, post)]))
    for own, got in zip(a, tuning["audio"]["prompts"], strict=True):
        close(own, got)


def test_htsat_common_prompts_share_one_pair_of_maps():
    p, tuning = make(HTSAT, htsat_map="common")
    assert [x.shape for x in p["audio"]] == [(1, 2, 12), (3, 2, 12)]
    assert len(p["pre"]) == len(p["post"]) == 1 and set(p["stage"]) == {"0"}  # stage 1 is 12 wide
    flat = np.concatenate(p["audio"])
    close(tuning["text"]["prompts"], np.concatenate(
        [flat @ m["w"] + m["b"] for m in (p["pre"][0], p["post"][0])], axis=1))
    first = p["stage"]["0"]
    close(tuning["audio"]["prompts"][0], p["audio"][0] @ first["w"] + first["b"])
    close(tuning["audio"]["prompts"][1], p["audio"][1])


@pytest.mark.parametrize("model", [AST, HTSAT], ids=["ast", "htsat"])
def test_per_layer_coupling_has_a_pair_of_maps_a_layer(model):
    p, tuning = make(model, coupling="per_layer")
    layer = 0
    for a, pre, post in zip(p["audio"], p["pre"], p["post"], strict=True):
        for i in range(len(a)):
            close(tuning["text"]["prompts"][layer], np.concatenate(
                [a[i] @ m["w"][i] + m["b"][i] for m in (pre, post)]))
            layer += 1
    assert layer == 4


@pytest.mark.parametrize("model", [AST, HTSAT], ids=["ast", "htsat"])
def test_independent_text_prompts_are_learned_themselves(model):
    p, tuning = make(model, coupling="independent")
    assert p["text"].shape == (4, 4, 12) and set(p) == {"audio", "text"}
    assert tuning["text"]["prompts"] is p["text"]


def test_shallow_prompts_have_one_layer_on_both_sides():
    p, tuning = make(AST, depth="shallow")
    assert tuning["audio"]["prompts"].shape == (1, 2, 6)
    assert tuning["text"]["prompts"].shape == (1, 4, 12)


@pytest.mark.parametrize("first, last, text_layers", [(0, 2, [0, 1]), (2, 0, [2, 3]),
                                                      (1, 3, [1, 2])])
@pytest.mark.parametrize("model", [AST, HTSAT], ids=["ast", "htsat"])
@pytest.mark.parametrize("coupling", ["linear_shared", "per_layer"])
def test_layer_ranges_open_these_layers_and_close_the_others(
        model, coupling, first, last, text_layers):
    p, tuning = make(model, first_layer=first, last_layer=last, coupling=coupling)
    assert sum(len(a) for a in p["audio"]) == len(text_layers)
    masks = tuning["audio"]["prompts_mask"]
    masks = np.concatenate(masks) if model is HTSAT else np.asarray(masks)
    expected = np.isin(np.arange(4), text_layers)
    np.testing.assert_array_equal(masks, expected[:, None].repeat(2, 1))
    np.testing.assert_array_equal(tuning["text"]["prompts_mask"], expected[:, None].repeat(4, 1))
    # The open rows hold the learned prompts in order.
    audio = tuning["audio"]["prompts"]
    rows = [r for a in (audio if model is HTSAT else [audio]) for r in np.asarray(a)]
    learned = [r for a in p["audio"] for r in a]
    for layer, own in zip(text_layers, learned, strict=True):
        close(rows[layer], own)
    assert np.abs(tuning["text"]["prompts"][np.array(text_layers)]).min(axis=(1, 2)).all()


@pytest.mark.parametrize("settings", [{}, {"htsat_map": "common"}, {"coupling": "per_layer"}])
def test_stages_without_prompts_learn_nothing(settings):
    p, tuning = make(HTSAT, first_layer=1, **settings)
    assert len(p["pre"]) == len(p["post"]) == 1 and p["audio"][0].size == 0
    assert not p.get("stage")
    # The tuning covers every layer at its width all the same.
    assert [a.shape for a in tuning["audio"]["prompts"]] == [(1, 2, 6), (3, 2, 12)]
    assert tuning["text"]["prompts"].shape == (4, 4, 12)


def test_one_stage_of_windows_takes_prompts_too():
    config = HTSATConfig(spec_size=16, mels=8, patch=2, width=6, depths=(2,), heads=(2,), window=4)
    _, tuning = make(types.SimpleNamespace(audio=config, text=TEXT))
    audio = jax.ShapeDtypeStruct((1, 32, 8), np.float32)
    tower = HTSATTower(config)
    params = jax.eval_shape(tower.init, jax.random.key(0), audio)
    out = jax.eval_shape(tower.apply, params, audio, None, tuning["audio"])
    assert out["pooled"].shape == (1, 6)


def test_towers_of_different_depth_pair_by_relative_depth():
    model = types.SimpleNamespace(
        audio=AST.audio, text=TextConfig(vocab_size=30, width=12, layers=2, heads=3, hidden=20))
    p, tuning = make(model)
    [pre], [post] = p["pre"], p["post"]
    for layer, source in enumerate((0, 2)):
        close(tuning["text"]["prompts"][layer], np.concatenate(
            [p["audio"][0][source] @ m["w"] + m["b"] for m in (pre, post)]))


@pytest.mark.parametrize("settings, message", [
    ({"depth": "middle"}, "prompts.depth is 'middle'"),
    ({"coupling": "none"}, "prompts.coupling is 'none'"),
    ({"htsat_map": "own"}, "prompts.htsat_map is 'own'"),
    ({"length": 0}, "prompts.length is 0"),
    ({"depth": "shallow", "last_layer": 2}, "leave prompts.first_layer")])
def test_wrong_settings_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        PromptConfig(**settings)


@pytest.mark.parametrize("model, settings, message", [
    (HTSAT, {"depth": "shallow"}, "needs a ViT audio tower"),
    (AST, {"last_layer": 5}, "layers 0 to 5; the audio tower has 4"),
    (AST, {"first_layer": 3, "last_layer": 3}, "layers 3 to 3")])
def test_settings_that_do_not_fit_the_tower_are_errors(model, settings, message):
    with pytest.raises(ValueError, match=message):
        init_prompts(jax.random.key(0), PromptConfig(**settings), model)


@pytest.mark.parametrize("coupling", ["linear_shared", "per_layer", "independent"])
@pytest.mark.parametrize("side, own, rows", [("prefix", "pre", slice(0, 2)),
                                             ("suffix", "post", slice(2, 4))])
@pytest.mark.parametrize("model", [AST, HTSAT], ids=["ast", "htsat"])
def test_one_text_side_has_the_prompts_of_that_side_alone(model, side, own, rows, coupling):
    p, tuning = make(model, coupling=coupling, text_side=side, last_layer=3)
    assert tuning["text"]["prompts"].shape == (4, 2, 12)
    if coupling == "independent":
        assert p["text"].shape == (4, 2, 12)
        return
    assert {"pre", "post"} & set(p) == {own}
    assert tuning["text"]["prompts_mask"].tolist() == [[True] * 2] * 3 + [[False] * 2]
    config = PromptConfig(length=2, coupling=coupling)
    values = init_prompts(jax.random.key(0), config, model)
    alone = {k: v for k, v in values.items() if k in ("audio", own)}
    close(prompt_tuning(PromptConfig(length=2, coupling=coupling, text_side=side), model,
                        alone)["text"]["prompts"],
          prompt_tuning(config, model, values)["text"]["prompts"][:, rows])
