"""MS-CLAP 2022 files against Cnn14, BERT and the projections in torch (needs the extra)."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import safetensors.torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers import audio_utils  # noqa: E402

from tail_jax import pretrained  # noqa: E402
from tail_jax.models.cnn14 import Cnn14Config  # noqa: E402
from tail_jax.models.dual_encoder import BUFFERS, DualEncoder  # noqa: E402
from tail_jax.models.bert import TextConfig  # noqa: E402
from tail_jax.tuning.masks import count  # noqa: E402

TOLERANCE = 1e-4
CHANNELS, FC, EMBEDDING, FRAMES, MELS = (5, 6, 9), 14, 24, 690, 64
BERT = dict(vocab_size=60, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=48, max_position_embeddings=120)
AUDIO, TEXT = "audio_encoder.base.", "caption_encoder.base."


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**BERT)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return model


@pytest.fixture(scope="module")
def file(bert):
    """The weights in the published names, and what else the published file holds."""
    random = np.random.default_rng(1)

    def new(*shape, scale=0.3, mean=0.0):
        return torch.tensor(mean + scale * random.normal(size=shape), dtype=torch.float32)

    def norm(name, n, mean=0.0):
        return {f"{name}.weight": new(n, mean=1.0), f"{name}.bias": new(n),
                f"{name}.running_mean": new(n, mean=mean), f"{name}.running_var": new(n) ** 2 + 0.5,
                f"{name}.num_batches_tracked": torch.tensor(7)}

    out = {f"{TEXT}{key}": value.clone() for key, value in bert.state_dict().items()}
    out |= norm(f"{AUDIO}bn0", MELS, mean=-20.0)
    out[f"{AUDIO}bn0.running_var"] *= 200
    for i, (n, m) in enumerate(zip((1, *CHANNELS), CHANNELS)):
        block = f"{AUDIO}conv_block{i + 1}."
        out |= {f"{block}conv1.weight": new(m, n, 3, 3), f"{block}conv2.weight": new(m, m, 3, 3),
                **norm(f"{block}bn1", m), **norm(f"{block}bn2", m)}
    out |= {f"{AUDIO}fc1.weight": new(FC, CHANNELS[-1]), f"{AUDIO}fc1.bias": new(FC),
            "logit_scale": torch.tensor(4.3)}
    for side, n in (("audio", FC), ("caption", 128)):
        head = f"{side}_encoder.projection."
        out |= {f"{head}linear1.weight": new(EMBEDDING, n),
                f"{head}linear2.weight": new(EMBEDDING, EMBEDDING),
                f"{head}layer_norm.weight": new(EMBEDDING, mean=1.0),
                f"{head}layer_norm.bias": new(EMBEDDING)}
    junk = lambda i: torch.full((2, 2), float(i))
    return out | {f"{AUDIO}spectrogram_extractor.stft.conv_real.weight": junk(0),
                  f"{AUDIO}spectrogram_extractor.stft.conv_imag.weight": junk(1),
                  f"{AUDIO}logmel_extractor.melW": junk(2),
                  f"{AUDIO}fc_audioset.weight": junk(3), f"{AUDIO}fc_audioset.bias": junk(4),
                  f"{TEXT}embeddings.position_ids": torch.arange(120)[None]}


def project(file, x, side):
    head = f"{side}_encoder.projection."
    e = F.linear(x, file[head + "linear1.weight"])
    e = e + F.linear(F.gelu(e), file[head + "linear2.weight"])
    return F.layer_norm(e, e.shape[-1:], file[head + "layer_norm.weight"],
                        file[head + "layer_norm.bias"])


def cnn14(file, audio):
    """(map averaged over mels, clip vector, frame vectors) of log-mels [B, frames, mels]."""

    def norm(x, name):
        return F.batch_norm(x, *(file[f"{AUDIO}{name}.{part}"] for part in (
            "running_mean", "running_var", "weight", "bias")))

    x = norm(torch.tensor(audio).mT[..., None], "bn0")  # mels are the channels of this norm
    x = x.permute(0, 3, 2, 1)
    for i in range(1, len(CHANNELS) + 1):
        for j in "12":
            x = F.conv2d(x, file[f"{AUDIO}conv_block{i}.conv{j}.weight"], padding=1)
            x = F.relu(norm(x, f"conv_block{i}.bn{j}"))
        x = F.avg_pool2d(x, 2) if i < len(CHANNELS) else x
    x = x.mean(3)  # [B, channels, T]
    fc1 = lambda y: F.relu(F.linear(y, file[f"{AUDIO}fc1.weight"], file[f"{AUDIO}fc1.bias"]))
    near = F.max_pool1d(x, 3, 1) + F.avg_pool1d(x, 3, 1)
    return x.mT, fc1(x.amax(2) + x.mean(2)), fc1(near.mT)


def close(ours, theirs, tolerance=TOLERANCE):
    np.testing.assert_allclose(ours, theirs.detach(), atol=tolerance, rtol=0)


@pytest.fixture(scope="module", params=["pth", "ddp", "safetensors"])
def loaded(request, file, tmp_path_factory):
    """(description, parameters) of each layout."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "safetensors":
        safetensors.torch.save_file(file, folder / "CLAP_weights_2022.safetensors")
    else:
        prefix = "module." * (request.param == "ddp")
        torch.save({"model": {prefix + key: value for key, value in file.items()}, "epoch": 5},
                   folder / "CLAP_weights_2022.pth")
    return pretrained.load(folder)


def test_audio_equals_torch_from_log_mels(loaded, file):
    description, params = loaded
    audio = np.random.default_rng(2).normal(-20, 14, (2, FRAMES, MELS)).astype(np.float32)
    out = jax.jit(description.model.encode_audio)(params, None, audio)
    tokens, clip, frames = cnn14(file, audio)
    close(out["tokens"], tokens)
    close(out["pooled"], clip)
    close(out["frames"], frames)
    close(out["embedding"], F.normalize(project(file, clip, "audio")))
    assert np.abs(out["embedding"][0] - out["embedding"][1]).max() > 0.01  # the input matters
    assert params["logit_scale"] == np.float32(4.3)


def test_text_equals_torch_padded_to_100(loaded, file, bert):
    description, params = loaded
    lengths, random = (3, 11, 100), np.random.default_rng(3)
    mask = np.arange(100) < np.array(lengths)[:, None]
    ids = np.where(mask, random.integers(1, 60, mask.shape), 0)
    states = bert(torch.tensor(ids), torch.tensor(mask).long()).last_hidden_state
    expected = F.normalize(project(file, states[:, 0], "caption"))
    encode = jax.jit(description.model.encode_text)
    close(encode(params, None, ids, mask)["embedding"], expected)
    # As many columns as the longest text needs do as well.
    close(encode(params, None, ids[:2, :11], mask[:2, :11])["embedding"], expected[:2])
    assert description.max_tokens == 100


def test_a_waveform_gives_the_vectors_of_the_published_front_end(file, tmp_path):
    torch.save({"model": file}, tmp_path / "CLAP_weights_2022.pth")
    description, params = pretrained.load(tmp_path)
    assert description.front_end.sampling_rate == 44100
    random = np.random.default_rng(4)
    clips = [random.normal(0, 0.1, n).astype(np.float32) for n in (60_001, 220_500, 300_000)]
    windows = [np.tile(clips[0], 4)[:220_500], clips[1], clips[2][39_750:260_250]]
    spectrum = torch.stft(torch.tensor(np.stack(windows)).double(), 1024, 320,
                          window=torch.hann_window(1024, dtype=torch.float64), center=True,
                          pad_mode="reflect", return_complex=True).abs() ** 2
    filters = torch.tensor(audio_utils.mel_filter_bank(513, MELS, 50, 14000, 44100, "slaney",
                                                       "slaney"))
    mel = 10 * torch.log10((spectrum.mT @ filters).clamp_min(1e-10))
    rows = np.concatenate([description.front_end.rows(clip) for clip in clips])
    assert rows.shape == (3, FRAMES, MELS)
    close(rows, mel, 1e-3)
    out = jax.jit(description.model.encode_audio)(params, None, rows)["embedding"]
    close(out, F.normalize(project(file, cnn14(file, mel.float().numpy())[1], "audio")))
    silence = description.front_end.rows(np.zeros(100, np.float32))
    np.testing.assert_allclose(silence, -100)


def test_parameter_counts_of_the_published_size():
    model = DualEncoder(Cnn14Config(), TextConfig(30522, 768, 12, 12, 3072, 512, 2, 0, "cls"),
                        1024, head="residual")
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert count(params["audio"], BUFFERS) == 79_673_792
    assert count(params["heads"]["audio"]) == 3_147_776
    assert count(params["heads"]["text"]) == 1_837_056
    assert count(params["text"]) + 768 * 768 + 768 == 109_482_240  # with BERT's pooler


@pytest.mark.parametrize("change, message", [
    (lambda f: f.pop(f"{AUDIO}fc1.weight"), "base.fc1.weight is missing"),
    (lambda f: f.pop(f"{TEXT}embeddings.word_embeddings.weight"), "MS-CLAP 2023 .* not supported"),
    (lambda f: f.pop("audio_encoder.projection.linear2.weight"), "no audio_encoder.projection"),
    (lambda f: f.pop(f"{AUDIO}conv_block2.bn1.running_var"), "no .*conv_block2.bn1.running_var"),
    (lambda f: f.update({f"{AUDIO}conv_block4.conv1.weight": torch.ones(3, 3, 3, 3)}),
     "unknown .*conv_block4"),
    (lambda f: f.update({"caption_encoder.projection.layer_norm.bias": torch.ones(5)}),
     r"layer_norm.bias is \[5\], the configuration asks for \[24\]")])
def test_files_that_are_not_ms_clap_2022_are_errors(change, message, file, tmp_path):
    changed = dict(file)
    change(changed)
    torch.save({"model": changed}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=f"x.pth: .*{message}"):
        pretrained.load(tmp_path)
