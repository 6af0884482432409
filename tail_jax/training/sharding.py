"""The device mesh and where each array lives on it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from tail_jax.tuning.masks import apply_rules, leaf_name

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
# What a mesh with an axis `fsdp` splits over it: kernels and embeddings of towers, wherever they
# are (backbone, trained tree, teacher, moments). Vectors stay whole: each would cost a collective.
FULLY_SHARDED = r"(audio|text|teacher|decoder)/.*"


def make_mesh(data: int = -1, model: int = 1, fsdp: int = 1,
              devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A ("data", "model") mesh, or ("data", "fsdp", "model") where fsdp > 1.

    Rows of a batch are split over `data` and `fsdp`; wide layers over `model`; kernels and
    embeddings over `fsdp`, too (ZeRO-3: each device keeps its part, and the parts of a layer are
    brought together where it is computed).

    Args:
        data: -1 takes what the others leave.
        devices: by default all.

    Raises:
        ValueError: if the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    names = ("data", "fsdp", "model") if fsdp != 1 else ("data", "model")
    sizes = {"data": data, "fsdp": fsdp, "model": model}
    shown = " x ".join(str(sizes[name]) for name in names)
    if min(model, fsdp) < 1 or data == 0 or data < -1:
        raise ValueError(f"mesh is {shown}; expected positive numbers (data=-1 fills up)")
    sizes["data"] = len(devices) // (fsdp * model) if data == -1 else data
    shape = tuple(sizes[name] for name in names)
    if math.prod(shape) != len(devices):
        raise ValueError(f"mesh is {' x '.join(map(str, shape))} but there are {len(devices)} "
                         f"devices; set {', '.join(f'mesh.{name}' for name in names)} so that "
                         "their product is that (data=-1 fills up)")
    axes = (jax.sharding.AxisType.Auto,) * len(names)  # Linen's embedding gather needs Auto axes
    return jax.make_mesh(shape, names, axis_types=axes, devices=devices)


def parameter_shardings(tree, mesh: Mesh):
    """A NamedSharding for every leaf of arrays or shapes, by `PARAMETER_RULES` and `fully`."""
    specs = apply_rules(tree, PARAMETER_RULES, "sharding rules")
    parts = mesh.shape.get("fsdp", 1)

    def place(path, leaf, spec):
        large = re.fullmatch(FULLY_SHARDED, leaf_name(path)) and leaf.ndim > 1
        return NamedSharding(mesh, fully(spec, leaf.shape, parts) if large else spec)

    return jax.tree_util.tree_map_with_path(place, tree, specs)


def fully(spec: P, shape: tuple[int, ...], parts: int) -> P:
    """The spec with the last axis that is whole and that `parts` divides split over `fsdp`.

    A leaf without such an axis stays as it is.
    """
    axes = list(spec) + [None] * (len(shape) - len(spec))
    for i in reversed(range(len(shape))):
        if parts > 1 and axes[i] is None and shape[i] % parts == 0:
            axes[i] = "fsdp"
            return P(*axes)
    return spec


def aux_shardings(trainable, aux: dict, mesh: Mesh) -> dict:
    """Trees like `trainable` (teachers, Fisher) lie as it does, the rest on every device."""
    where, here = parameter_shardings(trainable, mesh), replicated(mesh)
    like = jax.tree.structure(where)
    return {name: where if jax.tree.structure(tree) == like
            else jax.tree.map(lambda _: here, tree) for name, tree in aux.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def row_axes(mesh) -> tuple[str, ...]:
    """The axes of a mesh over which rows of a batch are split; () of one without any."""
    return tuple(axis for axis in mesh.axis_names if axis != "model")


def row_parts(mesh) -> int:
    """In how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in row_axes(mesh))


def by_row(mesh: Mesh) -> NamedSharding:
    """The leading axis split over the axes of rows."""
    return NamedSharding(mesh, P(row_axes(mesh)))


def local_rows(mesh: Mesh, size: int) -> np.ndarray | None:
    """The rows of a batch of `size` that lie on this host's devices, int [n]; None: all of them.

    They need not follow each other, and where `model` spans hosts, several have the same ones.
    """
    if jax.process_count() == 1:
        return None
    places = by_row(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[place] for place in places]))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from this host's rows of a batch (`local_rows`)."""
    sharding = by_row(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def place(tree, mesh: Mesh):
    """Copies a tree to the devices by `PARAMETER_RULES`."""
    return put_tree(tree, parameter_shardings(tree, mesh))


def put_tree(tree, shardings):
    """Copies a tree to the devices; the result never aliases its source.

    It is the same on every host: each puts its parts on its own devices.
    """
    tree = jax.tree.map(np.asarray, tree)
    if jax.process_count() == 1:
        return copied(jax.device_put(tree, shardings))
    # `device_put` would send all of it to all hosts, to compare.
    return copied(jax.tree.map(lambda x, sharding: jax.make_array_from_callback(
        x.shape, sharding, lambda index: x[index]), tree, shardings))


@jax.jit
def copied(tree):
    """A tree of arrays again, each where it lies, in memory of its own that a step can be given.

    An array that a CPU's `device_put` makes of NumPy's is that one, and cannot: the first step
    would take as much memory again, and have it stand in the way of all others.
    """
    return jax.tree.map(jnp.copy, tree)


def move(tree, shardings):
    """A tree of arrays, on the devices or not, as these shardings say; the same on every host."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    place = lambda x, sharding: (
        jax.device_put(x, sharding) if isinstance(x, jax.Array) and not x.is_fully_addressable
        else put_tree(x, sharding))
    return jax.tree.map(place, tree, shardings)


def to_host(tree):
    """A tree of NumPy arrays, whole on every host, wherever the parts of the arrays lie."""

    def whole(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return jax.device_put(x, replicated(x.sharding.mesh))
        return x

    return jax.device_get(jax.tree.map(whole, tree))
