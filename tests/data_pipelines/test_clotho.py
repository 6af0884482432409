import unicodedata

import pytest

import layouts
from data_pipelines.corpora.clotho import read_clotho


def test_clips_captions_and_splits_are_those_of_the_tables(tmp_path):
    layouts.write_clotho(tmp_path)
    clips = read_clotho(tmp_path).clips
    assert [clip.split for clip in clips] == ["train"] * 4 + ["valid"] * 2 + ["test"] * 3
    rows = [row for rows in layouts.clotho_rows().values() for row in rows]
    assert [list(clip.captions) for clip in clips] == [row[1:] for row in rows]
    assert all(len(clip.captions) == 5 for clip in clips)
    assert all(clip.audio for clip in clips) and len({clip.audio for clip in clips}) == 9


def test_one_name_in_two_tables_is_two_recordings_each_of_its_folder(tmp_path):
    layouts.write_clotho(tmp_path)
    twins = [clip for clip in read_clotho(tmp_path).clips if "same name" in clip.id]
    assert [clip.id for clip in twins] == ["development/same name.wav", "validation/same name.wav"]
    assert [clip.audio for clip in twins] == [str(tmp_path / clip.id) for clip in twins]
    (tmp_path / "validation" / "same name.wav").unlink()
    twins = [clip for clip in read_clotho(tmp_path).clips if "same name" in clip.id]
    assert [clip.audio is None for clip in twins] == [False, True]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("folder", ["development", "clotho_audio_development/development"])
def test_names_are_found_composed_or_not_and_without_their_leading_space(tmp_path, form, folder):
    tables = layouts.clotho_rows()
    layouts.write_clotho_tables(tmp_path, tables)
    (tmp_path / folder).mkdir(parents=True)
    written = [unicodedata.normalize(form, "Café №1.wav"), "leading space.wav"]
    for name in written:
        (tmp_path / folder / name).write_bytes(b"x")
    clips = read_clotho(tmp_path).clips
    assert [clip.audio for clip in clips[:2]] == [str(tmp_path / folder / n) for n in written]
    assert clips[0].id == unicodedata.normalize("NFC", "development/Café №1.wav")
    assert all(clip.audio is None for clip in clips[2:])


def test_a_row_told_twice_is_one_clip(tmp_path):
    tables = layouts.clotho_rows()
    tables["development"] += [tables["development"][0], ["b.wav", *"12345"]]
    layouts.write_clotho_tables(tmp_path, tables)
    assert len(read_clotho(tmp_path).clips) == 10


@pytest.mark.parametrize("part, row, message", [
    ("development", ["Café №1.wav", *"12345"], "'Café №1.wav' had other captions before"),
    ("evaluation", layouts.clotho_rows()["validation"][1], "with these captions is in validation"),
    ("evaluation", ["x.wav", "1", "2", "", "4", " "], "no caption_3, caption_5"),
    ("evaluation", ["", *"12345"], "no file_name"),
])  # fmt: skip
def test_rows_against_the_layout_are_told(tmp_path, part, row, message):
    tables = layouts.clotho_rows()
    tables[part].append(row)
    layouts.write_clotho_tables(tmp_path, tables)
    with pytest.raises(ValueError, match=message):
        read_clotho(tmp_path)


def test_a_missing_table_is_named(tmp_path):
    layouts.write_clotho_tables(tmp_path)
    (tmp_path / "clotho_captions_evaluation.csv").unlink()
    with pytest.raises(FileNotFoundError, match="no clotho_captions_evaluation.csv"):
        read_clotho(tmp_path)
