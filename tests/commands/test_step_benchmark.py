"""Train steps against PyTorch: both sides compute the same, and what the suites report."""

import sys

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch  # noqa: E402

from tail_jax import benchmark  # noqa: E402
from tail_jax.benchmarks import OURS, Measured, Options, Share  # noqa: E402
from tail_jax.benchmarks import embed, step, torch_clap, training  # noqa: E402
from tail_jax.benchmarks.training import (Ours, batch_of, configuration, make_peer,  # noqa: E402
                                          peer_tree)
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


def sides(method, folder):
    """(ours, peer, our batch, theirs), with an epsilon that keeps Adam's updates smooth.

    Some gradients are 0 but for rounding (of the biases of keys), and Adam's first updates are
    signs.
    """
    config = configuration(method, folder, "tiny")
    config["optimizer"]["epsilon"] = 1e-3
    ours = Ours(config)
    peer, batch = make_peer(config, ours), batch_of(config, ours.tokenizer)
    return ours, peer, ours.put(batch), peer.batch(batch)


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
        assert ours.step(own) == pytest.approx(float(peer.step(theirs)), abs=1e-5)
    assert assert_same_updates(start, ours, peer, folder) == len(jax.tree.leaves(start))
    ours.begin_task(1)
    peer.begin_task()
    alone = float(ours.step(own))
    assert alone == pytest.approx(float(peer.step(theirs)), abs=1e-5)
    own_kept, kept = ours.with_kept(own), peer.keep(theirs)
    assert {"teacher_audio", "teacher_text"} <= set(own_kept)
    for _ in range(3):
        assert ours.step(own_kept) == pytest.approx(float(peer.step(theirs, kept)), abs=1e-5)
    assert_same_updates(start, ours, peer, folder)


def test_full_fine_tuning_equals_the_peers(folder, short_warmup):
    ours, peer, own, theirs = sides("sequential", folder)
    start = jax.device_get(ours.state["trainable"])
    for _ in range(3):
        assert ours.step(own) == pytest.approx(float(peer.step(theirs)), abs=1e-5)
    assert assert_same_updates(start, ours, peer, folder) > 50


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


def test_step_suite_reports_every_case():
    report, shown = benchmark.benchmark("step", Options("tiny", repeats=1))
    compared, shares = report["cases"][:3], report["cases"][3:]
    assert [case["case"].partition(", 8 clips")[0] for case in compared] == [
        step.KEPT, step.LIVE, step.FULL]
    for case in compared:
        assert case["difference"] < 1e-4 and set(case["measured"]) == {OURS, step.PEER}
    assert [share["bar"] for share in shares] == [0.75, 1.05, 1.02, 0.03]
    assert all(share["value"] > 0 and share["kept"] == (share["value"] <= share["bar"])
               for share in shares)
    assert all(share["case"] in shown.table for share in shares)


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


def test_all_goes_on_without_a_peer(monkeypatch):
    def missing(_):
        raise ValueError("torch is not installed; pip install it")

    fake = lambda name: type(sys)(name)
    for suite in benchmark.SUITES:
        module = fake(f"tail_jax.benchmarks.{suite}")
        module.run = missing if suite == "step" else lambda _: Measured([{"case": "x"}], "|x|", "n")
        monkeypatch.setitem(sys.modules, module.__name__, module)
    done = benchmark.benchmark_all(Options("tiny"))
    assert [report["suite"] for report, _ in done] == [
        "embed", "load", "step", "memory", "frontend", "loader", "retrieval", "analytic"]
    for report, shown in done:
        failed = report["suite"] == "step"
        assert report["failed"] == ["torch is not installed; pip install it"] * failed
        assert bool(report["cases"]) != failed and report["commit"] == done[0][0]["commit"]


def test_share_is_kept_up_to_its_bar():
    assert Share("a", 0.5, 0.5).kept and not Share("a", 0.51, 0.5).kept
