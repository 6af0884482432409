"""The commands as a user starts them."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import tail_jax
from tail_jax import backbone as backbones
from tail_jax.run import open_run
from tail_jax.train import train
from tail_jax.training.checkpoints import load_tree, save_tree

pytestmark = pytest.mark.usefixtures("quick_compilation")
QUICK = "--config=configs/quickstart.py"


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    """(workdir, config) of a finished run of two steps a task."""
    workdir = tmp_path_factory.mktemp("finished")
    config = tiny_config("ptat", tasks=2, **{"train.duration": "2 steps"})
    train(config, workdir)
    return workdir, config


def one_error(process, code=2):
    """The line of a failed command, which must be the only one."""
    assert process.returncode == code, process.stderr
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("arguments, words", [
    ([QUICK, "--config.train.batch_sizee=3"], ["--config.train.batch_sizee", "'batch_size'"]),
    ([QUICK, "--config.methd.learning_rate=1"], ["methd", "'method'"]),
    ([QUICK, "--config.train.zzzz=3"], ["--config.train.zzzz: no such setting"]),
    ([QUICK, "--config.train.batch_size=abc"], ["train.batch_size=abc", "int"]),
    (["--config=configs/missing.py:seed=1"], ["no file 'configs/missing.py'"]),
    (["--config", "configs/missing.py"], ["no file 'configs/missing.py'"]),
    ([QUICK + ":method=nope"], ["no method 'nope'", "ptat"]),
    ([QUICK + ":methd=ptat"], ["config argument 'methd=ptat'", "method"]),
    ([QUICK + ":seed=x"], ["'x'"]),
    ([QUICK, "--workdr=x"], ["workdr", "workdir"]),
    ([QUICK, "extra"], ["'extra'"]),
    (["--config=configs/tail_clap.py", "--config.data.root=/missing"],
     ["/missing/audiocaps", "does not exist"]),
    (["--config=tests/tiny.py:root=/missing"], ["/missing/low", "does not exist"]),
    (["--config=tests/tiny.py:root=ROOT", "--config.backbone.kind=checkpoint"],
     ["model.checkpoint is empty"]),
    (["--config=tests/tiny.py:root=ROOT", "--config.method.prompts.coupling=none"],
     ["prompts.coupling is 'none'", "linear_shared"]),
], ids=lambda x: " ".join(x)[:40])
def test_mistake_is_one_line(run_python, tiny_root, tmp_path, arguments, words):
    arguments = [a.replace("ROOT", str(tiny_root)) for a in arguments]
    line = one_error(run_python("-m", "tail_jax.train", f"--workdir={tmp_path}", *arguments))
    assert all(word in line for word in words), line
    assert "Traceback" not in line and len(line) < 300


def test_missing_flags_are_one_line(run_python):
    assert "--workdir" in one_error(run_python("-m", "tail_jax.train", QUICK))
    assert "--config" in one_error(run_python("-m", "tail_jax.train", "--workdir=x"))
    assert "--workdir" in one_error(run_python("-m", "tail_jax.evaluate"))


def test_changed_configuration_is_refused_with_the_difference(run_python, finished):
    workdir, config = finished
    before = (workdir / "config.json").read_text()
    line = one_error(run_python(
        "-m", "tail_jax.train", f"--config=tests/tiny.py:tasks=2,root={config['data']['root']}",
        f"--workdir={workdir}", "--config.train.duration=2 steps",
        "--config.method.learning_rate=0.5"))
    assert "method.learning_rate was 0.002, is 0.5" in line
    assert "duration" not in line
    assert (workdir / "config.json").read_text() == before


def test_train_command_prints_where_the_results_are(run_python, finished):
    workdir, config = finished
    process = run_python(
        "-m", "tail_jax.train", f"--config=tests/tiny.py:tasks=2,root={config['data']['root']}",
        f"--workdir={workdir}", "--config.train.duration=2 steps")
    assert process.returncode == 0, process.stderr
    assert f"results: {workdir / 'results.json'}" in process.stdout


def test_divergence_is_one_line_and_keeps_the_last_good_state(run_python, tiny_root, tmp_path):
    command = ["-m", "tail_jax.train", f"--config=tests/tiny.py:root={tiny_root}",
               f"--workdir={tmp_path}", "--config.train.save_seconds=0",
               "--config.method.learning_rate=1e30"]
    for _ in range(2):  # the second time from the checkpoint
        process = run_python(*command)
        assert process.returncode == 3, process.stderr
        assert "Traceback" not in process.stderr
        line = process.stderr.splitlines()[-1]
        assert line.startswith("error: ptat: low: ") and "at step 1;" in line
        assert ".wav" in line and "lower the learning rate" in line
        # Row 0 is the only checkpoint: what the first update made is never kept.
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert not (tmp_path / "results.json").exists()


def test_sigterm_leaves_with_143_and_a_message(tiny_root, tmp_path, compilation_cache):
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": compilation_cache,
                                "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tail_jax.train", f"--config=tests/tiny.py:root={tiny_root}",
         f"--workdir={tmp_path}", "--config.train.duration=100000 steps"], env=environment,
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for _ in range(1200):
        metrics = tmp_path / "metrics.jsonl"
        if metrics.exists() and metrics.stat().st_size:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert "the state is saved; the same command resumes" in stderr.splitlines()[-1]


def test_evaluate_command_prints_and_writes_the_row(run_python, finished, tmp_path):
    workdir, _ = finished
    process = run_python("-m", "tail_jax.evaluate", f"--workdir={workdir}", "--task=1",
                         f"--json={tmp_path / 'row.json'}")
    assert process.returncode == 0, process.stderr
    report = json.loads((tmp_path / "row.json").read_text())
    matrices = json.loads((workdir / "results.json").read_text())["matrices"]
    assert report["row"] == {key: matrix[1] for key, matrix in matrices.items()}
    shown = f"{100 * report['row']['text_to_audio/R@5/own/fresh'][0]:.1f}"
    assert any(line.startswith("text_to_audio") and shown in line
               for line in process.stdout.splitlines())


def test_evaluate_names_what_is_missing(run_python, finished, tmp_path):
    assert "config.json" in one_error(run_python("-m", "tail_jax.evaluate", f"--workdir={tmp_path}"))
    line = one_error(run_python("-m", "tail_jax.evaluate", f"--workdir={finished[0]}", "--task=7"))
    assert "task 7 is not there; expected one of 0, 1, 2" in line


@pytest.mark.parametrize("name", ["tail_clap", "tail_ast"])
def test_describe_finds_ptat_within_its_budget(run_python, tmp_path, name):
    process = run_python("-m", "tail_jax.describe", f"--config=configs/{name}.py",
                         f"--json={tmp_path / 'report.json'}")
    assert process.returncode == 0, process.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    # The published models' counts; CLAP's 153,492,890 has two temperatures, ours has one.
    assert (report["trainable_parameters"], report["total_parameters"]) == {
        "tail_clap": (3_548_417, 153_492_889), "tail_ast": (2_530_817, 196_391_681)}[name]
    assert report["trainable_share"] <= 0.0242
    assert "within" in process.stdout and "ABOVE" not in process.stdout


@pytest.mark.parametrize("module, banned", [
    ("tail_jax", ["tensorflow", "absl", "matplotlib", "jax"]),
    *[(f"tail_jax.{name}", ["tensorflow", "matplotlib"]) for name in (
        "backbone", "models.dual_encoder", "models.presets", "methods", "training.loop",
        "training.step", "training.checkpoints", "training.embedder", "evaluation.retrieval",
        "train", "evaluate", "describe")]])
def test_import_is_light(module, banned):
    code = f"import sys, {module}; print([m for m in {banned} if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.strip() == "[]", process.stdout + process.stderr


# --- tail_jax.load and tail_jax.load_tuning ---------------------------------------------------


@pytest.fixture
def saved_backbone(finished, tmp_path):
    workdir, config = finished
    own = open_run(config, workdir).backbone
    return backbones.save_backbone(tmp_path / "backbone", own)


def test_loaded_backbone_and_tuning_are_those_of_the_run(finished, saved_backbone, tmp_path):
    workdir, _ = finished
    backbone = tail_jax.load(tmp_path / "backbone")
    assert backbone.sha256 == json.loads((workdir / "results.json").read_text())["backbone"]["sha256"]
    jax.tree.map(np.testing.assert_array_equal, backbone.params, saved_backbone.params)
    tree, header = tail_jax.load_tuning(workdir / "tuning" / "task_2.safetensors", backbone)
    assert set(tree) == {"prompts", "heads", "logit_scale"} and header["task"] == "high"


def test_tuning_of_another_backbone_is_refused(finished, saved_backbone, tmp_path):
    params = jax.tree.map(np.copy, saved_backbone.params)
    params["logit_scale"] += 1
    other = backbones.save_backbone(
        tmp_path / "other", dataclasses.replace(saved_backbone, params=params, stored_hash=""))
    with pytest.raises(ValueError, match="trained beside backbone .* got .*; load the backbone"):
        tail_jax.load_tuning(finished[0] / "tuning" / "task_2.safetensors", other)


def test_backbone_whose_values_changed_is_refused(saved_backbone, tmp_path):
    path = tmp_path / "backbone" / backbones.WEIGHTS
    tree, header = load_tree(path)
    tree["logit_scale"] = tree["logit_scale"] + 1
    save_tree(path, tree, header)
    with pytest.raises(ValueError, match="damaged"):
        tail_jax.load(tmp_path / "backbone")


def test_file_of_another_kind_is_refused(finished, tmp_path):
    workdir, _ = finished
    with pytest.raises(ValueError, match="has no weights"):
        tail_jax.load(tmp_path)
    with pytest.raises(ValueError, match="holds 'gallery', not a tuning tree"):
        tail_jax.load_tuning(workdir / "galleries" / "task_1.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x08\x00\x00")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        tail_jax.load_tuning(tmp_path / "torn.safetensors")
