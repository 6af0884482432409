"""Tables and pictures of several runs side by side.

    python -m tail_jax.compare --runs='runs/toy/*' --output=runs/toy/report

Reads results.json of every folder that matches, writes report.md with headline.md, table.md,
table.csv, matrices.png, curves.png and tradeoff.png beside it, and prints the headline table. Runs
must be of one stream, order of tasks and split, and have one backbone within each seed.
"""

import pathlib

from absl import flags

from tail_jax import cli
from tail_jax.reporting import report


def main() -> None:
    """The command."""
    output = pathlib.Path(flags.FLAGS.output)
    print(report.write_report(report.read_runs(flags.FLAGS.runs), output, flags.FLAGS.metric))
    print(f"Report: {output / 'report.md'}")


def define_flags() -> None:
    """--runs, --output and --metric."""
    flags.DEFINE_string("runs", None, "Glob of run folders, in quotes.", required=True)
    flags.DEFINE_string("output", None, "Folder of the report.", required=True)
    flags.DEFINE_enum("metric", None, ["R@1", "R@5", "R@10", "mAP@10", "accuracy"],
                      "What the pictures show, by default R@1 or accuracy; the table has all.")


if __name__ == "__main__":
    cli.run(main, define_flags)
