"""The command that embeds files: what it reads and writes, and that a killed one goes on."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import soundfile

import tail_jax
from data_pipelines.front_end import FrontEnd
from data_pipelines.log_mel import LogMelSettings
from data_pipelines.text import Tokenizer
from tail_jax import backbone as backbones
from tail_jax import embed
from tail_jax.models.ast import ASTConfig
from tail_jax.models.bert import TextConfig
from tail_jax.models.dual_encoder import DualEncoder

pytestmark = pytest.mark.usefixtures("quick_compilation")
RATE = 8000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder of a small random CLAP."""
    folder = tmp_path_factory.mktemp("checkpoint")
    Tokenizer.train(["rain on a roof", "two dogs"], 300).save(folder / "tokenizer.json")
    model = DualEncoder(
        ASTConfig(frames=32, mels=16, patch=8, stride=8, width=16, layers=1, heads=2, hidden=32),
        TextConfig(300, width=16, layers=1, heads=2, hidden=32, max_positions=22), embedding=8)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    front_end = FrontEnd(LogMelSettings(RATE, 256, 128, 16, 50.0, 4000.0), 0.496)
    backbones.save_backbone(folder / "model", backbones.Backbone(
        "small", model, params, front_end, 20, folder / "tokenizer.json"))
    return folder / "model"


@pytest.fixture(scope="module")
def small(checkpoint):
    return tail_jax.load(checkpoint)


@pytest.fixture()
def folder(tmp_path):
    """Seven audio files of several formats and lengths, in folders, and one that is none."""
    folder = tmp_path / "audio"
    (folder / "deep").mkdir(parents=True)
    random = np.random.default_rng(0)
    names = ("b.wav", "a.flac", "deep/c.WAV", "d.ogg", "e.wav", "f.wav", "g.aiff")
    for i, name in enumerate(names):
        soundfile.write(folder / name, 0.1 * random.standard_normal((900 * i + 700, 1 + i % 2)),
                        (RATE, 11025)[i % 2])
    (folder / "notes.txt").write_text("no audio")
    return folder


def read(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def test_folder_and_texts_become_arrays(run_python, checkpoint, small, folder, tmp_path):
    (tmp_path / "captions.txt").write_text("rain on a roof\n\ntwo dogs, überall\n", "utf-8")
    done = run_python("-m", "tail_jax.embed", f"--checkpoint={checkpoint}", f"--audio={folder}",
                      f"--text={tmp_path / 'captions.txt'}", f"--output={tmp_path / 'new/out.npz'}",
                      "--policy=chunk_mean")
    assert done.returncode == 0, done.stderr
    assert "7 clips, 3 texts" in done.stdout
    found = read(tmp_path / "new/out.npz")
    paths = sorted(str(p) for p in folder.rglob("*") if p.suffix != ".txt" and p.is_file())
    assert found["audio_paths"].tolist() == paths
    assert found["texts"].tolist() == ["rain on a roof", "", "two dogs, überall"]
    np.testing.assert_allclose(found["audio"], small.embed_audio(paths, policy="chunk_mean"),
                               atol=1e-5)
    np.testing.assert_allclose(found["text"], small.embed_text(found["texts"].tolist()), atol=1e-5)
    assert found["sha256"] == small.sha256 and found["policy"] == "chunk_mean"
    assert found["checkpoint"] == small.name
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out.npz"]


@pytest.mark.parametrize("as_folder", [False, True])
def test_captions_of_a_table_are_texts_of_their_clips(small, folder, tmp_path, as_folder):
    table = folder / "metadata.csv"
    table.write_text("file_name,caption,other\nb.wav,rain,1\na.flac,\"two, dogs\",2\n"
                     "b.wav,a roof,3\ne.wav,,4\n")
    inputs = embed.read_inputs(str(folder if as_folder else table), None)
    embed.embed(small, inputs, tmp_path / "out.npz")
    found = read(tmp_path / "out.npz")
    assert [pathlib.Path(p).name for p in found["audio_paths"]] == ["b.wav", "a.flac", "e.wav"]
    assert found["texts"].tolist() == ["rain", "two, dogs", "a roof"]
    assert found["text_audio"].tolist() == [0, 1, 0]


def test_audio_or_texts_alone(small, folder, tmp_path):
    embed.embed(small, embed.read_inputs(str(folder / "b.wav"), None), tmp_path / "a.npz")
    assert read(tmp_path / "a.npz")["audio"].shape == (1, 8)
    (tmp_path / "captions.txt").write_text("rain\r\nwind")
    embed.embed(small, embed.read_inputs(None, str(tmp_path / "captions.txt")), tmp_path / "t.npz")
    found = read(tmp_path / "t.npz")
    assert found["texts"].tolist() == ["rain", "wind"] and "audio" not in found


class Counting:
    """A backbone that counts the clips it embeds, and may be killed after some."""

    def __init__(self, backbone, kill_after=10**9):
        self.backbone, self.clips, self.kill_after = backbone, 0, kill_after

    def __getattr__(self, name):
        return getattr(self.backbone, name)

    def embed_audio(self, clips, **options):
        if self.clips >= self.kill_after:
            raise KeyboardInterrupt
        self.clips += len(clips)
        return self.backbone.embed_audio(clips, **options)


def test_killed_work_goes_on_where_it_was(small, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "CLIPS_PER_PART", 2)
    inputs, output = embed.read_inputs(str(folder), None), tmp_path / "out.npz"
    embed.embed(small, inputs, tmp_path / "whole.npz")
    with pytest.raises(KeyboardInterrupt):
        embed.embed(Counting(small, kill_after=4), inputs, output)
    assert not output.exists()
    again = Counting(small)
    embed.embed(again, inputs, output)
    assert again.clips == 7 - 4
    np.testing.assert_array_equal(read(output)["audio"], read(tmp_path / "whole.npz")["audio"])
    assert not pathlib.Path(f"{output}.parts").exists()


@pytest.mark.parametrize("change", ["policy", "dtype", "weights", "file"])
def test_parts_of_other_work_are_not_taken(small, folder, tmp_path, monkeypatch, change):
    monkeypatch.setattr(embed, "CLIPS_PER_PART", 2)
    inputs, output, options = embed.read_inputs(str(folder), None), tmp_path / "out.npz", {}
    with pytest.raises(KeyboardInterrupt):
        embed.embed(Counting(small, kill_after=6), inputs, output)
    if change == "policy":
        options["policy"] = "center"
    elif change == "dtype":
        small = dataclasses.replace(small, model=dataclasses.replace(small.model, dtype="bfloat16"))
    elif change == "weights":
        small = dataclasses.replace(small, stored_hash="another")
    else:
        soundfile.write(inputs.paths[0], np.zeros(3000), RATE)
    again = Counting(small)
    embed.embed(again, inputs, output, **options)
    assert again.clips == (3 if change == "file" else 7)
    np.testing.assert_allclose(read(output)["audio"],
                               small.embed_audio(list(inputs.paths), **options), atol=1e-5)


def test_bad_files_are_all_named_before_and_after_the_work(small, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "CLIPS_PER_PART", 3)
    (folder / "x.wav").write_bytes(b"no audio")
    (folder / "y.wav").write_bytes(b"")
    inputs, output = embed.read_inputs(str(folder), None), tmp_path / "out.npz"
    counting = Counting(small)
    with pytest.raises(ValueError, match="2 of 9") as error:
        embed.embed(counting, inputs, output)
    assert counting.clips == 0 and "x.wav" in str(error.value) and "y.wav" in str(error.value)
    for name in ("x.wav", "y.wav"):  # a header tells nothing about these
        soundfile.write(folder / name, np.full(3000, np.nan), RATE, subtype="FLOAT")
    with pytest.raises(ValueError, match="2 of 9.*--on_error=skip") as error:
        embed.embed(counting, inputs, output)
    assert "x.wav" in str(error.value) and "finite" in str(error.value)
    assert counting.clips == 9
    failures = embed.embed(counting, inputs, output, on_error="skip")
    assert counting.clips == 9  # all that was done before counts
    assert [pathlib.Path(inputs.paths[n]).name for n in failures] == ["x.wav", "y.wav"]
    found = read(output)
    assert len(found["audio"]) == len(found["audio_paths"]) == 7
    np.testing.assert_allclose(found["audio"], small.embed_audio(found["audio_paths"].tolist()),
                               atol=1e-5)


def test_clips_left_out_leave_their_texts(small, folder, tmp_path):
    (folder / "metadata.csv").write_text("file_name,caption\nmissing.wav,rain\nb.wav,wind\n")
    embed.embed(small, embed.read_inputs(str(folder), None), tmp_path / "out.npz", on_error="skip")
    found = read(tmp_path / "out.npz")
    assert found["text_audio"].tolist() == [-1, 0] and len(found["audio"]) == 1


@pytest.mark.parametrize("arguments, words", [
    ([], ["--audio", "--text"]),
    (["--audio=FOLDER/none"], ["none", "no such file or folder"]),
    (["--audio=FOLDER/empty"], ["empty", "no audio files"]),
    (["--audio=FOLDER/bad.csv"], ["bad.csv", "['name']", "file_name"]),
    (["--text=FOLDER/none.txt"], ["none.txt", "no such file"]),
    (["--text=FOLDER/empty.txt"], ["empty.txt", "empty"]),
    (["--text=FOLDER/latin.txt"], ["latin.txt", "UTF-8"]),
], ids=lambda x: " ".join(x)[:30])
def test_mistake_is_named(folder, arguments, words):
    (folder / "empty").mkdir()
    (folder / "bad.csv").write_text("name\nb.wav\n")
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"\xfcber")
    given = dict(a.removeprefix("--").replace("FOLDER", str(folder)).split("=") for a in arguments)
    with pytest.raises(ValueError) as error:
        embed.read_inputs(given.get("audio"), given.get("text"))
    assert all(word in str(error.value) for word in words), error.value


def test_mistake_is_one_line_of_the_command(run_python, checkpoint, folder, tmp_path):
    done = run_python("-m", "tail_jax.embed", f"--checkpoint={checkpoint}", f"--audio={folder}",
                      f"--output={tmp_path / 'x.npz'}", "--policy=random")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and "policy" in line
