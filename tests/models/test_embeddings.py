"""What an embedding depends on, and what it must not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tail_jax.models.ast import ASTConfig
from tail_jax.models.bert import TextConfig
from tail_jax.models.dual_encoder import BUFFERS, DualEncoder
from tail_jax.models.htsat import HTSATConfig
from tail_jax.models.presets import preset
from tail_jax.models.transformer import BlockConfig
from tail_jax.tuning.prompts import PromptConfig, init_prompts, prompt_tuning

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEXT = TextConfig(vocab_size=30, width=12, layers=4, heads=3, hidden=20, max_positions=16)
MODELS = {
    "htsat": DualEncoder(HTSATConfig(spec_size=16, mels=8, patch=2, width=8, depths=(2, 2),
                                     heads=(2, 2), window=4), TEXT, embedding=10),
    "fused": DualEncoder(HTSATConfig(spec_size=16, mels=6, patch=4, stride=2, width=8,
                                     depths=(2, 2), heads=(2, 2), window=3, fusion=True,
                                     activation="silu", qkv_bias=False),
                         dataclasses.replace(TEXT, pool="mean"), embedding=10),
    "ast": DualEncoder(ASTConfig(frames=20, mels=12, patch=4, stride=3, width=12, layers=4,
                                 heads=3, hidden=20, epsilon=1e-5),
                       dataclasses.replace(TEXT, pool="cls", position_offset=0), embedding=10)}
BOTH = pytest.mark.parametrize("name", MODELS)
ROWS = 5


def randomised(tree, seed):
    """A tree of the same shapes, all values random, positive where they must be."""
    rng = np.random.default_rng(seed)

    def new(path, x):
        value = rng.normal(0, 0.3, x.shape)
        if path[-1].key in ("scale", "running_var", "input_std"):
            value = np.abs(value) + 0.7
        return value.astype(np.float32)

    return jax.tree_util.tree_map_with_path(new, tree)


@functools.cache
def setup(name):
    """(audio function, text function, batch) with random weights and prompts on every layer."""
    model = MODELS[name]
    params = randomised(jax.eval_shape(model.init, jax.random.key(0)), 1)
    config = PromptConfig(length=3)
    tuning = prompt_tuning(config, model, init_prompts(jax.random.key(2), config, model))
    audio = jax.jit(lambda x: model.encode_audio(params, tuning, x)["embedding"])
    text = jax.jit(lambda i, m: model.encode_text(params, tuning, i, m)["embedding"])
    rng = np.random.default_rng(3)
    lengths = np.array([9, 4, 1, 6, 2])
    mask = np.arange(9) < lengths[:, None]
    channels = (4,) * (name == "fused")
    batch = {"audio": rng.normal(0, 1, (ROWS, *channels, *model.audio.input_shape)),
             "token_ids": np.where(mask, rng.integers(4, 30, mask.shape), 1), "token_mask": mask}
    return audio, text, batch | {"audio": batch["audio"].astype(np.float32)}


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5, rtol=0)


@BOTH
def test_embedding_does_not_depend_on_batch_composition_or_order(name):
    audio, text, batch = setup(name)
    a, t = audio(batch["audio"]), text(batch["token_ids"], batch["token_mask"])
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(t, axis=1), 1, atol=1e-5)
    assert np.ptp(np.asarray(a), axis=0).max() > 0.01
    order = np.array([3, 0, 4, 2, 1])
    close(audio(batch["audio"][order]), a[order])
    close(text(batch["token_ids"][order], batch["token_mask"][order]), t[order])
    for i in (0, 4):
        close(audio(batch["audio"][i:i + 1]), a[i:i + 1])
        close(text(batch["token_ids"][i:i + 1], batch["token_mask"][i:i + 1]), t[i:i + 1])


@BOTH
def test_embedding_does_not_depend_on_padding_rows(name):
    audio, text, batch = setup(name)
    blank = {k: np.concatenate([v[:2], np.zeros_like(v[2:])]) for k, v in batch.items()}
    a, t = audio(blank["audio"]), text(blank["token_ids"], blank["token_mask"])
    close(a[:2], audio(batch["audio"])[:2])
    close(t[:2], text(batch["token_ids"], batch["token_mask"])[:2])
    assert np.isfinite(a).all() and np.isfinite(t).all()


def test_mask_of_a_fused_model_says_of_each_row_whether_its_parts_are_looked_at():
    model, batch = MODELS["fused"], setup("fused")[2]["audio"]
    params = randomised(jax.eval_shape(model.init, jax.random.key(0)), 7)
    encode = jax.jit(lambda *args: model.encode_audio(params, None, *args)["embedding"])
    longer, whole = np.array([True, False, True, False, False]), batch.copy()
    whole[:, 1:] = 0
    got, full, other = encode(batch, longer), encode(batch), encode(whole, longer)
    close(got[longer], full[longer])
    close(got[~longer], other[~longer])
    assert (np.abs(got - full)[~longer].max(1) > 0.01).all()
    assert (np.abs(got - other)[longer].max(1) > 0.01).all()
    close(encode(batch[:, 0]), encode(np.repeat(batch[:, :1], 4, 1)))


@BOTH
def test_text_embedding_does_not_depend_on_length_side_or_content_of_padding(name):
    _, text, batch = setup(name)
    ids, mask = batch["token_ids"], batch["token_mask"]
    expected = text(ids, mask)
    wide = [(0, 0), (0, 3)]
    close(text(np.pad(ids, wide, constant_values=1), np.pad(mask, wide)), expected)
    left = [(0, 0), (3, 0)]
    close(text(np.pad(ids, left, constant_values=1), np.pad(mask, left)), expected)
    close(text(np.where(mask, ids, 7), mask), expected)
    assert np.abs(text(np.where(mask, 7, ids), mask) - expected).max() > 0.01


@BOTH
def test_dropout_acts_only_with_a_key(name):
    plain = MODELS[name]
    model = dataclasses.replace(plain, audio=dataclasses.replace(plain.audio, dropout=0.4),
                                text=dataclasses.replace(plain.text, dropout=0.4))
    params = randomised(jax.eval_shape(model.init, jax.random.key(0)), 4)
    batch = setup(name)[2]

    @functools.partial(jax.jit, static_argnums=0)
    def both(model, key=None):
        a = model.encode_audio(params, None, batch["audio"], key=key)
        t = model.encode_text(params, None, batch["token_ids"], batch["token_mask"], key=key)
        return jnp.stack([a["embedding"], t["embedding"]])

    # This kind of key compiles several times faster.
    first, second = (jax.random.key(seed, impl="rbg") for seed in (1, 2))
    without, one = np.asarray(both(model)), np.asarray(both(model, first))
    assert (without == both(plain)).all()
    assert (one == both(model, first)).all()
    for other in (np.asarray(both(model, second)), without):
        assert (np.abs(one - other).max((1, 2)) > 0.01).all()


@BOTH
def test_statistics_get_no_gradient(name):
    model, batch = MODELS[name], setup(name)[2]
    params = randomised(jax.eval_shape(model.init, jax.random.key(0)), 5)
    loss = lambda p: model.encode_audio(p, None, batch["audio"])["embedding"].sum()
    found = 0
    for path, g in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params)["audio"]):
        if path[-1].key in BUFFERS:
            found += 1
            assert (np.asarray(g) == 0).all(), path
    assert found == (10 if name == "fused" else 2) and np.abs(g).max() > 0


@BOTH
def test_bfloat16_towers_give_float32_embeddings_close_to_those_of_float32(name):
    exact, batch = MODELS[name], setup(name)[2]
    model = dataclasses.replace(exact, dtype="bfloat16")
    params = randomised(jax.eval_shape(model.init, jax.random.key(0)), 6)
    a, b = (jax.jit(m.encode_audio)(params, None, batch["audio"]) for m in (model, exact))
    assert a["tokens"].dtype == jnp.bfloat16 and a["embedding"].dtype == jnp.float32
    assert ((a["embedding"] * b["embedding"]).sum(1) > 0.99).all()


# --- Descriptions -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mini-htsat", "mini-ast", "mini-eat", "clap-htsat-tiny",
                                  "ast-base", "eat-base"])
def test_description_survives_a_round_trip(name):
    assert DualEncoder.from_dict(preset(name).to_dict()) == preset(name)


@pytest.mark.parametrize("change, message", [
    ({"audio": {"kind": "wav2vec"}}, "model.audio.kind is 'wav2vec'"),
    ({"audio": {"kind": "ast", "mel": 3}}, r"model.audio has unknown keys \['mel'\]"),
    ({"text": {"pool": "max"}}, "text pool is 'max'"),
    ({"dtype": "float16"}, "model.dtype is 'float16'"),
    ({"width": 3}, r"model has unknown keys \['width'\]")])
def test_wrong_descriptions_are_errors_that_name_the_key(change, message):
    with pytest.raises(ValueError, match=message):
        DualEncoder.from_dict(MODELS["htsat"].to_dict() | change)
    with pytest.raises(ValueError, match="model has no .'text'."):
        DualEncoder.from_dict({"audio": {"kind": "ast"}})
    with pytest.raises(ValueError, match="no preset 'clap'"):
        preset("clap")


@pytest.mark.parametrize("make, message", [
    (lambda: HTSATConfig(depths=(2, 2)), "depths .* and heads .* differ"),
    (lambda: HTSATConfig(spec_size=250), r"must be a multiple of spec_size // mels .64. = 3"),
    (lambda: HTSATConfig(mels=300), r"must be a multiple of spec_size // mels .300. = 0"),
    (lambda: HTSATConfig(patch=5, stride=4), "patches of 5 with stride 4 do not tile"),
    (lambda: HTSATConfig(patch=(4, 2), stride=4), "patches of 2 with stride 4 do not tile"),
    (lambda: HTSATConfig(spec_size=192, patch=4, depths=(1,) * 6, heads=(4,) * 6),
     "48 patches a side cannot be halved 5 times"),
    (lambda: HTSATConfig(patch=128, depths=(1,), heads=(4,), fusion=True), "three patches of 128"),
    (lambda: ASTConfig(mels=12), "patch 16 is larger than the log-mel of 1024 frames and 12"),
    (lambda: TextConfig(positions="rows"), "text positions is 'rows'; expected 'tokens' or"),
    (lambda: BlockConfig(9, 3, 4, activation="selu"), "activation is 'selu'; expected one of"),
    (lambda: BlockConfig(10, 3, 4), "not divisible by heads 3"),
    (lambda: BlockConfig(9, 3, 4, "none"), "norm is 'none'")])
def test_impossible_shapes_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_inputs_of_the_wrong_shape_are_errors():
    model = MODELS["ast"]
    params = jax.eval_shape(model.init, jax.random.key(0))
    shape = jax.ShapeDtypeStruct
    encode = lambda m, p, x: jax.eval_shape(lambda p, x: m.encode_audio(p, None, x), p, x)
    with pytest.raises(ValueError, match=r"this model takes \(20, 12\)"):
        encode(model, params, shape((2, 21, 12), jnp.float32))
    htsat = MODELS["htsat"]
    with pytest.raises(ValueError, match="at most 32 frames of 8 mels"):
        encode(htsat, jax.eval_shape(htsat.init, jax.random.key(0)),
               shape((2, 33, 8), jnp.float32))
    for audio in ((2, 4, 32, 8), (32, 8), (2, 32, 7)):
        with pytest.raises(ValueError, match="takes at most 32 frames of 8 mels"):
            encode(htsat, jax.eval_shape(htsat.init, jax.random.key(0)), shape(audio, jnp.float32))
    fused = MODELS["fused"]
    for audio in ((2, 3, 32, 6), (2, 4, 33, 6)):
        with pytest.raises(ValueError, match="one or four spectrograms of at most 32 frames of 6"):
            encode(fused, jax.eval_shape(fused.init, jax.random.key(0)), shape(audio, jnp.float32))
    with pytest.raises(ValueError, match="17 tokens, but the position table holds 16"):
        jax.eval_shape(lambda p, i, m: model.encode_text(p, None, i, m), params,
                       shape((2, 17), jnp.int32), shape((2, 17), jnp.bool_))
