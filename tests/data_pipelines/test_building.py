"""Builds: what is written, read again by others, resumed, and in how much memory."""

import csv
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import soxr
import tensorflow_datasets as tfds

import layouts
from conftest import write_tone
from configs import tail_clap
from data_pipelines import building
from data_pipelines.batches import DataSettings, SplitReader
from data_pipelines.corpora.folder import read_folder
from data_pipelines.corpora.published import CORPORA
from data_pipelines.corpora.sources import SourceClip
from data_pipelines.log_mel import LogMelSettings
from data_pipelines.streams import build_stream
from data_pipelines.text import Tokenizer
from tail_jax.train import train

SPLITS = ("train", "valid", "test")
FOLDER = pathlib.Path(__file__).parent


def build(name, clips, data_dir, rate=16000, **settings):
    return building.build(name, clips, data_dir, rate, settings, "A test.")


def records(data_dir, name):
    """Every record of a built corpus by id, as TFDS reads it."""
    builder = tfds.builder_from_directory(pathlib.Path(data_dir) / name / building.VERSION)
    found = {}
    for split in builder.info.splits:
        for example in tfds.as_numpy(builder.as_dataset(split=split)):
            captions = [text.decode() for text in example["captions"]]
            found[example["id"].decode()] = {
                "file_name": example["file_name"].decode(), "captions": captions,
                "samples": example["samples"], "split": split}  # fmt: skip
    return found


def contents(folder):
    """Bytes of every file of a build, but of the folder's own history."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def listed(folder, number, split=None):
    """Clips of files 0.wav, 1.wav, ...; `split` is that of all, or they have all three."""
    return [
        SourceClip(
            f"clip {i}",
            split or ("train", "valid", "train", "test")[i % 4],
            tuple(f"sound {i}, told as {j}" for j in range(1 + i % 3)),
            str(pathlib.Path(folder) / f"{i}.wav"),
        )
        for i in range(number)
    ]


def tones(folder, number, seconds, rate=8000, split=None):
    for i in range(number):
        write_tone(folder / f"{i}.wav", seconds, rate, 1, seed=i)
    return listed(folder, number, split)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """The four corpora of TAIL, built at 16 kHz from their official layouts."""
    root = tmp_path_factory.mktemp("corpora")
    layouts.write_audiocaps(root / "source" / "audiocaps")
    layouts.write_clotho(root / "source" / "clotho")
    layouts.write_wavcaps(root / "source" / "wavcaps")
    counts = {}
    for name in tail_clap.TASKS:
        source = root / "source" / (name if name in ("audiocaps", "clotho") else "wavcaps")
        tables = {"audioset_sl": {"overlap": "all", "audiocaps": [root / "source" / "audiocaps"]}}
        listing = CORPORA[name].read(source, **tables.get(name, {}))
        counts[name] = build(name, listing.clips, root / "built")
    return root, counts


def test_counts_and_report_say_what_is_missing(corpora):
    root, counts = corpora
    assert counts["audiocaps"][0] == {"train": [3, 5], "valid": [2, 2], "test": [2, 3]}
    assert counts["clotho"][0] == {"train": [4, 4], "valid": [2, 2], "test": [3, 3]}
    for name, total in (("bbc", 10), ("audioset_sl", 10)):
        assert counts[name][0] == {"train": [4, total], "valid": [2, 1000], "test": [3, 1000]}
    with open(root / "built" / "audiocaps" / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [f"{layouts.video(i)}_{10 * i}" for i in (3, 4, 8)]
    assert {row["reason"] for row in rows} == {"missing: no audio file in the source folder"}


def test_tfds_opens_what_was_built(corpora):
    root, _ = corpora
    rows = layouts.clotho_rows()
    found = records(root / "built", "clotho")
    assert {key: value["captions"] for key, value in found.items()} == {
        f"{part}/{row[0]}": row[1:] for part in rows for row in rows[part]}  # fmt: skip
    loaded = tfds.load("clotho", data_dir=root / "built", split="test+train")
    names = {example["file_name"].decode() for example in tfds.as_numpy(loaded)}
    assert names == {v["file_name"] for v in found.values() if v["split"] in ("train", "test")}


def test_records_and_caption_folder_say_the_same(corpora):
    root, _ = corpora
    for name in tail_clap.TASKS:
        found = records(root / "built", name)
        corpus = read_folder(root / "built" / name)
        clips = {clip.id: (s, list(clip.captions), soundfile.info(clip.path).frames)
                 for s in SPLITS for clip in getattr(corpus, s).clips}  # fmt: skip
        assert clips == {
            value["file_name"]: (value["split"], value["captions"], value["samples"])
            for value in found.values()}  # fmt: skip


def test_audio_is_the_mean_of_the_channels_resampled_in_16_bit(corpora):
    root, _ = corpora
    for name, path in (("audiocaps", f"audio/train/Y{layouts.video(1)}.flac"),  # 16 kHz stereo
                       ("clotho", "development/ leading space.wav"),  # 11,025 Hz, stereo
                       ("clotho", "development/rain, heavy.wav")):  # mono
        source = root / "source" / name / path
        clip_id = f"{layouts.video(1)}_10" if name == "audiocaps" else path
        samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
        expected = samples.mean(axis=1)
        if rate != 16000:
            expected = soxr.resample(expected, rate, 16000, quality="HQ")
        built = root / "built" / name / building.audio_name(clip_id)
        found, rate = soundfile.read(built, dtype="float64")
        assert rate == 16000 and soundfile.info(built).subtype == "PCM_16"
        assert len(found) == -(-len(samples) * 16000 // soundfile.info(source).samplerate)
        np.testing.assert_allclose(found[: len(expected)], expected, atol=0.51 / 32768)


def test_16_bit_mono_at_the_rate_is_kept_bit_by_bit_and_what_is_too_loud_is_cut(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 9001).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", samples, 16000)
    soundfile.write(tmp_path / "b.wav", np.float32([1.5, -1.5, 0.5]), 16000, subtype="FLOAT")
    for name in "ab":
        building.write_clip(SourceClip(name, "train", ("x",), str(tmp_path / f"{name}.wav")),
                            str(tmp_path), 16000)  # fmt: skip
    read = [soundfile.read(tmp_path / building.audio_name(n), dtype="int16")[0] for n in "ab"]
    np.testing.assert_array_equal(read[0], samples)
    assert read[1].tolist() == [32767, -32768, 16384]


def test_the_stream_of_the_configuration_reads_them_in_any_order_and_number(corpora):
    root, _ = corpora
    spec = tail_clap.get_config().stream.to_dict() | {"root": str(root / "built")}
    stream = build_stream(spec)
    assert [task.name for task in stream.tasks] == list(tail_clap.TASKS)
    sizes = [[len(getattr(task, split).clips) for split in SPLITS] for task in stream.tasks]
    assert sizes == [[3, 2, 2], [4, 2, 3], [4, 2, 3], [4, 2, 3]]
    assert [len(task.test.captions) for task in stream.tasks] == [10, 15, 3, 3]
    backward = build_stream(spec | {"order": tail_clap.TASKS[::-1], "limit": 2})
    assert [task.name for task in backward.tasks] == list(tail_clap.TASKS[::-1])
    for full, limited in zip(stream.tasks, backward.tasks[::-1]):
        for split in SPLITS:
            kept, all_clips = getattr(limited, split).clips, getattr(full, split).clips
            assert len(kept) == 2 and set(kept) <= set(all_clips)
    reader = SplitReader(
        stream.tasks[1].train,
        Tokenizer.train(stream.tasks[1].train.captions, 300),
        DataSettings(LogMelSettings(16000, 512, 320, 32, 50.0, 8000.0), window_seconds=0.5),
    )
    batch = next(reader.train_batches(20, seed=0))
    assert batch["mask"].all() and np.isfinite(batch["audio"]).all()


def test_a_run_trains_on_them(corpora, tiny_config, tmp_path, quick_compilation):
    root, _ = corpora
    config = tiny_config("frozen", tasks=2)
    config["data"] |= {"root": str(root / "built"), "cache_dir": str(tmp_path / "cache")}
    config["stream"] |= {"tasks": tail_clap.get_config().stream.to_dict()["tasks"],
                         "order": ["clotho", "bbc", "audiocaps", "audioset_sl"], "limit": 2}
    results = train(config, tmp_path / "run")
    assert results["tasks"] == config["stream"]["order"]


def test_clips_that_cannot_be_read_are_told_with_the_reason(tmp_path):
    clips = tones(tmp_path, 9, 0.5, split="train")
    paths = [pathlib.Path(clip.audio) for clip in clips]
    paths[0].write_bytes(b"")
    paths[1].write_bytes(paths[1].read_bytes()[:3000])
    paths[2].write_bytes(b"not audio at all" * 100)
    soundfile.write(paths[3], np.zeros([0, 1]), 8000)
    soundfile.write(paths[4], np.float32([0, np.nan]), 8000, subtype="FLOAT")
    soundfile.write(paths[5], np.random.default_rng(0).normal(size=9000) / 9, 8000, format="FLAC")
    paths[5].write_bytes(paths[5].read_bytes()[:9000])
    piped = bytearray(paths[6].read_bytes())  # lengths unknown, as ffmpeg writes to a pipe
    piped[4:8] = piped[40:44] = b"\xff" * 4
    paths[6].write_bytes(piped)
    paths[8].unlink()
    paths[8].symlink_to(tmp_path / "nowhere")
    counts, skipped = build("odd", clips, tmp_path / "built")
    assert counts["train"] == [2, 9]
    assert [one.clip.id for one in skipped] == [f"clip {i}" for i in (*range(6), 8)]
    for one, text in zip(skipped, ("0 bytes", "truncated, 3000 of 8044 bytes", "cannot be decoded",
                                   "no samples", "not finite", "cannot be decoded",
                                   "cannot be opened: No such file")):  # fmt: skip
        assert text in one.reason and one.clip.audio in one.reason
    assert sorted(records(tmp_path / "built", "odd")) == ["clip 6", "clip 7"]
    # A clip that was repaired is built, and one that broke since is no longer there.
    write_tone(paths[0], 0.5, 8000)
    paths[7].write_bytes(b"")
    for path in (paths[0], paths[7]):
        os.utime(path, (time.time() + 5, time.time() + 5))
    counts, skipped = build("odd", clips, tmp_path / "built")
    assert [one.clip.id for one in skipped] == [f"clip {i}" for i in (1, 2, 3, 4, 5, 7, 8)]
    assert sorted(records(tmp_path / "built", "odd")) == ["clip 0", "clip 6"]


def test_a_second_build_adds_what_has_come_and_writes_nothing_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(building, "_TELL_SECONDS", 0.01)
    clips = tones(tmp_path, 10, 0.3, split="train")
    aside = {i: pathlib.Path(clips[i].audio).read_bytes() for i in (2, 7)}
    partly = [SourceClip(c.id, c.split, c.captions, None if i in aside else c.audio)
              for i, c in enumerate(clips)]  # fmt: skip
    assert len(build("late", partly, tmp_path / "built")[1]) == 2
    assert " of 10 clips" in capsys.readouterr().err
    folder = tmp_path / "built" / "late"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("audio/*/*")}
    # A source that was repaired since is read again.
    soundfile.write(clips[0].audio, np.full(2400, 0.25), 8000)
    os.utime(clips[0].audio, (time.time() + 5, time.time() + 5))
    assert build("late", clips, tmp_path / "built")[1] == []
    after = {path: path.stat().st_mtime_ns for path in folder.glob("audio/*/*")}
    repaired = folder / building.audio_name("clip 0")
    assert len(after) == 10
    assert [path for path in before if before[path] != after[path]] == [repaired]
    assert soundfile.read(repaired)[0][1000] == pytest.approx(0.25, abs=1e-3)
    # What is built stays, though its source goes.
    for clip in clips:
        pathlib.Path(clip.audio).unlink()
    gone = [SourceClip(c.id, c.split, c.captions, None) for c in clips]
    assert build("late", gone, tmp_path / "built")[1] == []
    assert len(records(tmp_path / "built", "late")) == 10


def test_other_settings_in_one_folder_are_refused(tmp_path):
    clips = tones(tmp_path, 2, 0.1, split="test")
    build("one", clips, tmp_path / "built", overlap="all")
    with pytest.raises(ValueError, match="overlap was 'all', is 'none'; rate was 16000, is 8000"):
        build("one", clips, tmp_path / "built", 8000, overlap="none")


def test_a_corpus_without_any_audio_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="none of 1 clips could be built; the first: missing"):
        build("none", [SourceClip("a", "train", ("x",), None)], tmp_path)


def test_audio_that_cannot_be_written_is_one_clear_error(tmp_path):
    with pytest.raises(OSError, match="audio cannot be written: .*not support this sample rate"):
        build("one", tones(tmp_path, 1, 0.1), tmp_path / "built", 700000)


def test_without_beam_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ImportError, match=r"pip install 'tail_jax\[corpora\]'"):
        build("one", tones(tmp_path, 1, 0.1), tmp_path / "built")


def test_clips_that_a_runner_loses_are_an_error(tmp_path, monkeypatch):
    clips = tones(tmp_path, 3, 0.1, split="train")
    write = building.write_clips
    monkeypatch.setattr(building, "write_clips", lambda batch, **settings: write(
        [clip for clip in batch if clip.id != "clip 1"], **settings))  # fmt: skip
    with pytest.raises(OSError, match="ended without 1 of 3 clips, the first 'clip 1'; start"):
        build("lost", clips, tmp_path / "built")
    monkeypatch.undo()
    examples = building._examples
    monkeypatch.setattr(building, "_examples", lambda clip, **settings: (
        examples(clip, **settings) if clip.id != "clip 2" else ()))  # fmt: skip
    with pytest.raises(OSError, match="wrote records of {'train': 2} of {'train': 3} clips"):
        build("lost", clips, tmp_path / "built")
    assert not (tmp_path / "built" / "lost" / "metadata.csv").exists()


def start_building(*arguments):
    """This file as a program, which can be killed and measured."""
    environment = os.environ | {"PYTHONPATH": f"{FOLDER}:{FOLDER.parents[1]}"}
    return subprocess.Popen([sys.executable, __file__, *map(str, arguments)], env=environment,
                            stdout=subprocess.PIPE, text=True)  # fmt: skip


def test_killed_half_way_and_started_again_it_ends_with_the_same_files(tmp_path):
    number = 120
    clips = tones(tmp_path / "source", number, 4.0, 11025)
    build("killed", clips, tmp_path / "undisturbed")
    process = start_building(tmp_path / "source", tmp_path / "resumed", "killed", number, "")
    folder = tmp_path / "resumed" / "killed"
    while len(list(folder.glob("audio/*/*.flac"))) < number // 4:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert number // 4 <= len(list(folder.glob("audio/*/*.flac"))) < number
    with pytest.raises(FileNotFoundError, match="killed' is not built to its end"):
        read_folder(folder)
    # As if the kill had come while a file and the records were written.
    (folder / "audio" / "00").mkdir(exist_ok=True)
    (folder / "audio" / "00" / "x.1.tmp").write_bytes(b"half")
    (folder / f"{building.VERSION}.incompleteABCDEF").mkdir()
    counts, skipped = build("killed", clips, tmp_path / "resumed")
    assert sum(found for found, _ in counts.values()) == number and skipped == []
    assert contents(folder) == contents(tmp_path / "undisturbed" / "killed")
    assert len(records(tmp_path / "resumed", "killed")) == number


def peak_megabytes(tmp_path, *numbers, beam=()):
    """Peaks after building corpora of so many clips of 3 s; with its largest child's, if `beam`."""
    names = [f"of{number}" for number in numbers]
    process = start_building(tmp_path / "source", tmp_path / "built", "+".join(names),
                             "+".join(map(str, numbers)), "train", *beam)  # fmt: skip
    output = process.communicate(timeout=500)[0]
    assert process.returncode == 0
    return [float(line) for line in output.split()]


def test_memory_does_not_grow_with_the_audio(tmp_path):
    tones(tmp_path / "source", 200, 3.0)
    small, large = peak_megabytes(tmp_path, 10, 200)
    # The audio of 190 more clips is 55 MB in 16 bit, 109 MB as decoded.
    assert large - small < 50


@pytest.mark.slow
@pytest.mark.parametrize("beam", [
    (), ("--direct_running_mode=multi_processing", "--direct_num_workers=2")])  # fmt: skip
def test_memory_is_flat_from_500_to_2000_clips_on_two_workers(tmp_path, beam):
    tones(tmp_path / "source", 2000, 3.0)
    (small,), (large,) = (peak_megabytes(tmp_path, n, beam=beam) for n in (500, 2000))
    print(f"\npeak memory: 500 clips {small:.0f} MB, 2,000 clips {large:.0f} MB")
    # The audio of 1,500 more clips is 432 MB in 16 bit, 864 MB as decoded.
    assert large - small < 50


if __name__ == "__main__":
    source, data_dir, names, numbers, split, *beam = sys.argv[1:]
    for name, number in zip(names.split("+"), map(int, numbers.split("+"))):
        rate = 16000 if name == "killed" else 48000
        clips = listed(source, number, split)
        building.build(name, clips, data_dir, rate, {}, "A test.", beam, workers=2)
        whose = [resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN][: 1 + bool(beam)]
        print(sum(resource.getrusage(w).ru_maxrss / 1024 for w in whose), flush=True)
