"""What each method costs as the number of tasks grows: seconds a step, peak memory, bytes of state.

Every figure is of one short run through `tail_jax.train` in a process of its own, one after
another:

    seconds a step   median over the steps of the last task but its first
    peak memory      of the process: its largest resident set, or the accelerator's own count
    bytes of state   after the last task: what is trained, teachers, statistics, kept pairs

Two things that have nothing to do with tasks are kept out of the memory. A run that compiles takes
more than one that finds its programs in the cache: another run of a few tasks goes before, with the
same programs. And glibc's allocator keeps freed batches for later, more of them the longer a run
lasts (PTAT: 140 MB more after 32 tasks than after 2, all but 3 of them free): it is told to hand
large ones back.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Mapping, Sequence

from tail_jax import methods, sweep
from tail_jax.benchmarks import Measured, Options
from tail_jax.reporting.writers import read_results

# {quantity: (unit, units in one, relative growth that is still flat)}. Times and resident sets of
# two equal runs differ by some percent; bytes of state are counted.
QUANTITIES = {"seconds a step": ("ms", 1e3, 0.15), "peak memory": ("MB", 1e-6, 0.10),
              "state": ("kB", 1e-3, 0.0)}
TASKS = (2, 8, 32)
_RETURN_FREED = {f"MALLOC_{name}_THRESHOLD_": str(2 << 20) for name in ("MMAP", "TRIM")}
_WARM_TASKS = 4  # every corpus of the configuration once: their features are computed then, too


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one method costs.

    Attributes:
        method: its name.
        measured: {quantity: {number of tasks: value}}, in seconds and bytes, ascending; None where
            there is nothing to measure, as the steps of a method that does not train.
    """

    method: str
    measured: Mapping[str, Mapping[int, float | None]]

    def ratio(self, quantity: str, tasks: int) -> float | None:
        """What `tasks` tasks cost over what the fewest cost; 1 if both cost nothing."""
        values = self.measured[quantity]
        first, value = next(iter(values.values())), values[tasks]
        if first is None or value is None:
            return None
        return value / first if first else (float("inf") if value else 1.0)

    @property
    def grows(self) -> list[str]:
        """Quantities that cost more with the most tasks than with the fewest."""
        ratios = {name: self.ratio(name, [*self.measured[name]][-1]) for name in QUANTITIES}
        return [name for name, (_, _, tolerance) in QUANTITIES.items()
                if ratios[name] is not None and ratios[name] > 1 + tolerance]


def run(options: Options) -> Measured:
    """Makes the runs that are not yet done; a method of which one fails is left out of the table.

    Raises:
        ValueError: if the folder holds runs with another configuration.
    """
    names = options.methods or tuple(methods.for_streams("retrieves"))
    workdir, tasks = pathlib.Path(options.workdir), options.tasks or TASKS
    failures = sweep.run_plans(plans(options.config, names, tasks), workdir, parallel=1)
    lost = {failure.job.kind for failure in failures}
    costs = [read_cost(workdir, name, tasks) for name in names if name not in lost]
    most, fewest = tasks[-1], tasks[0]
    within = ", ".join(f"{name} within {tolerance:.0%}"
                       for name, (_, _, tolerance) in QUANTITIES.items())
    return Measured(
        [dataclasses.asdict(cost) | {"grows": cost.grows} for cost in costs], table(costs),
        f"x: times the value for {fewest} tasks; flat: no more for {most} tasks, {within}",
        tuple(f"{failure.job.name}, {failure.reason}" for failure in failures))


def plans(config: str, names: Sequence[str], tasks: Sequence[int]) -> list[sweep.Plan]:
    """The runs, method by method, so that what is compared is measured in the same minutes."""
    result = []
    for name in names:
        sized = "tasks" in methods.defaults(name)  # arrays, so programs, of another size
        for number in tasks if sized else tasks[-1:]:
            few = min(number, _WARM_TASKS)
            size = (f"method.tasks={number}",) if sized else ()
            result.append(_plan(config, f"warm-{name}-{number}", name, few, size))
        result += [_plan(config, _folder(name, number), name, number) for number in tasks]
    return result


def read_cost(workdir: pathlib.Path, name: str, tasks: Sequence[int]) -> Cost:
    """The cost of a method from its finished runs."""
    measured: dict[str, dict] = {quantity: {} for quantity in QUANTITIES}
    last = lambda by_task: [*by_task.values()][-1] if by_task else None
    for number in tasks:
        results = read_results(workdir / _folder(name, number))
        measured["seconds a step"][number] = last(results["wall_seconds"]["step"])
        measured["peak memory"][number] = results["peak_memory_bytes"]
        measured["state"][number] = last(results["state_bytes"])
    return Cost(name, measured)


def table(costs: Sequence[Cost]) -> str:
    """Markdown: a row a method; of each quantity the value for the fewest tasks, then ratios."""
    if not costs:
        return "(nothing was measured)"
    fewest, *others = costs[0].measured["state"]
    head = [f"{name}, {unit}, {fewest} tasks | " + " | ".join(f"{n} tasks" for n in others)
            for name, (unit, _, _) in QUANTITIES.items()]
    lines = [f"| method | {' | '.join(head)} | |",
             "|---|" + "---:|" * (len(QUANTITIES) * (1 + len(others))) + "---|"]
    for cost in costs:
        cells = []
        for name, (_, scale, _) in QUANTITIES.items():
            value = cost.measured[name][fewest]
            cells.append("–" if value is None else f"{value * scale:,.0f}")
            cells += [_times(cost.ratio(name, number)) for number in others]
        verdict = f"grows: {', '.join(cost.grows)}" if cost.grows else "flat"
        lines.append(f"| {cost.method} | {' | '.join(cells)} | {verdict} |")
    return "\n".join(lines)


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"x {ratio:.2f}"


def _plan(config: str, folder: str, name: str, number: int, overrides=()) -> sweep.Plan:
    return sweep.Plan(folder, name, 0, sweep.config_arguments(
        config, overrides, method=name, tasks=number), environment=_RETURN_FREED)


def _folder(name: str, number: int) -> str:
    return f"{name}-{number}"
