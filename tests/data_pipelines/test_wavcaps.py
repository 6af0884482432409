import collections
import json

import pytest

import layouts
from data_pipelines.corpora.wavcaps import read_wavcaps, split_by_hash

TABLES = {"bbc": "bbc_final.json", "audioset_sl": "as_final.json"}


def write_bbc(folder, rows):
    layouts.write_wavcaps_table(folder / TABLES["bbc"], rows)


def test_the_split_is_that_of_the_specification():
    # Given in the specification of the task.
    assert layouts.hashed_split("bbc", "07042236") == "6423a54a2463153fb2366bf70cf047989da900dd"
    ids = [f"{i:08d}" for i in range(2300)]
    found = split_by_hash("bbc", dict.fromkeys(ids, "the same"))
    ranked = sorted(ids, key=lambda key: layouts.hashed_split("bbc", key))
    assert [found[key] for key in ranked] == ["test"] * 1000 + ["valid"] * 1000 + ["train"] * 300
    # Another corpus, another order.
    assert split_by_hash("audioset_sl", dict.fromkeys(ids, "x")) != found


def test_grouped_by_caption_a_caption_lies_in_one_split_and_all_else_in_order_of_its_hash():
    captions = {f"{i}": f"Sound {i // 7}{'.' * (i % 3)}" for i in range(3001)}
    found = split_by_hash("bbc", captions, group_by_caption=True)
    splits = collections.defaultdict(set)
    for key, split in found.items():
        splits[captions[key].strip(".").lower()].add(split)
    assert all(len(of_caption) == 1 for of_caption in splits.values())
    counts = collections.Counter(found.values())
    # A group that begins below a limit goes below it as a whole, so at most 6 clips more.
    assert 1000 <= counts["test"] <= 1006 and 2000 <= counts["test"] + counts["valid"] <= 2006
    order = sorted(splits, key=lambda text: layouts.hashed_split("bbc", text))
    ranks = [["test", "valid", "train"].index(*splits[text]) for text in order]
    assert ranks == sorted(ranks)


def test_missing_audio_lowers_counts_and_moves_no_clip(tmp_path):
    layouts.write_wavcaps(tmp_path)
    clips = read_wavcaps(tmp_path, "bbc").clips
    counts = collections.Counter(clip.split for clip in clips)
    assert counts == {"test": 1000, "valid": 1000, "train": 10}
    with_audio = [clip for clip in clips if clip.audio]
    assert collections.Counter(clip.split for clip in with_audio) == {
        "test": 3, "valid": 2, "train": 4}  # fmt: skip
    assert all(clip.audio.endswith(f"BBC_Sound_Effects_flac/{clip.id}.flac") for clip in with_audio)
    for clip in with_audio[::2]:
        (tmp_path / "BBC_Sound_Effects_flac" / f"{clip.id}.flac").unlink()
    again = read_wavcaps(tmp_path, "bbc").clips
    assert [(clip.id, clip.split) for clip in again] == [(clip.id, clip.split) for clip in clips]


@pytest.mark.parametrize("overlap, removed", [("all", 10), ("eval_only", 5), ("none", 0)])
def test_clips_of_audiocaps_are_removed_before_the_split(tmp_path, overlap, removed):
    layouts.write_wavcaps(tmp_path)
    layouts.write_audiocaps_tables(tmp_path / "ac")
    listing = read_wavcaps(tmp_path, "audioset_sl", overlap, [tmp_path / "ac"])
    left = {clip.id for clip in listing.clips}
    gone = {layouts.video(i) for i in range(10)} - left
    assert len(left) == 2020 - removed
    assert gone == {layouts.video(i) for i in range(10 - removed, 10)}
    assert listing.notes == ((f"{removed} clips of AudioCaps removed",) if removed else ())
    ranked = sorted(left, key=lambda key: layouts.hashed_split("audioset_sl", key))
    test = {clip.id for clip in listing.clips if clip.split == "test"}
    assert test == set(ranked[:1000])
    if overlap == "all":
        assert sum(clip.audio is not None for clip in listing.clips) == 9


def test_a_blacklist_takes_clips_away_and_moves_none(tmp_path):
    layouts.write_wavcaps(tmp_path)
    layouts.write_audiocaps_tables(tmp_path / "ac")
    arguments = tmp_path, "audioset_sl", "all", [tmp_path / "ac"]
    before = {clip.id: clip.split for clip in read_wavcaps(*arguments).clips}
    banned = [layouts.video(100), layouts.video(101)]
    lists = [tmp_path / "one.json", tmp_path / "two.json"]
    lists[0].write_text(json.dumps({"AudioSet": [f"Y{banned[0]}.wav"], "FreeSound": ["7"]}))
    lists[1].write_text(json.dumps({"AudioSet": [f"Y{key}.wav" for key in banned]}))
    listing = read_wavcaps(*arguments, blacklists=lists)
    assert {clip.id: clip.split for clip in listing.clips} == {
        key: split for key, split in before.items() if key not in banned}  # fmt: skip
    assert listing.notes[-1] == "2 clips of the blacklists removed"
    assert read_wavcaps(tmp_path, "bbc", blacklists=lists).notes == (
        "0 clips of the blacklists removed",)  # fmt: skip


def test_overlap_needs_the_tables(tmp_path):
    layouts.write_wavcaps(tmp_path)
    with pytest.raises(ValueError, match="overlap is 'all', which needs the tables of AudioCaps"):
        read_wavcaps(tmp_path, "audioset_sl", "all")


def test_an_id_with_two_captions_is_an_error_and_an_entry_told_twice_is_none(tmp_path):
    rows = [("1", "rain"), ("2", "wind"), ("1", "rain"), ("3", "a bell")]
    write_bbc(tmp_path, rows)
    assert [clip.id for clip in read_wavcaps(tmp_path, "bbc").clips] == ["1", "2", "3"]
    write_bbc(tmp_path, [*rows, ("3", "a gong"), ("2", "a gale"), ("4", "")])
    with pytest.raises(ValueError) as error:
        read_wavcaps(tmp_path, "bbc")
    for text in ("3 faults", "entry 5: '3' had another caption", "entry 6: '2'", "entry 7: no cap"):
        assert text in str(error.value)


@pytest.mark.parametrize("content, message", [
    ("[]", "expected the layout of WavCaps"),
    ('{"num_captions_per_audio": 5, "data": []}', "expected the layout of WavCaps"),
    ('{"num_captions_per_audio": 1, "data": ["x"]}', "entry 1: no id"),
    ("{", "not JSON"),
])  # fmt: skip
def test_another_file_of_that_name_is_told(tmp_path, content, message):
    (tmp_path / TABLES["bbc"]).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_wavcaps(tmp_path, "bbc")


@pytest.mark.parametrize("content", ['["Yx.wav"]', '{"AudioSet": "x"}'])
def test_a_blacklist_of_another_layout_is_told(tmp_path, content):
    write_bbc(tmp_path, [("1", "rain")])
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(ValueError, match="expected a blacklist of WavCaps"):
        read_wavcaps(tmp_path, "bbc", blacklists=[tmp_path / "list.json"])
    with pytest.raises(FileNotFoundError, match="other.json: no such file"):
        read_wavcaps(tmp_path, "bbc", blacklists=[tmp_path / "other.json"])
