"""Memory of train steps of a full-size CLAP against PyTorch, each in a process of its own.

Peak memory is the largest resident set less what was resident after the imports, or on an
accelerator the most that arrays took; bytes of state are what is trained and the optimizer's
moments; a step is the median of those of a process without its first. Steps are those of the suite
`step`, with the teacher kept, and for PTAT also with `train.remat=blocks`, against the same peer. A
process that compiles takes more than one that finds its programs in the cache: one of ours of each
kind runs before those that are measured.
"""

from __future__ import annotations

import json
import tempfile

from tail_jax.benchmarks import OURS, Comparison, Measured, Options, Share, measured
from tail_jax.benchmarks.embed import need_peer
from tail_jax.benchmarks.load import WRITE
from tail_jax.benchmarks.step import FULL, KEPT, PEER
from tail_jax.process import run_python

BLOCKS = f"{KEPT}, blocks computed again"
# Method and `train.remat`; the peer knows only the first.
CASES = {KEPT: ("ptat", "none"), BLOCKS: ("ptat", "blocks"), FULL: ("sequential", "none")}
BAR = 0.7  # of the peer's peak
_STEPS = 6
_START = """
import json, statistics, sys, time
import jax
from tail_jax import settings
from tail_jax.benchmarks import training
from tail_jax.run import peak_memory
folder, size, steps, method, remat = sys.argv[1:]
config = training.configuration(method, folder, size)
config["train"]["remat"] = remat
jax.random.key(0)

def measure(side, peak, *inputs):
    seconds = []
    for _ in range(int(steps)):
        start = time.perf_counter()
        side.step(*inputs)
        seconds.append(time.perf_counter() - start)
    print(json.dumps([peak() / 1e6, side.state_bytes() / 1e6, statistics.median(seconds[1:])]))
"""
# The peer's process makes its prompts and batch without our model, and has malloc as it is.
_CODE = {OURS: _START.replace("config =", "settings.start_jax()\nconfig =") + """
before = peak_memory()
side = training.Ours(config)
batch = side.put(training.batch_of(config, side.tokenizer))
if method == "ptat":
    side.begin_task(1)
    batch = side.with_kept(batch)
measure(side, lambda: peak_memory() - before, batch)
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
on_chip = torch.cuda.is_available()
measure(side, lambda: torch.cuda.max_memory_allocated() if on_chip else peak_memory() - before,
        batch, *more)
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
        measure = lambda who, *case: json.loads(run_python(
            _CODE[who], path, options.size, str(_STEPS), *case).splitlines()[-1])
        for case in CASES.values():
            measure(OURS, *case)
        asked = [(who, method, remat if who == OURS else "none")
                 for method, remat in CASES.values() for who in _CODE]
        found = {each: [] for each in asked}
        for _ in range(options.repeats):
            for each in found:
                found[each].append(measure(*each))
    part = lambda i, method, remat: {
        OURS: [each[i] for each in found[OURS, method, remat]],
        PEER: [each[i] for each in found[PEER, method, "none"]]}
    comparisons = [
        Comparison(f"{quantity}, {case}", 1, part(i, *asks), None, unit)
        for i, (quantity, unit) in enumerate((("peak memory", "MB"), ("state", "MB"), ("step", "s")))
        for case, asks in CASES.items()]
    shares = [Share(f"{c.case}, of {PEER}'s", 1 / c.ratio, BAR) for c in comparisons[:len(CASES)]]
    return measured(comparisons, options.repeats, shares)
