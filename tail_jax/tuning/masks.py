"""Ordered rules over the names of a tree's leaves: groups, rates, freezing and sharding.

A leaf's name is its path, `text/encoder/layer_03/key/kernel`. A rule is (regular expression, value)
and must match the whole name. Every leaf must be matched, and by exactly one rule, so that a new
parameter cannot slip into a group by accident.
"""

from __future__ import annotations

import re
from typing import Any, Sequence

import jax

Rules = Sequence[tuple[str, Any]]


def leaf_name(path) -> str:
    """`a/b/0` for a key path of `jax.tree_util`."""
    return "/".join(str(getattr(p, "key", getattr(p, "idx", getattr(p, "name", p)))) for p in path)


def apply_rules(tree, rules: Rules, what: str = "rules"):
    """A tree of the values of the rules that match the leaves of `tree`.

    Raises:
        ValueError: names the leaves matched by no rule or by several.
    """
    compiled = [(re.compile(pattern), value) for pattern, value in rules]
    problems = []

    def pick(path, _):
        name = leaf_name(path)
        hits = [(p.pattern, v) for p, v in compiled if p.fullmatch(name)]
        if len(hits) != 1:
            problems.append(f"{name}: " + (f"matched by {[p for p, _ in hits]}" if hits
                                           else "matched by no rule"))
            return None
        return hits[0][1]

    values = jax.tree_util.tree_map_with_path(pick, tree)
    if problems:
        raise ValueError(f"{what}: every leaf needs exactly one rule; " + "; ".join(problems[:10])
                         + (f" and {len(problems) - 10} more" if len(problems) > 10 else ""))
    return values


def count(tree, exclude: Sequence[str] = ()) -> int:
    """Number of values in a tree, without the leaves whose last name is in `exclude`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(leaf.size for path, leaf in leaves
               if leaf_name(path).rsplit("/", 1)[-1] not in exclude)
