"""Measures a run again: one row of its result matrices, on its test or validation split.

    python -m tail_jax.evaluate --workdir=DIR [--split=valid] [--task=2] [--json=FILE]

The run may be finished or still be training. Nothing in its folder changes.
"""

from __future__ import annotations

import functools
import json
import pathlib

from absl import flags

from tail_jax import cli, hosts, methods, settings
from tail_jax.backbone import load_tuning
from tail_jax.evaluation.retrieval import DIRECTIONS, METRICS, evaluate_row
from tail_jax.methods.base import State
from tail_jax.reporting.writers import write_json_atomic
from tail_jax.run import Run, open_run
from tail_jax.training import sharding
from tail_jax.training.checkpoints import check_same_structure


def evaluate(workdir: pathlib.Path, split: str | None = None, task: int | None = None) -> dict:
    """One row of the result matrices of the run in `workdir`.

    Args:
        workdir: of a run that has begun.
        split: "valid" or "test"; by default the one that the run measures.
        task: number of tasks trained on, 0 is the pretrained model; by default the last there is.

    Returns:
        {"task": m, "split": ..., "tasks": [...], "row": {direction/metric/pool/index: [...]},
        "routed": {}}. Stale galleries exist for the split that the run measures only. Of a method
        that routes, `routed` has {audio, text: the share of each task's items given their own
        task, for the tasks trained on}.

    Raises:
        ValueError: if there is no such run or task, or its files are damaged or of another run.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the --workdir of a run")
    config = json.loads(path.read_text())
    trains = methods.METHODS[config["method"]["name"]].trains
    if trains:
        known = {0} | {int(file.stem.removeprefix("task_"))
                       for file in (workdir / "tuning").glob("task_*.safetensors")}
    else:
        known = set(range(len(config["stream"]["tasks"]) + 1))
    task = max(known) if task is None else task
    if task not in known:
        raise ValueError(f"{workdir}: task {task} is not there; expected one of "
                         f"{', '.join(map(str, sorted(known)))}")
    own_split = config["eval"]["split"]
    config["eval"]["split"] = split = split or own_split
    run = open_run(config, workdir)
    state = run.initial_state()
    if task and trains:
        file = workdir / "tuning" / f"task_{task}.safetensors"
        tree, _ = load_tuning(file, run.backbone)
        check_same_structure(run.method.stored(state), tree, str(file))
        kept = run.method.restored(tree)
        state |= {"trainable": sharding.place(kept["trainable"], run.mesh),
                  "aux": state["aux"] | kept["aux"],
                  "statistics": state.get("statistics", {}) | kept["statistics"]}
    if run.stream.classes:
        row = run.accuracies(run.predict(task, state))
    else:
        fresh = run.embed(state) if task else run.embed_backbone()
        stale = run.galleries(task) if split == own_split else [None] * len(fresh)
        row = evaluate_row(fresh, stale, task)
    return {"task": task, "split": split, "tasks": [t.name for t in run.stream.tasks],
            "row": row,
            "routed": routed(run, state, task) if task and run.method.routes else {}}


def routed(run: Run, state: State, tasks: int) -> dict[str, list[float]]:
    """{audio, text: [share of items whose largest weight is that of their own task]}."""
    shares: dict[str, list[float]] = {"audio": [], "text": []}
    for number, reader in enumerate(run.tests[:tasks]):
        data = run.task_data(reader, number, hook=0)
        for side, read in (("audio", data.map_audio), ("text", data.map_text)):
            weights = read(functools.partial(run.method.tasks_of, side), state)
            shares[side].append(float((weights.argmax(1) == number).mean()))
    return shares


def text(report: dict) -> str:
    """The report for a terminal: rates in percent, ranks as they are."""
    head = f"after task {report['task']}, {report['split']} split"
    if "accuracy/seen" in report["row"]:
        return "\n".join([head, "", "accuracy in % among the classes seen", *(
            f"{name:<20}{'–' if value is None else f'{100 * value:.1f}':>8}"
            for name, value in zip(report["tasks"], report["row"]["accuracy/seen"]))])
    lines = [head, "",
             f"{'direction':<15}{'pool':<7}{'task':<20}" + "".join(f"{m:>8}" for m in METRICS)]
    for direction in DIRECTIONS:
        for pool in ("own", "all"):
            for column, name in enumerate(report["tasks"]):
                values = [report["row"][f"{direction}/{m}/{pool}/fresh"][column] for m in METRICS]
                shown = "".join(f"{v if m == 'MedR' else 100 * v:>8.1f}"
                                for m, v in zip(METRICS, values))
                lines.append(f"{direction:<15}{pool:<7}{name:<20}{shown}")
    for side, shares in report["routed"].items():
        lines += [f"{side} given its own task: " + ", ".join(
            f"{name} {100 * share:.1f}" for name, share in zip(report["tasks"], shares))]
    return "\n".join([*lines, "", "own: among clips and captions of the task; all: of all tasks"])


def main() -> None:
    """The command."""
    settings.start_jax(many_hosts=True)
    args = flags.FLAGS
    report = evaluate(pathlib.Path(args.workdir), args.split, args.task)
    if not hosts.is_first():
        return
    print(text(report))
    if args.json:
        write_json_atomic(pathlib.Path(args.json), report)


def define_flags() -> None:
    """--workdir, --split, --task and --json."""
    flags.DEFINE_string("workdir", None, "Folder of a run.", required=True)
    flags.DEFINE_enum("split", None, ["valid", "test"], "What to measure on.")
    flags.DEFINE_integer("task", None, "Number of tasks trained on; 0: the backbone alone.")
    flags.DEFINE_string("json", None, "Write the row to this file, too.")


if __name__ == "__main__":
    cli.run(main, define_flags)
