import pathlib

import numpy as np
import pytest

from conftest import write_table
from data_pipelines.corpora import Clip, Split, caption_keys, normalise_caption
from data_pipelines.corpora.folder import read_folder

ROWS = [
    ["audio/a.wav", 'says "hello", twice', "dog", "g1", "train"],
    ["audio/ñandú 鳥.wav", "a bird\nof the plains", "bird", "g2", "valid"],
    ["audio/a.wav", "a dog", "dog", "g1", "train"],
    ["audio/c.wav", "rain", "rain", "", "train"],
    ["audio/d.wav", "rain", "rain", "", "test"],
]


def test_rows_of_one_file_are_captions_of_one_clip_in_row_order(tmp_path):
    write_table(tmp_path / "set", ROWS)
    corpus = read_folder(tmp_path / "set")
    assert corpus.name == "set"
    assert corpus.train.clips == (
        Clip(
            "audio/a.wav",
            tmp_path / "set/audio/a.wav",
            ('says "hello", twice', "a dog"),
            "dog",
            "g1",
        ),
        Clip("audio/c.wav", tmp_path / "set/audio/c.wav", ("rain",), "rain", ""),
    )
    assert [clip.captions for clip in corpus.valid.clips] == [("a bird\nof the plains",)]
    assert corpus.valid.clips[0].path.name == "ñandú 鳥.wav"
    assert len(corpus.test.clips) == 1


def test_byte_order_mark_column_order_and_extra_columns_do_not_matter(tmp_path):
    write_table(tmp_path / "plain", ROWS)
    columns = ("split", "license", "group", "caption", "label", "file_name")
    write_table(tmp_path / "odd", [[r[4], "x", r[3], r[1], r[2], r[0]] for r in ROWS], columns)
    table = tmp_path / "odd" / "metadata.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    plain, odd = read_folder(tmp_path / "plain", "x"), read_folder(tmp_path / "odd", "x")
    for name in ("train", "valid", "test"):
        assert getattr(plain, name).captions == getattr(odd, name).captions
        assert [c.id for c in getattr(plain, name).clips] == [
            c.id for c in getattr(odd, name).clips
        ]


def test_labels_select_clips_and_may_leave_a_split_empty(tmp_path):
    write_table(tmp_path, ROWS)
    corpus = read_folder(tmp_path, labels=["bird", "dog"])
    assert [clip.label for clip in corpus.train.clips] == ["dog"]
    assert len(corpus.valid.clips) == 1 and corpus.test.clips == ()
    with pytest.raises(ValueError, match="labels cat; expected one or more of: bird, dog, rain"):
        read_folder(tmp_path, labels=["dog", "cat"])


@pytest.mark.parametrize(
    "row, message",
    [
        (["e.wav", "  ", "x", "", "train"], "line 8: empty caption of e.wav"),
        (["", "text", "x", "", "train"], "line 8: empty file_name"),
        (["e.wav", "text", "x", "", "dev"], "unknown split 'dev', expected train, valid, test"),
        (["audio/c.wav", "text", "wind", "", "train"], "has label 'wind', but 'rain'"),
        (["audio/c.wav", "text", "rain", "g9", "train"], "has group 'g9', but ''"),
        (["audio/c.wav", "text", "rain", "", "test"], "has split 'test', but 'train'"),
        (["e.wav", "text", "x", "g1", "test"], "group 'g1' is in split 'test', but in 'train'"),
        (["e.wav", "text", "x", "train"], "line 8: 4 fields, expected 5"),
        (["e.wav", "one", "two", "x", "", "train"], "line 8: 6 fields, expected 5"),
    ],
)
def test_faulty_row_is_named(tmp_path, row, message):
    write_table(tmp_path, ROWS + [row])
    with pytest.raises(ValueError) as error:
        read_folder(tmp_path)
    # The caption of ROWS[1] spans two lines, hence line 8 for the sixth row.
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_all_faults_are_in_one_error_and_the_list_is_capped(tmp_path):
    write_table(tmp_path, [[f"{i}.wav", "text", "x", "", "dev"] for i in range(33)])
    with pytest.raises(ValueError) as error:
        read_folder(tmp_path)
    text = str(error.value)
    assert "33 faults" in text and text.count("unknown split") == 20 and "and 13 more" in text


def test_missing_folder_table_and_columns_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match="no metadata.csv; found notes.txt"):
        read_folder(tmp_path)
    write_table(tmp_path, [], ["file_name", "text", "split"])
    with pytest.raises(ValueError) as error:
        read_folder(tmp_path)
    assert "missing columns caption, label, group" in str(error.value)
    assert "found file_name, text, split" in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "found an empty file"),
        (b"file_name,caption,label,group,split\n", "no rows"),
        (b"file_name,caption,label,group,split\na.wav,caf\xe9,x,,train\n", "not UTF-8"),
        (b'file_name,caption,label,group,split\na.wav,"open,x,,train\n' * 2, "not valid CSV"),
    ],
)
def test_file_that_is_no_such_table_is_one_clear_error(tmp_path, content, message):
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)


def test_captions_of_a_split_are_flat_and_know_their_clip():
    clips = tuple(
        Clip(str(i), pathlib.Path("x"), tuple(f"{i}{j}" for j in range(n)))
        for i, n in enumerate([2, 1, 3])
    )
    split = Split("c", "train", clips)
    assert split.captions == ("00", "01", "10", "20", "21", "22")
    assert split.caption_clip.dtype == np.int32
    assert split.caption_clip.tolist() == [0, 0, 1, 2, 2, 2]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("  A dog,barks!\n Twice. ", "a dog barks twice"),
        ("It's a two-stroke \u2014 isn\u2019t it?", "its a two stroke isnt it"),
        ("CAFE\u0301", "caf\u00e9"),
        ("...", ""),
    ],
)
def test_normalised_caption_is_lower_case_without_punctuation(text, expected):
    assert normalise_caption(text) == expected


def test_caption_keys_are_equal_exactly_where_normalised_captions_are():
    captions = ["A dog.", "rain", "a  dog", "Rain!", "wind", "a dog"]
    keys = caption_keys(captions)
    assert keys.dtype == np.int32
    normalised = [normalise_caption(text) for text in captions]
    for i in range(6):
        for j in range(6):
            assert (keys[i] == keys[j]) == (normalised[i] == normalised[j])
