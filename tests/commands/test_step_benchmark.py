"""Train steps against PyTorch: both sides compute the same, and what the suites report."""

import json
import pathlib
import subprocess

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402

from tail_jax import benchmark  # noqa: E402
from tail_jax.benchmarks import OURS, Options, Share  # noqa: E402
from tail_jax.benchmarks import embed, step, torch_clap, training  # noqa: E402
from tail_jax.benchmarks.training import (Ours, batch_of, configuration, make_peer,  # noqa: E402
                                          peer_tree)
from tail_jax.costs.roofline import DEVICES, Chip  # noqa: E402
from tail_jax.models.dual_encoder import BUFFERS  # noqa: E402
from tail_jax.tuning.masks import leaf_name  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clap")
    embed.write_random_checkpoint(folder, "tiny")
    torch.set_num_threads(1)
    return folder


@pytest.fixture
def short_warmup(monkeypatch):
    """Rates ten times those of the suite, so that updates stand out from rounding."""
    monkeypatch.setattr(training, "STEPS", 100)


def sides(method, folder, dtype="float32"):
    """(ours, peer, our batch, theirs), with an epsilon that keeps Adam's updates smooth.

    Some gradients are 0 but for rounding (of the biases of keys), and Adam's first updates are
    signs.
    """
    config = configuration(method, folder, "tiny", 7)
    config["optimizer"]["epsilon"] = 1e-3
    config["model"]["dtype"] = dtype
    ours = Ours(config)
    peer, batch = make_peer(config, "cpu", ours), batch_of(config, ours.tokenizer)
    return ours, peer, ours.put(batch), peer.put(batch)


def assert_same_updates(start, ours, peer, folder):
    """Every leaf has moved as the peer's has, up to 1e-3 of how far the furthest went."""
    moved = 0
    pairs = zip(jax.tree_util.tree_leaves_with_path(start),
                jax.tree.leaves(jax.device_get(ours.state["trainable"])),
                jax.tree.leaves(peer_tree(peer, folder)), strict=True)
    for (path, before), own, theirs in pairs:
        if leaf_name(path).rpartition("/")[2] not in BUFFERS:
            most = np.abs(own - before).max()
            moved += most > 0
            np.testing.assert_allclose(own - before, theirs - before, rtol=0,
                                       atol=1e-3 * most + 3e-7, err_msg=leaf_name(path))
    return moved


def test_ptat_without_and_with_a_teacher_run_or_kept_equals_the_peers(folder, short_warmup):
    ours, peer, own, theirs = sides("ptat", folder)
    start = jax.device_get(ours.state["trainable"])
    for _ in range(2):
        assert ours.step(own) == pytest.approx(peer.step(theirs), abs=1e-5)
    assert assert_same_updates(start, ours, peer, folder) == len(jax.tree.leaves(start))
    ours.begin_task(1)
    peer.begin_task()
    assert ours.step(own) == pytest.approx(peer.step(theirs), abs=1e-5)
    own_kept, kept = ours.with_kept(own), peer.with_kept(theirs)
    assert {"teacher_audio", "teacher_text"} <= set(own_kept)
    for _ in range(3):
        assert ours.step(own_kept) == pytest.approx(peer.step(kept), abs=1e-5)
    assert_same_updates(start, ours, peer, folder)


def test_full_fine_tuning_equals_the_peers(folder, short_warmup):
    ours, peer, own, theirs = sides("sequential", folder)
    start = jax.device_get(ours.state["trainable"])
    for _ in range(3):
        assert ours.step(own) == pytest.approx(peer.step(theirs), abs=1e-5)
    assert assert_same_updates(start, ours, peer, folder) > 50


@pytest.mark.parametrize("method", ["ptat", "sequential"])
def test_bfloat16_is_near_the_peers_under_autocast(folder, method):
    ours, peer, own, theirs = sides(method, folder, "bfloat16")
    exact = sides(method, folder)[1]
    if method == "ptat":
        for side in (ours, peer, exact):
            side.step(own if side is ours else theirs)
            side.begin_task()
        dtypes = {p.dtype for p in peer.model.text_model.parameters()}
        assert dtypes == {torch.bfloat16, torch.float32}
        own, theirs = ours.with_kept(own), peer.with_kept(theirs)
    losses = ours.step(own), peer.step(theirs)
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert all(p.dtype == torch.float32 for p in peer.trainables)
    assert losses[1] != exact.step(theirs if method == "sequential" else exact.with_kept(theirs))


def test_prompts_as_keys_equal_prompts_inserted_as_tokens(folder):
    random = torch.Generator().manual_seed(0)
    clap = transformers.ClapModel.from_pretrained(folder).eval()
    layer = clap.text_model.encoder.layer[0]
    x, prompts = (torch.randn(shape, generator=random) for shape in ((2, 7, 32), (3, 32)))
    mask = torch.zeros(2, 1, 1, 7)
    mask[1, ..., 5:] = torch.finfo(torch.float32).min
    inserted = torch.cat([prompts.expand(2, -1, -1), x], 1)
    expected = layer(inserted, torch.nn.functional.pad(mask, (3, 0)))[:, 3:]
    layer.attention.self = torch_clap.TextAttention(layer.attention.self)
    layer.attention.self.prompts = prompts
    torch.testing.assert_close(layer(x, mask), expected)


def test_frozen_towers_have_no_gradients(folder):
    _, peer, _, theirs = sides("ptat", folder)
    peer.step(theirs)
    towers = [*peer.model.audio_model.parameters(), *peer.model.text_model.parameters()]
    assert all(p.grad is None for p in towers)
    assert all(p.grad is not None for p in peer.trainables)


def test_step_suite_reports_every_case(monkeypatch):
    chip = Chip(1e12, 1e9, 1e10, 0, 0)
    monkeypatch.setitem(DEVICES, jax.devices()[0].device_kind, chip)
    report, shown = benchmark.benchmark("step", Options("tiny", repeats=1, batch_size=5))
    compared, shares, used = (report["cases"][i:j] for i, j in ((0, 3), (3, 7), (7, 10)))
    assert [case["case"].partition(", 5 clips")[0] for case in compared] == [
        step.KEPT, step.LIVE, step.FULL]
    for case in compared:
        assert case["difference"] < 1e-4 and set(case["measured"]) == {OURS, step.PEER}
    assert [share["bar"] for share in shares] == [0.75, 1.05, 1.02, 0.03]
    assert all(share["value"] > 0 and share["kept"] == (share["value"] <= share["bar"])
               for share in shares)
    assert all(share["case"] in shown.table for share in shares)
    # A teacher that is run is a further forward pass; of towers that are frozen, the kept step has
    # one and as much for the gradients of their inputs, and more for prompts and heads.
    kept, live, full = (row["flops"] for row in used)
    assert kept < full and kept / 4 < live - kept < kept
    for row, case in zip(used, compared):
        assert row["seconds"] == case["measured"][OURS][0]
        assert row["value"] == pytest.approx(row["flops"] / row["seconds"] / 1e12)
        assert row["roofline"] == max(row["flops"] / 1e12, row["accessed_bytes"] / 1e10)


def test_step_suite_measures_our_side_where_the_peer_does_not_run(folder, monkeypatch):
    monkeypatch.setattr(step, "peer_device", lambda: None)
    report, shown = benchmark.benchmark("step", Options("tiny", 1, str(folder), batch_size=4))
    for case in report["cases"][:3]:
        assert set(case["measured"]) == {OURS} and case["ratio"] is case["difference"] is None
    assert "| – | – |" in shown.table and len(report["cases"]) == 7


@pytest.mark.parametrize("backend, sees, expected", [
    ("cpu", True, "cpu"), ("gpu", True, "cuda"), ("tpu", False, None), ("gpu", False, "torch sees")])
def test_the_peer_runs_where_we_do(monkeypatch, backend, sees, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees)
    if expected == "torch sees":
        with pytest.raises(ValueError, match="jax runs on a GPU and torch sees none"):
            embed.peer_device()
    else:
        assert embed.peer_device() == expected


def test_a_fused_clap_is_refused(tmp_path):
    config = transformers.ClapConfig(
        text_config=dict(vocab_size=2000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=64, projection_dim=16),
        audio_config=dict(spec_size=64, num_mel_bins=16, patch_embeds_hidden_size=8, depths=[1, 1],
                          num_attention_heads=[2, 2], hidden_size=16, window_size=4,
                          projection_dim=16, enable_fusion=True), projection_dim=16)
    embed.write_random_checkpoint(tmp_path, "tiny")
    transformers.ClapModel(config).save_pretrained(tmp_path)
    transformers.ClapFeatureExtractor(
        feature_size=16, sampling_rate=8000, hop_length=160, max_length_s=4, fft_window_size=256,
        frequency_min=50, frequency_max=4000, truncation="fusion").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a fused CLAP; expected one that takes a single"):
        configuration("ptat", tmp_path, "tiny")


@pytest.mark.slow
def test_memory_suite_measures_each_side_in_processes_of_its_own(compilation_cache, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", compilation_cache)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    report, _ = benchmark.benchmark("memory", Options("tiny", repeats=1))
    peaks, states, steps, shares = (report["cases"][i:i + 3] for i in (0, 3, 6, 9))
    for case in (*peaks, *states, *steps):
        assert case["unit"] == ("s" if case in steps else "MB")
        assert all(value[0] > 0 for value in case["measured"].values())
    for case in states:  # the same parameters and moments; steps are counted a parameter there
        assert case["ratio"] == pytest.approx(1, abs=0.02)
    assert [share["bar"] for share in shares] == [0.7] * 3
    # One peer, measured once, for PTAT with and without remat.
    assert all(part[0]["measured"][step.PEER] == part[1]["measured"][step.PEER]
               for part in (peaks, states, steps))


def test_all_writes_each_report_and_goes_on(tmp_path, monkeypatch, capsys):
    output, asked = tmp_path / "all.json", []

    def run(words, **_):
        given = dict(word[2:].split("=") for word in words[3:])
        suite = given["suite"]
        asked.append(given)
        if suite == "retrieval":  # the reports of those before are safe by now
            assert len(json.loads(output.read_text())) == len(asked) - 1
        if suite == "step":
            return subprocess.CompletedProcess(words, 2, "", "w\nerror: torch is not installed\n")
        if suite == "memory":
            return subprocess.CompletedProcess(words, -9, "", "")
        pathlib.Path(given["output"]).write_text(json.dumps(
            {"suite": suite, "cases": [1], "failed": ["x"] * (suite == "load")}))
        return subprocess.CompletedProcess(words, 0, f"|{suite}|\n", "progress\nnote\n")

    monkeypatch.setattr(subprocess, "run", run)
    reports = benchmark.benchmark_all(Options("tiny", 3, tasks=(2, 4)), output)
    assert json.loads(json.dumps(reports)) == json.loads(output.read_text())
    assert {report["suite"]: report["failed"] for report in reports if report["failed"]} == {
        "load": ["x"], "step": ["torch is not installed"], "memory": ["exit status -9"]}
    assert [report["suite"] for report in reports] == [
        "embed", "load", "step", "memory", "frontend", "loader", "retrieval", "analytic"]
    assert all(each["size"] == "tiny" and each["repeats"] == "3" and each["tasks"] == "2,4"
               and "checkpoint" not in each for each in asked)
    said = capsys.readouterr()
    assert "## frontend\n\n|frontend|\n" in said.out and "failed: memory: exit" in said.err
    assert "progress" not in said.err


def test_share_is_kept_up_to_its_bar():
    assert Share("a", 0.5, 0.5).kept and not Share("a", 0.51, 0.5).kept
