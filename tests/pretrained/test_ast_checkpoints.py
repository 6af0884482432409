"""AST folders as transformers saves them, and in the spelling of the published ones."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import safetensors.numpy  # noqa: E402

from tail_jax import pretrained  # noqa: E402
from tests.models.parity import close, randomise  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
             max_length=50, num_mel_bins=27, patch_size=8, frequency_stride=5, time_stride=5)


def make(name="ASTModel", seed=0, **options):
    config = transformers.ASTConfig(**SMALL | options)
    return randomise(getattr(transformers, name)(config), seed)


def unit(pooled):
    return torch.nn.functional.normalize(pooled, dim=-1)


@pytest.mark.parametrize("options", [
    {}, dict(max_length=33, num_mel_bins=40, frequency_stride=8, time_stride=3),
    dict(qkv_bias=False, hidden_act="gelu_new", num_attention_heads=2, layer_norm_eps=1e-3)],
    ids=["square", "strides", "options"])
@pytest.mark.parametrize("extractor", [None, {"mean": -2.5, "std": 3.0}, {"do_normalize": False}])
def test_vectors_equal_transformers(tmp_path, options, extractor):
    theirs = make(**options)
    theirs.save_pretrained(tmp_path)
    frames, mels = theirs.config.max_length, theirs.config.num_mel_bins
    normalise = transformers.ASTFeatureExtractor(
        max_length=frames, num_mel_bins=mels, **extractor or {})
    if extractor:
        normalise.save_pretrained(tmp_path)
    description, params = pretrained.load(tmp_path)
    audio = np.random.default_rng(1).normal(-4, 9, (3, frames, mels)).astype(np.float32)
    values = normalise.normalize(audio) if normalise.do_normalize else audio
    expected = theirs(torch.tensor(values, dtype=torch.float32))
    got = jax.jit(description.model.encode_audio)(params, None, audio)
    close(got["tokens"], expected.last_hidden_state)
    close(got["embedding"], unit(expected.pooler_output))
    assert description.max_tokens == 0 and set(params) == {"audio"}


def test_waveforms_give_the_vectors_of_their_extractor(tmp_path):
    theirs, extractor = make(), transformers.ASTFeatureExtractor(max_length=50, num_mel_bins=27)
    theirs.save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    description, params = pretrained.load(tmp_path)
    front_end = description.front_end
    assert front_end.input_shape == (50, 27)
    assert front_end.window_samples == 400 + 49 * 160
    encode = jax.jit(description.model.encode_audio)
    for samples in (front_end.window_samples, 3210):
        wave = np.random.default_rng(samples).normal(0, 0.1, samples).astype(np.float32)
        inputs = extractor(wave, sampling_rate=16000, return_tensors="pt")
        expected = unit(theirs(**inputs).pooler_output).detach().numpy()
        got = np.asarray(encode(params, None, front_end.rows(wave))["embedding"])
        assert (got * expected).sum() > 0.9999


def test_the_published_spelling_is_known(tmp_path):
    theirs = make("ASTForAudioClassification")
    theirs.save_pretrained(tmp_path)
    arrays = {k: v.numpy() for k, v in theirs.state_dict().items()}
    dense = {"attention.q_proj": "attention.attention.query",
             "attention.k_proj": "attention.attention.key",
             "attention.v_proj": "attention.attention.value",
             "attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense",
             "mlp.fc2": "output.dense", "transformer.layers.": "transformer.encoder.layer."}
    old = {}
    for key, array in arrays.items():
        for new, published in dense.items():
            key = key.replace(new, published)
        old[key] = array
    assert {k for k in old if "layer.1" in k and k.endswith("weight")} == {
        f"audio_spectrogram_transformer.encoder.layer.1.{name}.weight" for name in (
            "attention.attention.query", "attention.attention.key", "attention.attention.value",
            "attention.output.dense", "intermediate.dense", "output.dense", "layernorm_before",
            "layernorm_after")}
    loaded = []
    for tensors in (arrays, old):
        safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
        loaded.append(pretrained.load(tmp_path)[1])
    jax.tree.map(np.testing.assert_array_equal, *loaded)
    np.testing.assert_array_equal(
        loaded[0]["audio"]["encoder"]["layer_01"]["down"]["kernel"].T,
        arrays["audio_spectrogram_transformer.layers.1.mlp.fc2.weight"])


@pytest.mark.parametrize("file, option, value", [
    ("config.json", "hidden_act", "tanh"), ("config.json", "patch_size", [8, 8]),
    ("config.json", "num_attention_heads", 5), ("config.json", "patch_size", 99),
    ("preprocessor_config.json", "sampling_rate", 32000),
    ("preprocessor_config.json", "max_length", 51),
    ("preprocessor_config.json", "num_mel_bins", 26)])
def test_options_that_are_not_supported_are_named(tmp_path, file, option, value):
    make().save_pretrained(tmp_path)
    transformers.ASTFeatureExtractor(max_length=50, num_mel_bins=27).save_pretrained(tmp_path)
    config = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(config | {option: value}))
    with pytest.raises(ValueError, match=f"{file}: (option {option} is|not supported: )"):
        pretrained.load(tmp_path)
