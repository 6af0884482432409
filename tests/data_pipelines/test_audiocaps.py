import pytest

import layouts
from conftest import write_tone
from data_pipelines.corpora.audiocaps import read_audiocaps, read_video_ids
from data_pipelines.corpora.sources import AudioFiles


def test_clips_captions_and_splits_are_those_of_the_tables(tmp_path):
    layouts.write_audiocaps(tmp_path)
    clips = read_audiocaps(tmp_path).clips
    assert [clip.split for clip in clips] == ["train"] * 5 + ["valid"] * 2 + ["test"] * 3
    assert [len(clip.captions) for clip in clips] == [1] * 5 + [5] * 5
    assert clips[5].id == f"{layouts.video(5)}_50"
    assert clips[5].captions[3] == 'a dog, "clip 5",\nbarks 3 times'
    assert [i for i, clip in enumerate(clips) if clip.audio is None] == [3, 4, 8]


@pytest.mark.parametrize("name", [
    "{}.wav", "Y{}.wav", "{}_30.wav", "Y{}_30.mp3", "{}_30_40.flac", "Y{}_30_40.wav",
    "{}_30000.wav", "{}_30000_40000.wav", "Y{}_30.000_40.000.wav", "{}_30.0_40.0.opus",
    "{}_000030.wav", "{}_000030_000040.m4a", "train/{}.WAV", "waves/Y{}.wav",
])  # fmt: skip
def test_common_names_of_a_clip_are_found(tmp_path, name):
    layouts.write_audiocaps_tables(tmp_path)
    path = tmp_path / name.format(layouts.video(3))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    clips = read_audiocaps(tmp_path).clips
    assert clips[3].audio == str(path)
    assert [clip.audio for clip in clips if clip is not clips[3]] == [None] * 9


def test_another_time_or_case_is_another_clip(tmp_path):
    tables = layouts.audiocaps_rows()
    tables["train"][0][1] = "abcdefghijk"
    tables["train"][1][1] = "ABCDEFGHIJK"
    layouts.write_audiocaps_tables(tmp_path, tables)
    for name in ("abcdefghijk.wav", f"{layouts.video(3)}_31.wav", f"{layouts.video(4)}_4.wav"):
        (tmp_path / name).write_bytes(b"x")
    clips = read_audiocaps(tmp_path).clips
    assert clips[0].audio == str(tmp_path / "abcdefghijk.wav")
    assert all(clip.audio is None for clip in clips[1:])


def test_a_name_without_time_is_not_taken_for_two_clips_of_one_video(tmp_path):
    tables = layouts.audiocaps_rows()
    tables["train"][1][1] = layouts.video(0)
    layouts.write_audiocaps_tables(tmp_path, tables)
    for name in ("{}.wav", "{}_10.wav"):
        (tmp_path / name.format(layouts.video(0))).write_bytes(b"x")
    clips = read_audiocaps(tmp_path).clips
    assert clips[0].audio is None and clips[1].audio.endswith("_10.wav")


def test_folder_of_the_split_and_better_format_come_first(tmp_path):
    for name in ("b/x.wav", "a/x.flac", "val/x.mp3", "val/x.flac", "y.ogg", "y.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    files = AudioFiles(tmp_path)
    assert files.find(["x"], ("val",)) == str(tmp_path / "val/x.flac")
    assert files.find(["z", "x"]) == str(tmp_path / "b/x.wav")
    assert files.find(["y"], ("val",)) == str(tmp_path / "y.wav")
    assert files.find(["y"], ("val",), elsewhere=False) is None


def test_links_are_followed_once(tmp_path):
    write_tone(tmp_path / "real" / "x.wav", 0.01, 8000)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "source" / "loop").symlink_to(tmp_path / "source")
    assert AudioFiles(tmp_path / "source").find(["x"]).endswith("linked/x.wav")


def test_version_2_has_its_own_folder_and_any_number_of_captions(tmp_path):
    layouts.write_audiocaps_tables(tmp_path / "dataset")
    tables = layouts.audiocaps_rows((7, 1, 1))
    tables["train"][1][1:3] = tables["train"][0][1:3]
    tables["val"].pop()
    layouts.write_audiocaps_tables(tmp_path / "dataset2.0", tables)
    clips = read_audiocaps(tmp_path, "dataset2.0", counts=False).clips
    assert [len(clip.captions) for clip in clips] == [2, 1, 1, 1, 1, 1, 4, 5]
    # Ids of both versions, for the overlap with AudioSet.
    assert read_video_ids(tmp_path) == {layouts.video(i) for i in range(10)}
    assert read_video_ids(tmp_path / "dataset", ("test",)) == {layouts.video(i) for i in (7, 8, 9)}


@pytest.mark.parametrize("change, message", [
    (lambda t: t["train"].append([1, layouts.video(0), 0, "b"]), "has 2 captions, expected 1"),
    (lambda t: t["val"].pop(), "has 4 captions, expected 5"),
    (lambda t: t["test"].append([1, layouts.video(0), 0, "x"]), "at 0 s is in train.csv too"),
    (lambda t: t["train"].append([1, layouts.video(20), "1:30", "x"]), "start_time is '1:30'"),
    (lambda t: t["train"].append([1, layouts.video(20), "3", " "]), "no caption"),
])  # fmt: skip
def test_rows_against_the_layout_are_told(tmp_path, change, message):
    tables = layouts.audiocaps_rows()
    change(tables)
    layouts.write_audiocaps_tables(tmp_path, tables)
    with pytest.raises(ValueError, match=message):
        read_audiocaps(tmp_path)


def test_all_faults_are_in_one_error_and_a_row_told_twice_is_none(tmp_path):
    tables = layouts.audiocaps_rows()
    tables["train"].append(list(tables["train"][2]))
    layouts.write_audiocaps_tables(tmp_path, tables)
    assert len(read_audiocaps(tmp_path).clips) == 10
    tables["train"] += [[1, layouts.video(i), 10 * i, "another"] for i in range(2)]
    layouts.write_audiocaps_tables(tmp_path, tables)
    with pytest.raises(ValueError) as error:
        read_audiocaps(tmp_path)
    assert "2 faults" in str(error.value)
    assert all(layouts.video(i) in str(error.value) for i in range(2))


def test_missing_tables_and_folders_are_named(tmp_path):
    layouts.write_audiocaps_tables(tmp_path)
    (tmp_path / "val.csv").unlink()
    with pytest.raises(FileNotFoundError, match="no val.csv in .* holds test.csv, train.csv"):
        read_audiocaps(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        read_audiocaps(tmp_path / "nowhere")
