"""The published tables of captions beside the repository; skipped where these are not."""

import collections
import pathlib

import pytest

from data_pipelines.corpora.audiocaps import read_audiocaps, read_video_ids
from data_pipelines.corpora.clotho import read_clotho

ROOT = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data" / "captions"
pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason=f"no captions in {ROOT}")


def test_audiocaps_has_the_published_counts():
    clips = read_audiocaps(ROOT / "audiocaps").clips
    assert collections.Counter(clip.split for clip in clips) == {
        "train": 49838, "valid": 495, "test": 975}  # fmt: skip
    captions = collections.Counter((clip.split, len(clip.captions)) for clip in clips)
    assert captions == {("train", 1): 49838, ("valid", 5): 495, ("test", 5): 975}
    assert len({clip.id for clip in clips}) == 51308
    assert not any(clip.audio for clip in clips)
    assert len(read_video_ids(ROOT / "audiocaps")) == 51308
    assert len(read_video_ids(ROOT / "audiocaps", ("valid", "test"))) == 1470


def test_clotho_has_the_published_counts(tmp_path):
    for name in ("development", "validation", "evaluation"):
        (tmp_path / f"clotho_captions_{name}.csv").symlink_to(
            ROOT / "clotho" / f"clotho_captions_{name}.csv")
    (tmp_path / "development").mkdir()
    written = tmp_path / "development" / "Ambience Birds.wav"  # begins with a space in the table
    written.write_bytes(b"x")
    clips = read_clotho(tmp_path).clips
    assert collections.Counter(clip.split for clip in clips) == {
        "train": 3839, "valid": 1045, "test": 1045}  # fmt: skip
    assert {len(clip.captions) for clip in clips} == {5}
    assert len({clip.id for clip in clips}) == 5929
    assert [clip.audio for clip in clips if clip.audio] == [str(written)]
