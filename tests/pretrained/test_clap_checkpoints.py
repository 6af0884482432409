"""CLAP folders as transformers saves them, and what is said of those that are not."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import safetensors.numpy  # noqa: E402

from data_pipelines.text import Tokenizer  # noqa: E402
from tail_jax import pretrained  # noqa: E402
from tests.models.parity import close, randomise, tokens  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEXT = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, intermediate_size=48,
            num_attention_heads=4, max_position_embeddings=20)
AUDIO = dict(spec_size=32, num_mel_bins=16, patch_size=2, patch_stride=[2, 2], window_size=4,
             patch_embeds_hidden_size=16, hidden_size=32, depths=[1, 2], num_hidden_layers=2,
             num_attention_heads=[2, 4])
FUSED = dict(enable_fusion=True, fusion_type="aff_2d")
# name: (options of text, of audio, of both, frames)
CONFIGS = {
    "unfused": ({}, {}, {}, 59),
    "fused": ({}, FUSED, dict(projection_dim=7), 64),
    "odd depths": (dict(num_hidden_layers=1, pad_token_id=3, type_vocab_size=2),
                   dict(depths=[1, 3, 1], num_attention_heads=[1, 2, 4], hidden_size=64),
                   dict(projection_dim=24, projection_hidden_act="gelu"), 64),
    "odd windows": (dict(hidden_act="relu", layer_norm_eps=1e-3),
                    dict(window_size=3, qkv_bias=False, enable_patch_layer_norm=False,
                         hidden_act="gelu_new", mlp_ratio=2.5, layer_norm_eps=1e-2), {}, 33),
    "strides": ({}, FUSED | dict(patch_size=[6, 4], patch_stride=[2, 2], aff_block_r=3), {}, 64),
}


def make(text={}, audio={}, both={}, seed=0):
    return randomise(transformers.ClapModel(transformers.ClapConfig(
        text_config=TEXT | text, audio_config=AUDIO | audio, **dict(projection_dim=20) | both)),
        seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model that every test may copy and spoil."""
    folder = tmp_path_factory.mktemp("clap")
    make().save_pretrained(folder)
    return folder


@pytest.fixture
def spoiled(folder, tmp_path):
    """spoiled(config=..., tensors=...) -> a copy of `folder` that both functions have changed."""

    def copy(config=lambda c: None, arrays=lambda t: None):
        options = json.loads((folder / "config.json").read_text())
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        config(options)
        arrays(tensors)
        (tmp_path / "config.json").write_text(json.dumps(options))
        safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return copy


@pytest.mark.parametrize("name", CONFIGS)
def test_embeddings_equal_transformers(tmp_path, name):
    text, audio, both, frames = CONFIGS[name]
    theirs = make(text, audio, both)
    theirs.save_pretrained(tmp_path)
    description, params = pretrained.load(tmp_path)
    model, random = description.model, np.random.default_rng(1)
    shape = (3, 4, frames, 16) if model.audio.fusion else (3, frames, 16)
    features = random.normal(-20, 15, shape).astype(np.float32)
    ids, mask = tokens(2, 50, pad=theirs.config.text_config.pad_token_id)
    expected = theirs(
        input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long(),
        input_features=torch.tensor(features if model.audio.fusion else features[:, None]),
        is_longer=torch.ones(3, 1).bool())
    close(jax.jit(model.encode_audio)(params, None, features)["embedding"], expected.audio_embeds)
    close(jax.jit(model.encode_text)(params, None, ids, mask)["embedding"], expected.text_embeds)
    close(params["logit_scale"], theirs.logit_scale_a)
    assert description.max_tokens == 20 - 1 - theirs.config.text_config.pad_token_id


@pytest.mark.parametrize("old", [False, True], ids=["preprocessor", "processor"])
@pytest.mark.parametrize("fusion, padding", [(False, "repeatpad"), (False, "repeat"),
                                             (True, "pad")])
def test_waveforms_give_the_vectors_of_their_processor(tmp_path, fusion, padding, old):
    theirs = make(audio=FUSED if fusion else {})
    theirs.save_pretrained(tmp_path)
    extractor = transformers.ClapFeatureExtractor(
        feature_size=16, sampling_rate=8000, hop_length=160, max_length_s=1, fft_window_size=256,
        frequency_min=50, frequency_max=3900, padding=padding,
        truncation="fusion" if fusion else "rand_trunc")
    extractor.save_pretrained(tmp_path)
    if not old:
        options = json.loads((tmp_path / "preprocessor_config.json").read_text())
        (tmp_path / "preprocessor_config.json").unlink()
        (tmp_path / "processor_config.json").write_text(json.dumps({"feature_extractor": options}))
    description, params = pretrained.load(tmp_path)
    assert description.front_end.sampling_rate == 8000
    encode = jax.jit(description.model.encode_audio)
    for samples in (8000, 2900):
        wave = np.random.default_rng(samples).normal(0, 0.1, samples).cumsum() / 9
        inputs = extractor(wave, sampling_rate=8000, return_tensors="pt")
        expected = theirs.get_audio_features(
            inputs["input_features"].float(), is_longer=inputs["is_longer"]).pooler_output
        rows = description.front_end.rows(wave.astype(np.float32))
        got = np.asarray(encode(params, None, rows)["embedding"])
        assert (got @ expected.detach().numpy().T).item() > 0.9999


def test_published_folders_have_the_published_front_end(folder, tmp_path):
    front_end = pretrained.describe(folder)[0].front_end
    s = front_end.settings
    assert (s.sampling_rate, s.n_fft, s.hop_length, s.fmin, s.fmax) == (48000, 1024, 480, 50, 14000)
    assert (s.mel_scale, s.norm, s.fill) == ("slaney", "slaney", "repeatpad")
    assert front_end.window_seconds == 0.63  # the tiny model takes 64 frames
    make(audio=FUSED | dict(spec_size=256, num_mel_bins=64, patch_stride=[4, 4], patch_size=4,
                            window_size=8)).save_pretrained(tmp_path)
    front_end = pretrained.describe(tmp_path)[0].front_end
    assert front_end.fusion and front_end.window_seconds == 10
    assert (front_end.settings.mel_scale, front_end.settings.norm) == ("htk", None)


def test_a_tokenizer_may_cut_texts_before_the_position_table(spoiled):
    path = spoiled()
    for length, expected in ((12, 12), (10**30, 18), (None, 18)):
        (path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": length}))
        assert pretrained.describe(path)[0].max_tokens == expected


def test_older_spellings_are_known(spoiled):
    """Files of before transformers 4.31 have position ids; base models lie behind a prefix."""
    def older(tensors):
        tensors |= {f"clap.{key}": tensors.pop(key) for key in [*tensors]}
        tensors["clap.text_model.embeddings.position_ids"] = np.arange(20)[None]

    got, same = pretrained.load(spoiled(arrays=older))[1], pretrained.load(spoiled())[1]
    jax.tree.map(np.testing.assert_array_equal, got, same)


def test_ignored_arrays_are_all_that_stays_unused(folder):
    description, tensors = pretrained.describe(folder)
    shapes = jax.eval_shape(description.model.init, jax.random.key(0))
    parameters = sum(a.size for a in jax.tree.leaves(shapes))
    unused = ("position_ids", "token_type_ids", "relative_position_index", "num_batches_tracked")
    theirs = sum(int(np.prod(shape)) for key, shape in tensors.shapes.items()
                 if not key.endswith(unused))
    assert parameters == theirs - 1  # two temperatures there, one here


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("text_model.pooler.dense.bias"), "no text_model.pooler.dense.bias"),
    (lambda t: t.update(novel=np.zeros(2)), "unknown novel"),
    (lambda t: t.update({"audio_model.audio_encoder.norm.weight": np.zeros(5)}),
     r"wrong shape: audio_model.audio_encoder.norm.weight is \[5\].* asks for \[32\]"),
])
def test_weights_that_do_not_fit_are_listed(spoiled, change, message):
    with pytest.raises(ValueError, match=message) as error:
        pretrained.load(spoiled(arrays=change))
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize("section, option, value, message", [
    ("text_config", "hidden_act", "tanh", "supported: 'gelu', "),
    ("text_config", "position_embedding_type", "relative_key", "supported: 'absolute'"),
    ("text_config", "is_decoder", True, "supported: False"),
    ("text_config", "num_attention_heads", 5, "width 32 is not divisible by heads 5"),
    ("text_config", "hidden_size", 0, "expected a whole number above 0"),
    ("text_config", "layer_norm_eps", [1e-5], "expected a finite number, 0 or more"),
    ("text_config", "pad_token_id", "<pad>", "expected a whole number above -1"),
    ("text_config", "pad_token_id", 19, "max_positions 20 leaves no position"),
    ("audio_config", "mlp_ratio", 0, "mlp_ratio 0.0 leaves nothing of width 16"),
    ("audio_config", "aff_block_r", 17, "fusion_ratio 17 leaves nothing of width 16"),
    ("audio_config", "hidden_act", "quick_gelu", "supported: 'gelu', "),
    ("audio_config", "fusion_type", "channel_map", "supported: None, 'aff_2d'"),
    ("audio_config", "patch_embed_input_channels", 3, "supported: 1"),
    ("audio_config", "flatten_patch_embeds", False, "supported: True"),
    ("audio_config", "hidden_size", 31, "supported: 32"),
    ("audio_config", "spec_size", 15, "mels"),
    ("audio_config", "num_attention_heads", [3, 4], "width 16 is not divisible by heads 3"),
    ("audio_config", "depths", [1], "differ in length"),
    (None, "projection_hidden_act", "tanh", "supported: 'gelu', "),
    (None, "projection_dim", "wide", "expected a whole number above 0"),
    (None, "audio_config", [1], "expected an object"),
    (None, "model_type", "clip", "supported: clap, "),
    (None, "model_type", ["clap"], "supported: clap, "),
])
def test_options_that_are_not_supported_are_named(spoiled, section, option, value, message):
    def change(config):
        config["audio_config"]["enable_fusion"] = option in ("fusion_type", "aff_block_r")
        (config[section] if section else config)[option] = value

    with pytest.raises(ValueError, match=message) as error:
        pretrained.load(spoiled(config=change))
    assert "config.json" in str(error.value)
    assert option in str(error.value) or "not supported" in str(error.value)


@pytest.mark.parametrize("options, message", [
    ({"truncation": "fusion"}, "option truncation is 'fusion'.*supported: 'rand_trunc'"),
    ({"feature_size": 17}, "option feature_size is 17.*supported: 16"),
    ({"padding": "mirror"}, "option padding is 'mirror'"),
    ({"max_length_s": 10}, "a window of 10 s has 1001 frames; the model takes 64"),
    ({"frequency_max": 99999}, "not supported: log_mel.fmin"),
    ({"sampling_rate": 0}, "option sampling_rate is 0"),
])
def test_front_ends_that_do_not_suit_the_model_are_named(spoiled, options, message):
    path = spoiled()
    (path / "preprocessor_config.json").write_text(json.dumps(
        {"feature_size": 16, "truncation": "rand_trunc", "max_length_s": 0.5} | options))
    with pytest.raises(ValueError, match="preprocessor_config.json: " + message):
        pretrained.load(path)


def test_files_that_are_not_whole_are_named(spoiled, folder, tmp_path):
    path = spoiled()
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match="model.safetensors: truncated"):
        pretrained.load(path)
    weights.unlink()
    with pytest.raises(ValueError, match="has no weights"):
        pretrained.load(path)
    with pytest.raises(ValueError, match="no such file or folder"):
        pretrained.load(path / "none")
    (path / "config.json").unlink()
    weights.write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="has no config.json.*copy config.json too"):
        pretrained.load(path)
    with pytest.raises(ValueError, match="has no tokenizer, expected one of tokenizer.json"):
        Tokenizer.load(path)


def test_a_pickle_that_wants_to_run_code_is_refused(spoiled, tmp_path):
    path, ran = spoiled(), tmp_path / "ran"
    (path / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return open, (str(ran), "w")

    torch.save({"text_model.pooler.dense.bias": Evil()}, path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: refused: a pickle that asks for"):
        pretrained.load(path)
    assert not ran.exists()


def test_pytorch_files_and_shards_load_as_safetensors_do(folder, tmp_path):
    same = pretrained.load(folder)[1]
    config = (folder / "config.json").read_text()
    (tmp_path / "bin").mkdir()
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    torch.save({k: torch.tensor(v) for k, v in arrays.items()}, tmp_path / "bin/pytorch_model.bin")
    (tmp_path / "bin/config.json").write_text(config)
    transformers.ClapModel.from_pretrained(folder).save_pretrained(
        tmp_path / "shards", max_shard_size="40KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 1
    for name in ("bin", "shards"):
        jax.tree.map(np.testing.assert_array_equal, pretrained.load(tmp_path / name)[1], same)
