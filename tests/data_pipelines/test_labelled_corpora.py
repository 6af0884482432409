import collections
import pathlib
import unicodedata

import numpy as np
import pytest
import soundfile

from conftest import write_table, write_tone
from data_pipelines.audio import AudioError, check_audio, read_audio
from data_pipelines.corpora import SPLIT_NAMES
from data_pipelines.corpora.esc50 import read_esc50
from data_pipelines.corpora.labelled import read_labelled_folder
from data_pipelines.corpora.speech_commands import WORDS, read_speech_commands
from data_pipelines.corpora.timit import read_timit
from data_pipelines.corpora.us8k import read_us8k
from data_pipelines.corpora.vocalset import TECHNIQUES, read_vocalset
from layouts import (
    ESC50_CLASSES,
    esc50_rows,
    us8k_rows,
    write_esc50,
    write_esc50_table,
    write_speech_commands,
    write_sphere,
    write_timit,
    write_us8k,
    write_vocalset,
)


def every_clip(corpus):
    """{id: (split, clip)}; every clip's caption is its label."""
    found = {
        clip.id: (split, clip) for split in SPLIT_NAMES for clip in getattr(corpus, split).clips
    }
    assert len(found) == sum(len(getattr(corpus, split).clips) for split in SPLIT_NAMES)
    assert all(clip.captions == (clip.label,) for _, clip in found.values())
    return found


def test_esc50_has_fold_5_as_test_and_recordings_as_groups(tmp_path):
    write_esc50(tmp_path)
    corpus = read_esc50(tmp_path)
    found = every_clip(corpus)
    assert (corpus.name, len(found), len(corpus.valid.clips)) == ("esc50", 59, 0)
    for name, fold, _, category, _, source, _ in esc50_rows():
        split, clip = found[name]
        assert split == ("test" if fold == 5 else "train")
        assert (clip.label, clip.group) == (category, str(source))
        assert clip.path == tmp_path / "audio" / name
    assert {clip.label for _, clip in found.values()} == set(ESC50_CLASSES)


def test_missing_audio_is_counted_and_named_when_the_files_are_checked(tmp_path):
    write_esc50(tmp_path)
    corpus = read_esc50(tmp_path)
    with pytest.raises(AudioError, match="2 of 47 audio files cannot be used") as error:
        check_audio(corpus.train.clips)
    for name, *_ in esc50_rows()[:2]:
        assert f"{tmp_path / 'audio' / name}: no such file" in str(error.value)
    usable, problems = check_audio(corpus.train.clips, on_error="skip")
    assert len(usable) == 45 and len(problems) == 2


def test_audio_is_found_in_another_format_and_under_decomposed_names(tmp_path):
    rows = [
        ["1-7-A-0.wav", 1, 0, "dog", True, 7, "A"],
        ["Möwe №3.wav", 5, 1, "gull", False, 8, "A"],
    ]
    write_esc50_table(tmp_path, rows)
    decomposed = unicodedata.normalize("NFD", "Möwe №3")
    write_tone(tmp_path / "audio" / f"{decomposed}.ogg", 0.1, 16000)
    write_tone(tmp_path / "audio" / "1-7-A-0.flac", 0.1, 16000)
    found = every_clip(read_esc50(tmp_path))
    assert [clip.path.name for _, clip in found.values()] == ["1-7-A-0.flac", f"{decomposed}.ogg"]
    assert all(clip.path.is_file() for _, clip in found.values())


@pytest.mark.parametrize("row, message", [
    (["1-9-A-0.wav", 6, 0, "dog", True, 9, "A"], "line 3: fold is '6', expected 1 to 5"),
    (["1-7-A-0.wav", 1, 0, "dog", True, 7, "A"], "line 3: '1-7-A-0.wav' came before"),
    (["1-9-A-1.wav", 1, 1, "dog", True, 9, "A"], "'dog' has number 1, but 0 before"),
    (["1-9-A-0.wav", 1, 0, "dgo", True, 9, "A"], "number 0 is 'dgo', but 'dog' before"),
    (["1-9-A-0.wav", 1, 0, "", True, " ", "A"], "line 3: no category, src_file"),
])  # fmt: skip
def test_faulty_rows_of_a_fold_table_are_named(tmp_path, row, message):
    write_esc50_table(tmp_path, [["1-7-A-0.wav", 1, 0, "dog", True, 7, "A"], row])
    with pytest.raises(ValueError, match="esc50.csv: 1 fault; correct these rows") as error:
        read_esc50(tmp_path)
    assert message in str(error.value)


def test_us8k_has_folds_9_and_10_as_test_and_looks_in_the_folders_of_folds(tmp_path):
    write_us8k(tmp_path)
    found = every_clip(read_us8k(tmp_path))
    assert len(found) == len(us8k_rows())
    for name, source, *_, fold, _, label in us8k_rows():
        split, clip = found[name]
        assert split == ("test" if fold in (9, 10) else "train")
        assert (clip.label, clip.group) == (label, str(source))
        assert clip.path == tmp_path / "audio" / f"fold{fold}" / name
        assert clip.path.is_file() == (fold in (1, 10))


@pytest.mark.parametrize("read, name", [
    (read_esc50, "esc50.csv"), (read_us8k, "UrbanSound8K.csv"),
    (read_speech_commands, "validation_list.txt"),
])  # fmt: skip
def test_a_missing_table_is_named(tmp_path, read, name):
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match=f"no {name} in .*holds other"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        read(tmp_path / "nowhere")


def test_speech_commands_has_its_lists_and_its_speakers(tmp_path):
    valid, test = write_speech_commands(tmp_path)
    corpus = read_speech_commands(tmp_path)
    found = every_clip(corpus)
    assert len(found) == 60 and len(WORDS) == 35
    assert sorted(valid) == [clip.id for clip in corpus.valid.clips]
    assert sorted(test) == [clip.id for clip in corpus.test.clips]
    for key, (_, clip) in found.items():
        word, name = key.split("/")
        assert (clip.label, clip.group) == (word, name.split("_")[0])
        assert clip.path == tmp_path / f"{key}.wav"


def test_speech_commands_keeps_listed_files_that_are_missing(tmp_path):
    write_speech_commands(tmp_path)
    (tmp_path / "no" / "00000002_nohash_1.wav").unlink()
    valid = read_speech_commands(tmp_path).valid.clips
    with pytest.raises(AudioError, match="1 of 6 audio.*\n.*no/00000002_nohash_1.wav: no such"):
        check_audio(valid)


def test_faults_of_speech_commands_are_one_error(tmp_path):
    write_speech_commands(tmp_path)
    write_tone(tmp_path / "yess" / "00000001_nohash_0.wav", 0.05, 16000)
    write_tone(tmp_path / "yes" / "recording.wav", 0.05, 16000)
    write_tone(tmp_path / "yes" / "00000001_nohash_0.flac", 0.05, 16000)
    with open(tmp_path / "validation_list.txt", "a") as file:
        file.write("zero/00000000_nohash_1.wav\n")
    with pytest.raises(ValueError, match="4 faults") as error:
        read_speech_commands(tmp_path)
    for message in (
        "'yess' is none of the 35 words of version 2 (files: 1)",
        "'yes/recording': expected WORD/SPEAKER_nohash_N",
        "'yes/00000001_nohash_0' is there twice: 00000001_nohash_0.flac and 00000001_nohash_0.wav",
        "testing_list.txt line 10: 'zero/00000000_nohash_1.wav' is in validation_list.txt too",
    ):
        assert message in str(error.value)


@pytest.mark.parametrize("byte_order", ["01", "10"])
@pytest.mark.parametrize("coding", ["", "pcm"])
def test_sphere_files_are_decoded_and_resampled(tmp_path, byte_order, coding):
    samples = np.random.default_rng(0).integers(-30000, 30000, 1237)
    write_sphere(tmp_path / "SA1.WAV", samples, 16000, byte_order, coding)
    np.testing.assert_array_equal(read_audio(tmp_path / "SA1.WAV", 16000) * 32768, samples)
    assert len(read_audio(tmp_path / "SA1.WAV", 48000)) == 3 * 1237
    part = read_audio(tmp_path / "SA1.WAV", 16000, offset=0.01, seconds=0.02)
    np.testing.assert_array_equal(part * 32768, samples[160:480])


def test_compressed_sphere_is_a_clear_error(tmp_path):
    coding = "pcm,embedded-shorten-v2.00"
    write_sphere(tmp_path / "SA1.WAV", np.arange(100), coding=coding)
    with pytest.raises(AudioError, match="SA1.WAV: cannot be decoded"):
        read_audio(tmp_path / "SA1.WAV", 16000)


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("below", ["", "TIMIT"])
def test_timit_has_speakers_as_classes_in_any_letter_case(tmp_path, lower, below):
    write_timit(tmp_path / below, lower)
    corpus = read_timit(tmp_path)
    found = every_clip(corpus)
    count = collections.Counter(clip.label for clip in corpus.train.clips)
    assert count == {"FCJF0": 10, "MDAB0": 10, "FAKS0": 10, "MWBT0": 10, "FELC0": 10}
    assert len(found) == 50 and {"FCJF0/SA1", "FELC0/SI2"} < found.keys()
    for key, (_, clip) in found.items():
        assert clip.path.parent.name.upper() == clip.label == key.split("/")[0]
        assert clip.path.is_file() and clip.group == ""
    assert check_audio(corpus.train.clips)[1] == ()


def test_timit_takes_a_sentence_once(tmp_path):
    write_timit(tmp_path)
    sphere = tmp_path / "TRAIN" / "DR1" / "FCJF0" / "SA1.WAV"
    soundfile.write(f"{sphere}.wav", np.zeros(50), 16000)
    found = every_clip(read_timit(tmp_path))
    assert len(found) == 50 and found["FCJF0/SA1"][1].path == sphere
    sphere.unlink()
    assert every_clip(read_timit(tmp_path))["FCJF0/SA1"][1].path == pathlib.Path(f"{sphere}.wav")
    write_sphere(tmp_path / "copy" / "TEST" / "DR1" / "FCJF0" / "SA1.WAV", np.arange(9))
    with pytest.raises(ValueError, match="'FCJF0/SA1' is in .*TRAIN.* and in .*copy"):
        read_timit(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected the folders of TIMIT"):
        read_timit(sphere.parent)


def test_vocalset_has_techniques_as_classes_and_the_singers_of_its_list_as_test(tmp_path):
    write_vocalset(tmp_path, tests=(1, 4))
    write_tone(tmp_path / "FULL" / "__MACOSX" / "x.wav", 0.05, 8000)
    corpus = read_vocalset(tmp_path)
    found = every_clip(corpus)
    assert len(TECHNIQUES) == 17 and len(found) == 3 * (2 + 3 + 4 + 5 + 6 + 7)
    for key, (split, clip) in found.items():
        singer, _, technique, _ = key.split("/")
        assert (clip.group, clip.label) == (singer, technique)
        assert split == ("test" if singer in ("female1", "female4") else "train")
        assert clip.path == tmp_path / "FULL" / f"{key}.wav"
    (tmp_path / "FULL").rename(tmp_path / "data_by_singer")
    assert every_clip(read_vocalset(tmp_path)).keys() == found.keys()


def test_vocalset_without_its_list_has_no_test_split(tmp_path):
    write_vocalset(tmp_path, singers=2, tests=())
    assert read_vocalset(tmp_path).test.clips == ()
    assert len(read_vocalset(tmp_path / "FULL").train.clips) == 15


def test_faults_of_vocalset_are_one_error(tmp_path):
    write_vocalset(tmp_path, singers=2)
    write_tone(tmp_path / "FULL" / "female0" / "scales" / "yodel" / "a.wav", 0.05, 8000)
    write_tone(tmp_path / "FULL" / "female0" / "b.wav", 0.05, 8000)
    write_tone(tmp_path / "FULL" / "female0" / "scales" / "belt" / "f0_belt_0.flac", 0.05, 8000)
    with pytest.raises(ValueError, match="3 faults") as error:
        read_vocalset(tmp_path)
    for message in ("'female0/scales/yodel/a': expected SINGER", "'female0/b': expected SINGER",
                    "'female0/scales/belt/f0_belt_0' is there twice"):  # fmt: skip
        assert message in str(error.value)
    with pytest.raises(FileNotFoundError, match="expected FULL/SINGER/CATEGORY/TECHNIQUE"):
        (tmp_path / "empty").mkdir()
        read_vocalset(tmp_path / "empty")


def test_a_caption_folder_has_each_clip_once_with_its_class_or_joined_columns(tmp_path):
    columns = ("file_name", "caption", "label", "group", "split", "speaker")
    rows = [
        ["a.wav", "one, said twice", "one", "g", "train", "jürgen"],
        ["a.wav", "the word one", "one", "g", "train", "jürgen"],
        ["b.wav", "two", "two", "", "test", "ann"],
        ["c.wav", "two", "two", "", "valid", " "],
    ]
    write_table(tmp_path, rows, columns)
    found = every_clip(read_labelled_folder(tmp_path))
    assert {key: (split, clip.label) for key, (split, clip) in found.items()} == {
        "a.wav": ("train", "one"), "b.wav": ("test", "two"), "c.wav": ("valid", "two"),
    }  # fmt: skip
    found = every_clip(read_labelled_folder(tmp_path, "speaker+label"))
    assert [clip.label for _, clip in found.values()] == ["jürgen+one", "", "ann+two"]
    with pytest.raises(ValueError, match="missing columns singer; found file_name, caption"):
        read_labelled_folder(tmp_path, "singer+label")
    write_table(tmp_path, [*rows, ["a.wav", "uno", "one", "g", "train", "ann"]], columns)
    with pytest.raises(ValueError, match="a.wav has label 'ann.one', but 'jürgen.one' before"):
        read_labelled_folder(tmp_path, "speaker+label")
