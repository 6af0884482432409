import pytest
from ml_collections import ConfigDict

from conftest import write_table
from data_pipelines.corpora import scenes
from data_pipelines.streams import build_stream


@pytest.fixture
def root(tmp_path):
    for name in ("one", "two", "three"):
        rows = [
            [f"{split}{i}.wav", f"{name} {i}", "ab"[i % 2], "", split]
            for split, count in (("train", 30), ("valid", 5), ("test", 4))
            for i in range(count)
        ]
        write_table(tmp_path / name, rows)
    return tmp_path


def spec(root, **changes):
    tasks = [{"folder": "one"}, {"name": "deux", "folder": "two"}, {"folder": "three"}]
    return {"kind": "folders", "name": "s", "root": str(root), "tasks": tasks, **changes}


def test_tasks_come_in_the_order_of_the_list_or_the_one_asked_for(root):
    stream = build_stream(spec(root))
    assert stream.name == "s"
    assert [task.name for task in stream.tasks] == ["one", "deux", "three"]
    assert stream.tasks[1].train.clips[0].path == root / "two" / "train0.wav"
    stream = build_stream(spec(root, order=("three", "one", "deux")))
    assert [task.name for task in stream.tasks] == ["three", "one", "deux"]
    assert stream.tasks[0].test.captions[0] == "three 0"


def test_a_config_dict_describes_the_same_stream(root):
    assert build_stream(ConfigDict(spec(root, limit=3))) == build_stream(spec(root, limit=3))


def test_labels_make_tasks_of_one_folder(root):
    tasks = [{"name": label, "folder": "one", "labels": (label,)} for label in "ab"]
    a, b = build_stream(spec(root, tasks=tasks)).tasks
    assert {clip.label for clip in a.train.clips} == {"a"}
    assert {clip.label for clip in b.train.clips} == {"b"}
    assert len(a.test.clips) + len(b.test.clips) == 4


def test_embedded_tasks_of_one_corpus_share_its_folder(root, monkeypatch):
    asked = []

    def generate(directory, settings, corpora):
        asked.extend(corpora)
        return {"bbc_like": root / "one", "clotho_like": root / "two"}

    monkeypatch.setattr(scenes, "generate", generate)
    tasks = [{"name": "bbc_like"}, {"name": "clotho_like"}, {"name": "b2", "folder": "bbc_like"}]
    first, second, third = build_stream({"kind": "embedded", "tasks": tasks}).tasks
    assert asked == ["bbc_like", "clotho_like"]
    assert [task.name for task in (first, second, third)] == ["bbc_like", "clotho_like", "b2"]
    assert third.train.clips == first.train.clips != second.train.clips
    with pytest.raises(ValueError, match="names are not unique: bbc_like, bbc_like"):
        build_stream({"kind": "embedded", "tasks": tasks[:1] * 2})


def test_limit_takes_a_subset_that_ids_alone_decide_and_that_grows(root):
    full, ten, nine = (build_stream(spec(root, limit=n)).tasks[0] for n in (0, 10, 9))
    assert len(ten.train.clips) == 10 and len(ten.valid.clips) == 5 and len(full.train.clips) == 30
    assert set(nine.train.clips) < set(ten.train.clips) < set(full.train.clips)
    positions = [full.train.clips.index(clip) for clip in ten.train.clips]
    assert positions == sorted(positions) and positions != list(range(10))
    table = root / "one" / "metadata.csv"
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([header, *reversed(rows)]))
    shuffled = build_stream(spec(root, limit=10)).tasks[0]
    assert set(shuffled.train.clips) == set(ten.train.clips)


@pytest.mark.parametrize("changes, message", [
    ({"kind": "folder"}, "stream.kind is 'folder', expected one of: folders"),
    ({"roots": "x"}, "stream: unknown keys roots; known: kind, name"),
    ({"tasks": []}, "stream.tasks is empty"),
    ({"tasks": [{"path": "one"}]}, r"stream.tasks\[0\]: unknown keys path"),
    ({"tasks": [{"name": "one"}]}, r"stream.tasks\[0\] has no folder"),
    ({"tasks": [{"folder": "one"}] * 2}, "names are not unique: one, one"),
    ({"tasks": [{"folder": "one", "labels": ["c"]}]}, "expected one or more of: a, b"),
    ({"order": ["one", "deux"]}, "stream.order is one, deux; expected each of these once"),
    ({"order": ["one", "deux", "deux"]}, "expected each of these once: one, deux, three"),
    ({"limit": -1}, "stream.limit is -1"),
])  # fmt: skip
def test_faulty_descriptions_are_one_clear_error(root, changes, message):
    with pytest.raises(ValueError, match=message):
        build_stream(spec(root, **changes))


def test_missing_folder_is_named(root):
    with pytest.raises(FileNotFoundError, match="four' does not exist"):
        build_stream(spec(root, tasks=[{"folder": "four"}]))
