import fractions
import math

import librosa
import numpy as np
import pytest
import soundfile

from conftest import write_tone
from data_pipelines.audio import (
    AudioError,
    AudioLength,
    check_audio,
    measure_audio,
    read_audio,
    read_chunk,
    read_chunks,
)
from data_pipelines.corpora import Clip
from data_pipelines.waveforms import chunk_starts


@pytest.mark.parametrize("rate, channels, extension", [
    (8000, 1, "wav"), (22050, 2, "flac"), (44100, 3, "wav"), (48000, 2, "ogg"), (96000, 1, "flac"),
])  # fmt: skip
@pytest.mark.parametrize("target", [16000, 48000])
def test_read_audio_equals_librosa(tmp_path, rate, channels, extension, target):
    path = tmp_path / f"ü.{extension}"
    write_tone(path, 1.237, rate, channels)
    # Offsets that are whole samples at every rate: librosa rounds down, here to the nearest.
    for offset, seconds in [(0.0, None), (0.32, 0.5), (0.9, 9.0)]:
        found = read_audio(path, target, offset, seconds)
        expected, _ = librosa.load(
            path, sr=target, mono=True, offset=offset, duration=seconds, res_type="soxr_hq"
        )
        frames = round(1.237 * rate) - round(offset * rate)
        frames = min(frames, round((seconds or 9) * rate))
        assert found.dtype == np.float32
        # librosa's ceil of a float gives one sample more where the quotient is whole.
        assert len(found) == math.ceil(fractions.Fraction(frames * target, rate))
        np.testing.assert_allclose(found, expected[: len(found)], atol=2e-6)


def test_offset_outside_the_file_is_an_error(tmp_path):
    write_tone(tmp_path / "a.wav", 0.5, 8000)
    for offset in (0.5, 3.0, -0.1):
        with pytest.raises(AudioError, match="length, 0.5 s"):
            read_audio(tmp_path / "a.wav", 8000, offset)


@pytest.mark.parametrize("seconds, chunks", [(0.3, 1), (1.0, 1), (1.3, 2), (9.1, 3)])
def test_chunks_of_one_pass_equal_chunks_read_alone(tmp_path, monkeypatch, seconds, chunks):
    # Blocks shorter than a window, and of a length that divides nothing.
    monkeypatch.setattr("data_pipelines.audio._BLOCK_FRAMES", 7919)
    path = tmp_path / "a.flac"
    samples = write_tone(path, seconds, 22050, 2)
    together, valid = read_chunks(path, 16000, 16000, 3)
    assert together.shape == (chunks, 16000)
    starts = chunk_starts(len(samples), 22050, 3)
    for chunk, start in zip(together, starts):
        alone, own_valid = read_chunk(path, 16000, 16000, lambda f, w: start)
        np.testing.assert_array_equal(chunk, alone)
        assert own_valid == valid
    length = min(16000, math.ceil(len(samples) * 16000 / 22050))
    assert valid == length
    assert not together[:, length:].any() and together[:, length - 50 : length].any()


@pytest.mark.parametrize("samples, whole", [(3000, 2), (8000, 1), (7999, 1), (1, 8000)])
def test_a_file_shorter_than_the_window_is_filled_up(tmp_path, samples, whole):
    path = tmp_path / "a.wav"
    write_tone(path, samples / 8000, 8000)
    clip = read_audio(path, 8000)
    zeros = np.zeros(8000 - whole * samples, np.float32)
    repeated = np.concatenate([np.tile(clip, whole), zeros])
    cut = np.tile(clip, whole + 1)[:8000]
    zero_padded = np.pad(clip, (0, 8000 - samples))
    for fill, expected in [
        ("repeatpad", repeated), ("repeat", cut), ("zeros", zero_padded), ("frames", zero_padded),
    ]:  # fmt: skip
        one, valid = read_chunk(path, 8000, 8000, lambda frames, window: 0, fill)
        np.testing.assert_array_equal(one, expected)
        many, valid_of_many = read_chunks(path, 8000, 8000, 3, fill)
        np.testing.assert_array_equal(many, [expected])
        assert valid == valid_of_many == samples


def test_a_chunk_of_a_longer_file_is_not_repeated_where_rounding_leaves_it_short(tmp_path):
    path = tmp_path / "a.wav"
    write_tone(path, 0.5, 8000)
    # 1003 samples at 48 kHz are 167 at 8 kHz, which give 1002.
    chunk, valid = read_chunk(path, 48000, 1003, lambda frames, window: 0, "repeat")
    assert valid == 1003 and chunk[1002] == 0 and chunk[1001] != 0


@pytest.fixture
def bad_clips(tmp_path):
    """Six files that cannot be used, each with a word its message must have, and two good ones."""
    write_tone(tmp_path / "good.wav", 0.2, 8000)
    write_tone(tmp_path / "good.flac", 0.3, 44100, 2)
    (tmp_path / "zero.wav").write_bytes(b"")
    (tmp_path / "noise.flac").write_bytes(b"no audio at all" * 50)
    soundfile.write(tmp_path / "silent.wav", np.zeros([0]), 8000)
    write_tone(tmp_path / "cut.flac", 2.0, 8000)
    whole = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    soundfile.write(tmp_path / "nan.wav", np.full([80], np.nan), 8000, subtype="FLOAT")
    words = {
        "good.wav": "", "missing.wav": "no such file", "zero.wav": "cannot be decoded",
        "noise.flac": "cannot be decoded", "good.flac": "", "silent.wav": "no samples",
        "cut.flac": "cannot be decoded", "nan.wav": "not finite",
    }  # fmt: skip
    return [Clip(name, tmp_path / name, ("x",)) for name in words], words


def test_all_bad_files_are_named_in_one_error(bad_clips):
    clips, words = bad_clips
    with pytest.raises(AudioError) as error:
        check_audio(clips)
    text = str(error.value)
    assert text.startswith("6 of 8 audio files cannot be used")
    for name, word in words.items():
        assert (str(clips[0].path.parent / name) in text) == bool(word)
        assert word in text


def test_bad_files_are_skipped_and_returned_if_so_asked(bad_clips):
    clips, words = bad_clips
    good, problems = check_audio(clips, on_error="skip")
    assert [clip.id for clip in good] == ["good.wav", "good.flac"]
    assert [problem.row for problem in problems] == [1, 2, 3, 5, 6, 7]
    for problem in problems:
        assert words[clips[problem.row].id] in problem.message
    lengths, _ = measure_audio(clips)
    assert lengths[0] == AudioLength(1600, 8000) and lengths[4] == AudioLength(13230, 44100)
    assert [length is None for length in lengths] == [bool(words[clip.id]) for clip in clips]


def test_list_of_bad_files_is_capped(tmp_path):
    clips = [Clip(str(i), tmp_path / f"{i}.wav", ("x",)) for i in range(31)]
    with pytest.raises(AudioError) as error:
        check_audio(clips)
    assert str(error.value).count("no such file") == 20 and "and 11 more" in str(error.value)
    with pytest.raises(ValueError, match="expected 'raise' or 'skip'"):
        check_audio(clips, on_error="ignore")
