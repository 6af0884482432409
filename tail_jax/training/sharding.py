"""The device mesh and where each array lives on it."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from tail_jax.tuning.masks import apply_rules

# Every parameter of every tower, by name. Wide layers are split over `model` as in Megatron (into
# heads and hidden units, then back); everything else is replicated.
PARAMETER_RULES = [
    (r"(audio|text|teacher)/.*/(query|key|value|up)/kernel", P(None, "model")),
    (r"(audio|text|teacher)/.*/(query|key|value|up)/bias", P("model")),
    (r"(audio|text|teacher)/.*/(out|down)/kernel", P("model", None)),
    (r"(audio|text|teacher)/.*/(out|down)/bias", P()),
    (r"text/(word|position|token_type)/embedding", P()),
    (r"text/pooler/(kernel|bias)", P()),
    (r"(audio|text|teacher)/(.*/)?\w*norm\w*/(scale|bias|running_mean|running_var)", P()),
    (r"(audio|teacher)/(patch|merge_\d|project|fc\d|(conv|position)_\d+)/(kernel|bias)", P()),
    (r"audio/(block_\d/conv\d|fusion/(patch|(local|global)_conv_\d))/(kernel|bias)", P()),
    (r"(audio|teacher)/(input_mean|input_std|cls|dist|position)", P()),
    (r"audio/stage_\w+/relative_position_bias", P()),
    (r"heads/.*", P()),
    (r"logit_scale|updates", P()),
    (r"(prompts|pool|lora|adapters|decoder)/.*", P()),
]


def make_mesh(data: int = -1, model: int = 1) -> Mesh:
    """A ("data", "model") mesh over all devices; data = -1 takes what `model` leaves.

    Raises:
        ValueError: if the product is not the number of devices.
    """
    count = jax.device_count()
    if model < 1 or data == 0 or data < -1:
        raise ValueError(f"mesh is {data} x {model}; expected positive numbers (data=-1 fills up)")
    data = count // model if data == -1 else data
    if data * model != count:
        raise ValueError(f"mesh is {data} x {model} but there are {count} devices; set mesh.data "
                         "and mesh.model so that their product is that (data=-1 fills up)")
    axes = (jax.sharding.AxisType.Auto,) * 2  # Linen's embedding gather needs Auto axes
    return jax.make_mesh((data, model), ("data", "model"), axis_types=axes)


def parameter_shardings(tree, mesh: Mesh):
    """A NamedSharding for every leaf, by `PARAMETER_RULES`."""
    specs = apply_rules(tree, PARAMETER_RULES, "sharding rules")
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs,
                        is_leaf=lambda x: isinstance(x, P))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def by_row(mesh: Mesh) -> NamedSharding:
    """The leading axis split over `data`."""
    return NamedSharding(mesh, P("data"))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from this host's rows of a batch."""
    sharding = by_row(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def place(tree, mesh: Mesh):
    """Copies a tree to the devices by `PARAMETER_RULES`."""
    return put_tree(tree, parameter_shardings(tree, mesh))


def put_tree(tree, shardings):
    """Copies a tree to the devices; the result never aliases its source."""
    return jax.device_put(jax.tree.map(lambda x: np.array(x), tree), shardings)
