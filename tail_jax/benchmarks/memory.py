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
QUANTITIES = (("peak memory", "MB"), ("state", "MB"), ("step", "s"))
BAR = 0.7  # of the peer's peak
_DEVICE = """
import json
from tail_jax.benchmarks.embed import peer_device
print(json.dumps(peer_device()))
"""
_STEPS = 6
_START = """
import json, statistics, sys, time
import jax
from tail_jax import settings
from tail_jax.benchmarks import training
from tail_jax.run import peak_memory
folder, size, rows, device, steps, method, remat = sys.argv[1:]
config = training.configuration(method, folder, size, int(rows) or None)
config["train"]["remat"] = remat
jax.random.key(0)

def measure(side, peak):
    seconds = []
    batch = side.put(training.batch_of(config))
    if method == "ptat":
        side.begin_task()
        batch = side.with_kept(batch)
    for _ in range(int(steps)):
        start = time.perf_counter()
        side.step(batch)
        seconds.append(time.perf_counter() - start)
    print(json.dumps([peak() / 1e6, side.state_bytes() / 1e6, statistics.median(seconds[1:])]))
"""
# The peer's process makes its prompts and batch without our model, and has malloc as it is.
_CODE = {OURS: _START.replace("config =", "settings.start_jax()\nconfig =") + """
before = peak_memory()
measure(training.Ours(config), lambda: peak_memory() - before)
""", PEER: _START + """
import torch
from transformers import ClapModel
from tail_jax.benchmarks import torch_clap
before = peak_memory()
measure(training.make_peer(config, device), lambda: (
    torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory() - before))
"""}


def run(options: Options) -> Measured:
    """Peak memory and bytes of state of PTAT and of full fine-tuning.

    Raises:
        ValueError: torch or transformers are not installed, or a process failed.
    """
    # In a process of its own, which gives the accelerator back when it ends.
    device = json.loads(run_python(_DEVICE).splitlines()[-1])
    people = [OURS] + [PEER] * bool(device)
    with tempfile.TemporaryDirectory() as folder:
        if not options.checkpoint:
            need_peer()
            run_python(WRITE, folder, options.size)
        path = str(options.checkpoint or folder)
        measure = lambda who, *case: json.loads(run_python(
            _CODE[who], path, options.size, str(options.batch_size or 0), str(device), str(_STEPS),
            *case).splitlines()[-1])
        for case in CASES.values():
            measure(OURS, *case)
        asked = [(who, method, remat if who == OURS else "none")
                 for method, remat in CASES.values() for who in people]
        found = {each: [] for each in asked}
        for _ in range(options.repeats):
            for each in found:
                found[each].append(measure(*each))
    part = lambda i, method, remat: {
        who: [each[i] for each in found[who, method, remat if who == OURS else "none"]]
        for who in people}
    comparisons = [
        Comparison(f"{quantity}, {case}", 1, part(i, *asks), None, unit)
        for i, (quantity, unit) in enumerate(QUANTITIES)
        for case, asks in CASES.items()]
    shares = [Share(f"{c.case}, of {PEER}'s", 1 / c.ratio, BAR)
              for c in comparisons[:len(CASES)] if c.ratio]
    return measured(comparisons, options.repeats, shares)
