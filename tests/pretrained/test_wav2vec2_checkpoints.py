"""wav2vec 2.0 and data2vec-audio folders, with and without heads, in new and old spellings."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import safetensors.numpy  # noqa: E402

from tail_jax import pretrained  # noqa: E402
from tail_jax.models.dual_encoder import DualEncoder  # noqa: E402
from tail_jax.pretrained.names import unfill  # noqa: E402
from tests.models.parity import close, randomise  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
             conv_dim=[12, 8], conv_kernel=[10, 3], conv_stride=[5, 2],
             num_conv_pos_embedding_groups=4, num_conv_pos_embeddings=6, vocab_size=11,
             codevector_dim=8, num_codevectors_per_group=4, tdnn_dim=[8], tdnn_kernel=[3],
             tdnn_dilation=[1])
HEADS = ("Model", "ForPreTraining", "ForCTC", "ForSequenceClassification",
         "ForAudioFrameClassification", "ForXVector")


def make(kind="Wav2Vec2", head="Model", **options):
    config = getattr(transformers, f"{kind}Config")(**SMALL | options)
    return randomise(getattr(transformers, f"{kind}{head}")(config), 0)


def save(folder, model, extractor=None):
    model.save_pretrained(folder)
    if extractor is not None:
        transformers.Wav2Vec2FeatureExtractor(**extractor).save_pretrained(folder)
    return folder


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def wave(samples=700):
    return np.random.default_rng(samples).normal(0.1, 0.2, samples).astype(np.float32)


@pytest.mark.parametrize("kind, head", [
    *(("Wav2Vec2", head) for head in HEADS),
    *(("Data2VecAudio", head) for head in HEADS if head != "ForPreTraining")])
def test_the_encoder_below_every_head_is_read(tmp_path, kind, head):
    theirs = make(kind, head, use_weighted_layer_sum=True)
    description, params = pretrained.load(save(tmp_path, theirs))
    base = getattr(theirs, theirs.base_model_prefix, theirs)
    rows = description.front_end.rows(wave())
    with torch.inference_mode():
        expected = base(torch.tensor(np.stack(rows))).last_hidden_state.mean(1)
    got = jax.jit(description.model.encode_audio)(params, None, np.stack(rows))
    close(got["pooled"], expected)
    close(got["embedding"], torch.nn.functional.normalize(expected))
    assert set(params) == {"audio"} and description.max_tokens == 0


@pytest.mark.parametrize("extractor", [None, dict(do_normalize=False), dict(sampling_rate=8000)])
def test_waveforms_give_the_vectors_of_their_extractor(tmp_path, extractor):
    theirs = make()
    description, params = pretrained.load(save(tmp_path, theirs, extractor))
    processor = transformers.Wav2Vec2FeatureExtractor(**extractor or {})
    front_end = description.front_end
    assert front_end.sampling_rate == processor.sampling_rate
    assert front_end.window_samples == 30 * processor.sampling_rate
    assert description.model.audio.input_shape == (front_end.window_samples,)
    with torch.inference_mode():
        inputs = processor(wave(), sampling_rate=processor.sampling_rate, return_tensors="pt")
        expected = theirs(**inputs).last_hidden_state.mean(1)
    row, = front_end.rows(wave())
    got = description.model.encode_audio(params, None, row[None])["pooled"]
    close(got, expected)


def test_a_clip_below_one_frame_is_refused_by_the_front_end(tmp_path):
    description, _ = pretrained.load(save(tmp_path, make()))
    assert description.front_end.settings.min_samples == 20
    with pytest.raises(ValueError, match="20"):
        description.front_end.rows(wave(19))


def test_weight_norm_is_folded_from_either_spelling(tmp_path):
    theirs = make(head="ForCTC")
    _, params = pretrained.load(save(tmp_path, theirs))
    kernel = theirs.wav2vec2.encoder.pos_conv_embed.conv.weight.detach().numpy()
    np.testing.assert_allclose(params["audio"]["position_0"]["kernel"],
                               kernel.transpose(2, 1, 0), rtol=1e-6)
    weights = tmp_path / "model.safetensors"
    arrays = safetensors.numpy.load_file(weights)
    old = {key.replace("parametrizations.weight.original0", "weight_g")
           .replace("parametrizations.weight.original1", "weight_v")
           .replace("masked_spec_embed", "mask_time_emb_vector"): value
           for key, value in arrays.items()}
    assert {"wav2vec2.encoder.pos_conv_embed.conv.weight_g", "wav2vec2.mask_time_emb_vector",
            "lm_head.bias"} <= set(old)
    safetensors.numpy.save_file(old, weights)
    equal(pretrained.load(tmp_path)[1], params)
    gain = "wav2vec2.encoder.pos_conv_embed.conv.weight_g"
    old[gain] = np.ones((24, 1, 1), np.float32)  # one for each output, not for each tap
    safetensors.numpy.save_file(old, weights)
    with pytest.raises(ValueError, match=r"do not go together \(expected a gain \[1, 1, 6\]"):
        pretrained.load(tmp_path)


@pytest.mark.parametrize("kind", ["Wav2Vec2", "Data2VecAudio"])
def test_names_written_back_are_those_of_transformers(tmp_path, kind):
    theirs, other = make(kind), make(kind)
    description, params = pretrained.load(save(tmp_path, theirs))
    written = unfill(description.table, params)
    for value in other.parameters():
        value.data.zero_()
    left = other.load_state_dict({k: torch.tensor(v) for k, v in written.items()}, strict=False)
    assert left.missing_keys == ["masked_spec_embed"] and not left.unexpected_keys
    audio = torch.tensor(wave())[None]
    close(theirs(audio).last_hidden_state.detach().numpy(), other(audio).last_hidden_state)


@pytest.mark.parametrize("entry, value", [
    ("add_adapter", True), ("adapter_attn_dim", 16), ("conv_pos_batch_norm", True),
    ("feat_extract_norm", "batch"), ("hidden_act", "mish"), ("feat_extract_activation", "mish"),
    ("conv_dim", 512), ("conv_kernel", [10, 0]), ("num_conv_pos_embeddings", "many"),
    ("hidden_size", -1), ("do_stable_layer_norm", "maybe")])
def test_an_option_that_is_not_supported_names_the_file_and_itself(tmp_path, entry, value):
    save(tmp_path, make())
    change(tmp_path / "config.json", **{entry: value})
    with pytest.raises(ValueError, match=rf"config\.json: option {entry} is .*(support|expected)"):
        pretrained.load(tmp_path)


@pytest.mark.parametrize("entries, message", [
    (dict(num_attention_heads=5), "width 24 is not divisible by heads 5"),
    (dict(conv_stride=[5]), r"have \[2, 2, 1\] entries"),
    (dict(conv_dim=[12, 9]), r"projection.weight is \[24, 8\], the .* asks for \[24, 9\]"),
    (dict(num_conv_pos_embeddings=8), r"make an array \[6, 6, 24\].*asks for \[8, 6, 24\]"),
    (dict(num_hidden_layers=1), r"unknown encoder.layers.1\."),
    (dict(num_hidden_layers=3), r"no encoder.layers.2\.")])
def test_options_that_do_not_fit_say_how(tmp_path, entries, message):
    save(tmp_path, make())
    change(tmp_path / "config.json", **entries)
    with pytest.raises(ValueError, match=message) as error:
        pretrained.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_features_of_another_kind_are_refused(tmp_path):
    save(tmp_path, make(), {})
    change(tmp_path / "preprocessor_config.json", feature_size=80)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: option feature_size is 80"):
        pretrained.load(tmp_path)


def test_the_defaults_of_the_format_are_the_base_models(tmp_path):
    """Published configurations leave out what is standard."""
    save(tmp_path, make())
    for kind, model in (("wav2vec2", transformers.Wav2Vec2Config()),
                        ("data2vec-audio", transformers.Data2VecAudioConfig())):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        short = pretrained.describe(tmp_path)[0].model
        (tmp_path / "config.json").write_text(json.dumps(model.to_dict()))
        assert pretrained.describe(tmp_path)[0].model == short
        assert short.audio.frames(160_000) == 499 and short.audio.layers == 12
        assert DualEncoder.from_dict(json.loads(json.dumps(short.to_dict()))) == short
