import dataclasses
import itertools

import numpy as np
import pytest

from conftest import write_tone
from data_pipelines.audio import AudioError
from data_pipelines.augment import SpecAugment
from data_pipelines.batches import DataSettings, SplitReader
from data_pipelines.corpora import merge_splits
from data_pipelines.log_mel import LogMelSettings
from data_pipelines.streams import build_stream
from data_pipelines.text import Tokenizer
from layouts import ESC50_CLASSES, esc50_rows, write_esc50, write_esc50_table

SETTINGS = DataSettings(LogMelSettings(8000, 256, 100, 16, 50.0, 4000.0), window_seconds=0.06)


@pytest.fixture
def stream(tmp_path):
    """Two sessions of ESC-50 with the clips of four recordings a class; all have audio."""
    rows = [row for row in esc50_rows() if row[1] in (1, 5)]
    write_esc50(tmp_path)
    write_esc50_table(tmp_path, rows)
    for i, (name, *_) in enumerate(rows):
        write_tone(tmp_path / "audio" / name, 0.05, (8000, 11025)[i % 2], 1 + i % 2, i)
    spec = {"kind": "classes", "corpus": "esc50", "root": str(tmp_path), "sessions": 2}
    return build_stream(spec | {"split": "grouped", "order_seed": 2})


def take(batches, number):
    return list(itertools.islice(batches, number))


@pytest.mark.parametrize("cached", [True, False])
def test_a_row_has_the_number_of_its_clips_class_in_the_stream(stream, tmp_path, cached):
    settings = dataclasses.replace(SETTINGS, cache_dir=tmp_path / "cache" if cached else None)
    for task, numbers in zip(stream.tasks, ({0, 1}, {2, 3})):
        reader = SplitReader(task.train, None, settings, stream.classes)
        assert reader.labels.dtype == np.int32 and set(reader.labels.tolist()) == numbers
        assert [stream.classes[i] for i in reader.labels] == [c.label for c in task.train.clips]
        clips = len(task.train.clips)
        assert clips == 6 and reader.steps_per_epoch(4) == 2
        seen = []
        for batch in take(reader.train_batches(4, seed=1), 2):
            types = {"audio": "f4", "clip_id": "i4", "label": "i4", "mask": "?"}
            assert {name: array.dtype for name, array in batch.items()} == types
            real = batch["mask"]
            clip = batch["clip_id"][real]
            np.testing.assert_array_equal(batch["label"][real], reader.labels[clip])
            assert not batch["label"][~real].any() and not batch["audio"][~real].any()
            seen += clip.tolist()
        assert sorted(seen) == list(range(6))


def test_evaluation_audio_is_that_of_a_reader_with_text(stream):
    tokenizer = Tokenizer.train(list(ESC50_CLASSES), 280)
    split = stream.tasks[1].test
    bare, both = SplitReader(split, None, SETTINGS, stream.classes), SplitReader(
        split, tokenizer, SETTINGS, stream.classes)  # fmt: skip
    for one, two in zip(bare.audio_batches(4), both.audio_batches(4), strict=True):
        assert one.keys() == two.keys() == {"audio", "clip_id", "mask"}
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
    one, two = next(bare.train_batches(5, 0)), next(both.train_batches(5, 0))
    assert two.keys() - one.keys() == {"token_ids", "token_mask", "caption_id", "caption_key"}
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
    ids, _ = tokenizer.encode([stream.classes[i] for i in two["label"]], SETTINGS.max_tokens)
    np.testing.assert_array_equal(two["token_ids"], ids[:, :two["token_ids"].shape[1]])
    with pytest.raises(ValueError, match="corpus 'esc50_2' is read without a tokenizer: no text"):
        next(bare.text_batches(4))


def test_hosts_share_and_resume_batches_of_classes(stream):
    settings = dataclasses.replace(
        SETTINGS, window_seconds=0.04, crop="random", spec_augment=SpecAugment(1, 2, 1, 3)
    )
    reader = SplitReader(stream.tasks[0].train, None, settings, stream.classes)
    whole = take(reader.train_batches(4, seed=3), 4)
    shares = [take(reader.train_batches(4, 3, 2, rows), 2) for rows in ([0, 1], [2, 3])]
    for step, batch in enumerate(whole[2:]):
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([s[step][name] for s in shares]), array)


def test_clips_left_out_leave_no_label_behind(stream):
    split = stream.tasks[0].train
    labels = SplitReader(split, None, SETTINGS, stream.classes).labels
    split.clips[0].path.unlink()
    split.clips[4].path.write_bytes(b"broken")
    with pytest.raises(AudioError, match="2 of 6 audio files"):
        SplitReader(split, None, SETTINGS, stream.classes)
    skipping = dataclasses.replace(SETTINGS, on_error="skip")
    reader = SplitReader(split, None, skipping, stream.classes)
    assert reader.labels.tolist() == labels[[1, 2, 3, 5]].tolist()
    batch = next(reader.train_batches(4, 0))
    np.testing.assert_array_equal(batch["label"], reader.labels[batch["clip_id"]])


def test_sessions_merge_for_training_on_all(stream):
    merged = merge_splits([task.train for task in stream.tasks])
    reader = SplitReader(merged, None, SETTINGS, stream.classes)
    assert sorted(set(reader.labels.tolist())) == [0, 1, 2, 3] and len(reader.pairs) == 12
    assert reader.labels.tolist() == [stream.classes.index(c.label) for c in merged.clips]


def test_classes_that_were_not_given_are_named(stream):
    split = stream.tasks[0].train
    missing = stream.classes[1]
    with pytest.raises(ValueError, match="'esc50_1': split 'train' has clips of the classes") as e:
        SplitReader(split, None, SETTINGS, [c for c in stream.classes if c != missing])
    assert repr(missing) in str(e.value) and "the 3 that were given" in str(e.value)


def test_audio_alone_has_neither_text_nor_labels(stream):
    reader = SplitReader(stream.tasks[0].train, None, SETTINGS)
    batch = next(reader.train_batches(4, seed=0))
    assert set(batch) == {"audio", "clip_id", "mask"} and reader.labels is None
