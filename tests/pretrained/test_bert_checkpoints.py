"""BERT and RoBERTa folders as transformers saves them."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import safetensors.numpy  # noqa: E402

from tail_jax import pretrained  # noqa: E402
from tests.models.parity import close, randomise, tokens  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, intermediate_size=48,
             num_attention_heads=4, max_position_embeddings=16)


def make(name, seed=0, **options):
    kind = "Bert" if name.startswith("Bert") else "Roberta"
    config = getattr(transformers, f"{kind}Config")(**SMALL | options)
    return randomise(getattr(transformers, name)(config), seed)


def mean(theirs, ids, mask):
    """The issue's vector: mean of the last layer over valid tokens, unit length."""
    hidden = theirs(torch.tensor(ids).long(), torch.tensor(mask).long()).last_hidden_state
    weight = torch.tensor(mask)[..., None]
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name, options", [
    ("BertModel", {}),
    ("BertModel", dict(hidden_act="gelu_new", num_attention_heads=1, type_vocab_size=1)),
    ("RobertaModel", {}),
    ("RobertaModel", dict(pad_token_id=3, hidden_act="relu", layer_norm_eps=1e-2,
                          num_hidden_layers=3))])
def test_vectors_equal_transformers(tmp_path, name, options, padding):
    theirs = make(name, **options)
    theirs.save_pretrained(tmp_path)
    description, params = pretrained.load(tmp_path)
    ids, mask = tokens(3, 50, padding=padding, pad=theirs.config.pad_token_id)
    got = jax.jit(description.model.encode_text)(params, None, ids, mask)
    close(got["embedding"], mean(theirs, ids, mask))
    expected = 16 if name.startswith("Bert") else 15 - theirs.config.pad_token_id
    assert description.max_tokens == expected
    assert description.front_end is None and set(params) == {"text"}


@pytest.mark.parametrize("name", [
    "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification",
    "BertForQuestionAnswering", "RobertaForMaskedLM", "RobertaForSequenceClassification",
    "RobertaForTokenClassification"])
def test_heads_are_left_out(tmp_path, name):
    theirs = make(name)
    theirs.save_pretrained(tmp_path)
    description, params = pretrained.load(tmp_path)
    word = theirs.base_model.embeddings.word_embeddings.weight.detach().numpy()
    np.testing.assert_array_equal(params["text"]["word"]["embedding"], word)
    norm = theirs.base_model.encoder.layer[1].output.LayerNorm.weight.detach().numpy()
    np.testing.assert_array_equal(params["text"]["encoder"]["layer_01"]["norm2"]["scale"], norm)


def test_the_oldest_spellings_are_known(tmp_path):
    """Files of 2019 call the norms' arrays gamma and beta, and have position ids."""
    theirs = make("BertForPreTraining")
    theirs.save_pretrained(tmp_path)
    same = pretrained.load(tmp_path)[1]
    arrays = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"): torch.tensor(v) for k, v in arrays.items()}
    assert any("gamma" in key for key in old)
    old["bert.embeddings.position_ids"] = torch.arange(16)[None]
    (tmp_path / "model.safetensors").unlink()
    torch.save(old, tmp_path / "pytorch_model.bin")
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(tmp_path)[1], same)


@pytest.mark.parametrize("modes, expected", [
    (["mean_tokens"], "mean"), (["cls_token"], "cls"), (["max_tokens"], None),
    (["cls_token", "mean_tokens"], None), ([], None)])
def test_sentence_transformers_choose_their_pooling(tmp_path, modes, expected):
    make("BertModel").save_pretrained(tmp_path)
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
               for i, (kind, path) in enumerate(kinds.items())]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(
        {f"pooling_mode_{m}": m in modes for m in ("cls_token", "mean_tokens", "max_tokens")}))
    if expected:
        assert pretrained.describe(tmp_path)[0].model.text.pool == expected
    else:
        with pytest.raises(ValueError, match="1_Pooling/config.json: asks for .*supported: one of"):
            pretrained.describe(tmp_path)
    modules.append({"path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="modules.json: has a module 'Dense'"):
        pretrained.describe(tmp_path)
    (tmp_path / "modules.json").write_text("[3]")
    with pytest.raises(ValueError, match="modules.json: has an entry 3; expected objects"):
        pretrained.describe(tmp_path)


def test_the_tokenizer_may_cut_earlier_than_the_positions_end(tmp_path):
    make("BertModel").save_pretrained(tmp_path)
    longest = pretrained.describe(tmp_path)[0].max_tokens
    for value, expected in ((7, 7), (10**30, longest), (None, longest)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": value}))
        assert pretrained.describe(tmp_path)[0].max_tokens == expected
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": "long"}')
    with pytest.raises(ValueError, match="tokenizer_config.json: option model_max_length is"):
        pretrained.describe(tmp_path)


@pytest.mark.parametrize("option, value", [
    ("hidden_act", "tanh"), ("position_embedding_type", "relative_key_query"),
    ("is_decoder", True), ("num_attention_heads", 3), ("hidden_size", "wide")])
def test_options_that_are_not_supported_are_named(tmp_path, option, value):
    make("BertModel").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {option: value}))
    with pytest.raises(ValueError, match=f"config.json: (option {option} is|not supported: width)"):
        pretrained.load(tmp_path)


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("embeddings.LayerNorm.weight"), "no embeddings.LayerNorm.weight"),
    (lambda t: t.update({"encoder.layer.2.output.dense.bias": np.zeros(32, np.float32)}),
     "unknown encoder.layer.2.output.dense.bias"),
    (lambda t: t.update({"embeddings.word_embeddings.weight": np.zeros((5, 32), np.float32)}),
     r"wrong shape: .*word_embeddings.weight is \[5, 32\], the configuration asks for \[50, 32\]")])
def test_weights_that_do_not_fit_are_listed(tmp_path, change, message):
    make("BertModel").save_pretrained(tmp_path)
    arrays = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    change(arrays)
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"model.safetensors: .*{message}"):
        pretrained.load(tmp_path)
