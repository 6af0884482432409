"""Suites of the data and of ranking: both sides compute the same, and memory is measured."""

import os
import sys

import numpy as np
import pytest

from tail_jax import benchmark, process
from tail_jax.benchmarks import (
    OURS, Comparison, Options, frontend, loader, retrieval, table)


def test_frontend_suite_compares_equal_features_with_every_peer():
    pytest.importorskip("transformers")
    report, shown = benchmark.benchmark("frontend", Options("tiny", repeats=2))
    assert len(shown.table.splitlines()) == 2 + 5
    peers = [next(who for who in case["measured"] if who != OURS) for case in report["cases"]]
    assert peers == [frontend.LIBROSA] * 3 + [frontend.TRANSFORMERS] * 2
    assert all(0 <= case["difference"] < 1e-3 for case in report["cases"])  # dB
    assert {"librosa", "transformers"} <= set(report["machine"]["versions"])


def test_frontend_suite_without_transformers_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    shown = frontend.run(Options("tiny", repeats=1))
    assert shown.note.endswith("; transformers is not installed")
    assert [case["case"].partition(", ")[2] for case in shown.cases] == [
        "one thread", "one thread", "all cores"]
    assert all(0 <= case["difference"] < 1e-3 for case in shown.cases)


def test_table_leaves_out_a_side_that_a_case_has_not():
    shown = table([Comparison("a", 1, {OURS: [1.0], "x": [2.0]}, 0.0),
                   Comparison("b", 1, {OURS: [1.0], "y": [4.0]}, 0.0, "MB")]).splitlines()
    assert shown[0] == "| case | tail_jax | x | y | ratio | difference |"
    assert shown[2:] == ["| a | 1 s (1 to 1) | 2 s (2 to 2) | – | 2.00 | 0.0e+00 |",
                         "| b | 1 MB (1 to 1) | – | 4 MB (4 to 4) | 4.00 | 0.0e+00 |"]


def test_retrieval_suite_finds_equal_metrics_and_reports_memory():
    report, shown = benchmark.benchmark("retrieval", Options("tiny", repeats=1))
    assert [case["unit"] for case in report["cases"]] == ["s", "MB"]
    assert all(case["difference"] < 1e-7 for case in report["cases"])
    # A process with JAX, and one without: megabytes, not kilobytes.
    assert all(10 < mb < 2000 for side in report["cases"][1]["measured"].values() for mb in side)
    assert " MB (" in shown.table and report["cases"][0]["items"] == 300
    (case, _) = benchmark.benchmark("retrieval", Options("tiny", repeats=1, items=41))[0]["cases"]
    assert case["items"] == 41


def test_sides_of_ranking_agree_where_captions_tie_and_where_none_finds_its_clip():
    queries, owner, gallery = retrieval.embeddings(97, 61, 8)
    gallery[1::2] = gallery[:60:2]  # every clip but one has an equal
    for asked in (queries, -queries, np.zeros_like(queries)):
        ours, numpys = (rank(asked, owner, gallery) for rank in retrieval.SIDES.values())
        np.testing.assert_allclose(ours, numpys, atol=1e-7)
    assert numpys.tolist() == [0, 0, 0, 0, 61]


def test_freed_memory_is_kept_and_touched_once(monkeypatch):
    code = """
import resource, sys
import numpy as np
from tail_jax import process
kept = sys.argv[1] == "keep" and process.keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(10_000_000), np.ones(10_000_000)
before = faults()
for _ in range(5):
    np.ones(10_000_000)
print(kept, faults() - before)
"""
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    kept, plain = (process.run_python(code, way).split() for way in ("keep", "leave"))
    assert (kept[0], plain[0]) == ("True", "False")
    assert int(kept[1]) < 100 < 5 * 80_000_000 / 2**21 < int(plain[1])  # pages of 2 MB at most
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert process.run_python(code, "keep").split()[0] == "False"


@pytest.mark.parametrize("devices", [1, 8])
def test_on_a_cpu_a_call_returns_when_its_temporary_memory_is_free(devices, monkeypatch, tmp_path):
    code = """
import jax
import jax.numpy as jnp
from tail_jax import settings
settings.start_jax()
x = jnp.ones((4000, 40))
run = jax.jit(lambda x: (x @ x.T) @ x).lower(x).compile()
print(len(jax.devices()), [run(x).is_ready() for _ in range(5)])
"""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(devices))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert process.run_python(code) == f"{devices} {[True] * 5}"


def test_what_was_freed_in_between_is_given_back_when_a_program_is_compiled(monkeypatch, tmp_path):
    code = """
import jax
import numpy as np
from tail_jax import process, settings
settings.start_jax()
run = lambda x: jax.jit(lambda y: y + x)(1.0)
run(1)
pieces = [np.ones(100_000) for _ in range(500)]
del pieces[::2]
before = process.resident_bytes()
run(2)
print(before - process.resident_bytes())
"""
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert float(process.run_python(code)) > 0.8 * 250 * 800_000


def test_memory_of_a_process_is_what_it_touches():
    before = process.resident_bytes()
    touched = np.ones(50_000_000, np.uint8)
    assert 45e6 < process.resident_bytes() - before < 80e6
    assert process.peak_bytes() >= process.resident_bytes() and touched.all()
    code = "from tail_jax import process; print(process.peak_bytes())"
    assert float(process.run_python(code)) < process.peak_bytes()
    with pytest.raises(ValueError, match="1 2: ZeroDivisionError"):
        process.run_python("1 / 0", "1", "2")


def test_loader_suite_compares_equal_rows_and_its_memory_does_not_grow():
    report, _ = benchmark.benchmark("loader", Options("tiny", repeats=1))
    epoch, first, early, late = report["cases"]
    assert epoch["difference"] == first["difference"] == 0
    assert all(list(case["measured"]) == [OURS, loader.PARTS] for case in (epoch, first))
    assert [case["unit"] for case in (early, late)] == ["MB", "MB"]
    assert late["measured"][loader.EARLIER] == early["measured"][OURS]
    # Half of what an epoch's batch kept in each epoch would take.
    batch = loader.BATCH * 1001 * 64 * 4 / 1e6
    growth = late["measured"][OURS][0] - late["measured"][loader.EARLIER][0]
    assert growth < (loader.EPOCHS - 2) * batch / 2
