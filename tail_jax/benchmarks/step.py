"""A train step of a full-size CLAP against PyTorch: PTAT, its teacher run or kept, and full
fine-tuning; and what PTAT's steps cost beside those of full fine-tuning.

A step is forward, loss, backward, clipping and AdamW's update on a batch that lies on the device
(`training.py`); both sides start from the same weights and prompts and take the same steps in the
same order, so that losses and what was trained agree (`difference`). float32 on a CPU; on an
accelerator bfloat16 with float32 trainables, the peer compiled under autocast.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import statistics
import tempfile

import jax
import numpy as np

from tail_jax.benchmarks import OURS, Comparison, Measured, Options, Share, in_turns, measured
from tail_jax.benchmarks.embed import need_peer, write_random_checkpoint
from tail_jax.benchmarks.training import (ROWS, Ours, batch_of, configuration, make_peer,
                                          peer_tree)
from tail_jax.models.dual_encoder import BUFFERS
from tail_jax.tuning.masks import leaf_name

PEER = "PyTorch"
LIVE, KEPT, FULL = "PTAT, teacher run", "PTAT, teacher kept", "full fine-tuning"
# Of our own figures, in one run: a step of PTAT over one of full fine-tuning with a kept teacher
# and a live one, the forward pass with prompts over that without (the median of pairs), and bytes
# of what is trained and its moments over those of full fine-tuning.
BARS = {KEPT: 0.75, LIVE: 1.05, "forward": 1.02, "state": 0.03}
# Rounds of forward passes for each repetition of the steps: what is asked of them is less than a
# machine's unrest. With, without, without, with: neither is always the second.
ROUNDS = 8
TURNS = ((True, False), (False, True))
# Peaks of dense matrix products in bfloat16, FLOP/s, by the name that JAX has for the chip: NVIDIA,
# data sheets of H100 (SXM) and H200, half of what they give with sparsity.
PEAKS = {"NVIDIA H100 80GB HBM3": 989.5e12, "NVIDIA H200": 989.5e12}


def run(options: Options) -> Measured:
    """Steps of both sides in turns.

    Raises:
        ValueError: torch or transformers are not installed.
    """
    need_peer()
    import torch
    # Tiny steps would mostly wait for the other threads.
    torch.set_num_threads(os.cpu_count() if options.size == "full" else 1)
    with tempfile.TemporaryDirectory() as folder:
        if not options.checkpoint:
            write_random_checkpoint(folder, options.size)
        return _run(pathlib.Path(options.checkpoint or folder), options)


def _run(folder: pathlib.Path, options: Options) -> Measured:
    configs = {name: configuration(name, folder, options.size) for name in ("ptat", "sequential")}
    ours = {name: Ours(config) for name, config in configs.items()}
    peers = {name: make_peer(config, ours[name]) for name, config in configs.items()}
    batch = batch_of(configs["ptat"], ours["ptat"].tokenizer)
    own, theirs = ours["ptat"].put(batch), peers["ptat"].batch(batch)

    # --- A step of a first task, so that there is a teacher, which the student then leaves --------
    losses = {FULL: (ours["sequential"].step(own), peers["sequential"].step(theirs)),
              LIVE: (ours["ptat"].step(own), peers["ptat"].step(theirs))}
    ours["ptat"].begin_task(1)
    peers["ptat"].begin_task()
    own_kept, kept = ours["ptat"].with_kept(own), peers["ptat"].keep(theirs)

    # --- Everything in turns ------------------------------------------------------------------
    embed = {prompted: ours["ptat"].embed(prompted) for prompted in (True, False)}
    steps = {
        (KEPT, OURS): lambda: ours["ptat"].step(own_kept),
        (KEPT, PEER): lambda: peers["ptat"].step(theirs, kept),
        (LIVE, OURS): lambda: ours["ptat"].step(own),
        (LIVE, PEER): lambda: peers["ptat"].step(theirs),
        (FULL, OURS): lambda: ours["sequential"].step(own),
        (FULL, PEER): lambda: peers["sequential"].step(theirs)}
    losses |= {case: (steps[case, OURS](), steps[case, PEER]()) for case in (KEPT, LIVE, FULL)}
    passes = {(prompted, turn): functools.partial(embed[prompted], own)
              for turn, order in enumerate(TURNS) for prompted in order}
    for function in passes.values():
        function()
    seconds = in_turns(steps, options.repeats)
    forward = in_turns(passes, ROUNDS * options.repeats)

    # --- What came out of them ----------------------------------------------------------------
    apart = {name: _difference(ours[name], peer_tree(peers[name], folder)) for name in ours}
    comparisons = [Comparison(
        f"{case}, {ROWS} clips", ROWS, {who: seconds[case, who] for who in (OURS, PEER)},
        max(apart["sequential" if case == FULL else "ptat"],
            abs(losses[case][0] - float(losses[case][1])))) for case in (KEPT, LIVE, FULL)]
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    prompts = [a / b for turn in range(len(TURNS))
               for a, b in zip(forward[True, turn], forward[False, turn])]
    shares = [
        *(Share(f"a step of {case}, of {FULL}", middle[case, OURS] / middle[FULL, OURS], BARS[case])
          for case in (KEPT, LIVE)),
        Share("forward pass with prompts, of that without", statistics.median(prompts),
              BARS["forward"]),
        Share(f"bytes trained and their moments, PTAT's of {FULL}'s",
              ours["ptat"].state_bytes() / ours["sequential"].state_bytes(), BARS["state"])]
    result = measured(comparisons, options.repeats, shares)
    batches = {KEPT: (ours["ptat"], own_kept), LIVE: (ours["ptat"], own),
               FULL: (ours["sequential"], own)}
    return _with_utilisation(result, {case: (side.flops, rows, middle[case, OURS])
                                      for case, (side, rows) in batches.items()})


def _difference(ours: Ours, tree: dict) -> float:
    """Largest absolute difference of what was trained from the peer's, statistics left out."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(jax.device_get(ours.state["trainable"])),
                jax.tree.leaves(tree), strict=True)
    return max(float(np.abs(a - b).max()) for (path, a), b in pairs
               if leaf_name(path).rpartition("/")[2] not in BUFFERS and a.size)


def _with_utilisation(result: Measured, steps: dict) -> Measured:
    """Adds, on a chip whose peak is known, the share of it that our steps reach."""
    peak = PEAKS.get(jax.devices()[0].device_kind)
    if peak is None:
        return result
    rows = []
    for case, (count, batch, seconds) in steps.items():
        flops = count(batch)
        rows.append({"case": f"utilisation, {case}", "flops": flops, "seconds": seconds,
                     "value": flops / seconds / peak})
    lines = ["| case | FLOPs a step | of the peak |", "|---|---:|---:|"]
    lines += [f"| {row['case']} | {row['flops']:.3g} | {row['value']:.1%} |" for row in rows]
    return dataclasses.replace(result, cases=result.cases + rows,
                               table="\n\n".join([result.table, "\n".join(lines)]))
