"""Measures speed against the libraries that people would use otherwise, and the cost of methods.

    python -m tail_jax.benchmark --suite=embed|load|step|memory --output=FILE [--checkpoint=DIR] \
        [--repeats=5] [--batch_size=64]
    python -m tail_jax.benchmark --suite=frontend|loader|retrieval --output=FILE [--repeats=5]
    python -m tail_jax.benchmark --suite=analytic --output=FILE [--tasks=10,62] [--repeats=5]
    python -m tail_jax.benchmark --suite=tasks --output=FILE --workdir=DIR [--methods=all] \
        [--tasks=2,8,32]
    python -m tail_jax.benchmark --suite=all --output=FILE [--repeats=5]

`all` are the suites that need no runs of their own, one after another, each in a process of its
own: FILE has a list of reports, that of a suite once it is done. A suite that cannot be run, for
want of its peer, say, has the reason in its report.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile

import jax
from absl import flags

from data_pipelines import cores
from tail_jax import cli, settings, sweep
from tail_jax.benchmarks import Measured, Options
from tail_jax.reporting.writers import write_json_atomic

SUITES = ("embed", "load", "step", "memory", "frontend", "loader", "retrieval", "analytic", "tasks")
ALL, WITH_RUNS = "all", ("tasks",)
_PACKAGES = ("jax", "jaxlib", "numpy", "scipy", "scikit-learn", "librosa", "torch",
             "transformers")


def benchmark(suite: str, options: Options) -> tuple[dict, Measured]:
    """(report for JSON, what was measured) of a suite, see `tail_jax.benchmarks`."""
    measured = importlib.import_module(f"tail_jax.benchmarks.{suite}").run(options)
    return _report(suite, options, measured), measured


def _report(suite: str, options: Options, measured: Measured) -> dict:
    return {
        "suite": suite, "options": dataclasses.asdict(options), "machine": machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": cli.commit(), "cases": measured.cases, "failed": list(measured.failed)}


def benchmark_all(options: Options, output: pathlib.Path) -> list[dict]:
    """Reports of every suite that needs no runs of its own; each is printed and written when done.

    A suite that cannot be run is reported with no cases and the reason, and the others go on. In a
    process of its own it finds the memory and the accelerator free, and may even crash.
    """
    given = {"size": options.size, "repeats": options.repeats, "checkpoint": options.checkpoint,
             "items": options.items, "batch_size": options.batch_size,
             "tasks": ",".join(map(str, options.tasks))}
    words = [f"--{name}={value}" for name, value in given.items() if value]
    reports = []
    for suite in SUITES:
        if suite in WITH_RUNS:
            continue
        print(f"## {suite}\n", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "report.json"
            done = subprocess.run([sys.executable, "-m", "tail_jax.benchmark", f"--suite={suite}",
                                   f"--output={file}", *words], capture_output=True, text=True)
            if file.is_file():
                reports.append(json.loads(file.read_text()))
                print(done.stdout, end="\n", flush=True)
                print(*done.stderr.strip().splitlines()[-1:], file=sys.stderr)
            else:
                said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
                reports.append({"suite": suite, "options": dataclasses.asdict(options), "cases": [],
                                "failed": [said[-1].removeprefix("error: ")]})
                print("(nothing was measured)\n", flush=True)
        for line in reports[-1]["failed"]:
            print(f"failed: {suite}: {line}", file=sys.stderr)
        write_json_atomic(output, reports)
    return reports


def machine() -> dict:
    """Processor, cores, accelerator and versions."""
    return {"processor": _processor(), "cores": cores(),
            "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
            "device": jax.devices()[0].device_kind, "python": platform.python_version(),
            "versions": {name: version for name in _PACKAGES if (version := _version(name))}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> int:
    """The command."""
    args = flags.FLAGS
    if args.repeats < 1:
        raise ValueError(f"--repeats is {args.repeats}; expected 1 or more")
    options = Options(
        args.size, args.repeats, args.checkpoint, args.items, args.batch_size, args.config,
        tuple(sweep.chosen_methods(args.methods, args.config)) if args.methods else (),
        _numbers(args.tasks) if args.tasks else (),
        args.workdir)
    output = pathlib.Path(args.output)
    if args.suite == ALL:
        return 1 if any(report["failed"] for report in benchmark_all(options, output)) else 0
    # Both sides are on the card.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    settings.start_jax()
    report, shown = benchmark(args.suite, options)
    write_json_atomic(output, report)
    print(shown.table)
    for line in shown.failed:
        print(f"failed: {line}", file=sys.stderr)
    note = f"{shown.note}; " if shown.note else ""
    print(f"{note}{report['machine']['processor']}, {report['machine']['device']}, "
          f"{report['machine']['cores']} cores, {report['date']}, commit {report['commit']}",
          file=sys.stderr)
    return 1 if shown.failed else 0


def _numbers(texts: list[str]) -> tuple[int, ...]:
    numbers = [int(text) if text.isdecimal() else 0 for text in texts]
    if len(numbers) < 2 or numbers[0] < 1 or numbers != sorted(set(numbers)):
        raise ValueError(f"--tasks={','.join(texts)}; expected two or more whole numbers, "
                         "ascending, with commas")
    return tuple(numbers)


def define_flags() -> None:
    """The flags: of all suites, of embed, load, step, memory and analytic, of tasks."""
    flags.DEFINE_enum("suite", None, (*SUITES, ALL), "What to measure.", required=True)
    flags.DEFINE_string("output", None, "JSON file for the measurements.", required=True)
    flags.DEFINE_string("checkpoint", None, "Measure with this folder; by default random weights.")
    flags.DEFINE_enum("size", "full", ["full", "tiny"], "Published sizes, or just to try.")
    flags.DEFINE_integer("repeats", 5, "Measurements of each case.")
    flags.DEFINE_integer("items", None, "Captions of the longest case, or clips.", lower_bound=32)
    flags.DEFINE_integer("batch_size", None, "Of train steps; by default 8 on a CPU, 64 elsewhere.",
                         lower_bound=2)
    usual = Options()
    flags.DEFINE_string("config", usual.config, "Configuration that takes method= and tasks=.")
    flags.DEFINE_string("methods", None, "all, or names with commas; by default all but ablations.")
    flags.DEFINE_list("tasks", None, "Numbers of tasks, ascending; by default the suite's own.")
    flags.DEFINE_string("workdir", usual.workdir, "Folder of the runs; start again there to go on.")


if __name__ == "__main__":
    cli.run(main, define_flags)
