import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest

from conftest import write_table, write_tone
from data_pipelines import batches as batches_module
from data_pipelines import iterate, load_tensorflow
from data_pipelines.audio import AudioError, read_audio
from data_pipelines.augment import SpecAugment
from data_pipelines.batches import DataSettings, SplitReader
from data_pipelines.corpora import merge_splits, normalise_caption
from data_pipelines.corpora.folder import read_folder
from data_pipelines.front_end import FrontEnd
from data_pipelines.log_mel import LogMelSettings
from data_pipelines.text import Tokenizer
from data_pipelines.waveforms import chunk_starts
from tensorflow_log_mel import tensorflow_log_mel

MEL = LogMelSettings(8000, 256, 100, 16, 50.0, 4000.0)
TOKENIZER = Tokenizer.train(["sound told as twice a 0 1 2 3 4 5 6"] * 3, 280)
MASKS = SpecAugment(1, 20, 1, 5)


@pytest.fixture
def settings(tmp_path):
    return DataSettings(MEL, window_seconds=1.0, max_tokens=12, cache_dir=tmp_path / "cache")


@pytest.fixture
def corpus(corpus_folder):
    return read_folder(corpus_folder)


def take(batches, number):
    return list(itertools.islice(batches, number))


def assert_same(one, two, audio_atol=0.0):
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(a["audio"], b["audio"], rtol=0, atol=audio_atol)
        for name in a.keys() - {"audio"}:
            np.testing.assert_array_equal(a[name], b[name])


def centre_features(clip):
    samples = read_audio(clip.path, 8000)
    start = chunk_starts(len(samples), 8000, 1)[0]
    chunk = samples[start : start + 8000]
    return tensorflow_log_mel(np.pad(chunk, (0, 8000 - len(chunk))), MEL)


@pytest.mark.parametrize("cached", [True, False])
def test_an_epoch_holds_every_pair_once_and_its_last_batch_is_padded(corpus, settings, cached):
    settings = dataclasses.replace(settings, cache_bytes=1 << 30 if cached else 0)
    reader = SplitReader(corpus.train, TOKENIZER, settings)
    split = reader.split
    assert reader.problems == () and split == corpus.train
    pairs = [(c, r) for r, c in enumerate(split.caption_clip)]
    assert reader.pairs.tolist() == [list(pair) for pair in pairs] and len(pairs) == 13
    assert reader.steps_per_epoch(5) == 3
    two_epochs = take(reader.train_batches(5, seed=3), 6)
    for epoch in (two_epochs[:3], two_epochs[3:]):
        seen = [
            pair
            for batch in epoch
            for pair, real in zip(zip(batch["clip_id"], batch["caption_id"]), batch["mask"])
            if real
        ]
        assert sorted(seen) == pairs
        assert [batch["mask"].sum() for batch in epoch] == [5, 5, 3]
        for name, array in epoch[2].items():
            assert len(array) == 5 and not array[3:].any(), name
    assert two_epochs[0]["caption_id"].tolist() != two_epochs[3]["caption_id"].tolist()


def test_fields_of_a_row_belong_together(corpus, settings):
    reader = SplitReader(corpus.train, TOKENIZER, settings)
    split = corpus.train
    keys = {}
    for batch in take(reader.train_batches(4, seed=0), 4):
        assert batch["audio"].shape == (4, *settings.audio_shape)
        types = {"audio": "f4", "token_ids": "i4", "token_mask": "?", "clip_id": "i4",
                 "caption_id": "i4", "caption_key": "i4", "mask": "?"}  # fmt: skip
        assert {name: array.dtype for name, array in batch.items()} == types
        ids, mask = TOKENIZER.encode([split.captions[i] for i in batch["caption_id"]], 12)
        for row in np.flatnonzero(batch["mask"]):
            np.testing.assert_array_equal(batch["token_ids"][row], ids[row])
            np.testing.assert_array_equal(batch["token_mask"][row], mask[row])
            clip = split.clips[batch["clip_id"][row]]
            caption = split.captions[batch["caption_id"][row]]
            assert caption in clip.captions
            keys.setdefault(int(batch["caption_key"][row]), set()).add(normalise_caption(caption))
            # Every third clip has the rate of MEL, so that cutting before resampling is exact.
            if batch["clip_id"][row] % 3 == 0:
                np.testing.assert_allclose(batch["audio"][row], centre_features(clip), atol=1e-4)
    assert all(len(texts) == 1 for texts in keys.values())
    assert len(keys) == len({normalise_caption(text) for text in split.captions}) == 12


MODES = {
    "kept": {},
    "kept, masks": {"spec_augment": MASKS},
    "computed": {"cache_bytes": 0},
    "computed, masks": {"cache_bytes": 0, "spec_augment": MASKS},
    "random crops, masks": {"crop": "random", "spec_augment": MASKS, "num_parallel": 3},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_iterator_continues_in_the_same_bits(corpus, settings, mode):
    settings = dataclasses.replace(settings, **MODES[mode])
    reader = SplitReader(corpus.train, TOKENIZER, settings)
    whole = take(reader.train_batches(5, seed=3), 8)
    for step in (1, 2, 3, 7):
        fresh = SplitReader(corpus.train, TOKENIZER, settings)
        assert_same(take(fresh.train_batches(5, 3, start_step=step), 8 - step), whole[step:])
    far = take(reader.train_batches(5, seed=3, start_step=3 * 10**6), 1)[0]
    assert far["mask"].all()
    other = take(reader.train_batches(5, seed=4), 1)[0]
    assert other["caption_id"].tolist() != whole[0]["caption_id"].tolist()


@pytest.mark.parametrize("mode", MODES)
def test_hosts_together_read_the_global_batch(corpus, settings, mode):
    reader = SplitReader(corpus.train, TOKENIZER, dataclasses.replace(settings, **MODES[mode]))
    whole = take(reader.train_batches(6, seed=1, start_step=1), 4)
    rows = [np.array(own) for own in ([0, 1], [2, 5], [3, 4])]  # as devices may lie
    order = np.argsort(np.concatenate(rows))

    def join(shares):
        return [
            {name: np.concatenate([share[name] for share in step])[order] for name in step[0]}
            for step in zip(*shares, strict=True)
        ]

    assert_same(join([take(reader.train_batches(6, 1, 1, own), 4) for own in rows]), whole)
    audio = [list(reader.audio_batches(6, rows=own)) for own in rows]
    assert_same(join(audio), list(reader.audio_batches(6)))
    text = [list(reader.text_batches(6, own)) for own in rows]
    np.testing.assert_equal(join(text), list(reader.text_batches(6)))


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_kept_and_computed_features_are_the_same(corpus, settings, split):
    kept = SplitReader(getattr(corpus, split), TOKENIZER, settings)
    settings = dataclasses.replace(settings, cache_bytes=0)
    computed = SplitReader(getattr(corpus, split), TOKENIZER, settings)
    assert_same(
        take(kept.train_batches(4, 0), 3), take(computed.train_batches(4, 0), 3), audio_atol=1e-4
    )
    assert_same(list(kept.audio_batches(3)), list(computed.audio_batches(3)), audio_atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4, 10, 64])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_evaluation_audio_is_every_chunk_in_clip_order(corpus, settings, batch_size, cache_bytes):
    settings = dataclasses.replace(settings, cache_bytes=cache_bytes, spec_augment=MASKS)
    reader = SplitReader(corpus.train, TOKENIZER, settings)
    found = list(reader.audio_batches(batch_size))
    assert all(len(batch["mask"]) == len(batch["audio"]) == batch_size for batch in found)
    clip_id = np.concatenate([batch["clip_id"][batch["mask"]] for batch in found])
    assert clip_id.tolist() == [0, 1, 2, 3, 3, 4, 5, 5, 5, 6]
    assert not any(batch["audio"][~batch["mask"]].any() for batch in found)
    audio = np.concatenate([batch["audio"][batch["mask"]] for batch in found])
    middle = read_audio(corpus.train.clips[5].path, 8000, (4.3 - 1.0) / 2, 1.0)
    np.testing.assert_allclose(audio[7], tensorflow_log_mel(middle, MEL), atol=1e-3)
    assert_same(found, list(reader.audio_batches(batch_size)))


@pytest.mark.parametrize("fill", ["zeros", "repeatpad", "repeat", "frames"])
@pytest.mark.parametrize("cache_bytes", [1 << 30, 0])
def test_training_sees_what_the_front_end_gives_to_embed(corpus, settings, fill, cache_bytes):
    mel = dataclasses.replace(MEL, center=False, fill=fill, frames=79)
    settings = dataclasses.replace(settings, log_mel=mel, cache_bytes=cache_bytes)
    reader = SplitReader(corpus.train, TOKENIZER, settings)
    found = np.concatenate([b["audio"] for b in reader.audio_batches(7, training=True)])
    front_end = FrontEnd(mel, settings.window_seconds)
    for row, clip in enumerate(corpus.train.clips):
        if row == 5:
            continue  # longer than the window, and cut before it is resampled
        expected = front_end.rows(read_audio(clip.path, 8000))[0]
        np.testing.assert_allclose(found[row], expected, atol=1e-4)
    short = found[4]  # 0.05 s, 400 samples: two frames of 256
    assert short[:2].any() and short[2:78].any() == (fill != "frames") and not short[78:].any()


@pytest.mark.parametrize("batch_size", [1, 5, 13, 40])
def test_evaluation_text_is_every_caption_once_by_length(corpus, settings, batch_size):
    reader = SplitReader(corpus.train, TOKENIZER, settings)
    found = list(reader.text_batches(batch_size))
    assert all(len(batch["token_ids"]) == batch_size for batch in found)
    flat = {n: np.concatenate([b[n][b["mask"]] for b in found]) for n in found[0]}
    assert sorted(flat["caption_id"]) == list(range(13))
    assert (np.diff(flat["token_mask"].sum(1)) >= 0).all()
    ids, mask = TOKENIZER.encode(corpus.train.captions, 12)
    np.testing.assert_array_equal(flat["token_ids"], ids[flat["caption_id"]])
    np.testing.assert_array_equal(flat["token_mask"], mask[flat["caption_id"]])


def test_rows_of_tokens_are_as_long_as_the_longest_caption_of_a_batch_needs(corpus, settings):
    texts = iter([" ".join(["dog"] * (1 + 2 * i)) for i in range(13)])  # to 25 words
    split = dataclasses.replace(corpus.train, clips=tuple(
        dataclasses.replace(clip, captions=tuple(next(texts) for _ in clip.captions))
        for clip in corpus.train.clips))
    settings = dataclasses.replace(settings, max_tokens=100)
    reader = SplitReader(split, TOKENIZER, settings)
    ids, mask = TOKENIZER.encode(split.captions, 100)
    steps = take(reader.train_batches(4, 7), 8)
    for host in ([0, 1], [2, 3]):  # a host cuts as the global batch needs
        for whole, part in zip(steps, reader.train_batches(4, 7, rows=np.array(host))):
            assert part["token_ids"].shape == (2, whole["token_ids"].shape[1])
    found = set()
    for batch in [*steps, *reader.text_batches(4), *reader.text_batches(4, np.array([1]))]:
        used, tokens = batch["mask"], batch["token_ids"].shape[1]
        own = batch["caption_id"][used]
        assert tokens in (32, 48, 64, 96, 100)
        np.testing.assert_array_equal(batch["token_ids"][used], ids[own, :tokens])
        assert not mask[own, tokens:].any()
        found.add(tokens)
    assert len(found) > 2
    for batch in steps:  # and no longer
        longest = mask[batch["caption_id"][batch["mask"]]].sum(1).max()
        assert min(n for n in (32, 48, 64, 96, 100) if n >= longest) == batch["token_ids"].shape[1]
    whole = take(reader.train_batches(4, 7, whole_text=True), 8)
    assert {batch["token_ids"].shape for batch in whole} == {(4, 100)}


def test_random_crops_differ_from_epoch_to_epoch_for_long_clips_only(corpus, settings):
    settings = dataclasses.replace(settings, crop="random")
    reader = SplitReader(corpus.train, TOKENIZER, settings)
    first, second = (
        {int(b["caption_id"][0]): b["audio"][0] for b in take(reader.train_batches(1, 0, s), 13)}
        for s in (0, 13)
    )
    for caption, clip in enumerate(corpus.train.caption_clip):
        long = clip in (3, 5)
        assert (first[caption] != second[caption]).any() == long
    evaluated = SplitReader(corpus.train, TOKENIZER, dataclasses.replace(settings, crop="center"))
    assert_same(list(reader.audio_batches(4)), list(evaluated.audio_batches(4)))


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_bad_files_are_all_named_or_left_out(corpus, settings, crop, cache_bytes):
    settings = dataclasses.replace(settings, crop=crop, cache_bytes=cache_bytes)
    corpus.train.clips[0].path.unlink()
    corpus.train.clips[4].path.write_bytes(b"broken")
    with pytest.raises(AudioError) as error:
        SplitReader(corpus.train, TOKENIZER, settings)
    assert "2 of 7 audio files" in str(error.value)
    assert "clip 0.wav" in str(error.value) and "clip 4.wav" in str(error.value)
    reader = SplitReader(corpus.train, TOKENIZER, dataclasses.replace(settings, on_error="skip"))
    assert [problem.row for problem in reader.problems] == [0, 4]
    assert reader.split.clips == tuple(corpus.train.clips[i] for i in (1, 2, 3, 5, 6))
    batch = take(reader.train_batches(16, seed=0), 1)[0]
    assert sorted(batch["caption_id"][batch["mask"]]) == list(range(len(reader.split.captions)))
    audio = np.concatenate([b["audio"][b["mask"]] for b in reader.audio_batches(3)])
    clip_id = np.concatenate([b["clip_id"][b["mask"]] for b in reader.audio_batches(3)])
    assert clip_id.tolist() == [0, 1, 2, 2, 3, 3, 3, 4]
    # Clip 6 is the last of both; its rows would be another's if numbers had not moved up.
    np.testing.assert_allclose(audio[-1], centre_features(corpus.train.clips[6]), atol=1e-4)
    if crop == "center":
        row = np.flatnonzero((batch["clip_id"] == 4) & batch["mask"])[0]
        np.testing.assert_array_equal(batch["audio"][row], audio[-1])


def test_a_file_that_vanishes_in_training_is_named(corpus, settings):
    reader = SplitReader(corpus.train, TOKENIZER, dataclasses.replace(settings, cache_bytes=0))
    corpus.train.clips[2].path.unlink()
    with pytest.raises(AudioError, match="clip 2.wav: no such file"):
        take(reader.train_batches(13, seed=0), 1)


def test_splits_without_usable_clips_are_refused(corpus_folder, settings):
    empty = read_folder(corpus_folder).valid
    with pytest.raises(ValueError, match="corpus 'odd': split 'valid' has no clips"):
        SplitReader(dataclasses.replace(empty, clips=()), TOKENIZER, settings)
    for clip in empty.clips:
        clip.path.unlink()
    with pytest.raises(ValueError, match="none of the 2 clips of split 'valid' can be used"):
        SplitReader(empty, TOKENIZER, dataclasses.replace(settings, on_error="skip"))


def test_a_second_reader_decodes_nothing(corpus, settings, monkeypatch):
    for cache_bytes in (0, 1 << 30):
        changed = dataclasses.replace(settings, cache_bytes=cache_bytes)
        SplitReader(corpus.valid, TOKENIZER, changed)
        with monkeypatch.context() as patch:
            patch.setattr("data_pipelines.features.read_chunks", None)
            patch.setattr("data_pipelines.features.measure_audio", None)
            SplitReader(corpus.valid, TOKENIZER, changed)


def test_impossible_requests_are_refused(corpus, settings):
    reader = SplitReader(corpus.valid, TOKENIZER, settings)
    for arguments in [(5, 0, 0, [5]), (0, 0), (4, 0, -1), (4, 0, 0, []), (4, -1)]:
        with pytest.raises(ValueError, match="expected"):
            reader.train_batches(*arguments)
    with pytest.raises(ValueError, match="batch_size is 0"):
        next(reader.audio_batches(0))
    with pytest.raises(ValueError, match="batch_size is 0"):
        next(reader.text_batches(0))
    for change in ({"crop": "left"}, {"on_error": "ignore"}, {"max_chunks": 0}):
        with pytest.raises(ValueError, match=f"data.{next(iter(change))} is"):
            dataclasses.replace(settings, **change)


def test_epochs_are_permutations_that_only_seed_and_epoch_decide():
    orders = {(s, e): batches_module._permutation(s, e, 101) for s in range(3) for e in range(3)}
    for (seed, epoch), order in orders.items():
        assert sorted(order) == list(range(101))
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
        np.testing.assert_array_equal(order, generator.permutation(101))
    assert len({tuple(order) for order in orders.values()}) == 9


def test_merged_splits_keep_clips_apart_and_load(corpus, settings, tmp_path):
    write_tone(tmp_path / "even" / "audio" / "clip 0.wav", 0.4, 8000)
    write_table(tmp_path / "even", [["audio/clip 0.wav", "one sound", "a", "g0", "train"]])
    even = read_folder(tmp_path / "even")
    merged = merge_splits([corpus.train, even.train])
    assert (merged.corpus, merged.name) == ("odd+even", "train")
    assert merged.captions == corpus.train.captions + even.train.captions
    assert merged.clips[-1].id == "even/audio/clip 0.wav" and merged.clips[-1].group == "even/g0"
    assert len({clip.id for clip in merged.clips}) == 8
    reader = SplitReader(merged, TOKENIZER, settings)
    batch = take(reader.train_batches(14, seed=0), 1)[0]
    assert sorted(batch["clip_id"]) == merged.caption_clip.tolist()
    for splits in ([corpus.train, corpus.train], [corpus.train, even.valid], []):
        with pytest.raises(ValueError, match="cannot merge"):
            merge_splits(splits)


def test_a_program_ends_with_an_iterator_still_open(corpus_folder, tmp_path):
    code = (
        "import sys\n"
        "from data_pipelines.batches import *\n"
        "from data_pipelines.corpora.folder import read_folder\n"
        "mel = LogMelSettings(8000, 256, 100, 16, 50.0, 4000.0)\n"
        "split = read_folder(sys.argv[1]).train\n"
        "tokenizer = Tokenizer.train(split.captions, 280)\n"
        "settings = DataSettings(mel, 1.0, 12, cache_dir=sys.argv[2], cache_bytes=0)\n"
        "batches = SplitReader(split, tokenizer, settings).train_batches(32, 0)\n"
        "for _ in range(5): next(batches)\n"
        "sys.exit(7)"
    )
    arguments = [str(corpus_folder), str(tmp_path / "cache")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], timeout=60)
    assert done.returncode == 7


def test_nothing_is_tuned_while_batches_are_read(monkeypatch):
    # The thread that does so has an iterator close later than it could, by up to half a second.
    dataset = load_tensorflow().data.Dataset
    tuned, original = [], dataset.as_numpy_iterator

    def begin(self):
        tuned.append(self.options().autotune.enabled)
        return original(self)

    monkeypatch.setattr(dataset, "as_numpy_iterator", begin)
    assert [*iterate(dataset.range(3))] == [0, 1, 2]
    assert tuned == [False]
