"""Memory of train steps of a full-size CLAP against PyTorch, each in a process of its own.

Peak memory is the largest resident set less what was resident after the imports, or on an
accelerator the most that arrays took; bytes of state are what is trained and the optimizer's
moments. Steps are those of the suite `step`, with the teacher kept. A process that compiles takes
more than one that finds its programs in the cache: one of ours of each kind runs before those that
are measured.
"""

from __future__ import annotations

import json
import tempfile

from tail_jax.benchmarks import OURS, Comparison, Measured, Options, Share, measured
from tail_jax.benchmarks.embed import need_peer
from tail_jax.benchmarks.load import WRITE
from tail_jax.benchmarks.step import FULL, KEPT, PEER
from tail_jax.process import run_python

METHODS = {KEPT: "ptat", FULL: "sequential"}
BAR = 0.7  # of the peer's peak
_STEPS = 3
_START = """
import json, sys
import jax
from tail_jax import settings
from tail_jax.benchmarks import training
from tail_jax.run import peak_memory
folder, size, method, steps = sys.argv[1:]
config = training.configuration(method, folder, size)
jax.random.key(0)
"""
# The peer's process makes its prompts and batch without our model, and has malloc as it is.
_CODE = {OURS: _START.replace("config =", "settings.start_jax()\nconfig =") + """
before = peak_memory()
side = training.Ours(config)
batch = side.put(training.batch_of(config, side.tokenizer))
if method == "ptat":
    side.begin_task(1)
    batch = side.with_kept(batch)
for _ in range(int(steps)):
    side.step(batch)
print(json.dumps([peak_memory() - before, side.state_bytes()]))
""", PEER: _START + """
import torch
from transformers import ClapModel
from tail_jax.benchmarks import torch_clap
before = peak_memory()
side = training.make_peer(config)
batch = side.batch(training.batch_of(config))
more = ()
if method == "ptat":
    side.begin_task()
    more = (side.keep(batch),)
for _ in range(int(steps)):
    side.step(batch, *more)
on_chip = torch.cuda.is_available()
peak = torch.cuda.max_memory_allocated() if on_chip else peak_memory() - before
print(json.dumps([peak, side.state_bytes()]))
"""}


def run(options: Options) -> Measured:
    """Peak memory and bytes of state of PTAT and of full fine-tuning.

    Raises:
        ValueError: torch or transformers are not installed, or a process failed.
    """
    need_peer()
    with tempfile.TemporaryDirectory() as folder:
        if not options.checkpoint:
            run_python(WRITE, folder, options.size)
        path = str(options.checkpoint or folder)
        for method in METHODS.values():
            _measure(_CODE[OURS], path, options.size, method)
        found = {(case, who): [_measure(code, path, options.size, method)
                               for _ in range(options.repeats)]
                 for case, method in METHODS.items() for who, code in _CODE.items()}
    part = lambda case, i: {who: [each[i] / 1e6 for each in found[case, who]] for who in _CODE}
    comparisons = [Comparison(f"{quantity}, {case}", 1, part(case, i), None, "MB")
                   for i, quantity in enumerate(("peak memory", "state")) for case in METHODS]
    shares = [Share(f"{c.case}, of {PEER}'s", 1 / c.ratio, BAR) for c in comparisons[:len(METHODS)]]
    return measured(comparisons, options.repeats, shares)


def _measure(code: str, folder: str, size: str, method: str) -> list[int]:
    return json.loads(run_python(code, folder, size, method, str(_STEPS)).splitlines()[-1])
