"""Benchmark suites: one file a suite, with `run(options) -> Measured`."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

OURS = "tail_jax"


@dataclasses.dataclass(frozen=True)
class Options:
    """What suites take; `embed`, `load`, `step` and `memory` of the first four, `tasks` the others,
    `analytic` some.

    Attributes:
        size: "full", or "tiny" to see that it works.
        repeats: measurements of each case.
        checkpoint: folder to measure with, in place of random weights; None for those.
        items: of the longest case, or of the stream; None is the suite's own number.
        batch_size: of the train steps of `step` and `memory`; None is 8 on a CPU, 64 elsewhere.
        config: configuration file that takes method= and tasks=.
        methods: to measure; none is all but the ablations.
        tasks: numbers of tasks, ascending; none is the suite's own.
        workdir: folder of the runs; those that are done are not run again.
    """

    size: str = "full"
    repeats: int = 5
    checkpoint: str | None = None
    items: int | None = None
    batch_size: int | None = None
    config: str = "configs/task_costs.py"
    methods: tuple[str, ...] = ()
    tasks: tuple[int, ...] = ()
    workdir: str = "runs/task_costs"


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a suite gives.

    Attributes:
        cases: for JSON.
        table: the same in Markdown.
        note: what the table does not say by itself.
        failed: what could not be measured, one line each.
    """

    cases: list[dict]
    table: str
    note: str
    failed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One case, measured for us and a peer.

    Attributes:
        case: what was done.
        items: clips, texts or loads of one measurement.
        measured: {who: each measurement}; less is better.
        difference: largest absolute difference between the two results; None where they have none.
        unit: of the measurements.
    """

    case: str
    items: int
    measured: Mapping[str, list[float]]
    difference: float | None
    unit: str = "s"

    @property
    def ratio(self) -> float | None:
        """Median of the peer over ours, above 1 we are faster or take less; None without a peer."""
        peers = [times for who, times in self.measured.items() if who != OURS]
        if not peers:
            return None
        return statistics.median(peers[0]) / statistics.median(self.measured[OURS])


@dataclasses.dataclass(frozen=True)
class Share:
    """What one thing takes of what another takes, measured in one run.

    Attributes:
        case: what of what.
        value: the share.
        bar: what it may be at most.
    """

    case: str
    value: float
    bar: float

    @property
    def kept(self) -> bool:
        """Whether the bar is."""
        return self.value <= self.bar


def compare(case: str, items: int, repeats: int,
            functions: Mapping[str, Callable[[], np.ndarray]]) -> Comparison:
    """Measures functions in turns, after each has run once; a slow minute hits all alike."""
    results = [np.asarray(function()) for function in functions.values()]
    seconds = in_turns(functions, repeats)
    return Comparison(case, items, seconds, float(np.abs(results[0] - results[1]).max()))


def in_turns(functions: Mapping[Any, Callable], repeats: int) -> dict[Any, list[float]]:
    """Seconds of `repeats` calls of each function, the first after the last."""
    seconds: dict[Any, list[float]] = {who: [] for who in functions}
    for _ in range(repeats):
        for who, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[who].append(time.perf_counter() - start)
    return seconds


def measured(comparisons: list[Comparison], repeats: int,
             shares: Sequence[Share] = ()) -> Measured:
    """Comparisons, and shares if any, as a suite gives them."""
    cases = [dataclasses.asdict(c) | {"ratio": c.ratio} for c in comparisons]
    cases += [dataclasses.asdict(s) | {"kept": s.kept} for s in shares]
    tables = [table(comparisons)] + [share_table(shares)] * bool(shares)
    return Measured(cases, "\n\n".join(tables),
                    f"median (least to most) of {repeats}; ratio: the peer over ours")


def table(comparisons: list[Comparison]) -> str:
    """Markdown: median and (least to most) of every case, and the ratio; "–": not measured."""
    people = [*dict.fromkeys(who for c in comparisons for who in c.measured)]
    lines = [f"| case | {' | '.join(people)} | ratio | difference |",
             "|---|" + "---:|" * (len(people) + 2)]
    for c in comparisons:
        sides = [c.measured.get(who) for who in people]
        times = [f"{statistics.median(m):.3g} {c.unit} ({min(m):.3g} to {max(m):.3g})"
                 if m else "–" for m in sides]
        ratio = "–" if c.ratio is None else f"{c.ratio:.2f}"
        difference = "–" if c.difference is None else f"{c.difference:.1e}"
        lines.append(f"| {c.case} | {' | '.join(times)} | {ratio} | {difference} |")
    return "\n".join(lines)


def share_table(shares: Sequence[Share]) -> str:
    """Markdown: a row a share."""
    lines = ["| case | share | bar | |", "|---|---:|---:|---|"]
    lines += [f"| {s.case} | {s.value:.3f} | {s.bar:.3f} | {'kept' if s.kept else 'missed'} |"
              for s in shares]
    return "\n".join(lines)
