"""Every parameter of every tower has its place on the mesh."""

import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec as P

from tail_jax.models.bert import TextConfig
from tail_jax.models.dual_encoder import AUDIO_TOWERS, DualEncoder
from tail_jax.models.htsat import HTSATConfig
from tail_jax.models.presets import preset
from tail_jax.training.sharding import (
    PARAMETER_RULES,
    fully,
    make_mesh,
    parameter_shardings,
    place,
)
from tail_jax.tuning.masks import apply_rules, leaf_name

MODELS = {kind: DualEncoder(config(), None) for kind, (config, _) in AUDIO_TOWERS.items()} | {
    "fused": DualEncoder(HTSATConfig(fusion=True), None),
    "residual heads": DualEncoder(HTSATConfig(), TextConfig(), head="residual")}


@pytest.mark.parametrize("name", [*MODELS])
def test_every_parameter_matches_one_rule(name):
    # apply_rules raises on a parameter that no rule or two rules match.
    apply_rules(jax.eval_shape(MODELS[name].init, jax.random.key(0)), PARAMETER_RULES, "rules")


def local_bytes(params, *sizes):
    """Bytes of the parameters on each device of a mesh of (data, fsdp, model) devices."""
    mesh = AbstractMesh(sizes, ("data", "fsdp", "model"))
    sizes = jax.tree.map(lambda x, where: math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize,
                         params, parameter_shardings(params, mesh))
    return sum(jax.tree.leaves(sizes))


@pytest.mark.parametrize("name", ["clap-htsat-tiny", "ast-base"])
def test_full_sharding_divides_the_bytes_of_full_size_models(name):
    params = jax.eval_shape(preset(name).init, jax.random.key(0))
    whole = local_bytes(params, 8, 1, 1)
    assert whole == sum(x.size * 4 for x in jax.tree.leaves(params))
    # What stays whole (heads, vectors) is 1 to 2 % of these models.
    for parts in (2, 4, 8):
        assert 1 / parts < local_bytes(params, 1, parts, 1) / whole < 1 / parts + 0.02
    # Blocks lie in eighths then, embeddings in quarters.
    assert local_bytes(params, 1, 4, 2) < 0.7 * local_bytes(params, 1, 4, 1)


@pytest.mark.parametrize("name", [*MODELS])
def test_wide_layers_of_every_block_are_split_over_the_model_axis(name):
    params = jax.eval_shape(MODELS[name].init, jax.random.key(0))
    where = parameter_shardings(params, AbstractMesh((1, 2), ("data", "model")))
    split = {leaf_name(path) for path, x in jax.tree_util.tree_leaves_with_path(where)
             if "model" in x.spec}
    wide = {leaf_name(path) for path, x in jax.tree_util.tree_leaves_with_path(params)
            if re.search(r"/(query|key|value|out|up|down)/kernel$", leaf_name(path))}
    assert wide <= split and (wide or name == "cnn14")


@pytest.mark.parametrize("spec, shape, expected", [
    (P(), (6, 8), P(None, "fsdp")), (P(None, "model"), (8, 6), P("fsdp", "model")),
    (P("model", None), (6, 8), P("model", "fsdp")), (P(), (8, 6), P("fsdp", None)),
    (P(), (3, 3, 6, 12), P(None, None, None, "fsdp")), (P(), (3, 6), P())])
def test_full_sharding_takes_the_last_axis_that_can_be_divided(spec, shape, expected):
    assert fully(spec, shape, 4) == expected and fully(spec, shape, 1) == spec


@pytest.mark.parametrize("size", [1, 100_003])
def test_a_step_can_take_over_what_was_put_on_the_devices(size):
    raw = np.zeros(size + 16, np.float32)
    first = -raw.ctypes.data % 64 // 4  # so aligned, a CPU's `device_put` takes it as it is
    source = raw[first:first + size]
    mesh = make_mesh(devices=jax.devices()[:1])
    placed = place({"logit_scale": source}, mesh)["logit_scale"]
    before = placed.unsafe_buffer_pointer()
    grown = jax.jit(lambda x: x + 1, donate_argnums=0)(placed)
    assert grown.unsafe_buffer_pointer() == before
    assert grown.sum() == size and not source.any()
