"""`python -m data_pipelines.build` as a user meets it."""

import json
import pathlib
import shutil

import pytest

import layouts
from data_pipelines.corpora.folder import read_folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    layouts.write_audiocaps(root / "audiocaps")
    layouts.write_clotho(root / "clotho")
    layouts.write_wavcaps(root / "wavcaps")
    return root


def files(folder):
    return sorted(path for path in pathlib.Path(folder).rglob("*"))


def test_check_lists_what_is_missing_or_odd_and_writes_nothing(sources, run_python, tmp_path):
    before = files(sources)
    done = run_python("-m", "data_pipelines.build", "--corpus=audiocaps",
                      f"--source={sources / 'audiocaps'}", "--check")  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"{split}\t{layouts.video(i)}_{10 * i}\tmissing"
        for split, i in (("train", 3), ("train", 4), ("test", 8))
    ]
    assert done.stderr.strip() == (
        "audiocaps: train 3 of 5 clips, valid 2 of 2 clips, test 2 of 3 clips")
    shutil.copytree(sources / "clotho", tmp_path / "clotho")
    (tmp_path / "clotho/evaluation/c.wav").write_bytes(b"")
    done = run_python("-m", "data_pipelines.build", "--corpus=clotho",
                      f"--source={tmp_path / 'clotho'}", "--check")  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == 9  # all are shorter than Clotho's 15 s
    assert "rain, heavy.wav: lasts 0.8 s, expected 14.5 to 30.5" in lines[2]
    assert "c.wav: cannot be opened, or has no samples" in lines[6]
    assert "tensorflow" not in done.stderr and files(sources) == before


def test_check_of_a_whole_source_says_so_and_exits_with_0(sources, run_python, tmp_path):
    (tmp_path / "blacklist.json").write_text(json.dumps({"AudioSet": ["Yx.wav"]}))
    shutil.copytree(sources / "wavcaps", tmp_path / "wavcaps")
    table = tmp_path / "wavcaps/json_files/AudioSet_SL/as_final.json"
    rows = json.loads(table.read_text())["data"]
    there = {path.stem for path in (tmp_path / "wavcaps/AudioSet_SL_flac").iterdir()}
    layouts.write_wavcaps_table(table, [(r["id"], r["caption"]) for r in rows
                                        if r["id"].removesuffix(".wav") in there])  # fmt: skip
    done = run_python("-m", "data_pipelines.build", "--corpus=audioset_sl", "--check",
                      f"--source={tmp_path / 'wavcaps'}",
                      f"--audiocaps={sources / 'audiocaps'}",
                      f"--blacklist={tmp_path / 'blacklist.json'}")  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.strip() == (
        "audioset_sl: train 0 of 0 clips, valid 0 of 0 clips, test 9 of 9 clips; 0 clips of "
        "AudioCaps removed; 0 clips of the blacklists removed")


def test_a_build_ends_with_a_corpus_and_one_paragraph(sources, run_python, tmp_path):
    arguments = ("-m", "data_pipelines.build", "--corpus=audiocaps", "--rate=16000",
                 f"--source={sources / 'audiocaps'}", f"--data_dir={tmp_path}")  # fmt: skip
    done = run_python(*arguments, "--beam=--direct_num_workers=1", "--beam=--no_save_main_session")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.strip().splitlines()[-1] == (
        "audiocaps: train 3 of 5 clips, valid 2 of 2 clips, test 2 of 3 clips; 3 missing, 0 that "
        f"cannot be read, listed in {tmp_path / 'audiocaps/report.csv'}")
    assert len(read_folder(tmp_path / "audiocaps").train.clips) == 3
    done = run_python(*arguments[:3], "--rate=32000", *arguments[4:])
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert "rate was 16000, is 32000. Use another data_dir" in done.stderr
    # What was built is a caption folder: it can be checked and built as one, elsewhere.
    folder = f"--source={tmp_path / 'audiocaps'}"
    done = run_python("-m", "data_pipelines.build", "--corpus=folder", folder, "--check")
    assert (done.returncode, done.stdout) == (0, "")
    done = run_python("-m", "data_pipelines.build", "--corpus=folder", folder,
                      f"--data_dir={tmp_path}")  # fmt: skip
    assert done.returncode == 2 and "would be built into its own source" in done.stderr


@pytest.mark.parametrize("arguments, message", [
    (["--corpus=clotho"], "--source must have a value"),
    (["--corpus=clothes", "--source=x", "--check"], "should be one of <audiocaps|audiocaps2|"),
    (["--corpus=clotho", "--source=x"], "--data_dir is missing"),
    (["--corpus=clotho", "--source=nowhere", "--check"], "source folder 'nowhere' does not exist"),
    (["--corpus=clotho", "--source=.", "--check", "--overlap=all"], "--overlap has no meaning"),
    (["--corpus=bbc", "--source=tests", "--check"], "no bbc_final.json in 'tests' or"),
    (["--corpus=bbc", "--source=tests", "check"], "unexpected argument 'check'"),
    (["--corpus=bbc", "--source=tests", "--rate=4000"], "--rate=4000"),
])  # fmt: skip
def test_errors_are_one_line(run_python, arguments, message):
    done = run_python("-m", "data_pipelines.build", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert message in done.stderr
