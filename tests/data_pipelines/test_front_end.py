import dataclasses
import json
import math

import librosa
import numpy as np
import pytest

from data_pipelines.front_end import (
    CLAP,
    CLAP_FUSED,
    KALDI,
    PANNS,
    POLICIES,
    FrontEnd,
    WaveformSettings,
)
from data_pipelines.log_mel import LogMelSettings, log_mel, window_and_filters
from tensorflow_log_mel import tensorflow_log_mel

KINDS = {
    "clap": CLAP, "clap_fused": CLAP_FUSED, "ast": dataclasses.replace(KALDI, frames=1024),
    "eat": dataclasses.replace(KALDI, frames=512), "panns": PANNS,
}  # fmt: skip
# A window of 1 s, 8 frames and 8 bands.
SMALL = LogMelSettings(800, n_fft=128, hop_length=100, n_mels=8, fmin=20.0, fmax=400.0)


def noise(samples, seed=0):
    generator = np.random.default_rng(seed)
    tone = np.sin(0.05 * np.arange(samples) ** 1.1)
    return (0.5 * tone + 0.1 * generator.normal(size=samples)).astype(np.float32)


# --- the features --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("samples", [1, 2, 399, 400, 401, 511, 1024, 4801, 30011])
def test_features_equal_those_of_tensorflow(name, samples):
    settings, waveform = KINDS[name], noise(samples)
    if settings.center or samples >= 400:
        found = log_mel(waveform, settings)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, tensorflow_log_mel(waveform, settings), atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("samples", [400, 1001, 5999, 6000])
def test_what_fills_a_short_clip_equals_tensorflow(name, samples):
    settings = dataclasses.replace(KINDS[name], frames=None)
    front_end = FrontEnd(settings, 6000 / settings.sampling_rate)
    waveform = noise(samples)
    repetitions = {"repeatpad": 6000 // samples, "repeat": 6000 // samples + 1}
    filled = np.zeros(6000, np.float32)
    part = np.tile(waveform, repetitions.get(settings.fill, 1))[:6000]
    filled[: len(part)] = part
    expected = tensorflow_log_mel(filled, settings, samples)
    found = front_end.rows(waveform)
    assert found.shape == (1, *front_end.input_shape) == (1, *expected.shape)
    np.testing.assert_allclose(found[0], expected, atol=1e-4)


@pytest.mark.parametrize("settings", [CLAP, CLAP_FUSED, PANNS])
def test_named_settings_equal_librosa(settings):
    waveform = noise(48000)
    mel = librosa.feature.melspectrogram(
        y=waveform.astype(np.float64), sr=settings.sampling_rate, n_fft=1024,
        hop_length=settings.hop_length, n_mels=64, fmin=50.0, fmax=14000.0, pad_mode="reflect",
        htk=settings is CLAP_FUSED, norm=None if settings is CLAP_FUSED else "slaney",
    )  # fmt: skip
    expected = librosa.power_to_db(mel, amin=1e-10, top_db=None).T
    np.testing.assert_allclose(log_mel(waveform, settings), expected, atol=1e-3)


def test_an_offset_of_the_waveform_changes_nothing_in_kaldi_frames():
    # So the mean that EAT subtracts from a waveform needs no code.
    waveform = noise(16007).astype(np.float64)
    found = log_mel(waveform - waveform.mean(), KALDI)
    np.testing.assert_allclose(found, log_mel(waveform, KALDI), atol=1e-5)
    np.testing.assert_allclose(found, log_mel(waveform + 0.7, KALDI), atol=1e-5)


def test_shapes_of_the_models():
    for settings, seconds, fusion, shape in [
        (CLAP, 10.0, False, (1001, 64)), (CLAP_FUSED, 10.0, True, (4, 1001, 64)),
        (KINDS["ast"], 10.255, False, (1024, 128)), (KINDS["eat"], 5.12, False, (512, 128)),
        (PANNS, 5.0, False, (690, 64)), (WaveformSettings(), 30.0, False, (480000,)),
    ]:  # fmt: skip
        front_end = FrontEnd(settings, seconds, fusion)
        assert front_end.input_shape == shape
        assert front_end.window_samples == round(seconds * front_end.sampling_rate)
    # The longest window that AST's 1024 frames hold; 5.12 s leave two of EAT's 512 frames empty.
    assert dataclasses.replace(KALDI, frames=None).num_frames(round(10.255 * 16000)) == 1024
    rows = FrontEnd(KINDS["eat"], 5.12).rows(noise(81920))
    assert rows[0, 509].all() and not rows[0, 510:].any()


# --- against the processors of transformers ------------------------------------------------------


def clap_processor(truncation):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    return transformers.ClapFeatureExtractor(
        max_length_s=1, frequency_min=50, truncation=truncation, padding="repeatpad"
    )


def processed(processor, waveform):
    rate = processor.sampling_rate
    [features] = processor(waveform, sampling_rate=rate, return_tensors="np").values()
    return features[0]


@pytest.mark.parametrize("samples", [1, 700, 5003, 16000, 23999, 24000, 24001, 47999, 48000])
@pytest.mark.parametrize("fusion", [False, True])
def test_short_clips_equal_the_processor_of_clap(fusion, samples):
    processor = clap_processor("fusion" if fusion else "rand_trunc")
    front_end = FrontEnd(CLAP_FUSED if fusion else CLAP, 1.0, fusion)
    expected = processor(noise(samples), sampling_rate=48000)
    assert np.ravel(expected["is_longer"]) == [fusion]
    found = front_end.rows(noise(samples))
    np.testing.assert_allclose(found[:, None] if not fusion else found,
                               np.array(expected["input_features"]), atol=1e-3)
    assert not fusion or (found == found[:, :1]).all()


# From one sample more than the window on; 480 more have one frame more, 960 two, 1440 three.
@pytest.mark.parametrize("samples", [48001, 48479, 48480, 48960, 49440, 49999, 60000, 211111])
def test_fusion_of_long_clips_is_the_processors_at_the_middle_of_each_third(monkeypatch, samples):
    processor = clap_processor("fusion")
    monkeypatch.setattr(np.random, "choice", lambda possible: possible[len(possible) // 2])
    expected = processor(noise(samples), sampling_rate=48000)["input_features"][0]
    [found] = FrontEnd(CLAP_FUSED, 1.0, fusion=True).rows(noise(samples))
    assert found.shape == (4, 101, 64)
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_without_fusion_a_long_clip_is_the_processors_at_its_centre(monkeypatch):
    monkeypatch.setattr(np.random, "randint", lambda low, high: (high - 1) // 2)
    expected = clap_processor("rand_trunc")(noise(60001), sampling_rate=48000)["input_features"]
    found = FrontEnd(CLAP, 1.0).rows(noise(60001))
    np.testing.assert_allclose(found, expected[0], atol=1e-3)


@pytest.mark.parametrize("samples", [400, 401, 559, 560, 5003, 15600, 16240, 16399])
def test_kaldi_frames_equal_the_processor_of_ast(samples):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    processor = transformers.ASTFeatureExtractor(max_length=100, do_normalize=False)
    settings = dataclasses.replace(KALDI, frames=100)
    waveform = noise(samples) * np.linspace(0.001, 1.0, samples, dtype=np.float32)
    expected = processor(waveform, sampling_rate=16000)["input_values"][0]
    found = FrontEnd(settings, 16399 / 16000).rows(waveform)
    np.testing.assert_allclose(found[0], expected, atol=2e-3)
    assert not found[0, 1 + (samples - 400) // 160 :].any()


def test_kaldi_filters_equal_those_of_transformers():
    audio_utils = pytest.importorskip("transformers.audio_utils")
    expected = audio_utils.mel_filter_bank(
        257, 128, 20, 8000, 16000, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    window, filters = window_and_filters(KALDI)
    np.testing.assert_allclose(filters, expected, atol=1e-12)
    expected = audio_utils.window_function(400, "hann", periodic=False)
    np.testing.assert_allclose(window, expected, atol=1e-15)


@pytest.mark.parametrize("normalize", [True, False])
def test_waveforms_equal_the_processor_of_wav2vec2(normalize):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    processor = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize)
    front_end = FrontEnd(WaveformSettings(normalize=normalize), 1.0)
    for samples in (400, 7001, 16000):
        waveform = 3.0 * noise(samples) + 0.5
        expected = processor(waveform, sampling_rate=16000)["input_values"][0]
        [found] = front_end.rows(waveform)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)
    silence = front_end.rows(np.zeros([400], np.float32))[0]
    assert not silence.any()


# --- policies ------------------------------------------------------------------------------------


def cut(waveform, *starts):
    """The log-mel of windows of 800 samples."""
    return np.stack([log_mel(waveform[start : start + 800], SMALL) for start in starts])


def test_policies_by_hand_on_short_clips():
    waveform = noise(301)
    zeros = np.pad(waveform, (0, 499))
    whole_twice = np.concatenate([waveform, waveform, np.zeros(198, np.float32)])
    cut_off = np.concatenate([waveform, waveform, waveform[:198]])
    fills = {"zeros": zeros, "repeatpad": whole_twice, "repeat": cut_off}
    for fill, own in fills.items():
        front_end = FrontEnd(dataclasses.replace(SMALL, fill=fill), 1.0)
        for policy, expected in [
            (None, own), ("chunk_mean", own), ("center", zeros), ("repeatpad", whole_twice),
        ]:  # fmt: skip
            np.testing.assert_array_equal(front_end.rows(waveform, policy), cut(expected, 0))


def test_policies_by_hand_on_long_clips():
    front_end = FrontEnd(SMALL, 1.0)
    for samples, centre, chunks in [
        (800, 0, (0,)), (801, 0, (0, 1)), (803, 1, (0, 3)), (1600, 400, (0, 800)),
        (1601, 400, (0, 400, 801)), (4001, 1600, (0, 640, 1280, 1920, 2560, 3201)),
    ]:  # fmt: skip
        waveform = noise(samples)
        for policy in (None, "repeatpad", "center"):
            np.testing.assert_array_equal(front_end.rows(waveform, policy), cut(waveform, centre))
        found = front_end.rows(waveform, "chunk_mean")
        np.testing.assert_array_equal(found, cut(waveform, *chunks))
        assert len(chunks) == math.ceil(samples / 800)


def test_policies_by_hand_with_fusion():
    front_end = FrontEnd(dataclasses.replace(SMALL, fill="repeat"), 1.0, fusion=True)
    four = (4, 9, 8)
    assert front_end.input_shape == four
    waveform = noise(1900)  # 20 frames: windows of 9 begin at 0-3, 4-7, 8-11
    whole = log_mel(waveform, SMALL)
    assert len(whole) == 20
    for policy in (None, "repeatpad"):
        [found] = front_end.rows(waveform, policy)
        for channel, start in zip(found[1:], (2, 6, 10)):
            np.testing.assert_array_equal(channel, whole[start : start + 9])
        # Row 4 of 9 is at the middle of the clip, row 0 at 20/18 - 1/2.
        np.testing.assert_allclose(found[0, 4], (whole[9] + whole[10]) / 2, rtol=1e-6)
        first = whole[0] + (20 / 18 - 0.5) * (whole[1] - whole[0])
        np.testing.assert_allclose(found[0, 0], first, rtol=1e-6)
    for policy, starts in [("center", (550,)), ("chunk_mean", (0, 550, 1100))]:
        found = front_end.rows(waveform, policy)
        expected = cut(waveform, *starts)
        np.testing.assert_array_equal(found, np.stack([expected] * 4, axis=1))
    short = front_end.rows(waveform[:300], "center")
    assert (short == cut(np.pad(waveform[:300], (0, 500)), 0)[:, None]).all()


def test_policies_by_hand_on_waveforms():
    front_end = FrontEnd(WaveformSettings(800, normalize=False, min_samples=40), 1.0)
    waveform = noise(1601)
    for policy in POLICIES:
        [short] = front_end.rows(waveform[:301], policy)
        np.testing.assert_array_equal(short, waveform[:301])
        found = front_end.rows(waveform, policy)
        starts = (0, 400, 801) if policy == "chunk_mean" else (400,)
        assert len(found) == len(starts)
        for row, start in zip(found, starts):
            np.testing.assert_array_equal(row, waveform[start : start + 800])
    normalized = FrontEnd(WaveformSettings(800), 1.0).rows(waveform, "chunk_mean")
    for row in normalized:  # each window on its own
        assert abs(row.mean()) < 1e-6 and abs(row.std() - 1) < 1e-5


def test_policies_by_hand_on_missing_frames():
    settings = dataclasses.replace(SMALL, center=False, fill="frames", frames=12)
    front_end = FrontEnd(settings, 1.0)
    waveform = noise(430)  # 1 + (430 - 128) // 100 = 4 frames, of the 7 of a window
    plain = dataclasses.replace(settings, frames=None)
    expected = np.zeros([1, 12, 8], np.float32)
    expected[0, :4] = log_mel(waveform, plain)
    for policy in (None, "chunk_mean"):
        np.testing.assert_array_equal(front_end.rows(waveform, policy), expected)
    for policy, filled in [
        ("center", np.pad(waveform, (0, 370))),
        ("repeatpad", np.pad(waveform, (0, 370))),
    ]:
        expected[0, :7] = log_mel(filled, plain)
        np.testing.assert_array_equal(front_end.rows(waveform, policy), expected)
    without = FrontEnd(plain, 1.0)
    assert without.rows(waveform).shape == (1, 7, 8) and not without.rows(waveform)[0, 4:].any()
    with pytest.raises(ValueError, match="127 samples at 800 Hz is too short .* at least 128"):
        front_end.rows(noise(127))
    assert front_end.rows(noise(127), "center").shape == (1, 12, 8)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("front_end", [
    FrontEnd(SMALL, 1.0), FrontEnd(SMALL, 1.0, fusion=True), FrontEnd(WaveformSettings(800), 1.0),
])  # fmt: skip
def test_equal_clips_have_equal_rows_of_the_promised_shape(front_end, policy):
    for samples in (401, 800, 877, 5003):
        rows = front_end.rows(noise(samples), policy)
        again = front_end.rows(noise(samples).astype(np.float64), policy)
        for one, two in zip(rows, again, strict=True):
            np.testing.assert_array_equal(one, two)
            assert one.dtype == np.float32
            assert one.shape == front_end.input_shape or samples < 800 and len(one) == samples


# --- errors and files ----------------------------------------------------------------------------


def test_what_cannot_be_a_row_is_refused():
    front_end = FrontEnd(WaveformSettings(), 1.0)
    with pytest.raises(ValueError, match="399 samples at 16000 Hz is too short .* at least 400"):
        front_end.rows(noise(399))
    for waveform in (np.zeros([0]), np.zeros([2, 900]), np.float32(1)):
        with pytest.raises(ValueError, match=r"expected \[samples\] with at least one"):
            front_end.rows(waveform)
    with pytest.raises(ValueError, match="policy is 'centre', expected one of .*'center'"):
        front_end.rows(noise(900), "centre")


@pytest.mark.parametrize("settings, seconds, fusion, message", [
    (WaveformSettings(), 1.0, True, "fusion=True with waveforms"),
    (WaveformSettings(), 0.02, False, "has 320 samples, expected at least min_samples, 400"),
    (KALDI, 0.02, False, "320 samples are too few"), (CLAP, 0.0, False, "0 samples are too few"),
    (dataclasses.replace(CLAP, frames=9), 1.0, True, "log_mel.frames=9, expected None"),
])  # fmt: skip
def test_impossible_front_ends_are_refused(settings, seconds, fusion, message):
    with pytest.raises(ValueError, match=message):
        FrontEnd(settings, seconds, fusion)


@pytest.mark.parametrize("change", [{"sampling_rate": 0}, {"min_samples": -1}])
def test_impossible_waveforms_are_refused(change):
    with pytest.raises(ValueError, match="expected more than 0"):
        WaveformSettings(**change)


@pytest.mark.parametrize("front_end", [
    FrontEnd(CLAP_FUSED, 10.0, fusion=True), FrontEnd(KALDI, 5.12),
    FrontEnd(WaveformSettings(8000, False), 2.5),
])  # fmt: skip
def test_a_front_end_survives_json(front_end):
    values = json.loads(json.dumps(front_end.to_dict()))
    assert FrontEnd.from_dict(values) == front_end
    assert values["kind"] == ("waveform" if front_end.is_waveform else "log_mel")


@pytest.mark.parametrize("change, message", [
    ({"kind": "cqt"}, "kind is 'cqt', expected one of"), ({"window": 3}, "fields .*'window'"),
    ({"settings": {"hop": 3}}, "expected those of FrontEnd and LogMelSettings"),
    ({"settings": {"hop_length": 0}}, "hop_length is 0"), ({"settings": None}, "fields"),
])  # fmt: skip
def test_a_damaged_description_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        FrontEnd.from_dict(FrontEnd(CLAP, 10.0).to_dict() | change)
