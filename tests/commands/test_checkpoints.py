"""From a checkpoint to a run and back: model.checkpoint, tuning files, the convert command."""

import dataclasses
import json
import pathlib
import re
import shlex

import jax
import numpy as np
import pytest
import soundfile

import tail_jax
from data_pipelines.front_end import CLAP, CLAP_FUSED, KALDI, FrontEnd, WaveformSettings
from data_pipelines.text import Tokenizer
from tail_jax import backbone as backbones
from tail_jax import methods, settings
from tail_jax.convert import convert
from tail_jax.models.ast import ASTConfig
from tail_jax.models.bert import TextConfig
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.htsat import HTSATConfig
from tail_jax.models.wav2vec2 import Wav2Vec2Config
from tail_jax.pretrained.export import export_clap
from tail_jax.run import open_run
from tail_jax.train import train
from tail_jax.training.checkpoints import load_tree
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def run(quick_compilation, tiny_config, tmp_path_factory):
    """(workdir, config, backbone folder) of a finished run of PTAT."""
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config("ptat", tasks=2, **{"train.duration": "2 steps"})
    train(config, workdir)
    folder = tmp_path_factory.mktemp("checkpoint") / "backbone"
    backbones.save_backbone(folder, open_run(config, workdir).backbone)
    return workdir, config, folder


def with_checkpoint(config, path, **model):
    return config | {"model": config["model"] | {"checkpoint": str(path)} | model}


def saved(folder, audio=None, text=None, front_end=None, tokenizer=None, max_tokens=30):
    """A folder with a random model of these towers."""
    model = DualEncoder(audio, text, 6)
    params = jax.device_get(model.init(jax.random.key(3)))
    return backbones.save_backbone(folder, backbones.Backbone(
        folder.name, model, params, front_end, max_tokens, tokenizer))


AUDIO = ASTConfig(frames=32, mels=16, patch=8, stride=8, width=16, layers=2, heads=2, hidden=32)
TEXT = TextConfig(vocab_size=300, width=8, layers=2, heads=2, hidden=16, max_positions=32,
                  pool="mean")


def test_a_tuned_model_embeds_as_its_run_did(run):
    workdir, config, folder = run
    model = tail_jax.load(folder, tuning=workdir / "tuning" / "task_2.safetensors")
    split = open_run(config, workdir).stream.tasks[1].test
    gallery, _ = load_tree(workdir / "galleries" / "task_2.safetensors")
    audio = model.embed_audio([clip.path for clip in split.clips], policy="chunk_mean")
    np.testing.assert_allclose(audio, gallery["audio"], atol=1e-5)
    np.testing.assert_allclose(model.embed_text(split.captions), gallery["text"], atol=1e-5)
    bare = tail_jax.load(folder).embed_text(split.captions)
    assert np.abs(bare - gallery["text"]).max() > 1e-3  # the tuning does something


def test_the_readmes_search_ranks_an_archive(run, run_python, tmp_path, monkeypatch, capsys):
    workdir, config, folder = run
    readme = (ROOT / "README.md").read_text()
    command = next(line for line in readme.splitlines() if "--output=vectors.npz" in line
                   and "runs/mine" in line).replace("task_3", "task_2")
    code = re.search(r"```python\n([^`]*vectors\.npz[^`]*)```", readme)[1].replace("task_3", "task_2")
    clips = open_run(config, workdir).stream.tasks[1].test.clips
    (tmp_path / "DIR").symlink_to(folder)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(workdir)
    (tmp_path / "FOLDER").symlink_to(pathlib.Path(clips[0].path).parent)
    done = run_python(*shlex.split(command)[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    exec(code, names := {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == min(10, len(names["archive"]["audio"])) > 1
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    text = names["model"].embed_text(["rain on a tin roof"])[0]
    best = names["model"].embed_audio([lines[0].split(maxsplit=1)[1]])[0]
    assert best @ text == pytest.approx(max(scores), abs=2e-3)


def test_a_run_starts_from_a_checkpoint(run, tmp_path):
    _, config, folder = run
    results = train(with_checkpoint(config, folder), tmp_path / "run")
    assert results["backbone"]["sha256"] == tail_jax.load(folder).sha256
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["model"]["checkpoint"] == str(folder)


def test_the_front_end_is_the_checkpoints_and_that_is_told(run, capsys):
    _, config, folder = run
    other = config | {"data": config["data"] | {"log_mel": config["data"]["log_mel"] | {
        "fmin": 20.0}, "window_seconds": 0.3}}
    resolved = settings.with_checkpoint(with_checkpoint(other, folder, dtype="bfloat16"))
    assert resolved["data"] == config["data"] and resolved["model"]["dtype"] == "bfloat16"
    told = capsys.readouterr().err
    assert "fmin 20.0 -> 50.0" in told and "window_seconds 0.3 -> 0.496" in told
    assert settings.with_checkpoint(resolved) == resolved and not capsys.readouterr().err


def test_two_checkpoints_become_one_model(run, tmp_path):
    _, config, folder = run
    own = tail_jax.load(folder)
    text = saved(tmp_path / "text", text=TEXT, tokenizer=own.tokenizer)
    audio = saved(tmp_path / "audio", audio=AUDIO, front_end=own.front_end)
    both = with_checkpoint(config, f"{tmp_path / 'audio'}+{tmp_path / 'text'}", embedding=5)
    backbone = open_run(settings.with_checkpoint(both), tmp_path / "run").backbone
    for side, part in (("audio", audio), ("text", text)):
        jax.tree.map(np.testing.assert_array_equal, backbone.params[side], part.params[side])
    assert backbone.model.embedding == 5 and backbone.model.text.pool == config["model"]["text"][
        "pool"]
    results = train(both, tmp_path / "run")
    assert results["backbone"]["name"] == "audio+text"


@pytest.mark.parametrize("case, message", [
    ("text alone", "a model of text alone; retrieval needs two towers: join an audio and a text"),
    ("wrong order", "expected one with an audio tower, then one with a text tower"),
    ("waveforms", "takes waveforms; training feeds log-mels only"),
    ("long", "data.max_tokens is 40; .* takes 30 at most"),
    ("missing", "no such file or folder"),
    ("no tokenizer", "has no tokenizer; put tokenizer.json beside its weights")])
def test_checkpoints_that_cannot_be_trained_are_refused(run, tmp_path, case, message):
    _, config, folder = run
    own = tail_jax.load(folder)
    saved(tmp_path / "text", text=TEXT, tokenizer=own.tokenizer)
    saved(tmp_path / "bare", audio=AUDIO, text=TEXT, front_end=own.front_end)
    waveforms = Wav2Vec2Config(samples=8000, feature_widths=(8, 8), feature_kernels=(10, 3),
                               feature_strides=(5, 2), width=16, layers=1, heads=2, hidden=16,
                               position_kernel=4, position_groups=2)
    saved(tmp_path / "wave", audio=waveforms, text=TEXT, tokenizer=own.tokenizer,
          front_end=FrontEnd(WaveformSettings(), 0.5))
    path = {"text alone": tmp_path / "text", "wrong order": f"{tmp_path / 'text'}+{folder}",
            "waveforms": tmp_path / "wave", "long": tmp_path / "bare",
            "no tokenizer": tmp_path / "bare", "missing": tmp_path / "gone"}[case]
    if case == "long":
        config = config | {"data": config["data"] | {"max_tokens": 40}}
    with pytest.raises(ValueError, match=message):
        train(with_checkpoint(config, path), tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()


def test_convert_keeps_everything(run, tmp_path, capsys):
    workdir, _, folder = run
    convert(folder, tmp_path / "copy")
    before, after = tail_jax.load(folder), tail_jax.load(tmp_path / "copy")
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    assert (after.front_end, after.max_tokens, after.sha256) == (
        before.front_end, before.max_tokens, before.sha256)
    np.testing.assert_array_equal(before.embed_text("a tone"), after.embed_text("a tone"))
    with pytest.raises(ValueError, match="is there already; expected a new or empty folder"):
        convert(folder, tmp_path / "copy")
    with pytest.raises(ValueError, match="holds prompts or other tuning beside the model"):
        convert(folder, tmp_path / "tuned", workdir / "tuning" / "task_2.safetensors")
    with pytest.raises(ValueError, match="cannot be a CLAP folder"):
        convert(folder, tmp_path / "clap", to="clap")
    assert not (tmp_path / "clap").exists() and not (tmp_path / "tuned").exists()


@pytest.mark.parametrize("fusion", [False, True])
def test_a_clap_folder_is_fine_tuned_and_becomes_a_clap_folder_again(run, tmp_path, fusion):
    _, config, folder = run
    log_mel = dataclasses.replace(CLAP_FUSED if fusion else CLAP, sampling_rate=8000, n_fft=256,
                                   hop_length=160, n_mels=16, fmax=4000.0)
    audio = HTSATConfig(spec_size=32, mels=16, patch=4, width=8, depths=(1, 1), heads=(2, 2),
                        window=4, fusion=fusion)
    text = TextConfig(vocab_size=300, width=8, layers=1, heads=2, hidden=16, max_positions=40)
    model = DualEncoder(audio, text, 6)
    clap = export_clap(model, jax.device_get(model.init(jax.random.key(0))), FrontEnd(
        log_mel, 1.0, fusion), Tokenizer.load(tail_jax.load(folder).tokenizer), tmp_path / "clap")
    config = with_checkpoint(config, clap) | {
        "method": methods.defaults("sequential"), "data": config["data"] | {"max_tokens": 38}}
    train(config, tmp_path / "run")
    tuned = tail_jax.load(tmp_path / "run" / "backbone")
    convert(tmp_path / "run" / "backbone", tmp_path / "again", to="clap")
    again, before = tail_jax.load(tmp_path / "again"), tail_jax.load(clap)
    assert again.model == before.model == tuned.model
    assert again.front_end == before.front_end == tuned.front_end
    jax.tree.map(np.testing.assert_array_equal, again.params, tuned.params)
    assert not np.array_equal(again.params["text"]["word"]["embedding"],
                              before.params["text"]["word"]["embedding"])
    # What was measured at the end of the run is what its folder embeds.
    split = open_run(settings_of(tmp_path / "run"), tmp_path / "run").stream.tasks[1].test
    gallery, _ = load_tree(tmp_path / "run" / "galleries" / "task_2.safetensors")
    short = [i for i, clip in enumerate(split.clips) if soundfile.info(clip.path).duration < 1]
    audio = again.embed_audio([split.clips[i].path for i in short])
    np.testing.assert_allclose(audio, gallery["audio"][short], atol=1e-5)
    np.testing.assert_allclose(again.embed_text(split.captions), gallery["text"], atol=1e-5)


def settings_of(workdir):
    return json.loads((workdir / "config.json").read_text())


def test_a_backbone_folder_tells_what_it_is_without_its_weights(run, tmp_path):
    _, _, folder = run
    own = tail_jax.load(folder)
    assert backbones.describe(folder) == (own.model, own.front_end, own.max_tokens)
    audio = saved(tmp_path / "audio", audio=AUDIO, front_end=FrontEnd(
        dataclasses.replace(KALDI, n_mels=16, frames=32), 0.35))
    assert backbones.describe(tmp_path / "audio") == (audio.model, audio.front_end, 30)
