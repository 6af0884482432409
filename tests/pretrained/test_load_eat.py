"""EAT files in the layouts that are published, against the encoder in torch (needs the extra)."""

import json
import math

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import safetensors.torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from tail_jax import pretrained  # noqa: E402

TOLERANCE = 1e-4
WIDTH, HIDDEN, LAYERS, FRAMES, MELS, PATCH = 128, 160, 3, 96, 128, 16
STEM = "modality_encoders.IMAGE."


def random_file(seed=0, rows=FRAMES // PATCH):
    """What every layout has, in the names of pretraining: nothing is 0 or 1."""
    random = np.random.default_rng(seed)

    def new(*shape, scale=0.08, mean=0.0):
        return torch.tensor(mean + scale * random.normal(size=shape), dtype=torch.float32)

    norm = lambda name: {f"{name}.weight": new(WIDTH, scale=0.2, mean=1.0),
                         f"{name}.bias": new(WIDTH, scale=0.2)}
    dense = lambda name, n, m: {f"{name}.weight": new(m, n), f"{name}.bias": new(m)}
    file = {f"{STEM}local_encoder.proj.weight": new(WIDTH, 1, PATCH, PATCH),
            f"{STEM}local_encoder.proj.bias": new(WIDTH),
            f"{STEM}extra_tokens": new(1, 1, WIDTH, scale=1.0),
            f"{STEM}fixed_positional_encoder.positions": positions(rows)[None],
            **norm(f"{STEM}context_encoder.norm")}
    for i in range(LAYERS):
        file |= {**dense(f"blocks.{i}.attn.qkv", WIDTH, 3 * WIDTH),
                 **dense(f"blocks.{i}.attn.proj", WIDTH, WIDTH),
                 **dense(f"blocks.{i}.mlp.fc1", WIDTH, HIDDEN),
                 **dense(f"blocks.{i}.mlp.fc2", HIDDEN, WIDTH),
                 **norm(f"blocks.{i}.norm1"), **norm(f"blocks.{i}.norm2")}
    return file


def positions(rows):
    """Token by token: mel index in the first half, frame index in the second."""
    quarter = WIDTH // 4
    rates = [1 / 10000 ** (i / quarter) for i in range(quarter)]
    wave = lambda p: [math.sin(p * w) for w in rates] + [math.cos(p * w) for w in rates]
    columns = MELS // PATCH
    return torch.tensor([wave(token % columns) + wave(token // columns)
                         for token in range(rows * columns)])


def reference(file, audio, heads=4, mean=-4.268, deviation=4.569, epsilon=1e-6):
    """Tokens before the first block and after each, from log-mels [B, frames, mels]."""
    layer_norm = lambda x, name: F.layer_norm(x, (WIDTH,), file[f"{name}.weight"],
                                              file[f"{name}.bias"], epsilon)
    dense = lambda x, name: F.linear(x, file[f"{name}.weight"], file[f"{name}.bias"])
    x = (torch.tensor(audio)[:, None] - mean) / (2 * deviation)
    x = F.conv2d(x, file[f"{STEM}local_encoder.proj.weight"],
                 file[f"{STEM}local_encoder.proj.bias"], stride=PATCH).flatten(2).mT
    x = x + positions(x.shape[1] * PATCH // MELS)
    x = torch.cat([file[f"{STEM}extra_tokens"].expand(len(x), -1, -1), x], 1)
    hidden = [layer_norm(x, f"{STEM}context_encoder.norm")]
    for i in range(LAYERS):
        x = hidden[-1]
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2)
                   for part in dense(x, f"blocks.{i}.attn.qkv").chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = layer_norm(x + dense(attended, f"blocks.{i}.attn.proj"), f"blocks.{i}.norm1")
        inner = dense(F.gelu(dense(x, f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2")
        hidden.append(layer_norm(x + inner, f"blocks.{i}.norm2"))
    return hidden


def hub(file):
    """The names of the layout on the Hugging Face hub."""
    return {"model." + key.replace(f"{STEM}context_encoder.norm", "pre_norm").replace(STEM, ""):
            value for key, value in file.items()}


def write(layout, file, folder):
    """Writes `file` in one of the published layouts; returns what to load."""
    junk = torch.ones(2, 3)  # what an encoder has no use for
    if layout == "pretrained":
        more = {f"{STEM}decoder.blocks.0.0.weight": junk, f"{STEM}decoder.proj.bias": junk,
                "_ema": {key: value + 1 for key, value in file.items()}}
        torch.save({"args": None, "cfg": {"model": {"_name": "data2vec_multi", "num_heads": 4,
                                                    "depth": LAYERS, "layer_norm_first": False},
                                          "task": {"target_length": FRAMES}},
                    "model": file | more, "extra_state": {"epoch": 30}}, folder / "eat.pt")
        return folder / "eat.pt"
    if layout == "finetuned":
        state = {f"model.{key}": value for key, value in file.items()}
        state |= {"fc_norm.weight": junk, "head.weight": junk, "head.bias": junk}
        torch.save({"model": state, "cfg": {"model": {
            "target_length": FRAMES, "pretrained_model_args": {"model": {"num_heads": 4}}}}},
            folder / "eat.pt")
        return folder
    if layout == "fairseq names":
        safetensors.torch.save_file(file, folder / "model.safetensors")
        return folder
    state = hub(file) | {"model.fc_norm.weight": junk, "model.head.weight": junk + 1}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    write_config(folder)
    return folder


def write_config(folder, **options):
    config = {"model_type": "eat", "embed_dim": WIDTH, "depth": LAYERS, "num_heads": 4,
              "mlp_ratio": HIDDEN / WIDTH, "img_size": [FRAMES, MELS], "max_length": 768}
    (folder / "config.json").write_text(json.dumps(config | options))


def random_audio(frames=FRAMES, seed=1):
    return np.random.default_rng(seed).normal(-4, 5, (2, frames, MELS)).astype(np.float32)


def encode(path, audio):
    """(description, output of the encoder) of a checkpoint."""
    description, params = pretrained.load(path)
    return description, jax.jit(description.model.encode_audio)(params, None, audio)


@pytest.mark.parametrize("layout", ["pretrained", "finetuned", "fairseq names", "hub"])
def test_every_layout_gives_the_same_tokens_layer_by_layer(layout, tmp_path):
    file, audio = random_file(), random_audio()
    description, out = encode(write(layout, file, tmp_path), audio)
    # Without settings heads are 64 wide.
    expected = reference(file, audio, heads=2 if layout == "fairseq names" else 4)
    assert len(out["hidden"]) == len(expected) == LAYERS + 1
    for mine, theirs in zip(out["hidden"], expected):
        np.testing.assert_allclose(mine, theirs, atol=TOLERANCE, rtol=0)
    cls = F.normalize(expected[-1][:, 0])
    np.testing.assert_allclose(out["embedding"], cls, atol=TOLERANCE, rtol=0)
    assert np.abs(out["embedding"][0] - out["embedding"][1]).max() > 0.01  # the input matters
    assert description.max_tokens == 0
    assert description.front_end.input_shape == description.model.audio.input_shape == (96, 128)


@pytest.mark.parametrize("frames, epsilon", [(32, 0.3), (1024, 1e-6)])
def test_a_hub_model_is_what_its_configuration_says(frames, epsilon, tmp_path):
    file = random_file(rows=768)  # the published table is longer than any input
    audio = random_audio(frames)
    path = write("hub", file, tmp_path)
    write_config(tmp_path, img_size=[frames, MELS], norm_eps=epsilon)
    out = encode(path, audio)[1]
    expected = F.normalize(reference(file, audio, epsilon=epsilon)[-1][:, 0])
    np.testing.assert_allclose(out["embedding"], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("rows, settings, frames", [
    (768, {}, 1024), (6, {}, 96), (768, {"model": {"target_length": 512}}, 512),
    (768, {"task": {"target_length": 64}}, 64), (32, {"task": {"target_length": 1024}}, 512)])
def test_length_is_that_of_training_within_the_positions(rows, settings, frames, tmp_path):
    torch.save({"model": random_file(rows=rows), "cfg": settings}, tmp_path / "eat.pt")
    description = pretrained.describe(tmp_path)[0]
    assert description.model.audio.frames == frames
    assert description.front_end.window_seconds == pytest.approx(frames / 100 + 0.015)


@pytest.mark.parametrize("flag, mean, deviation", [
    ("esc50_eval", -6.627, 5.359), ("spcv2_eval", -6.846, 5.565), ("audio_mae", -4.268, 4.569)])
def test_statistics_are_those_of_the_corpus_of_fine_tuning(flag, mean, deviation, tmp_path):
    file, audio = random_file(), random_audio()
    state = {f"model.{key}": value for key, value in file.items()}
    torch.save({"model": state, "cfg": {"model": {flag: True}}}, tmp_path / "eat.pt")
    out = encode(tmp_path, audio)[1]
    expected = reference(file, audio, 2, mean, deviation)[-1]
    np.testing.assert_allclose(out["tokens"], expected, atol=TOLERANCE, rtol=0)


def test_a_waveform_gives_the_tokens_of_kaldis_filterbank(tmp_path):
    transformers = pytest.importorskip("transformers")
    file, random = random_file(), np.random.default_rng(2)
    # AST's extractor is EAT's in all but the two constants. The third clip is longer than the
    # 0.975 s of the model: its centre is taken.
    extract = transformers.ASTFeatureExtractor(max_length=FRAMES, do_normalize=False)
    clips = [random.normal(0.05, 0.1, n).astype(np.float32) for n in (4999, 15600, 32000)]
    mels = [extract(clip, sampling_rate=16000)["input_values"][0]
            for clip in (*clips[:2], clips[2][8200:23800])]
    description, params = pretrained.load(write("hub", file, tmp_path))
    rows = np.concatenate([description.front_end.rows(clip) for clip in clips])
    out = jax.jit(description.model.encode_audio)(params, None, rows)["embedding"]
    expected = F.normalize(reference(file, np.stack(mels))[-1][:, 0]).numpy()
    assert (out * expected).sum(1).min() >= 0.99999
    np.testing.assert_allclose(out, expected, atol=1e-3)


@pytest.mark.parametrize("options, message", [
    ({"layer_norm_first": True}, "option layer_norm_first is True.*supported: False"),
    ({"fixed_positions": False}, "option fixed_positions is False"),
    ({"stride": 10}, "option stride is 10"), ({"mel_bins": 64}, "option mel_bins is 64"),
    ({"depth": LAYERS + 1}, r"no blocks.3.attn.proj.bias"),
    ({"embed_dim": 64, "num_heads": 1},
     r"model.extra_tokens is \[1, 1, 128\], the configuration asks for \[64\]"),
    ({"img_size": [100, 128]}, "config.json: EAT frames is 100; expected a multiple of patch 16"),
    ({"img_size": 128}, r"config.json: option img_size is 128; expected \[frames, mels\]"),
    ({"num_heads": "2"}, "config.json: option num_heads is '2'; expected a whole number"),
    ({"num_heads": 5}, "config.json: width 128 is not divisible by heads 5"),
    ({"norm_eps": [1e-6]}, "config.json: option norm_eps is .*; expected a finite number")])
def test_configurations_that_cannot_be_are_errors(options, message, tmp_path):
    write("hub", random_file(), tmp_path)
    write_config(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        pretrained.load(tmp_path)


@pytest.mark.parametrize("change, message", [
    (lambda f: f[f"{STEM}fixed_positional_encoder.positions"].mul_(1.01),
     "positions .* are not the sine-cosine positions of 6 by 8 patches and width 128"),
    (lambda f: f.update({f"{STEM}fixed_positional_encoder.positions": torch.zeros(1, 43, WIDTH)}),
     "are not the sine-cosine positions"),
    (lambda f: f.update({f"{STEM}alibi_scale": torch.ones(1)}), "unknown .*alibi_scale"),
    (lambda f: f.update({f"{STEM}context_encoder.blocks.0.norm1.weight": torch.ones(WIDTH)}),
     "unknown .*context_encoder.blocks.0"),
    (lambda f: f.pop("modality_encoders.IMAGE.extra_tokens"), "no extra_tokens"),
    (lambda f: f.pop("blocks.1.norm2.bias"), "no blocks.1.norm2.bias"),
    (lambda f: f.pop("blocks.0.mlp.fc1.weight"), "not a whole EAT checkpoint")])
def test_files_that_are_not_eat_are_errors(change, message, tmp_path):
    file = random_file()
    change(file)
    torch.save({"model": file}, tmp_path / "eat.pt")
    with pytest.raises(ValueError, match=message) as error:
        pretrained.load(tmp_path)
    assert "eat.pt: " in str(error.value)


def test_pre_norm_training_settings_are_an_error(tmp_path):
    torch.save({"model": random_file(), "cfg": {"model": {"layer_norm_first": True}}},
               tmp_path / "eat.pt")
    with pytest.raises(ValueError, match="eat.pt: cfg: model: option layer_norm_first is True"):
        pretrained.load(tmp_path)
