"""Programs compiled for TPU slices that are not here; needs the compiler, libtpu."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from tail_jax import cli
from tail_jax.costs import programs
from tail_jax.costs.slices import devices, parse_slices
from tail_jax.describe import describe
from tail_jax.training import sharding
from tests import tiny

pytest.importorskip("libtpu", reason="the TPU's compiler is not installed (tail_jax[tpu])")

BYTES = 256 * 128 * 4


@pytest.fixture(scope="module")
def mesh():
    """4 x 4 chips of v5e."""
    return sharding.make_mesh(4, 4, devices=devices(parse_slices("v5e:4x4")[0]))


@pytest.mark.parametrize("name, case, kind, payload, group", [
    ("psum", lambda x: jax.lax.psum(x, "data"), "all-reduce", BYTES, 4),
    ("gather", lambda x: jax.lax.all_gather(x, "model", tiled=True), "all-gather", 4 * BYTES, 4),
    ("scatter", lambda x: jax.lax.psum_scatter(x, "data", tiled=True), "reduce-scatter", BYTES, 4),
    ("exchange", lambda x: jax.lax.all_to_all(x, "data", 0, 1, tiled=True), "all-to-all", BYTES, 4),
])
def test_a_collective_of_known_size_on_a_slice(mesh, name, case, kind, payload, group):
    run = jax.jit(jax.shard_map(case, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    found = programs.measure(run.lower(jax.ShapeDtypeStruct((256, 128), jnp.float32)).compile())
    factor = 2 if kind == "all-reduce" else 1
    assert found["collectives"] == {kind: {
        "count": 1, "bytes": payload, "sent_bytes": factor * payload * (group - 1) / group}}


def test_a_collective_that_runs_beside_a_loop_is_counted_once(mesh):
    here, rows = sharding.replicated(mesh), sharding.by_row(mesh)

    def run(x, w):
        y, _ = jax.lax.scan(lambda c, _: (c @ w, None), x @ w, length=5)
        return jnp.sum(y, 0), jax.lax.with_sharding_constraint(x * 2, here), jnp.sum(x)

    lowered = jax.jit(run, in_shardings=(rows, here), out_shardings=(here, here, here)).lower(
        jax.ShapeDtypeStruct((64, 256), jnp.float32), jax.ShapeDtypeStruct((256, 256), jnp.float32))
    found = programs.measure(lowered.compile())
    assert found["collectives"]["all-gather"]["count"] == 1
    assert found["collectives"]["all-gather"]["bytes"] == 64 * 256 * 4
    assert found["collectives"]["all-reduce"]["bytes"] == 256 * 4 + 4
    # Of 16 rows: the product before the loop, and one pass of five.
    products = 2 * 2 * 16 * 256 * 256
    assert found["loops"] == 1 and products < found["flops"] < 1.1 * products


def test_programs_of_a_run_on_slices_of_one_chip_and_more():
    config = cli.plain(tiny.get_config())
    report = describe(config, parse_slices("v5e:1x1,v5e:2x2"), batch_per_chip=8)
    json.dumps(report)
    one, four = (where["programs"] for where in report["slices"])
    assert set(one) == set(four) == {"train_step", "embed_audio", "embed_text"}
    for name in one:
        assert not one[name]["collectives"] and one[name]["fits"]
        assert four[name]["flops"] == pytest.approx(one[name]["flops"], rel=0.2)
    reduced = four["train_step"]["collectives"]["all-reduce"]["bytes"]
    assert reduced >= 0.98 * 4 * report["trainable_parameters"]
    assert [where["batch_size"]["train_step"] for where in report["slices"]] == [8, 32]


def test_a_program_that_does_not_fit_is_reported_in_the_words_of_the_compiler():
    where = parse_slices("v5e:1x1")[0]
    here = sharding.replicated(sharding.make_mesh(devices=devices(where)))
    lowered = jax.jit(lambda x: jnp.sort(x, axis=0), in_shardings=here).lower(
        jax.ShapeDtypeStruct((1 << 16, 1 << 17), jnp.float32))  # 34 GB
    found = programs.measure_on(lowered, where)
    assert not found["fits"] and "seconds" not in found
    assert all(words in found["refused"] for words in ("Ran out of memory", "15.75G"))


def test_slices_that_the_compiler_does_not_know_and_batches_that_cannot_be_shared():
    config = cli.plain(tiny.get_config())
    with pytest.raises(ValueError, match="the compiler knows no slice v5e:3x3"):
        describe(config, parse_slices("v5e:3x3"))
    with pytest.raises(ValueError, match="train.batch_size is 8, which 16 devices"):
        describe(config, parse_slices("v5e:4x4"))


@pytest.mark.slow
# AST's 1,212 tokens fit 64 at a time only if their blocks are computed again.
@pytest.mark.parametrize("name, remat", [("tail_clap", "none"), ("tail_ast", "blocks")])
def test_full_size_ptat_fits_and_reduces_its_trainable_tree_alone(name, remat):
    config = cli.parse_config([f"--config=configs/{name}.py:method=ptat",
                               f"--config.train.remat={remat}"])
    report = describe(config, parse_slices("v5e:4x4"), names=("train_step",), batch_per_chip=64)
    step = report["slices"][0]["programs"]["train_step"]
    assert step["fits"] and step["memory"]["total"] < 16e9
    # Embeddings of two sides, the student's and the teacher's; XLA puts gradients into few messages.
    assert step["collectives"]["all-gather"]["count"] == 4
    assert step["collectives"]["all-gather"]["bytes"] == 4 * 64 * 16 * 512 * 4
    reduced = step["collectives"]["all-reduce"]
    assert reduced["count"] <= 8
    trained, batch = 4 * report["trainable_parameters"], 64 * 16
    # Beside the gradients: the gradient of the embeddings of both sides, and of four similarity
    # matrices' sums what is a row long.
    assert 0.98 * trained <= reduced["bytes"] <= trained + 2 * 4 * batch * (512 + 64)
    assert reduced["bytes"] < 0.03 * 4 * report["total_parameters"]
