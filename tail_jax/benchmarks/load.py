"""Time and memory of loading a CLAP against transformers, each load in a process of its own.

Imports and the start of the library are done before the clock; the file lies in the system's cache,
for it has just been read once. Memory is the largest resident set, less what was resident before,
in multiples of the weights.
"""

from __future__ import annotations

import json
import tempfile

from tail_jax.benchmarks import OURS, Comparison, Measured, Options, measured
from tail_jax.benchmarks.embed import PEER, need_peer
from tail_jax.process import run_python

_LOADS = {
    OURS: """
import jax, tail_jax.backbone, tail_jax.pretrained.clap
jax.random.key(0)
def load():
    model = tail_jax.load(folder)
    return (sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
            float(abs(model.params["text"]["word"]["embedding"]).mean()))
""",
    PEER: """
import torch, transformers
from transformers import ClapModel
def load():
    model = ClapModel.from_pretrained(folder)
    return (sum(p.numel() * p.element_size() for p in model.parameters()),
            float(model.text_model.embeddings.word_embeddings.weight.abs().mean()))
"""}
_MEASURE = """
import json, resource, sys, time
folder = sys.argv[1]
{load}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start = peak(), time.perf_counter()
weights, mean = load()
seconds, page = time.perf_counter() - start, resource.getpagesize()
print(json.dumps([seconds, max(peak() - before, page) / weights, mean]))
"""
# In a process of its own, too: others would inherit its largest resident set from this one.
WRITE = """
import sys
from tail_jax.benchmarks.embed import write_random_checkpoint
write_random_checkpoint(*sys.argv[1:])
"""


def run(options: Options) -> Measured:
    """Seconds of a load, and its memory.

    Raises:
        ValueError: torch or transformers are not installed, or a load failed.
    """
    need_peer()
    with tempfile.TemporaryDirectory() as folder:
        if not options.checkpoint:
            run_python(WRITE, folder, options.size)
        path = options.checkpoint or folder
        first = {who: _measure(code, path) for who, code in _LOADS.items()}  # warms the file cache
        found: dict[str, list] = {who: [] for who in _LOADS}
        for _ in range(options.repeats):
            for who, code in _LOADS.items():
                found[who].append(_measure(code, path))
    difference = abs(first[OURS][2] - first[PEER][2])
    cases = (("load", "s"), ("memory of a load", "x weights"))
    return measured([Comparison(case, 1, {who: [m[i] for m in runs] for who, runs in found.items()},
                                difference, unit) for i, (case, unit) in enumerate(cases)],
                    options.repeats)


def _measure(load: str, folder) -> list[float]:
    return json.loads(run_python(_MEASURE.format(load=load), str(folder)).splitlines()[-1])

