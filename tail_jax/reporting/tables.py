"""Tables from the results of several runs."""

from collections.abc import Mapping, Sequence
import csv
import dataclasses
import io
import math

from scipy import special

from tail_jax.reporting.columns import (
    REFERENCE, Column, Layout, Results, keys, layout_of)
from tail_jax.reporting.writers import ResultsError

# Families in the order of rows and pictures, with the beginnings (up to the first _) of their
# methods' names. `frozen` and `sequential` come first and `joint` last: the floor and the ceiling.
BOUNDS = "bounds"
OTHERS = "other methods"
FAMILIES = {
    BOUNDS: ("frozen", "sequential", "joint"),
    "distillation and penalties": ("lwf", "ewc", "modx"),
    "replay": ("er", "der", "icarl"),
    "prompt pools": ("l2p", "dualprompt", "coda", "sprompts"),
    "low rank and adapters": ("lora", "clap", "inflora", "lorasub"),
    "analytic classifiers": ("ncm", "lda", "fecam", "acil", "aper", "ranpac"),
    OTHERS: (),
    "shared prompts": ("prompts", "ptat"),
    "PACE": ("pace",),
}

Matrix = Sequence[Sequence[float | None]]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Mean over seeds and half the width of its 95 % t-interval, which one seed has not."""

    mean: float
    half_width: float | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    method: str
    seeds: tuple[int, ...]
    layout: Layout
    cells: tuple[Estimate | None, ...]  # one a column; None where a run has no value


def group_by_method(runs: Mapping[str, Results]) -> dict[str, list[Results]]:
    """Runs of each method by seed, methods from floor to ceiling.

    Args:
      runs: results by the name of their folder, which errors mention.

    Raises:
      ResultsError: if there are none, if streams, tasks, orders or the split that was measured
        differ, or backbones within a seed, if runs of a method have different numbers of trainable
        parameters, or if a method ran twice with a seed.
    """
    if not runs:
        raise ResultsError("no runs to compare; expected at least one results.json")
    first_name, first = next(iter(runs.items()))
    facts = {
        "stream": lambda results: results["stream"],
        "order": lambda results: results["order"],
        "tasks": lambda results: results["tasks"],
        "the split that was measured": lambda results: results.get("evaluation_split"),
    }
    for name, results in runs.items():
        for fact, of in facts.items():
            if of(results) != of(first):
                raise ResultsError(
                    f"{first_name} and {name} cannot share a table: {fact} is {of(first)!r} in "
                    f"the one and {of(results)!r} in the other; compare them apart"
                )
    backbones: dict[int, tuple[str, str]] = {}
    for name, results in runs.items():
        own = str(results["backbone"].get("sha256"))
        other, found = backbones.setdefault(results["seed"], (name, own))
        if own != found:
            raise ResultsError(
                f"{other} and {name} have seed {results['seed']} and different backbones, "
                f"{found[:12]} and {own[:12]}; differences between methods would be differences "
                "between backbones: run them again on one, or compare them apart"
            )
    groups: dict[str, dict[int, str]] = {}
    for name, results in runs.items():
        method, seed = results["method"], results["seed"]
        seeds = groups.setdefault(method, {})
        if seed in seeds:
            raise ResultsError(
                f"{seeds[seed]} and {name} are both {method} with seed {seed}; leave one out"
            )
        for other in list(seeds.values())[:1]:
            counts = [runs[run]["trainable_parameters"] for run in (other, name)]
            if counts[0] != counts[1]:
                raise ResultsError(
                    f"{other} and {name} are both {method}, with {counts[0]:,} and {counts[1]:,} "
                    "trainable parameters; two settings of a method are no seeds of one, "
                    "compare them apart"
                )
        seeds[seed] = name
    return {
        method: [runs[name] for _, name in sorted(groups[method].items())]
        for method in sorted(groups, key=_rank)
    }


def family(method: str) -> str:
    """The family of FAMILIES that a method belongs to, by the first part of its name."""
    root = method.split("_")[0]
    return next((name for name, roots in FAMILIES.items() if root in roots), OTHERS)


def _rank(method: str) -> tuple:
    """Sorts methods: joint training last, then by family and root, then by alphabet."""
    name, root = family(method), method.split("_")[0]
    roots = FAMILIES[name]
    place = roots.index(root) if root in roots else 0
    return root == "joint", list(FAMILIES).index(name), place, method


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Mean and t-interval of half width t_{0.975, n-1} s / sqrt(n); None if a value is None."""
    if not values or None in values:
        return None
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    quantile = float(special.stdtrit(count - 1, 0.975))
    return Estimate(mean, quantile * math.sqrt(variance / count))


def make_rows(groups: Mapping[str, Sequence[Results]]) -> list[Row]:
    """A row for each method of `group_by_method`, a cell for each column of its layout."""
    layout = layout_of(next(iter(groups.values()))[0])
    reference = {results["seed"]: results for results in groups.get(REFERENCE, ())}
    return [
        Row(
            method,
            tuple(results["seed"] for results in runs),
            layout,
            tuple(_cell(column, runs, reference) for column in layout.columns),
        )
        for method, runs in groups.items()
    ]


def markdown_table(rows: Sequence[Row], titles: Sequence[str] | None = None) -> str:
    """GitHub Markdown, padded so that it reads as text too.

    Args:
      titles: of the columns to show; by default all that are there, and the number of seeds.
    """
    columns = rows[0].layout.columns
    shown = [
        index
        for index, column in enumerate(columns)
        if (titles is None or column.title in titles)
        and (not column.optional or any(row.cells[index] for row in rows))
    ]
    lines = [["method", "seeds", *(columns[index].title for index in shown)]]
    for row in rows:
        cells = [_text(row.cells[index], columns[index]) for index in shown]
        lines.append([row.method, str(len(row.seeds)), *cells])
    if titles is not None:
        lines = [[line[0], *line[2:]] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in aligned)


def csv_table(rows: Sequence[Row]) -> str:
    """Comma-separated and unrounded: columns X and X ± (half width) for each column X."""
    columns = rows[0].layout.columns
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    titles = [title for column in columns for title in (column.title, f"{column.title} ±")]
    writer.writerow(["method", "seeds", *titles])
    for row in rows:
        pairs = [(cell.mean, cell.half_width) if cell else (None, None) for cell in row.cells]
        values = [value for pair in pairs for value in pair]
        writer.writerow([row.method, " ".join(map(str, row.seeds)), *values])
    return file.getvalue()


def matrix_text(matrix: Matrix, tasks: Sequence[str], *, scale: float = 100) -> str:
    """A result matrix for the terminal: tasks across, training down; rates become percent."""
    labels = ["before", *(f"after {task}" for task in tasks)]
    width = max(6, *(len(task) for task in tasks))
    first = max(map(len, labels))
    lines = [" " * first + "".join(f"  {task:>{width}}" for task in tasks)]
    for label, row in zip(labels, matrix, strict=True):
        cells = ["–" if value is None else f"{scale * value:.1f}" for value in row]
        lines.append(f"{label:<{first}}" + "".join(f"  {cell:>{width}}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines) + "\n"


def mean_matrix(runs: Sequence[Results], metric: str, pool: str = "own/fresh") -> Matrix | None:
    """Mean of a result matrix over runs and, in retrieval, both directions.

    A value is None where one of the matrices has none; all is None if one of them is missing.
    """
    matrices = [results["matrices"].get(key) for results in runs for key in keys(metric, pool)]
    if not matrices or None in matrices:
        return None
    return [[_mean(values) for values in zip(*rows, strict=True)] for rows in zip(*matrices)]


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else math.fsum(values) / len(values)


def _cell(
    column: Column, runs: Sequence[Results], reference: Mapping[int, Results]
) -> Estimate | None:
    values = [column.value(results) for results in runs]
    if column.against is not None:
        seeds = [results["seed"] for results in runs]
        # Over the seeds that both have.
        pairs = [
            (value, column.value(reference[seed]))
            for value, seed in zip(values, seeds, strict=True)
            if seed in reference
        ]
        values = [None if None in pair else column.against(*pair) for pair in pairs]
    cell = estimate(values)
    # Of the reference to itself there is no scatter.
    alone = column.against is not None and runs[0]["method"] == REFERENCE
    return cell if cell is None or (column.interval and not alone) else Estimate(cell.mean)


def _text(cell: Estimate | None, column: Column) -> str:
    if cell is None:
        return "–"
    text = _fixed(cell.mean, column.decimals)
    if cell.half_width is None:
        return text
    return f"{text} ± {_fixed(cell.half_width, column.decimals)}"


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text  # no -0.0
