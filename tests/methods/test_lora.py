"""LoRA: neutral at the start, the dense update it stands for, and PTAT's distillation beside it."""

import functools

import jax
import numpy as np
import pytest

from tail_jax import losses, methods
from tail_jax.models.ast import ASTConfig
from tail_jax.models.bert import TextConfig
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.htsat import HTSATConfig
from tail_jax.models.presets import preset
from tail_jax.tuning.masks import count

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEXT = TextConfig(vocab_size=20, width=8, layers=2, heads=2, hidden=12, max_positions=16)
MODELS = {
    "ast": DualEncoder(ASTConfig(frames=12, mels=8, patch=4, stride=4, width=6, layers=3, heads=2,
                                 hidden=12, epsilon=1e-5), TEXT, embedding=6),
    "htsat": DualEncoder(HTSATConfig(spec_size=16, mels=8, patch=2, width=6, depths=(1, 2),
                                     heads=(2, 2), window=4), TEXT, embedding=6)}
TOWERS = pytest.mark.parametrize("tower", MODELS)


@functools.cache
def params(tower):
    return jax.device_get(jax.jit(MODELS[tower].init)(jax.random.key(0)))


@functools.cache
def batch(tower):
    rng = np.random.default_rng(1)
    return {"audio": rng.normal(0, 3, (3, *MODELS[tower].audio.input_shape)).astype(np.float32),
            "token_ids": rng.integers(0, 20, (3, 7)).astype(np.int32),
            "token_mask": np.arange(7) < np.array([7, 3, 5])[:, None]}


@functools.cache
def encode(tower, side):
    return jax.jit(functools.partial(MODELS[tower].encode, side))


def setup(tower, **settings):
    method = methods.build({"name": "lora", "rank": 2} | settings)
    return method, method.init(jax.random.key(3), MODELS[tower], params(tower))["trainable"]


@TOWERS
def test_lora_starts_as_the_unprompted_model(tower):
    method, trainable = setup(tower)
    resolved, tuning = method.resolve(MODELS[tower], trainable, params(tower))
    for side in ("audio", "text"):
        out = encode(tower, side)(resolved, tuning, batch(tower))["embedding"]
        bare = encode(tower, side)(params(tower), None, batch(tower))["embedding"]
        np.testing.assert_allclose(out, bare, atol=1e-6)
    a = np.concatenate([np.ravel(x) for x in jax.tree.leaves(trainable["lora"]["audio"])
                        if np.any(x)])
    assert 0 < np.abs(a).max() <= 6**-0.5


@TOWERS
def test_lora_is_the_dense_weight_plus_a_b(tower):
    method, trainable = setup(tower, alpha=3.0, layers=("query", "key", "value", "out"))
    rng = np.random.default_rng(4)
    trainable["lora"] = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32),
                                     trainable["lora"])
    merged = jax.tree.map(np.copy, params(tower))
    for side, layers in trainable["lora"].items():
        blocks = merged[side]["encoder"] if "encoder" in merged[side] else {
            name: stage["block"] for name, stage in merged[side].items()
            if name.startswith("stage_")}
        for name, p in layers.items():
            flat = lambda x: [m for stage in (x if isinstance(x, list) else [x]) for m in stage]
            for block, a, b in zip(sorted(blocks), flat(p["a"]), flat(p["b"]), strict=True):
                blocks[block][name]["kernel"] += 1.5 * a @ b  # alpha / rank
    resolved, tuning = method.resolve(MODELS[tower], trainable, params(tower))
    for side in ("audio", "text"):
        out = encode(tower, side)(resolved, tuning, batch(tower))["embedding"]
        expected = encode(tower, side)(merged, None, batch(tower))["embedding"]
        np.testing.assert_allclose(out, expected, atol=2e-5)
        bare = encode(tower, side)(params(tower), None, batch(tower))["embedding"]
        assert np.abs(out - bare).max() > 1e-3


def test_lora_of_clap_has_two_matrices_for_each_query_and_value():
    model = preset("clap-htsat-tiny")
    method = methods.build(methods.defaults("lora"))
    tree = jax.eval_shape(lambda key: method.init_tuning(key, model), jax.random.key(0))
    widths = [d for layers, d in model.audio.layer_widths for _ in range(layers)] + [768] * 12
    assert count(tree) == sum(2 * 2 * 4 * d for d in widths)


@pytest.mark.parametrize("settings, message", [
    ({"rank": 0}, "method.rank is 0"), ({"layers": ("upper",)}, "method.layers is"),
    ({"layers": ()}, "method.layers is")])
def test_wrong_lora_settings_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        methods.build({"name": "lora"} | settings)


def test_distilled_lora_adds_the_terms_of_ptat():
    method = methods.build({"name": "lora_distil", "rank": 2, "feature_weight": 3.0,
                            "similarity_weight": 0.5})
    model = MODELS["ast"]
    state = method.begin_task(method.init(jax.random.key(3), model, params("ast")), 1, None)
    rng = np.random.default_rng(5)
    o = rng.normal(size=(4, 3, 6)).astype(np.float32)
    o = dict(zip(("audio", "text", "teacher_audio", "teacher_text"),
                 o / np.linalg.norm(o, axis=-1, keepdims=True)))
    rows = {"clip_id": np.arange(3), "caption_key": np.arange(3), "mask": np.ones(3, bool)}
    loss, m = method.objective(model, state["trainable"], params("ast"), state["aux"], o, rows)
    feature = sum(float(losses.feature_distillation(o[side], o[f"teacher_{side}"], rows["mask"],
                                                    2.0)) for side in ("audio", "text"))
    assert float(m["feature"]) == pytest.approx(feature, rel=1e-5) and m["similarity"] > 0.01
    assert float(loss) == pytest.approx(
        float(m["retrieval"]) + 0.5 * float(m["similarity"]) + 3 * feature, rel=1e-5)
    assert jax.tree.structure(state["aux"]["teacher"]) == jax.tree.structure(state["trainable"])
    with pytest.raises(ValueError, match="method.feature_form is 'l1'"):
        methods.build({"name": "lora_distil", "feature_form": "l1"})
