"""Checks on real corpora beside the repository; skipped where these are not."""

import collections
import pathlib

import numpy as np
import pytest

from data_pipelines.audio import check_audio
from data_pipelines.batches import DataSettings, SplitReader
from data_pipelines.log_mel import LogMelSettings
from data_pipelines.streams import build_stream
from data_pipelines.text import Tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not (ROOT / "esc10").is_dir(), reason=f"no corpora in {ROOT}")
SPLITS = ("train", "valid", "test")


def load(folder, **changes):
    tasks = [{"folder": folder}]
    return build_stream({"kind": "folders", "root": ROOT, "tasks": tasks, **changes}).tasks[0]


@pytest.mark.parametrize("folder, clips, captions, labels", [
    ("esc10", (240, 80, 80), (720, 240, 240), (24, 8, 8)),
    ("fsdd", (2400, 300, 300), (4184, 532, 538), (240, 30, 30)),
])  # fmt: skip
def test_counts_are_those_published_with_the_data(folder, clips, captions, labels):
    corpus = load(folder)
    for name, num_clips, num_captions, per_label in zip(SPLITS, clips, captions, labels):
        split = getattr(corpus, name)
        assert (len(split.clips), len(split.captions)) == (num_clips, num_captions)
        count = collections.Counter(clip.label for clip in split.clips)
        assert len(count) == 10 and set(count.values()) == {per_label}
    groups = [{clip.group for clip in getattr(corpus, name).clips} for name in SPLITS]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    if folder == "esc10":
        assert [len(group) for group in groups] == [187, 59, 57]


def test_distinct_captions_are_as_many_as_published():
    for folder, distinct in (("esc10", 802), ("fsdd", 726)):
        corpus = load(folder)
        assert len({c for name in SPLITS for c in getattr(corpus, name).captions}) == distinct


@pytest.mark.parametrize("folder", ["esc10", "fsdd"])
def test_real_clips_become_batches(folder, tmp_path):
    corpus = load(folder, limit=12)
    tokenizer = Tokenizer.train(corpus.train.captions, 300)
    settings = DataSettings(
        LogMelSettings(16000, 512, 320, 32, 50.0, 8000.0),
        window_seconds=2.0,
        max_tokens=20,
        cache_dir=tmp_path,
    )
    for name in SPLITS:
        split = getattr(corpus, name)
        assert check_audio(split.clips) == (split.clips, ())
        reader = SplitReader(split, tokenizer, settings)
        batch = next(reader.train_batches(9, seed=0))
        assert batch["audio"].shape == (9, 101, 32) and np.isfinite(batch["audio"]).all()
        clip_id = np.concatenate([b["clip_id"][b["mask"]] for b in reader.audio_batches(5)])
        chunks = collections.Counter(clip_id.tolist())
        assert sorted(chunks) == list(range(12))
        # Sounds of esc10 last 3.6 s and more, spoken digits less than 2.3 s.
        assert set(chunks.values()) <= ({2, 3} if folder == "esc10" else {1, 2})


@pytest.mark.parametrize("folder, label, sessions, classes, clips", [
    ("esc10", "label", 5, 10, (32, 0, 8)),
    ("fsdd", "label", 5, 10, (240, 0, 60)),
    ("fsdd", "speaker+label", 30, 60, (40, 0, 10)),
])  # fmt: skip
def test_real_folders_become_sessions_of_classes(folder, label, sessions, classes, clips):
    spec = {"kind": "classes", "corpus": "folder", "root": ROOT, "folder": folder, "label": label}
    stream = build_stream(spec | {"sessions": sessions})
    assert len(stream.classes) == len(set(stream.classes)) == classes
    assert len(stream.tasks) == sessions
    seen = set()
    for number, task in enumerate(stream.tasks):
        own = stream.classes[number * classes // sessions : (number + 1) * classes // sessions]
        for name, count in zip(SPLITS, clips):
            split = getattr(task, name)
            assert not seen & {clip.path for clip in split.clips}
            seen |= {clip.path for clip in split.clips}
            assert collections.Counter(clip.label for clip in split.clips) == (
                dict.fromkeys(own, count) if count else {}
            )
    assert len(seen) == classes * sum(clips)
    published = build_stream(spec | {"sessions": sessions, "split": "own"})
    assert published.classes == stream.classes
    parts = [{clip.group for task in published.tasks for clip in getattr(task, name).clips}
             for name in SPLITS]  # fmt: skip
    assert all(parts) and not (parts[0] & parts[2] or parts[0] & parts[1] or parts[1] & parts[2])


def test_real_clips_of_a_session_become_labelled_batches(tmp_path):
    stream = build_stream({"kind": "classes", "corpus": "folder", "root": ROOT, "folder": "fsdd",
                           "label": "speaker+label", "sessions": 30, "limit": 10})  # fmt: skip
    settings = DataSettings(
        LogMelSettings(16000, 512, 320, 32, 50.0, 8000.0), window_seconds=1.0, cache_dir=tmp_path
    )
    reader = SplitReader(stream.tasks[3].train, None, settings, stream.classes)
    batch = next(reader.train_batches(17, seed=0))
    assert sorted(batch["label"].tolist()) == [0] + [6] * 8 + [7] * 8  # a row of padding
    assert np.isfinite(batch["audio"]).all() and batch["mask"].sum() == 16
