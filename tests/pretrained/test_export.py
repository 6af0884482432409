"""Exported folders, loaded by transformers."""

import dataclasses

import jax
import numpy as np
import pytest

from data_pipelines.front_end import CLAP, CLAP_FUSED, FrontEnd, WaveformSettings
from data_pipelines.text import Tokenizer
from tail_jax import pretrained
from tail_jax.models.ast import ASTConfig
from tail_jax.models.bert import TextConfig
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.htsat import HTSATConfig
from tail_jax.pretrained.export import export_clap

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEXTS = ["a dog barks", "Rain.", "", "wind in the trees, and a bird", "naïve 鳥"]
AUDIO = HTSATConfig(spec_size=32, mels=16, patch=2, width=16, depths=(1, 2), heads=(2, 4),
                    window=4)
TEXT = TextConfig(vocab_size=300, width=32, layers=2, heads=4, hidden=48, max_positions=24,
                  epsilon=1e-5)
TINY = dict(sampling_rate=8000, n_fft=256, hop_length=160, n_mels=16, fmin=50.0, fmax=3900.0)
FRONT_ENDS = {fusion: FrontEnd(dataclasses.replace(settings, **TINY), 1.0, fusion)
              for fusion, settings in ((False, CLAP), (True, CLAP_FUSED))}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 300)


def parameters(model, seed=0):
    """Everything changed, as after a full fine-tuning: statistics and temperature too."""
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: random.uniform(0.3, 2, leaf.shape) if "running_var" in str(path)
        else random.normal(0, 0.2, leaf.shape), shapes)
    params["logit_scale"] = np.asarray(1.7)
    return jax.tree.map(lambda a: np.asarray(a, np.float32), params)


@pytest.mark.parametrize("audio, text, model", [
    (dict(), dict(), dict(embedding=9)),
    (dict(fusion=True, fusion_ratio=3, patch=4, stride=2, window=5, activation="relu"),
     dict(activation="gelu_tanh", layers=1, type_vocab_size=2),
     dict(embedding=20, head_activation="silu")),
    (dict(patch=(4, 2), stride=(2, 2), qkv_bias=False, patch_norm=False, mlp_ratio=2.5,
          epsilon=1e-2), dict(epsilon=1e-2), dict(embedding=12, head_activation="gelu"))],
    ids=["unfused", "fused", "odd"])
def test_transformers_gives_equal_embeddings_and_logits(tmp_path, tokenizer, audio, text, model):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = DualEncoder(dataclasses.replace(AUDIO, **audio), dataclasses.replace(TEXT, **text),
                        **model)
    params, front_end = parameters(model), FRONT_ENDS[model.audio.fusion]
    folder = export_clap(model, params, front_end, tokenizer, tmp_path / "a" / "clap")
    theirs, info = transformers.ClapModel.from_pretrained(folder, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(key.endswith(("position_ids", "token_type_ids", "relative_position_index",
                             "num_batches_tracked")) for key in info["missing_keys"])
    processor = transformers.ClapProcessor.from_pretrained(folder)
    random = np.random.default_rng(1)
    waves = [random.normal(0, 0.1, n).cumsum().astype(np.float32) / 9 for n in (8000, 3000)]
    # One at a time: with several short clips, their extractor draws the one that is fused.
    features = [processor.feature_extractor(w, sampling_rate=8000, return_tensors="pt")
                for w in waves]
    tokens = processor.tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = theirs.eval()(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"],
            input_features=torch.cat([f["input_features"] for f in features]).float(),
            is_longer=torch.cat([f["is_longer"] for f in features]))
    ids, mask = tokenizer.encode(TEXTS, tokens["input_ids"].shape[1])
    np.testing.assert_array_equal(ids, tokens["input_ids"])
    np.testing.assert_array_equal(mask, tokens["attention_mask"].bool())
    a = model.encode_audio(params, None, np.concatenate([front_end.rows(w) for w in waves]))
    t = model.encode_text(params, None, ids, mask)
    a, t = np.asarray(a["embedding"]), np.asarray(t["embedding"])
    np.testing.assert_allclose(a, expected.audio_embeds, atol=1e-4)
    np.testing.assert_allclose(t, expected.text_embeds, atol=1e-4)
    logits = np.exp(params["logit_scale"]) * a @ t.T
    np.testing.assert_allclose(logits, expected.logits_per_audio, atol=1e-3)
    np.testing.assert_allclose(logits.T, expected.logits_per_text, atol=1e-3)


@pytest.mark.parametrize("fusion", [False, True])
def test_an_exported_folder_loads_here_as_what_it_was(tmp_path, tokenizer, fusion):
    model = DualEncoder(dataclasses.replace(AUDIO, stride=(2, 2), fusion=fusion), TEXT, embedding=9)
    params, front_end = parameters(model), FRONT_ENDS[fusion]
    export_clap(model, params, front_end, tokenizer, tmp_path / "clap", max_tokens=15)
    description, again = pretrained.load(tmp_path / "clap")
    assert description.front_end == front_end and description.max_tokens == 15
    assert description.model == model
    jax.tree.map(np.testing.assert_array_equal, again, params)
    for one, two in zip(Tokenizer.load(tmp_path / "clap").encode(TEXTS, 20),
                        tokenizer.encode(TEXTS, 20)):
        np.testing.assert_array_equal(one, two)
    assert [p.name for p in tmp_path.iterdir()] == ["clap"], "a temporary folder was left"


@pytest.mark.parametrize("change, message", [
    (lambda m: dataclasses.replace(m, audio=ASTConfig(frames=50, mels=16)),
     "a model of ASTConfig and TextConfig cannot be a CLAP folder"),
    (lambda m: dataclasses.replace(m, text=None), "a model of HTSATConfig cannot be a CLAP"),
    (lambda m: dataclasses.replace(m, head="residual"), "model.head is 'residual'.*'mlp'"),
    (lambda m: dataclasses.replace(m, text=dataclasses.replace(TEXT, pool="mean")),
     "text pool is 'mean', which a CLAP folder cannot say; expected 'pooler'"),
    (lambda m: dataclasses.replace(m, text=dataclasses.replace(TEXT, positions="columns")),
     "text positions is 'columns'"),
    (lambda m: dataclasses.replace(m, text=dataclasses.replace(TEXT, position_offset=0)),
     "text position_offset is 0, .* expected 2"),
    (lambda m: dataclasses.replace(m, text=dataclasses.replace(TEXT, vocab_size=200)),
     "the tokenizer has 299 tokens, the model 200"),
    (lambda m: dataclasses.replace(m, audio=dataclasses.replace(AUDIO, window=9)),
     "HTSAT's window is 9, .* expected 8"),
    (lambda m: dataclasses.replace(m, audio=dataclasses.replace(AUDIO, fusion=True)),
     "front end's fusion is False, .* expected True"),
])
def test_models_that_the_layout_cannot_hold_are_refused(tmp_path, tokenizer, change, message):
    model = change(DualEncoder(AUDIO, TEXT, embedding=9))
    with pytest.raises(ValueError, match=message):
        export_clap(model, {}, FRONT_ENDS[False], tokenizer, tmp_path / "clap")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("front_end, message", [
    (FrontEnd(WaveformSettings(), 1.0), "a front end of waveforms"),
    (dataclasses.replace(FRONT_ENDS[False], window_seconds=0.5), "front end's window is 0.5"),
    (FrontEnd(dataclasses.replace(CLAP, fill="frames", center=False), 1.0),
     "front end's fill is 'frames', .* expected 'repeatpad' or 'repeat' or 'zeros'"),
    (FrontEnd(dataclasses.replace(CLAP, mel_scale="htk"), 1.0),
     "front end's mel_scale is 'htk', .* expected 'slaney'"),
    (FrontEnd(dataclasses.replace(CLAP, floor=1e-5), 1.0), "front end's floor is 1e-05"),
])
def test_front_ends_that_the_layout_cannot_hold_are_refused(tmp_path, tokenizer, front_end,
                                                            message):
    with pytest.raises(ValueError, match=message):
        export_clap(DualEncoder(AUDIO, TEXT), {}, front_end, tokenizer, tmp_path / "clap")
    assert not any(tmp_path.iterdir())


def test_nothing_is_left_of_an_export_that_fails_and_nothing_is_overwritten(tmp_path, tokenizer):
    model = DualEncoder(AUDIO, TEXT, embedding=9)
    with pytest.raises(LookupError):
        export_clap(model, {"novel": np.zeros(2)}, FRONT_ENDS[False], tokenizer, tmp_path / "clap")
    assert not any(tmp_path.iterdir())
    (tmp_path / "clap").mkdir()
    (tmp_path / "clap" / "mine").write_text("")
    with pytest.raises(ValueError, match="clap: exists and is not an empty folder"):
        export_clap(model, {}, FRONT_ENDS[False], tokenizer, tmp_path / "clap")
