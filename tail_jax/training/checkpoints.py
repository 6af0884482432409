"""State on disk: Orbax checkpoints to resume from, safetensors files to hand on."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

from tail_jax.pretrained.files import open_tensors
from tail_jax.tuning.masks import leaf_name

_LIST = "__list__"


class Checkpoints:
    """The latest state of a run: a pytree of arrays and a JSON-able record of progress.

    Orbax writes aside and renames, so a kill leaves the checkpoint before it. Two are kept.
    """

    def __init__(self, directory: pathlib.Path):
        # Which is the latest, all hosts are told by one: a shared disk may show each another list.
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False,
                                               single_host_load_and_broadcast=True)
        # Named here, because a manager knows the handlers of what it has saved itself only.
        handlers = {"state": ocp.StandardCheckpointHandler(),
                    "progress": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(pathlib.Path(directory).absolute(), options=options,
                                              item_handlers=handlers)

    def save(self, number: int, state: Any, progress: dict) -> None:
        """Writes checkpoint `number`; numbers grow."""
        self._manager.save(number, args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)))
        self._manager.wait_until_finished()

    def progress(self) -> dict | None:
        """What was recorded with the latest checkpoint; None if there is none."""
        latest = self._manager.latest_step()
        if latest is None:
            return None
        args = ocp.args.Composite(progress=ocp.args.JsonRestore())
        return self._manager.restore(latest, args=args)["progress"]

    def restore(self, like: Any) -> Any:
        """The latest state, placed as `like` (a tree of arrays) is.

        Raises:
            ValueError: if its structure or shapes are others than those of `like`, saying where.
        """
        latest = self._manager.latest_step()
        stored = self._manager.item_metadata(latest)["state"]
        check_same_structure(like, stored, f"checkpoint {latest}")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(latest, args=args)["state"]

    def close(self) -> None:
        """Releases the manager's threads."""
        self._manager.close()


def check_same_structure(expected: Any, found: Any, what: str) -> None:
    """Raises a ValueError that lists leaves missing, left over or of another shape in `found`."""
    shapes = [{leaf_name(path): tuple(leaf.shape) for path, leaf
               in jax.tree_util.tree_leaves_with_path(tree)} for tree in (expected, found)]
    missing, extra = sorted(shapes[0].keys() - shapes[1]), sorted(shapes[1].keys() - shapes[0])
    other = [f"{k}: {shapes[1][k]}, expected {shapes[0][k]}"
             for k in sorted(shapes[0].keys() & shapes[1]) if shapes[0][k] != shapes[1][k]]
    if missing or extra or other:
        raise ValueError(f"{what} does not fit this model and method: missing {missing[:5]}, "
                         f"left over {extra[:5]}, of another shape {other[:5]}")


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """{name: array} of a tree of dicts and lists; `unflatten` is its inverse."""

    def names(node):
        if isinstance(node, (list, tuple)):
            return {f"{_LIST}{i}": names(child) for i, child in enumerate(node)}
        return {k: names(v) for k, v in node.items()} if isinstance(node, dict) else node

    leaves = jax.tree_util.tree_leaves_with_path(names(tree))
    return {leaf_name(path): np.asarray(leaf, order="C") for path, leaf in leaves}


def unflatten(flat: dict[str, np.ndarray]) -> dict:
    """The tree of dicts and lists that `flatten` took apart (empty containers are lost)."""
    tree: dict = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf

    def lists(node):
        if not isinstance(node, dict):
            return node
        children = {k: lists(v) for k, v in node.items()}
        if children and all(k.startswith(_LIST) for k in children):
            return [children[f"{_LIST}{i}"] for i in range(len(children))]
        return children

    return lists(tree)


def tree_hash(tree: Any) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all leaves, in order of the names."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flatten(tree).items()):
        digest.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(leaf.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def save_tree(path: pathlib.Path, tree: Any, header: dict) -> None:
    """Writes a tree as safetensors, with `header` as JSON in its metadata; whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    safetensors.numpy.save_file(flatten(tree), aside, {"tail_jax": json.dumps(header)})
    os.replace(aside, path)


def load_tree(path: pathlib.Path) -> tuple[dict, dict]:
    """(tree, header) of a file that `save_tree` wrote.

    Raises:
        ValueError: if there is no such file, it is damaged, or not ours.
    """
    tensors = open_tensors(path)
    if "tail_jax" not in tensors.extras:
        raise ValueError(f"{path}: has no tail_jax header; expected a file written by tail_jax")
    flat = {name: tensors.read(name) for name in tensors.shapes}
    return unflatten(flat), json.loads(tensors.extras["tail_jax"])
