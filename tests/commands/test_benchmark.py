"""The benchmark command: what it measures, and that both sides computed the same."""

import dataclasses
import json
import sys

import pytest

from tail_jax import benchmark
from tail_jax.benchmarks import OURS, Comparison, Options, analytic, compare, embed, table


def test_embed_suite_compares_equal_outputs(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    report, shown = benchmark.benchmark("embed", Options("tiny", repeats=2))
    (tmp_path / "bench.json").write_text(json.dumps(report))
    assert len(report["cases"]) == 6 and len(shown.table.splitlines()) == 2 + 6
    for case in report["cases"]:
        assert case["difference"] < 1e-5
        assert all(second > 0 for seconds in case["measured"].values() for second in seconds)
    assert {"processor", "cores", "versions", "device"} <= set(report["machine"])


def test_load_suite_measures_time_and_memory_of_equal_weights():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    report, _ = benchmark.benchmark("load", Options("tiny", repeats=1))
    assert [case["unit"] for case in report["cases"]] == ["s", "x weights"]
    assert all(case["difference"] < 1e-7 for case in report["cases"])


def test_analytic_suite_compares_equal_weights_after_each_session():
    report, shown = benchmark.benchmark("analytic", Options("tiny", repeats=2))
    assert len(shown.table.splitlines()) == 2 + 4
    assert "scikit-learn" in report["machine"]["versions"]
    ways = ("3 sessions, 90 features (accumulation)", "16 sessions, 90 features (recursion)")
    for i, way in enumerate(ways):
        last, every = report["cases"][2 * i:2 * i + 2]
        assert (last["case"], every["case"]) == (f"320 clips in {way}: the last",
                                                 f"320 clips in {way}: all")
        assert last["difference"] == every["difference"] < 1e-9
        for side, seconds in last["measured"].items():
            assert len(seconds) == 2
            assert all(0 < one < of_all for one, of_all in zip(seconds, every["measured"][side]))


def test_analytic_suite_takes_its_sizes_from_the_options(monkeypatch):
    sizes = Options("tiny", repeats=1, items=41, tasks=(2, 7))
    assert [case["case"][:24] for case in benchmark.benchmark("analytic", sizes)[0]["cases"]] == [
        *["41 clips in 2 sessions, "] * 2, *["41 clips in 7 sessions, "] * 2]
    with pytest.raises(ValueError, match="--tasks=42 sessions of 41 clips"):
        analytic.run(dataclasses.replace(sizes, tasks=(2, 42)))
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ValueError, match=r"sklearn.*pip install 'tail_jax\[test\]'"):
        analytic.run(sizes)


def test_suite_without_the_peer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"torch.*pip install 'tail_jax\[torch\]'"):
        embed.run(Options("tiny"))


def test_sides_are_measured_in_turns_after_a_warm_up():
    calls = []
    result = compare("case", 1, 3, {OURS: lambda: calls.append("a") or 0.5,
                                    "peer": lambda: calls.append("b") or 0.75})
    assert calls == list("abababab")
    assert [len(s) for s in result.measured.values()] == [3, 3] and result.difference == 0.25


def test_ratio_is_of_medians_and_above_one_where_we_are_faster():
    c = Comparison("case", 1, {OURS: [1.0, 2.0, 9.0], "peer": [3.0, 1.0, 100.0]}, 0.0)
    assert c.ratio == 1.5
    assert table([c]).splitlines()[-1] == "| case | 2 s (1 to 9) | 3 s (1 to 100) | 1.50 | 0.0e+00 |"


def test_captions_have_the_lengths_of_captions():
    words = [len(text.split()) for text in embed.captions(3000)]
    assert min(words) == 4 and max(words) == 30 and 9 < sum(words) / len(words) < 13
    assert embed.captions(50) == embed.captions(50)


def test_mistake_is_one_line(run_python, tmp_path):
    done = run_python("-m", "tail_jax.benchmark", "--suite=nope", f"--output={tmp_path / 'x.json'}")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and "nope" in line
