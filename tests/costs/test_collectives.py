"""Collectives and costs of compiled programs, against what a reader counts by hand."""

import json

import pytest

from tail_jax.costs.collectives import Collective, count_loops, read_collectives, summarize


@pytest.fixture(scope="module")
def counted(run_python):
    """What tests/costs/hand_counted.py measured on eight devices."""
    process = run_python("-m", "tests.costs.hand_counted", devices=8)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


BYTES = 64 * 32 * 4  # of the array that each device holds


@pytest.mark.parametrize("name, kind, payload, sent", [
    # Over `data`, 4 devices: a ring sends 3/4 of the array twice.
    ("psum", "all-reduce", BYTES, 2 * BYTES * 3 / 4),
    ("psum of all", "all-reduce", BYTES, 2 * BYTES * 7 / 8),
    # Over `model`, 2 devices: each has twice the array, and sends its own.
    ("all_gather", "all-gather", 2 * BYTES, BYTES),
    ("psum_scatter", "reduce-scatter", BYTES, BYTES * 3 / 4),
    ("all_to_all", "all-to-all", BYTES, BYTES * 3 / 4),
    ("ppermute", "collective-permute", BYTES, BYTES),
    # Of five passes, one.
    ("looped", "all-reduce", BYTES, 2 * BYTES * 3 / 4),
    # The gradient of a matrix [128, 256] is summed over `data`, whole.
    ("gradient", "all-reduce", 128 * 256 * 4, 2 * 128 * 256 * 4 * 3 / 4),
])
def test_a_collective_of_known_size(counted, name, kind, payload, sent):
    assert counted[name]["collectives"] == {
        kind: {"count": 1, "bytes": payload, "sent_bytes": sent}}
    assert counted[name]["sent_bytes"] == sent
    assert counted[name]["loops"] == (name == "looped")


def test_operations_are_those_of_a_device(counted):
    # x @ w and x^T @ g of 512 rows, a quarter on each device; element by element, little more.
    products = 2 * 2 * 512 * 128 * 256 / 4
    assert products < counted["gradient"]["flops"] < 1.02 * products
    memory = counted["gradient"]["memory"]
    assert memory["arguments"] == 4 * (128 * 256 + 512 * 128 / 4)  # w whole, x in part
    assert memory["outputs"] == 4 * 128 * 256
    assert memory["total"] == sum(v for k, v in memory.items() if k != "total")


def test_data_parallel_ptat_reduces_nothing_of_the_backbone(counted):
    (small, trained), (large, same) = counted["sizes"]["ptat 32"], counted["sizes"]["ptat 96"]
    assert large > 1.5 * small and same == trained
    assert counted["ptat 32"]["collectives"] == counted["ptat 96"]["collectives"]
    # Gradients and a few scalars; those of audio prompts before the map that makes them of text's.
    found = {kind: each["bytes"] for kind, each in counted["ptat 32"]["collectives"].items()}
    assert 2 * trained < found.pop("all-reduce") <= 4 * trained + 200
    # Embeddings of all rows and their teacher's, ids and the mask, and the gradients coming back.
    rows, width = counted["batch"]
    assert sum(found.values()) <= 4 * 8 * rows * width + 16 * rows


def test_data_parallel_training_of_everything_reduces_everything(counted):
    names = "sequential 32", "sequential 96"
    grown = counted["sizes"][names[1]][1] - counted["sizes"][names[0]][1]
    reduced = [counted[name]["collectives"]["all-reduce"]["bytes"] for name in names]
    assert reduced[1] - reduced[0] == 4 * grown
    assert reduced[0] >= 4 * 0.99 * counted["sizes"][names[0]][1]


# --- Forms of the text ------------------------------------------------------------------------


def module(*instructions, name="ENTRY %main", more=""):
    lines = "".join(f"  %x.{i} = {line}\n" for i, line in enumerate(instructions))
    return (f"HloModule jit_f, is_scheduled=true, num_partitions=16\n\n{more}\n"
            f"{name} (p: f32[8]) -> f32[8] {{\n{lines}}}\n")


ITEM = ", channel_id=1, use_global_device_ids=true, to_apply=%add"


@pytest.mark.parametrize("groups, size", [
    ("{{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}", 4),
    ("[8,2]<=[16]", 2), ("[2,8]<=[4,4]T(1,0)", 8), ("{}", 16),
    ("mesh['data'=4,'model'=4] {'data'}", 4),
    ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=4] {'axis_0','axis_2'}", 16),
    ("mesh['data'=16] {'data':(4)2}", 2)])
def test_every_form_of_replica_groups(groups, size):
    text = module(f"f32[10]{{0:T(256)}} all-reduce(%p), replica_groups={groups}{ITEM}")
    assert read_collectives(text) == [Collective("all-reduce", 40, size)]


def test_unknown_form_of_replica_groups_is_an_error():
    with pytest.raises(ValueError, match="form that is not known: 'V9"):
        read_collectives(module(f"f32[10] all-reduce(%p), replica_groups=V9{ITEM}"))


def test_groups_of_one_device_move_nothing():
    alone = "{{" + "},{".join(map(str, range(16))) + "}}"
    assert not read_collectives(module(f"f32[9] all-reduce(%p), replica_groups={alone}{ITEM}"))
    assert not read_collectives(module(
        "f32[9] collective-permute(%p), source_target_pairs={{0,0},{1,1}}"))


def test_a_tuple_is_one_collective_of_all_its_arrays():
    text = module(f"(f32[256]{{0:T(256)}}, bf16[4,2]{{1,0:T(8,128)(2,1)}}, /*index=2*/pred[3]{{0}},"
                  f" f32[]{{:T(128)}}) all-reduce(%a, %b), replica_groups=[4,4]<=[16]{ITEM}")
    assert read_collectives(text) == [Collective("all-reduce", 1024 + 16 + 3 + 4, 4)]


def test_start_and_done_are_one():
    text = module(
        f"f32[8]{{0}} all-reduce-start(%p), replica_groups=[4,4]<=[16]{ITEM}",
        "f32[8]{0} all-reduce-done(%x.0)",
        f"(f32[8]{{0:T(8,128)}}, f32[32]{{0}}) all-gather-start(%p), replica_groups=[4,4]<=[16]",
        "f32[32]{0} all-gather-done(%x.2)",
        "((f32[8]{0}, f32[4]{0}), (f32[32]{0}, f32[16]{0})) all-gather-start(%p, %q), "
        "replica_groups=[4,4]<=[16]",
        "(f32[8]{0}, f32[8]{0:T(8,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) "
        "collective-permute-start(%p), channel_id=1, source_target_pairs={{0,4},{4,8},{8,0}}",
        "f32[8]{0} collective-permute-done(%x.5)")
    assert read_collectives(text) == [
        Collective("all-reduce", 32, 4), Collective("all-gather", 128, 4),
        Collective("all-gather", 192, 4), Collective("collective-permute", 32, 3)]


def test_a_collective_that_goes_on_beside_other_work_is_one():
    # As the TPU's compiler writes it: in the fusion that starts it, in each that it runs beside,
    # and in the one that ends it.
    gather = ("f32[64,256]{1,0} all-gather(%p), channel_id=2, replica_groups=[4,4]<=[16], "
              'backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}')
    parts = [("start", 'u32[] custom-call(%x.0), custom_call_target="AsyncCollectiveStart"'),
             ("beside", "f32[16,256] convolution(%p, %p)"),
             ("done", 'u32[] custom-call(%x.0), custom_call_target="AsyncCollectiveDone"')]
    more = "".join(
        f"%{name} (p: f32[8]) -> f32[8] {{\n  %x.0 = {gather}\n  ROOT %x.1 = {line}\n}}\n"
        for name, line in parts)
    text = module("f32[8] fusion(%p), kind=kCustom, calls=%start", more=more)
    assert read_collectives(text) == [Collective("all-gather", 64 * 256 * 4, 4)]


def test_a_fused_collective_counts():
    inner = (f"%fused (p: f32[8]) -> f32[8] {{\n  ROOT %r = f32[8] all-reduce(%p), "
             f"replica_groups=[4,4]<=[16]{ITEM}\n}}\n")
    text = module("f32[8] fusion(%p), kind=kCustom, calls=%fused", more=inner)
    assert read_collectives(text) == [Collective("all-reduce", 32, 4)]


def test_sums_by_kind_and_loops():
    found = [Collective("all-reduce", 40, 4), Collective("all-reduce", 8, 2),
             Collective("all-gather", 12, 3)]
    assert summarize(found) == {
        "all-gather": {"count": 1, "bytes": 12, "sent_bytes": 8.0},
        "all-reduce": {"count": 2, "bytes": 48, "sent_bytes": 68.0}}
    loop = "(s32[], f32[8]) while(%t), condition=%c, body=%b"
    assert count_loops(module(loop, "f32[8] add(%p, %p)", loop)) == 2
