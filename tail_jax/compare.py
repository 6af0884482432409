"""Tables and pictures of several runs side by side.

    python -m tail_jax.compare --runs='runs/toy/*' --output=runs/toy/report

Reads results.json of every folder that matches, writes report.md with table.md, table.csv,
matrices.png, curves.png and tradeoff.png beside it, and prints the table.
"""

import glob
import pathlib
import sys

from absl import app
from absl import flags

from tail_jax.reporting import plots
from tail_jax.reporting import tables
from tail_jax.reporting import writers

_RUNS = flags.DEFINE_string("runs", None, "Glob of run folders, in quotes.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the report.", required=True)
_METRIC = flags.DEFINE_enum(
    "metric", "R@1", ["R@1", "R@5", "R@10", "mAP@10"], "What the pictures show; the table has all."
)


def compare(pattern: str, output: pathlib.Path, metric: str) -> str:
    """Writes the report on all runs that match pattern into output; returns the Markdown table.

    Raises:
      ResultsError: if no folder matches with a results.json, or if the runs do not belong together.
    """
    runs = read_runs(pattern)
    groups = tables.group_by_method(runs)
    rows = tables.make_rows(groups)
    table = tables.markdown_table(rows)
    plots.plot_matrices(groups, metric, output / "matrices.png")
    plots.plot_curves(groups, metric, output / "curves.png")
    plots.plot_tradeoff(groups, metric, output / "tradeoff.png")
    writers.write_text_atomic(output / "table.md", table)
    writers.write_text_atomic(output / "table.csv", tables.csv_table(rows))
    writers.write_text_atomic(output / "report.md", report_text(runs, table, metric))
    return table


def read_runs(pattern: str) -> dict[str, tables.Results]:
    """Results by folder, of the folders that match pattern and hold a results.json."""
    folders = sorted(path for path in map(pathlib.Path, glob.glob(pattern)) if path.is_dir())
    finished = [folder for folder in folders if (folder / "results.json").exists()]
    if not finished:
        raise writers.ResultsError(
            f"--runs={pattern}: {len(folders)} folders match, none of them holds a "
            "results.json; expected a glob of folders of finished runs, in quotes"
        )
    for folder in folders:
        if (folder / "config.json").exists() and folder not in finished:
            print(f"left out, not finished: {folder}", file=sys.stderr)
    return {str(folder): writers.read_results(folder) for folder in finished}


def report_text(runs: dict[str, tables.Results], table: str, metric: str) -> str:
    """The report: what was compared, the table and its legend, the pictures, the runs."""
    first = next(iter(runs.values()))
    backbone = first["backbone"]
    devices = sorted({str(results.get("device", "unknown")) for results in runs.values()})
    versions = sorted(
        {
            f"{name} {version}"
            for results in runs.values()
            for name, version in (results.get("versions") or {}).items()
        }
    )
    listed = "".join(
        f"| {pathlib.Path(name).name} | {results['method']} | {results['seed']} "
        f"| {results['trainable_parameters']:,} |\n"
        for name, results in runs.items()
    )
    return f"""\
# {first["stream"]}: {len({results["method"] for results in runs.values()})} methods compared

- tasks, in order of training: {" → ".join(first["tasks"])}
- backbone: {backbone.get("name")}, {backbone.get("parameters")} parameters, \
sha256 `{str(backbone.get("sha256"))[:16]}`
- device: {", ".join(devices)}
- versions: {", ".join(versions) or "not recorded"}

## Results

{table}
{tables.LEGEND}
The same numbers, unrounded: [table.csv](table.csv).

## {metric} over the stream

![{metric} averaged over the tasks seen so far, after each task](curves.png)

![{metric} on every task after each step of training, one panel for each method](matrices.png)

![{metric} after the last task against forgetting and trainable parameters](tradeoff.png)

## Runs

| run | method | seed | trainable parameters |
| --- | --- | ---: | ---: |
{listed}"""


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; put the glob of --runs in quotes")
    output = pathlib.Path(_OUTPUT.value)
    try:
        table = compare(_RUNS.value, output, _METRIC.value)
    except writers.ResultsError as error:
        sys.exit(f"error: {error}")
    print(table)
    print(f"Report: {output / 'report.md'}")


if __name__ == "__main__":
    app.run(main)
