"""The report on several runs: tables and pictures in one folder."""

import glob
import os
import pathlib
import sys

from tail_jax.reporting import plots, tables, writers
from tail_jax.reporting.columns import Results


def read_runs(pattern: str) -> dict[str, Results]:
    """Results by folder, of the folders that match pattern and hold a results.json.

    Raises:
      ResultsError: if there is none, or one cannot be read.
    """
    folders = sorted(path for path in map(pathlib.Path, glob.glob(pattern)) if path.is_dir())
    finished = [folder for folder in folders if (folder / "results.json").exists()]
    if not finished:
        raise writers.ResultsError(
            f"{pattern}: {len(folders)} folders match, none of them holds a results.json; "
            "expected a glob of folders of finished runs, in quotes"
        )
    for folder in folders:
        if (folder / "config.json").exists() and folder not in finished:
            print(f"left out, not finished: {folder}", file=sys.stderr)
    return {str(folder): writers.read_results(folder) for folder in finished}


def write_report(
    runs: dict[str, Results], output: str | os.PathLike, metric: str | None = None
) -> str:
    """Writes report.md with its tables and pictures into output; returns the headline table.

    Args:
      metric: of the pictures; by default R@1, or accuracy for class-incremental streams.

    Raises:
      ResultsError: if the runs do not belong together.
    """
    output = pathlib.Path(output)
    groups = tables.group_by_method(runs)
    rows = tables.make_rows(groups)
    layout = rows[0].layout
    metric = metric or layout.metric
    headline, table = tables.markdown_table(rows, layout.headline), tables.markdown_table(rows)
    pages = plots.plot_matrices(groups, metric, output / "matrices.png")
    plots.plot_curves(groups, metric, output / "curves.png")
    plots.plot_tradeoff(groups, metric, output / "tradeoff.png")
    writers.write_text_atomic(output / "headline.md", headline)
    writers.write_text_atomic(output / "table.md", table)
    writers.write_text_atomic(output / "table.csv", tables.csv_table(rows))
    text = _text(runs, rows, headline, table, metric, [page.name for page in pages])
    writers.write_text_atomic(output / "report.md", text)
    return headline


def _text(runs, rows, headline, table, metric, pages) -> str:
    """What was compared, the tables and their legend, the pictures, the runs."""
    first = next(iter(runs.values()))
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
        f"| {results['trainable_parameters']:,} "
        f"| `{str(results['backbone'].get('sha256'))[:12]}` |\n"
        for name, results in runs.items()
    )
    pictures = "\n\n".join(
        f"![{metric} on every task after each step of training, one panel for each method]({page})"
        for page in pages
    )
    return f"""\
# {first["stream"]}: {len(rows)} methods compared

- tasks, in order of training: {" → ".join(first["tasks"])}
- measured on: {first.get("evaluation_split") or "not recorded"}
- seeds: {_seeds(rows)}
- {_backbones(runs)}
- device: {", ".join(devices)}
- versions: {", ".join(versions) or "not recorded"}

## Results

{headline}
{rows[0].layout.legend}
## All columns

{table}
The same numbers, unrounded: [table.csv](table.csv).

## {metric} over the stream

![{metric} averaged over the tasks seen so far, after each task](curves.png)

![{metric} after the last task against forgetting and trainable parameters](tradeoff.png)

{pictures}

## Runs

| run | method | seed | trainable parameters | backbone |
| --- | --- | ---: | ---: | --- |
{listed}"""


def _seeds(rows) -> str:
    """The seeds of most methods, and who has others."""
    every = [row.seeds for row in rows]
    usual = max(every, key=lambda seeds: (every.count(seeds), len(seeds)))
    others = [f"{row.method}: {_join(row.seeds)}" for row in rows if row.seeds != usual]
    return _join(usual) + (f" (but {'; '.join(others)})" if others else "")


def _backbones(runs) -> str:
    """Every seed with its backbone, or the one of all."""
    first = next(iter(runs.values()))["backbone"]
    size = f"{first.get('name')}, {first.get('parameters')} parameters"
    hashes = {r["seed"]: str(r["backbone"].get("sha256"))[:16] for r in runs.values()}
    if len(set(hashes.values())) == 1:
        return f"backbone: {size}, sha256 `{next(iter(hashes.values()))}`"
    listed = ", ".join(f"seed {seed} `{found}`" for seed, found in sorted(hashes.items()))
    return f"backbones, one a seed (the first: {size}), sha256: {listed}"


def _join(seeds) -> str:
    return ", ".join(map(str, seeds))
