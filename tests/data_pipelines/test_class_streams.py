import collections

import pytest
from ml_collections import ConfigDict

from conftest import write_table
from data_pipelines.corpora import SPLIT_NAMES
from data_pipelines.streams import build_stream
from layouts import (
    ESC50_CLASSES,
    esc50_rows,
    us8k_rows,
    write_esc50_table,
    write_speech_commands,
    write_timit,
    write_us8k,
    write_vocalset,
)


def build(corpus, root, **changes):
    return build_stream({"kind": "classes", "corpus": corpus, "root": str(root), **changes})


def sizes(stream):
    """(train, valid, test) clips of each class, in the order of the stream."""
    count = collections.Counter(
        (clip.label, name)
        for task in stream.tasks
        for name in SPLIT_NAMES
        for clip in getattr(task, name).clips
    )
    return [tuple(count[label, name] for name in SPLIT_NAMES) for label in stream.classes]


def groups(stream, name):
    return {clip.group for task in stream.tasks for clip in getattr(task, name).clips}


def test_esc50_becomes_sessions_by_chance_or_by_fold(tmp_path):
    write_esc50_table(tmp_path)
    stream = build("esc50", tmp_path, sessions=2, order_seed=1)
    assert stream.name == "esc50" and sorted(stream.classes) == sorted(ESC50_CLASSES)
    assert [task.name for task in stream.tasks] == ["esc50_1", "esc50_2"]
    short = stream.classes.index(ESC50_CLASSES[2])  # has 14 clips, the others 15
    assert sizes(stream) == [(12, 0, 2) if i == short else (12, 0, 3) for i in range(4)]
    assert groups(stream, "train") & groups(stream, "test")
    stream = build("esc50", tmp_path, sessions=2, split="grouped")
    assert {clip.id for task in stream.tasks for clip in task.test.clips} == {
        row[0] for row in esc50_rows() if row[1] == 5
    }
    assert not groups(stream, "train") & groups(stream, "test")


def test_a_table_in_another_order_is_the_same_stream(tmp_path):
    write_esc50_table(tmp_path)
    one = build("esc50", tmp_path, sessions=4, valid=0.1)
    write_esc50_table(tmp_path, sorted(esc50_rows(), key=lambda row: row[0][::-1]))
    assert build("esc50", tmp_path, sessions=4, valid=0.1) == one
    spec = {"kind": "classes", "corpus": "esc50", "root": str(tmp_path), "sessions": 4,
            "valid": 0.1, "classes": (), "order_file": "", "label": "", "limit": None}  # fmt: skip
    assert build_stream(ConfigDict(spec)) == one


def test_us8k_grouped_never_parts_a_recording(tmp_path):
    write_us8k(tmp_path)
    stream = build("us8k", tmp_path, sessions=3, split="grouped", valid=0.1)
    assert groups(stream, "test") == {str(row[1]) for row in us8k_rows() if row[5] > 8}
    assert not (groups(stream, "train") | groups(stream, "valid")) & groups(stream, "test")
    rows = us8k_rows()
    rows[0][5] = 9  # one of the two slices of a recording of fold 1
    write_us8k(tmp_path, rows)
    build("us8k", tmp_path, sessions=3)
    with pytest.raises(ValueError, match="'us8k': 1 groups are in more than one split:\n  100"):
        build("us8k", tmp_path, sessions=3, split="grouped")


def test_speech_commands_grouped_are_its_lists(tmp_path):
    valid, test = write_speech_commands(tmp_path)
    stream = build("sc2", tmp_path, sessions=3, split="grouped", valid=0.1)
    assert {clip.id for task in stream.tasks for clip in task.valid.clips} == set(valid)
    assert {clip.id for task in stream.tasks for clip in task.test.clips} == set(test)
    assert sizes(build("sc2", tmp_path, sessions=1)) == [(16, 0, 4)] * 3


def test_timit_has_eight_and_two_utterances_of_a_speaker(tmp_path):
    write_timit(tmp_path / "lisa" / "TIMIT")
    stream = build("timit", tmp_path, folder="lisa", name="timit2", classes_per_session=2)
    assert sizes(stream) == [(8, 0, 2)] * 5
    assert [task.name for task in stream.tasks] == ["timit2_1", "timit2_2", "timit2_3"]
    with pytest.raises(ValueError, match="stream.split is 'grouped', expected for timit: random"):
        build("timit", tmp_path, sessions=1, split="grouped")


def test_vocalset_draws_98_clips_a_technique_and_tests_its_singers(tmp_path):
    # 2 + 3 + ... + 14 = 104 files of each technique.
    names = ("belt", "trill", "spoken")
    write_vocalset(tmp_path, names, singers=13, tests=(1, 12))
    stream = build("vocalset", tmp_path, sessions=1, classes=names[:2])
    assert sizes(stream) == [(79, 0, 19)] * 2
    assert sizes(build("vocalset", tmp_path, sessions=1, classes=names, limit=0)) == [
        (84, 0, 20)] * 3  # fmt: skip
    grouped = build("vocalset", tmp_path, sessions=1, classes=names[:2], split="grouped")
    assert groups(grouped, "test") == {"female1", "female12"}
    assert not groups(grouped, "train") & groups(grouped, "test")
    assert all(sum(size) == 98 for size in sizes(grouped))
    with pytest.raises(ValueError, match="has no breathy, .* it has belt, spoken, trill"):
        build("vocalset", tmp_path, sessions=1)  # all but `spoken`
    (tmp_path / "test_singers_technique.txt").unlink()
    with pytest.raises(ValueError, match="has no test clips: the singers of test_singers_techn"):
        build("vocalset", tmp_path, sessions=1, classes=names[:2], split="grouped")


@pytest.fixture
def words(tmp_path):
    """A caption folder of three words by two speakers, two captions a clip."""
    rows = [
        [f"{word} {speaker} {i}.wav", text, word, f"{speaker} {i // 2}", split, speaker]
        for word in ("eins", "zwei", "fünf")
        for speaker in ("ann", "bo")
        for i, split in enumerate(["train"] * 6 + ["valid"] * 2 + ["test"] * 2)
        for text in ("a word", f"the word {word}")
    ]
    columns = ("file_name", "caption", "label", "group", "split", "speaker")
    write_table(tmp_path / "words", rows, columns)
    return tmp_path


def test_a_caption_folder_has_its_own_split_or_another(words):
    stream = build("folder", words, folder="words", sessions=3, split="own")
    assert stream.name == "words" and sizes(stream) == [(12, 4, 4)] * 3
    assert all(clip.captions == (clip.label,) for clip in stream.tasks[0].train.clips)
    assert sizes(build("folder", words, folder="words", sessions=3)) == [(16, 0, 4)] * 3
    stream = build("folder", words / "words", label="speaker+label", sessions=2, split="own")
    assert sorted(stream.classes) == ["ann+eins", "ann+fünf", "ann+zwei",
                                      "bo+eins", "bo+fünf", "bo+zwei"]  # fmt: skip
    assert sizes(stream) == [(6, 2, 2)] * 6
    stream = build("folder", words, folder="words", sessions=3, split="own", limit=5, name="w")
    assert sizes(stream) == [(3, 1, 1)] * 3 and stream.tasks[0].name == "w_1"


def test_streams_of_text_and_audio_have_no_classes(words):
    tasks = [{"folder": "words"}]
    stream = build_stream({"kind": "folders", "root": str(words), "tasks": tasks})
    assert stream.classes == () and len(stream.tasks[0].train.captions) == 72


@pytest.mark.parametrize("changes, message", [
    ({"corpus": "esc-50"}, "stream.corpus is 'esc-50', expected one of: esc50, us8k, sc2, timit"),
    ({"corpus": None}, "stream.corpus is None"),
    ({"tasks": []}, "stream: unknown keys tasks; known: kind, name, corpus, root, folder"),
    ({"sessions": 0}, "stream.sessions is 0 and stream.classes_per_session 0"),
    ({"sessions": 2}, "stream.sessions is 2, which does not divide 3 classes"),
    ({"split": "grouped"}, "stream.split is 'grouped', expected for folder: random or own"),
    ({"classes": ("eins", "drei")}, "classes: corpus 'words' has no drei; it has eins, fünf"),
    ({"label": "speaker+accent"}, "missing columns accent"),
    ({"corpus": "timit", "label": "speaker"}, "stream.label is 'speaker', but timit has one class"),
    ({"limit": -1}, "stream.limit is -1"),
])  # fmt: skip
def test_faulty_descriptions_of_classes_are_one_clear_error(words, changes, message):
    spec = {"kind": "classes", "corpus": "folder", "root": words, "folder": "words", "sessions": 3}
    with pytest.raises(ValueError, match=message):
        build_stream(spec | changes)


def test_a_missing_folder_is_named(words):
    with pytest.raises(FileNotFoundError, match="wrds' does not exist"):
        build("folder", words, folder="wrds", sessions=3)
