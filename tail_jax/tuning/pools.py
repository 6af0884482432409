"""Prompt pools: queries, choices by cosine, centroids, and how what was chosen enters a tower.

A pool belongs to one tower and holds N entries for some of its layers,

    {stage: [N, l, n, d]}     l of the stage's layers, n tokens, the stage's width d

with the stage's number as text; stages without such a layer are left out (ViT and text towers have
the stage '0' alone). A query is the feature that the frozen tower pools without any prompt. So a
row's choice depends on that row alone, in any batch, and never on the other modality.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from tail_jax.tuning.prompts import prompt_bound, stage_ranges

SIDES = ("audio", "text")


def depth(tower) -> int:
    """Number of layers of a tower.

    Raises:
        ValueError: if it has none that prompts could enter.
    """
    layers = sum(count for count, _ in tower.layer_widths)
    if not layers:
        raise ValueError(f"{type(tower).__name__} describes a tower without transformer blocks, "
                         "which takes no prompts; choose another model.audio.kind")
    return layers


def share(tower, twelfths: int) -> int:
    """ceil(L twelfths / 12): published layer ranges are those of towers of L = 12 layers."""
    return math.ceil(depth(tower) * twelfths / 12)


def query(side: str, model, frozen: dict, batch: dict) -> jax.Array:
    """What the frozen tower pools of each row, without prompts: [B, width] float32.

    Taken from the batch where that has it, as `query_name`.
    """
    if query_name(side) in batch:
        return batch[query_name(side)]
    pooled = model.encode(side, frozen, None, batch)["pooled"]
    return jax.lax.stop_gradient(pooled.astype(jnp.float32))


def query_name(side: str) -> str:
    """The entry of a batch that holds the queries of a tower."""
    return f"query_{side}"


def query_width(tower) -> int:
    """Width of a tower's queries."""
    return tower.layer_widths[-1][1]


def unit(x: jax.Array) -> jax.Array:
    """x / ||x|| along the last axis."""
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-12)


def cosine(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Cosines of queries [B, d] with keys [N, d]: [B, N] in float32."""
    return jnp.matmul(unit(queries), unit(keys).T, precision=jax.lax.Precision.HIGHEST)


def init_pool(key: jax.Array, tower, entries: int, length: int, ranges) -> dict:
    """A pool with entries of `length` tokens in `ranges`, a list as `stage_ranges` gives it.

    U(+-sqrt(6 / (p^2 + d))), as PTAT's prompts (p the patch size, or 1).
    """
    pool = {}
    for stage, (rows, _, width) in enumerate(ranges):
        if rows:
            bound = prompt_bound(tower, width)
            pool[str(stage)] = jax.random.uniform(
                jax.random.fold_in(key, stage), (entries, len(rows), length, width),
                minval=-bound, maxval=bound)
    return pool


def init_prefixes(key: jax.Array, tower, entries: int, length: int, first: int, last: int) -> dict:
    """{key, value}: two pools, of prefixes in the layers from `first` to `last` (not in it)."""
    ranges = layer_ranges(tower, first, last)
    return {name: init_pool(k, tower, entries, length, ranges)
            for name, k in zip(("key", "value"), jax.random.split(key))}


def layer_ranges(tower, first: int, last: int):
    """`stage_ranges` of a tower."""
    return stage_ranges(tower.layer_widths, first, last)


def entry_ranges(tower):
    """One tensor a stage: where a pool's entries stand in place of a range of layers (L2P)."""
    return [(range(min(layers, 1)), layers, width) for layers, width in tower.layer_widths]


def prompt_tuning(tower, chosen: dict) -> dict:
    """The tower's tuning with chosen entries {stage: [B, 1, n, d]} as its prompts.

    They enter a ViT or a text tower at the first layer and flow on. HTSAT's windows have no common
    sequence to flow along: a stage's prompts stand in each of its windows and blocks.
    """
    stages = tower.layer_widths
    if len(stages) == 1:
        return {"prompts": chosen["0"]}
    return {"prompts": [
        jnp.broadcast_to(x, (x.shape[0], layers, *x.shape[2:]))
        for x, (layers, _) in ((chosen[str(s)], stage) for s, stage in enumerate(stages))]}


def prefix_tuning(tower, groups) -> dict:
    """The tower's tuning with prefixes in some of its layers, none in the others.

    Args:
        groups: list of (first layer, last layer (not in it), keys, values), each a dict
            {stage: [l, n, d]} or {stage: [B, l, n, d]}; no layer is in two groups.
    """
    longest = max(x.shape[-2] for _, _, keys, _ in groups for x in keys.values())
    stages = []
    for s, (layers, width) in enumerate(tower.layer_widths):
        mine = [(layer_ranges(tower, first, last)[s][0], keys[str(s)], values[str(s)])
                for first, last, keys, values in groups if str(s) in keys]
        batch = jnp.broadcast_shapes(*(x.shape[:-3] for _, x, _ in mine))
        key = value = jnp.zeros((*batch, layers, longest, width))
        mask = np.zeros((layers, longest), bool)
        for rows, k, v in mine:
            at = (..., slice(rows.start, rows.stop), slice(0, k.shape[-2]), slice(None))
            key, value = key.at[at].set(k), value.at[at].set(v)
            mask[at[1:3]] = True
        stages.append((key, value, jnp.asarray(mask)))
    keys, values, masks = (list(x) if len(stages) > 1 else x[0] for x in zip(*stages))
    return {"prefix": {"key": keys, "value": values}, "prefix_mask": masks}


def orthogonal_rows(x: np.ndarray, first: int, last: int) -> np.ndarray:
    """x [N, ...] with rows first to last orthogonal to each other and to those before, all unit.

    Gram-Schmidt in float64. Where the rows before span the whole space nothing is orthogonal to
    them, and a row stays as it is, scaled to unit length.
    """
    flat = np.asarray(x, np.float64).reshape(len(x), -1).copy()
    basis = np.zeros((0, flat.shape[1]))
    for i in range(last):
        row = flat[i] / np.linalg.norm(flat[i])
        rest = row
        for _ in range(2):  # once more against rounding
            rest = rest - basis.T @ (basis @ rest)
        norm = np.linalg.norm(rest)
        if norm > 1e-6:
            basis = np.concatenate([basis, rest[None] / norm])
        if i >= first:
            flat[i] = rest / norm if norm > 1e-6 else row
    out = np.array(x, np.float32)  # rows before and after: bit for bit
    out[first:last] = flat[first:last].reshape(out[first:last].shape)
    return out


def centroids(features: np.ndarray, count: int, seed: int, rounds: int = 100) -> np.ndarray:
    """K-means centres [count, d] of features [n, d]: k-means++, then Lloyd's iterations.

    The same for the same seed. With fewer different features than centres, centres coincide.
    """
    random = np.random.default_rng(seed)
    x = np.asarray(features, np.float64)
    centres = x[random.integers(len(x))][None]
    while len(centres) < count:
        nearest = squared_distances(x, centres).min(1)
        total = nearest.sum()
        chosen = random.choice(len(x), p=nearest / total if total > 0 else None)
        centres = np.concatenate([centres, x[chosen][None]])
    labels = None
    for _ in range(rounds):
        before, labels = labels, squared_distances(x, centres).argmin(1)
        if before is not None and (before == labels).all():
            break
        for k in np.unique(labels):  # a centre without features stays
            centres[k] = x[labels == k].mean(0)
    return centres.astype(np.float32)


def squared_distances(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """||x_i - c_k||^2, [n, K], of x [n, d] and centres [K, d]."""
    gaps = (x * x).sum(1)[:, None] - 2 * x @ centres.T + (centres * centres).sum(1)
    return np.maximum(gaps, 0)


def nearest_task(queries: jax.Array, centres: jax.Array, seen: jax.Array) -> jax.Array:
    """Task [B] of the centroid nearest to each query, among the first `seen` tasks.

    Args:
        queries: [B, d].
        centres: [tasks, K, d].
        seen: [].
    """
    tasks, count, width = centres.shape
    gaps = queries[:, None] - centres.reshape(1, -1, width)
    distance = (gaps * gaps).sum(-1).reshape(-1, tasks, count).min(-1)
    return jnp.argmin(jnp.where(jnp.arange(tasks) < seen, distance, jnp.inf), axis=1)
