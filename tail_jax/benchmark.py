"""Measures speed against the libraries that people would use otherwise, in one process.

    python -m tail_jax.benchmark --suite=embed|load --output=FILE [--checkpoint=DIR] [--repeats=5]
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import pathlib
import platform
import sys

import jax
from absl import flags

from tail_jax import cli
from tail_jax.benchmarks import Options, table
from tail_jax.reporting.writers import write_json_atomic

SUITES = ("embed", "load")
_PACKAGES = ("jax", "jaxlib", "numpy", "torch", "transformers")


def benchmark(suite: str, options: Options) -> tuple[dict, str]:
    """(report for JSON, its table) of a suite, see `tail_jax.benchmarks`."""
    comparisons = importlib.import_module(f"tail_jax.benchmarks.{suite}").run(options)
    report = {
        "suite": suite, "options": dataclasses.asdict(options), "machine": machine(),
        "cases": [dataclasses.asdict(c) | {"ratio": c.ratio} for c in comparisons]}
    return report, table(comparisons)


def machine() -> dict:
    """Processor, cores, accelerator and versions."""
    return {"processor": _processor(), "cores": os.cpu_count(),
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


def main() -> None:
    """The command."""
    args = flags.FLAGS
    if args.repeats < 1:
        raise ValueError(f"--repeats is {args.repeats}; expected 1 or more")
    options = Options(args.size, args.repeats, args.checkpoint, args.items)
    report, shown = benchmark(args.suite, options)
    write_json_atomic(pathlib.Path(args.output), report)
    print(shown)
    print(f"median (least to most) of {args.repeats}; ratio: the peer over ours",
          file=sys.stderr)


def define_flags() -> None:
    """--suite, --output, --checkpoint, --size, --repeats and --items."""
    flags.DEFINE_enum("suite", None, SUITES, "What to measure.", required=True)
    flags.DEFINE_string("output", None, "JSON file for the measurements.", required=True)
    flags.DEFINE_string("checkpoint", None, "Measure with this folder; by default random weights.")
    flags.DEFINE_enum("size", "full", ["full", "tiny"], "Published sizes, or just to try.")
    flags.DEFINE_integer("repeats", 5, "Measurements of each case.")
    flags.DEFINE_integer("items", None, "Captions of the longest case.", lower_bound=32)


if __name__ == "__main__":
    cli.run(main, define_flags)
