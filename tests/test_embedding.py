"""Embedding of clips and texts: inputs, policies, batches of few shapes, and errors."""

import dataclasses
import inspect
import itertools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

import tail_jax
from data_pipelines import cores, map_ahead, padded_lengths
from data_pipelines.front_end import FrontEnd, WaveformSettings
from data_pipelines.log_mel import LogMelSettings
from data_pipelines.text import Tokenizer
from data_pipelines.waveforms import to_mono
from tail_jax import embedding
from tail_jax.embedding import Embeddings
from tail_jax.models.bert import TextConfig
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.htsat import HTSATConfig
from tail_jax.models.wav2vec2 import Wav2Vec2Config

pytestmark = pytest.mark.usefixtures("quick_compilation")

RATE = 8000
WORDS = "rain falls on a tin roof while two dogs bark near the old mill and wind blows".split()
RESAMPLED = 2e-3  # soxr's own error on a tone, of full scale


@dataclasses.dataclass(frozen=True)
class Moments:
    """A waveform model in closed form: masked means of x, x^2 and x^4, to unit length."""

    embedding: int = 3
    dtype: str = "float32"

    @property
    def towers(self):
        return {"audio": self}

    def encode_audio(self, params, tuning, audio, mask):
        count = mask.sum(1)
        moment = lambda p: jnp.where(mask, audio**p, 0.0).sum(1) / count
        x = params["weight"] * jnp.stack([moment(1), moment(2), moment(4)], 1)
        return {"pooled": x, "embedding": x / jnp.linalg.norm(x, axis=1, keepdims=True)}

    def encode_text(self):
        raise NotImplementedError  # it has no text tower; the engine must never call this


def moments(clip):
    """What `Moments` gives for [S], in float64."""
    x = np.array([np.mean(np.float64(clip)**p) for p in (1, 2, 4)])
    return x / np.linalg.norm(x)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture()
def waves():
    """Embeddings of waveforms of at most 6 s."""
    return Embeddings(Moments(), {"weight": np.ones(3, np.float32)},
                      FrontEnd(WaveformSettings(RATE, normalize=False, min_samples=16), 6.0))


@pytest.fixture(scope="module")
def clips():
    """40 clips between 2 ms and 15 s, none equal in length."""
    random = np.random.default_rng(0)
    lengths = np.unique(np.geomspace(16, 15 * RATE, 40).astype(int) + np.arange(40) % 7)
    random.shuffle(lengths)
    return [(0.2 + 0.5 * random.random()) * random.standard_normal(n).astype(np.float32)
            for n in lengths]


@pytest.fixture(scope="module")
def clap(tmp_path_factory):
    """Embeddings of a CLAP with random parameters."""
    path = tmp_path_factory.mktemp("clap") / "tokenizer.json"
    Tokenizer.train([" ".join(WORDS)], 300).save(path)
    model = DualEncoder(
        HTSATConfig(spec_size=32, mels=16, patch=4, width=8, depths=(1, 1), heads=(2, 2), window=4),
        TextConfig(300, width=16, layers=1, heads=2, hidden=32, max_positions=102), embedding=8)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    params["audio"]["input_norm"] |= {"running_mean": np.full(16, -30, np.float32),
                                      "running_var": np.full(16, 200, np.float32)}
    front_end = FrontEnd(LogMelSettings(RATE, 256, 128, 16, 50.0, 4000.0, fill="repeatpad"), 1.0)
    return Embeddings(model, params, front_end, path, 100, "tiny")


def captions(count, seed=0):
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(0, 14))) for _ in range(count)]


# ---------------------------------------------------------------------------------------- waveforms

@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_waveforms_of_any_length_are_embedded_as_alone(waves, clips, batch_size):
    middle = [c[(max(len(c), 6 * RATE) - 6 * RATE) // 2:][:6 * RATE] for c in clips]
    out = waves.embed_audio(clips, batch_size=batch_size)
    assert out.dtype == np.float32 and out.shape == (len(clips), 3)
    np.testing.assert_allclose(out, [moments(c) for c in middle], atol=1e-6)


def test_order_of_the_clips_changes_nothing(waves, clips):
    order = np.random.default_rng(1).permutation(len(clips))
    out = waves.embed_audio([clips[i] for i in order], batch_size=4)
    np.testing.assert_allclose(out, waves.embed_audio(clips, batch_size=4)[order], atol=1e-6)


def test_chunk_mean_averages_unit_embeddings_of_windows_that_cover_the_clip(waves, clips):
    window, expected = 6 * RATE, []
    for clip in clips:
        count = math.ceil(len(clip) / window)
        starts = [i * (len(clip) - window) // max(count - 1, 1) for i in range(count)]
        starts = starts if count > 1 else [0]
        expected.append(unit(sum(moments(clip[s:s + window]) for s in starts)))
    assert max(map(len, clips)) > 2 * window
    out = waves.embed_audio(clips, policy="chunk_mean", batch_size=3)
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_few_programs_serve_all_lengths(waves):
    random = np.random.default_rng(2)
    for count in (1, 2, 3, 5, 8, 60):
        waves.embed_audio([random.standard_normal(n) for n in random.integers(16, 9 * RATE, count)],
                          batch_size=4)
    # Batches of 40 s have a power of two of rows, or as many as there is room for.
    lengths = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6)
    assert waves.traces <= sum(2 + math.floor(math.log2(40 / s)) for s in lengths)
    before = waves.traces
    for _ in range(2):
        waves.embed_audio([random.standard_normal(n) for n in range(RATE, RATE + 900, 10)],
                          batch_size=4)
    assert waves.traces <= before + 2


def test_long_waveforms_make_smaller_batches():
    shapes, length = [], 60
    rows = ((i, np.zeros(length if i % 2 else 15, np.float32)) for i in range(40))
    for padded, most, items in embedding._batches(rows, [15, 30, 60], 8, 15):
        assert len(items) <= most and all(len(row) <= padded for _, row in items)
        shapes.append((padded, most))
    assert set(shapes) == {(15, 8), (60, 2)}


def test_buckets_grow_by_a_quarter_at_most():
    sizes = padded_lengths(8, 512, 4)
    assert sizes[:9] == [8, 10, 12, 14, 16, 20, 24, 28, 32] and sizes[-1] == 512
    assert max(b / a for a, b in itertools.pairwise(sizes)) <= 1.25
    assert padded_lengths(8, 8, 4) == [8] and padded_lengths(8, 5, 8) == [5]
    assert padded_lengths(8, 77, 4)[-2:] == [64, 77]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are not given here")
def test_cores_are_those_that_the_process_may_run_on():
    given = os.sched_getaffinity(0)
    assert cores() == len(given)
    os.sched_setaffinity(0, {min(given)})
    try:
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, given)


@pytest.mark.parametrize("chosen, expected", [
    (None, ".cache/tail_jax/compiled"), ("", ""), ("elsewhere", "elsewhere")])
def test_loading_keeps_what_is_compiled(tmp_path, monkeypatch, chosen, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", chosen)
    try:
        with pytest.raises((ValueError, OSError)):
            tail_jax.load(tmp_path / "nothing")
        assert jax.config.jax_compilation_cache_dir == (
            expected if chosen is not None else str(tmp_path / expected))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_the_front_end_runs_a_bounded_number_of_clips_ahead():
    begun = []
    results = map_ahead(lambda i: begun.append(i) or i, range(10_000))
    taken = [next(results) for _ in range(20)]
    assert taken == list(range(20))
    assert len(begun) <= 20 + 2 * embedding.os.cpu_count() + 1
    results.close()
    assert len(begun) < 200


# ------------------------------------------------------------------------------------------- inputs

def tone(rate, seconds=0.8, pitch=500):
    return 0.4 + 0.3 * np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)


def test_files_arrays_channels_rates_and_types_mix(waves, tmp_path):
    mono = tone(RATE)
    stereo = np.stack([mono + 0.1, mono - 0.1], 1)
    soundfile.write(tmp_path / "a.wav", stereo, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "b.flac", tone(16000), 16000)
    clips = [mono, stereo, stereo.T, str(tmp_path / "a.wav"), np.int16(mono * 2**15),
             mono.astype(np.float16), list(mono)]
    np.testing.assert_allclose(waves.embed_audio(clips), [moments(mono)] * len(clips), atol=5e-4)
    others = [tmp_path / "b.flac", tone(16000), tone(44100), mono]
    out = waves.embed_audio(others, [1, 16000, 44100, None])  # the rate of a file is its own
    np.testing.assert_allclose(out, [moments(mono)] * 4, atol=RESAMPLED)
    wrong = waves.embed_audio([mono], 11025)
    assert np.abs(wrong - waves.embed_audio([mono])).max() < RESAMPLED  # moments know no time
    np.testing.assert_array_equal(wrong, waves.embed_audio(to_mono(mono, 11025, RATE)))


def test_one_clip_or_text_is_a_list_of_one(waves, clap, tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(RATE), RATE, subtype="FLOAT")
    many = waves.embed_audio([tone(RATE)])
    for one in (tone(RATE), jnp.asarray(tone(RATE)), str(tmp_path / "a.wav"), tmp_path / "a.wav"):
        np.testing.assert_allclose(waves.embed_audio(one), many, atol=1e-6)
    np.testing.assert_array_equal(clap.embed_text("rain"), clap.embed_text(["rain"]))


def test_nothing_in_nothing_out(waves, clap):
    assert waves.embed_audio([]).shape == (0, 3)
    assert clap.embed_audio([], [], policy="chunk_mean").shape == (0, 8)
    assert clap.embed_text([]).shape == (0, 8)
    assert clap.classify([], ["rain", "wind"]).shape == (0, 2)


# ------------------------------------------------------------------------------------- dual encoder

def test_log_mel_rows_are_the_models_own_forward_pass(clap, clips):
    rows = np.concatenate([clap.front_end.rows(c) for c in clips])
    out = jax.jit(clap.model.encode_audio)(*clap._host_params, rows)["embedding"]
    np.testing.assert_allclose(clap.embed_audio(clips), out, atol=1e-5)
    assert np.abs(np.asarray(out)[0] - np.asarray(out)[1:]).max() > 1e-2  # clips do differ


@pytest.mark.parametrize("policy", [None, "repeatpad", "center", "chunk_mean"])
def test_clip_is_embedded_alike_alone_in_any_batch_in_any_order_and_twice(clap, clips, policy):
    embed = lambda clips, size=8: clap.embed_audio(clips, policy=policy, batch_size=size)
    whole = embed(clips)
    np.testing.assert_array_equal(embed(clips), whole)
    np.testing.assert_allclose(embed(clips, 5), whole, atol=1e-5)
    np.testing.assert_allclose(embed(clips[::-1])[::-1], whole, atol=1e-5)
    np.testing.assert_allclose([embed(c)[0] for c in clips[:5]], whole[:5], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)


def test_text_is_embedded_alike_alone_in_any_batch_in_any_order_and_twice(clap):
    texts = captions(150) + [" ".join(WORDS * 20)]
    whole = clap.embed_text(texts, batch_size=16)
    ids, mask = Tokenizer.load(clap._tokenizer_path).encode(texts, 100)
    direct = jax.jit(clap.model.encode_text)(*clap._host_params, ids, mask)["embedding"]
    np.testing.assert_allclose(whole, direct, atol=1e-5)
    np.testing.assert_array_equal(clap.embed_text(texts, batch_size=16), whole)
    np.testing.assert_allclose(clap.embed_text(texts, batch_size=7), whole, atol=1e-5)
    np.testing.assert_allclose(clap.embed_text(texts[::-1], batch_size=16)[::-1], whole, atol=1e-5)
    np.testing.assert_allclose([clap.embed_text(t)[0] for t in texts[-4:]], whole[-4:], atol=1e-5)


def test_texts_of_one_length_share_programs_and_padding_is_small(clap):
    texts, padded, real = captions(2000, seed=3), 0, 0
    clap.embed_text(texts, batch_size=32)
    before = clap.traces
    clap.embed_text(captions(2000, seed=4), batch_size=32)
    assert clap.traces - before <= 6  # what is left at the end, in smaller batches
    rows = [*clap._text_rows(texts, False)]
    buckets = padded_lengths(8, 100, embedding._TEXT_STEPS)
    for length, _, items in embedding._batches(rows, buckets, 32, 16):
        padded += length * len(items)
        real += sum(len(row) for _, row in items)
    assert padded < 1.12 * real


def test_tokenizing_in_pieces_is_tokenizing_at_once(clap, monkeypatch):
    whole = clap.embed_text(captions(50))
    monkeypatch.setattr(embedding, "_TEXTS_AT_ONCE", 7)
    np.testing.assert_allclose(clap.embed_text(captions(50)), whole, atol=1e-5)


def test_a_tokenizer_of_another_model_is_refused(clap):
    model = dataclasses.replace(clap.model, text=dataclasses.replace(clap.model.text, vocab_size=9))
    other = Embeddings(model, {}, tokenizer=clap._tokenizer_path, max_tokens=100, name="other")
    with pytest.raises(ValueError, match=r"tokenizer.json: gave the token \d+; other knows 9"):
        other.embed_text(["rain falls"])


@pytest.mark.parametrize("log_scale", [math.log(1 / 0.07), 9.0])
def test_probabilities_are_the_softmax_of_scaled_cosines(clap, clips, log_scale):
    clap = Embeddings(clap.model, clap._host_params[0] | {"logit_scale": np.float32(log_scale)},
                      clap.front_end, clap._tokenizer_path, 100)
    names = ["rain", "dogs {x}", "wind"]
    out = clap.classify(clips[:6], names, "a roof and {}")
    texts = clap.embed_text([f"a roof and {name}" for name in names])
    odds = np.exp(min(math.exp(log_scale), 100) * clap.embed_audio(clips[:6]) @ texts.T)
    np.testing.assert_allclose(out, odds / odds.sum(1, keepdims=True), atol=1e-5)
    assert out.dtype == np.float32


def test_encoders_take_prepared_inputs_and_give_all_layers(clap, waves, clips):
    audio, mask = clap.prepare_audio(clips[:3])
    out = clap.encode_audio(audio, mask)
    assert mask is None and len(out["hidden"]) == 2 and out["tokens"].shape == (3, 16, 16)
    np.testing.assert_allclose(out["embedding"], clap.embed_audio(clips[:3]), atol=1e-5)
    out = clap.encode_text(*clap.prepare_text(["rain", "a tin roof"]))
    assert len(out["hidden"]) == 2
    np.testing.assert_allclose(out["embedding"], clap.embed_text(["rain", "a tin roof"]), atol=1e-5)
    audio, mask = waves.prepare_audio(clips[:4])
    np.testing.assert_array_equal(mask.sum(1), [min(len(c), 6 * RATE) for c in clips[:4]])
    np.testing.assert_allclose(waves.encode_audio(audio, mask)["embedding"],
                               waves.embed_audio(clips[:4]), atol=1e-6)


def test_bfloat16_is_near_and_returns_float32(clap, clips):
    half = Embeddings(dataclasses.replace(clap.model, dtype="bfloat16"), clap._host_params[0],
                      clap.front_end, clap._tokenizer_path, 100)
    for exact, near in ((clap.embed_audio(clips), half.embed_audio(clips)),
                        (clap.embed_text(captions(9)), half.embed_text(captions(9)))):
        assert near.dtype == np.float32
        assert (exact * near).sum(1).min() > 0.99
        assert np.abs(exact - near).max() > 1e-6  # it did compute in bfloat16


WAV2VEC2 = Wav2Vec2Config(
    samples=2 * RATE, feature_widths=(8, 8, 8), feature_kernels=(10, 8, 4),
    feature_strides=(5, 4, 4), position_kernel=8, position_groups=2, width=8, layers=1, heads=2,
    hidden=16)
TOWERS = {
    "wav2vec 2.0, group norm": (WAV2VEC2, WaveformSettings(RATE)),
    "wav2vec 2.0, layer norm": (
        dataclasses.replace(WAV2VEC2, feature_norm="layer", norm="pre"), WaveformSettings(RATE)),
    "fused HTSAT": (
        HTSATConfig(spec_size=32, mels=16, patch=4, width=8, depths=(1, 1), heads=(2, 2), window=4,
                    fusion=True), LogMelSettings(RATE, 512, 256, 16, fmax=4000.0))}


@pytest.mark.parametrize("policy", [None, "chunk_mean"])
@pytest.mark.parametrize("name", TOWERS)
def test_batch_order_and_padding_change_nothing_for_any_tower(name, policy, clips):
    tower, settings = TOWERS[name]
    model = DualEncoder(audio=tower, text=None)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    front_end = FrontEnd(settings, 2.0, fusion=name == "fused HTSAT")
    embeddings = Embeddings(model, params, front_end)
    clips = [c for c in clips if 400 <= len(c) < 5 * RATE][:9]
    assert min(map(len, clips)) < 2 * RATE < max(map(len, clips))
    whole = embeddings.embed_audio(clips, policy=policy, batch_size=2)
    again = embeddings.embed_audio(clips[::-1], policy=policy, batch_size=1)[::-1]
    np.testing.assert_allclose(again, whole, atol=1e-5)
    row = front_end.rows(clips[0], policy)[0][None]  # alone and without padding
    mask = np.ones(row.shape, bool) if front_end.is_waveform else None
    assert len(front_end.rows(clips[0], policy)) == 1
    np.testing.assert_allclose(embeddings.encode_audio(row, mask)["embedding"], whole[:1],
                               atol=1e-5)
    assert np.abs(whole[0] - whole[1:]).max() > 1e-3


def test_parameters_are_on_the_device_without_a_copy():
    from tail_jax.pretrained.files import empty
    weight = empty((1 << 10, 3))
    model = Embeddings(Moments(), {"weight": weight})
    assert model._params[0]["weight"].unsafe_buffer_pointer() == weight.ctypes.data


# ------------------------------------------------------------------------------------------- errors

@pytest.mark.parametrize("call, words", [
    (lambda m, w: m.embed_audio([tone(RATE), np.zeros((0,))]), ["clip 1", "no samples"]),
    (lambda m, w: w.embed_audio([tone(RATE), np.zeros(15)]), ["clip 1", "15 samples", "16"]),
    (lambda m, w: m.embed_audio([tone(RATE), [np.nan]]), ["clip 1", "finite"]),
    (lambda m, w: m.embed_audio([None]), ["clip 0", "object"]),
    (lambda m, w: m.embed_audio([tone(RATE), "no/such.wav"]), ["no/such.wav"]),
    (lambda m, w: m.embed_audio([tone(RATE)] * 2, [RATE]), ["1 sampling rates for 2 clips"]),
    (lambda m, w: m.embed_audio([tone(RATE)] * 2, [RATE, -5]), ["clip 1", "-5"]),
    (lambda m, w: m.embed_audio([tone(RATE)], policy="random"), ["'random'", "repeatpad"]),
    (lambda m, w: m.embed_audio([tone(RATE)], batch_size=0), ["batch_size", "0"]),
    (lambda m, w: m.prepare_audio([]), ["no clips"]),
    (lambda m, w: m.embed_text(["rain", 3]), ["texts[1]", "3", "int"]),
    (lambda m, w: m.embed_text(["rain", "\ud800"]), ["texts[1]", "surrogate"]),
    (lambda m, w: w.embed_text(["rain"]), ["waves", "audio alone", "text"]),
    (lambda m, w: w.encode_text(np.zeros((1, 3), np.int32), np.ones((1, 3), bool)),
     ["waves", "encode_text"]),
    (lambda m, w: w.classify([tone(RATE)], ["rain"]), ["waves", "both towers"]),
    (lambda m, w: m.classify([tone(RATE)], []), ["class_names", "[]"]),
    (lambda m, w: m.classify([tone(RATE)], "rain"), ["class_names", "'rain'"]),
    (lambda m, w: m.classify([tone(RATE)], ["rain", None]), ["class_names[1]"]),
    (lambda m, w: m.classify([tone(RATE)], ["rain"], "a sound"), ["template", "'a sound'", "{}"]),
    (lambda m, w: Embeddings(m.model, {}, name="bare").embed_text("rain"), ["bare", "tokenizer"]),
    (lambda m, w: Embeddings(m.model, {}, name="bare").embed_audio([]), ["bare", "front end"]),
    (lambda m, w: Embeddings(dataclasses.replace(m.model, audio=None), {}, name="t")
     .embed_audio([]), ["t: a model of text alone", "embed_audio"]),
], ids=lambda x: inspect.getsource(x).split("m, w: ")[-1][:40] if callable(x) else "")
def test_mistake_is_named(clap, waves, call, words):
    waves.name = "waves"
    with pytest.raises(ValueError) as error:
        call(clap, waves)
    assert all(word in str(error.value) for word in words), error.value
    assert len(str(error.value)) < 250


def test_unusable_file_is_named_once(clap, tmp_path):
    (tmp_path / "x.wav").write_bytes(b"no audio")
    with pytest.raises(ValueError) as error:
        clap.embed_audio([tmp_path / "x.wav"])
    assert str(error.value).count("x.wav") == 1


# ------------------------------------------------------------------------------------------ imports

BLOCKED = """
import sys
class Blocked:
    names = {"tensorflow", "librosa", "torch", "transformers", "soundfile", "soxr"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
import numpy as np
import tail_jax
from data_pipelines.front_end import FrontEnd, LogMelSettings
from tail_jax.embedding import Embeddings
class Mean:
    embedding, dtype, towers = 32, "float32", {"audio": None}
    encode_text = None
    def encode_audio(self, params, tuning, audio, mask):
        return {"embedding": audio.mean(1)}
front_end = FrontEnd(LogMelSettings(8000, 256, 64, 32, 50.0, 4000.0), 1.0)
embeddings = Embeddings(Mean(), {}, front_end)
assert embeddings.embed_audio([np.random.rand(n) for n in (300, 8000, 20000)]).shape == (3, 32)
assert not Blocked.names & set(sys.modules), Blocked.names & set(sys.modules)
Blocked.names = {"tensorflow", "librosa"}
assert embeddings.embed_audio([sys.argv[1], np.random.rand(900)], 11025).shape == (2, 32)
"""


def test_embeds_without_packages_that_it_does_not_need(run_python, tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16000), 16000)
    done = run_python("-c", BLOCKED, tmp_path / "a.wav")
    assert done.returncode == 0, done.stderr
