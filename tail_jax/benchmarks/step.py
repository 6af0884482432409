"""A train step of a full-size CLAP against PyTorch: PTAT, its teacher run or kept, and full
fine-tuning; and what PTAT's steps cost beside those of full fine-tuning.

A step is forward, loss, backward, clipping and AdamW's update on a batch that lies on the device
(`training.py`); both sides start from the same weights and prompts and take the same steps in the
same order, so that losses and what was trained agree (`difference`). float32 on a CPU; on an
accelerator bfloat16 with float32 trainables, the peer compiled under autocast, and each step also
against the chip's peak and its roofline. One device; on a TPU there is no peer.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
import tempfile

import jax
import numpy as np

from tail_jax.benchmarks import OURS, Comparison, Measured, Options, Share, in_turns, measured
from tail_jax.benchmarks.embed import need_peer, peer_device, write_random_checkpoint
from tail_jax.benchmarks.training import Ours, batch_of, configuration, make_peer, peer_tree
from tail_jax.costs.roofline import DEVICES, roofline
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


def run(options: Options) -> Measured:
    """Steps of both sides in turns.

    Raises:
        ValueError: torch or transformers are not installed, or see no GPU where jax does; or the
            checkpoint is not of a CLAP that is trained here.
    """
    device = peer_device()
    if device and options.size == "tiny":  # it would mostly wait for the other threads
        import torch
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if not options.checkpoint:
            need_peer()
            write_random_checkpoint(folder, options.size)
        return _run(pathlib.Path(options.checkpoint or folder), options, device)


def _run(folder: pathlib.Path, options: Options, device: str | None) -> Measured:
    configs = {name: configuration(name, folder, options.size, options.batch_size)
               for name in ("ptat", "sequential")}
    sides = {OURS: {name: Ours(config) for name, config in configs.items()}}
    if device:
        sides[PEER] = {name: make_peer(config, device, sides[OURS][name])
                       for name, config in configs.items()}
    arrays = batch_of(configs["ptat"], sides[OURS]["ptat"].tokenizer)
    batches = {who: side["ptat"].put(arrays) for who, side in sides.items()}

    # --- A step of a first task, so that there is a teacher, which the student then leaves --------
    kept = {}
    for who, side in sides.items():
        side["ptat"].step(batches[who])
        side["ptat"].begin_task()
        kept[who] = side["ptat"].with_kept(batches[who])

    # --- Everything in turns ------------------------------------------------------------------
    cases = {KEPT: ("ptat", kept), LIVE: ("ptat", batches), FULL: ("sequential", batches)}
    steps = {(case, who): functools.partial(side[name].step, given[who])
             for case, (name, given) in cases.items() for who, side in sides.items()}
    losses = {name: step() for name, step in steps.items()}
    ptat = sides[OURS]["ptat"]
    embed = {prompted: ptat.embed(prompted) for prompted in (True, False)}
    passes = {(prompted, turn): functools.partial(embed[prompted], batches[OURS])
              for turn, order in enumerate(TURNS) for prompted in order}
    for function in passes.values():
        function()
    seconds = in_turns(steps, options.repeats)
    forward = in_turns(passes, ROUNDS * options.repeats)

    # --- What came out of them ----------------------------------------------------------------
    comparisons = []
    for case, (name, _) in cases.items():
        apart = max(_difference(sides[OURS][name], peer_tree(sides[PEER][name], folder)),
                    abs(losses[case, OURS] - losses[case, PEER])) if device else None
        comparisons.append(Comparison(f"{case}, {len(arrays['audio'])} clips", len(arrays["audio"]),
                                      {who: seconds[case, who] for who in sides}, apart))
    middle = {case: statistics.median(seconds[case, OURS]) for case in cases}
    prompts = [a / b for turn in range(len(TURNS))
               for a, b in zip(forward[True, turn], forward[False, turn])]
    shares = [
        *(Share(f"a step of {case}, of {FULL}", middle[case] / middle[FULL], BARS[case])
          for case in (KEPT, LIVE)),
        Share("forward pass with prompts, of that without", statistics.median(prompts),
              BARS["forward"]),
        Share(f"bytes trained and their moments, PTAT's of {FULL}'s",
              ptat.state_bytes() / sides[OURS]["sequential"].state_bytes(), BARS["state"])]
    result = measured(comparisons, options.repeats, shares)
    return _with_roofline(result, {
        case: (functools.partial(sides[OURS][name].cost, given[OURS]), middle[case])
        for case, (name, given) in cases.items()})


def _difference(ours: Ours, tree: dict) -> float:
    """Largest absolute difference of what was trained from the peer's, statistics left out."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(jax.device_get(ours.state["trainable"])),
                jax.tree.leaves(tree), strict=True)
    return max(float(np.abs(a - b).max()) for (path, a), b in pairs
               if leaf_name(path).rpartition("/")[2] not in BUFFERS and a.size)


def _with_roofline(result: Measured, steps: dict) -> Measured:
    """Adds, on an accelerator, the share of its peak that our steps reach, and what they take of
    their rooflines' time; `steps` are {case: (function of its cost, seconds)}."""
    kind = jax.devices()[0].device_kind
    chip = DEVICES.get(kind)
    if chip is None:
        unknown = jax.default_backend() != "cpu"
        return dataclasses.replace(result, note=result.note + f"; no peak of {kind!r} in "
                                   "costs/roofline.py: no utilisation" * unknown)
    rows, lines = [], ["| case | FLOPs a step | of the peak | roofline | times the roofline |",
                       "|---|---:|---:|---:|---:|"]
    for case, (cost, seconds) in steps.items():
        flops, accessed = cost()
        least = roofline(chip, (1,), flops, accessed, 0)
        rows.append({"case": f"utilisation, {case}", "device": kind, "flops": flops,
                     "accessed_bytes": accessed, "seconds": seconds,
                     "value": flops / seconds / chip.flops, "roofline": least.seconds})
        lines.append(f"| {case} | {flops:.3g} | {rows[-1]['value']:.1%} | {least.seconds:.3g} s "
                     f"({least.bound}) | {seconds / least.seconds:.2f} |")
    return dataclasses.replace(result, cases=result.cases + rows,
                               table="\n\n".join([result.table, "\n".join(lines)]))
