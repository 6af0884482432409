import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from conftest import write_tone
from data_pipelines import features as features_module
from data_pipelines.audio import read_audio
from data_pipelines.corpora import Clip
from data_pipelines.corpora.folder import read_folder
from data_pipelines.features import ChunkPolicy, FeatureCache
from data_pipelines.log_mel import LogMelSettings
from data_pipelines.waveforms import chunk_starts
from tensorflow_log_mel import tensorflow_log_mel

MEL = LogMelSettings(8000, 256, 100, 16, 50.0, 4000.0)
TRAINING, EVALUATION = ChunkPolicy(MEL, 8000, 1), ChunkPolicy(MEL, 8000, 3)


def make_clips(folder, seconds, rates=(8000,)):
    clips = []
    for i, length in enumerate(seconds):
        path = folder / f"{i}.flac"
        write_tone(path, length, rates[i % len(rates)], seed=i)
        clips.append(Clip(path.name, path, ("x",)))
    return clips


def expected_rows(clip, max_chunks):
    """Log-mel of the chunks, cut from the whole clip; exact where the clip has MEL's rate."""
    samples = read_audio(clip.path, 8000)
    rows = []
    for start in chunk_starts(len(samples), 8000, max_chunks):
        chunk = samples[start : start + 8000]
        rows.append(tensorflow_log_mel(np.pad(chunk, (0, 8000 - len(chunk))), MEL))
    return rows


@pytest.mark.parametrize("policy", [TRAINING, EVALUATION])
def test_rows_are_the_log_mel_of_the_chunks_in_clip_order(tmp_path, policy):
    clips = make_clips(tmp_path, [0.3, 2.5, 1.0, 1.4, 7.1])
    found = FeatureCache(tmp_path / "cache", 1 << 30, 2).features(clips, policy)
    rows = [expected_rows(clip, policy.max_chunks) for clip in clips]
    assert found.values.dtype == np.float32 and found.values.shape[1:] == policy.row_shape
    assert found.rows_clip.tolist() == [i for i, row in enumerate(rows) for _ in row]
    assert [len(row) for row in rows] == ([1] * 5 if policy is TRAINING else [1, 3, 1, 2, 3])
    np.testing.assert_allclose(found.values, np.concatenate(rows), atol=1e-4)


def test_features_are_computed_once(tmp_path, monkeypatch):
    clips = make_clips(tmp_path, [0.3, 2.5])
    first = FeatureCache(tmp_path / "cache", 1 << 30).features(clips, EVALUATION)
    monkeypatch.setattr(features_module, "read_chunks", None)
    monkeypatch.setattr(features_module, "measure_audio", None)
    again = FeatureCache(tmp_path / "cache", 1 << 30).features(clips, EVALUATION)
    np.testing.assert_array_equal(first.values, again.values)
    np.testing.assert_array_equal(first.rows_clip, again.rows_clip)


def test_both_policies_share_a_file_where_no_clip_is_longer_than_the_window(tmp_path):
    for seconds, files in [([0.3, 1.0], 1), ([0.3, 1.001], 2)]:
        cache = FeatureCache(tmp_path / f"cache{files}", 1 << 30)
        clips = make_clips(tmp_path / f"clips{files}", seconds)
        for policy in (TRAINING, EVALUATION):
            cache.features(clips, policy)
        assert len(list(cache.directory.glob("*.npy"))) == files


def test_what_decides_on_features_decides_on_the_file(tmp_path):
    cache = FeatureCache(tmp_path / "cache", 1 << 30)
    clips = make_clips(tmp_path, [0.3, 0.4])

    def files():
        cache.features(clips, TRAINING)
        return len(list(cache.directory.glob("*.npy")))

    assert files() == 1
    status = os.stat(clips[0].path)
    os.utime(clips[0].path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert files() == 2, "a file modified"
    clips.reverse()
    assert files() == 3, "another order"
    cache.features(clips, ChunkPolicy(MEL, 8001, 1))
    cache.features(clips, ChunkPolicy(LogMelSettings(8000, 256, 100, 16, 51.0, 4000.0), 8000, 1))
    assert files() == 5, "other settings"


def test_bad_files_have_no_rows_and_are_remembered(tmp_path, monkeypatch):
    clips = make_clips(tmp_path, [0.3, 0.4, 2.5, 0.2])
    clips[1].path.write_bytes(b"nothing")
    clips[3].path.unlink()
    cache = FeatureCache(tmp_path / "cache", 1 << 30)
    first = cache.features(clips, EVALUATION)
    assert first.rows_clip.tolist() == [0, 2, 2, 2]
    assert [problem.row for problem in first.problems] == [1, 3]
    lengths, problems = cache.check(clips)
    assert problems == first.problems and [length is None for length in lengths] == [0, 1, 0, 1]
    monkeypatch.setattr(features_module, "read_chunks", None)
    monkeypatch.setattr(features_module, "measure_audio", None)
    again = FeatureCache(tmp_path / "cache", 1 << 30)
    assert again.features(clips, EVALUATION).problems == first.problems
    assert again.check(clips) == (lengths, problems)


def test_features_larger_than_the_limit_are_not_kept(tmp_path):
    clips = make_clips(tmp_path, [0.3, 0.4, 2.5])
    needed = 4 * 5 * int(np.prod(EVALUATION.row_shape))
    cache = FeatureCache(tmp_path / "cache", needed - 1)
    assert cache.features(clips, EVALUATION) is None and not cache.directory.exists()
    assert cache.features(clips, TRAINING) is not None
    assert FeatureCache(tmp_path / "cache", needed).features(clips, EVALUATION) is not None
    assert FeatureCache(None, 1 << 30).features(clips, EVALUATION) is None


@pytest.mark.parametrize("broken", ["progress", "_write_record"])
def test_nothing_half_is_left_when_computing_fails(tmp_path, monkeypatch, broken):
    clips = make_clips(tmp_path, [0.3, 0.4])
    cache = FeatureCache(tmp_path / "cache", 1 << 30)

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(features_module, broken, fail)
        with pytest.raises(OSError, match="disk full"):
            cache.features(clips, TRAINING)
    assert not list(cache.directory.glob("*.tmp"))
    assert cache.features(clips, TRAINING).rows_clip.tolist() == [0, 1]


def test_threads_that_compute_the_same_features_all_end_right(tmp_path):
    clips = make_clips(tmp_path, [0.3, 2.5, 0.9])
    barrier, results = threading.Barrier(3), []

    def work():
        cache = FeatureCache(tmp_path / "cache", 1 << 30, 1)
        barrier.wait()
        results.append(cache.features(clips, EVALUATION))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = np.stack([row for clip in clips for row in expected_rows(clip, 3)])
    for found in results:
        np.testing.assert_allclose(found.values, expected, atol=1e-4)
    names = sorted(path.suffix for path in (tmp_path / "cache").iterdir())
    assert len(results) == 3 and names == [".json", ".npy"]


@pytest.mark.slow
def test_two_processes_that_compute_the_same_features_both_end_right(corpus_folder, tmp_path):
    code = (
        "import sys, hashlib; from data_pipelines.corpora.folder import read_folder\n"
        "from data_pipelines.features import *\n"
        "mel = LogMelSettings(8000, 256, 100, 16, 50.0, 4000.0)\n"
        "clips = read_folder(sys.argv[1]).train.clips\n"
        "found = FeatureCache(sys.argv[2], 1 << 30).features(clips, ChunkPolicy(mel, 8000, 3))\n"
        "print(hashlib.sha256(found.values.tobytes()).hexdigest(), len(found.rows_clip))"
    )
    arguments = [sys.executable, "-c", code, str(corpus_folder), str(tmp_path / "cache")]
    running = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1] and outputs[0].split()[1] == "10"
    clips = read_folder(corpus_folder).train.clips
    alone = FeatureCache(tmp_path / "alone", 1 << 30).features(clips, EVALUATION)
    shared = FeatureCache(tmp_path / "cache", 1 << 30).features(clips, EVALUATION)
    np.testing.assert_array_equal(alone.values, shared.values)
