"""Functions of all pairs of a batch's rows, one block of pairs at a time.

The rows of a batch lie over the mesh, B / N on each of its N parts. A function of all pairs, such
as a softmax over the batch, is computed where the rows are: each device is sent the other rows,
[B, d], and walks over blocks of B / N of them. What it holds of the pairs is one block
[B / N, B / N], in the backward pass, too, which computes each block again.
"""

from __future__ import annotations

from typing import Any, Callable

import jax
from jax.sharding import PartitionSpec as P

from tail_jax.training.sharding import row_axes, row_parts


def by_blocks(function: Callable[[Any, Any, Any], Any], rows: Any, shared: Any) -> Any:
    """What each row makes of each block of rows: a tree of [N, B], the last axis lying as rows do.

    N is the number of parts that `jax.sharding.get_abstract_mesh()` has of a batch. Without a mesh,
    or on one device, it is 1, and the block is the whole batch.

    Args:
        function: (own, others, shared) -> tree of [b]; `own` and `others` are rows like `rows`, b
            of each.
        rows: tree of arrays [B, ...], B a multiple of N.
        shared: tree of arrays that belong to no row.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = row_axes(mesh)
    if row_parts(mesh) == 1:
        return jax.tree.map(lambda x: x[None], function(rows, rows, shared))

    def local(rows, shared):
        blocks = jax.tree.map(lambda x: jax.lax.all_gather(x, axes), rows)
        # In a loop nothing is merged across the checkpoint: no barrier is needed.
        again = jax.checkpoint(lambda others: function(rows, others, shared), prevent_cse=False)
        return jax.lax.map(again, blocks)

    return jax.shard_map(local, in_specs=(P(axes), P()), out_specs=P(None, axes))(rows, shared)
