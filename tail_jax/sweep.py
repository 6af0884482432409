"""The whole comparison with one command: every method, seed and order that is not yet done.

    python -m tail_jax.sweep --config=configs/tail_embedded.py --methods=all --seeds=0,1,2 \
        --workdir=DIR [--orders=paper,reverse] [--jobs=N] [--set='train.duration=2 epochs' ...]

Each run is `python -m tail_jax.train` in DIR/METHOD-SEED (DIR/METHOD-SEED-ORDER for orders other
than the paper's), its output in DIR/log. Backbones are pretrained first, one after another, so that
no two runs make the same one and no run's memory holds pretraining. A run that fails does not stop
the others and ends the command with exit code 1. Killed and started again, the command goes on; at
the end it writes DIR/report (DIR/report-ORDER) on all finished runs in DIR.

    python -m tail_jax.sweep --config=configs/tail_embedded.py --methods=all --seeds=100 \
        --workdir=DIR --tune=configs/best/embedded.json --trials=3

searches instead: the same number of trials for every method, on the validation sets of the first
tasks (--tuned_tasks, two). The best by the mean over these tasks after the last of them, of R@1 in
both directions or of the accuracy among their classes, goes into the file (`best.py` says what else
is in it). The configuration must take `tasks` and `settings`; where a stream of classes brings no
validation clips, --set=stream.valid=0.1 holds out training clips.
"""

from __future__ import annotations

import dataclasses
import datetime
import glob
import pathlib
import shlex
import sys
from typing import Mapping

from absl import flags

from tail_jax import best, cli, jobs, methods, settings
from tail_jax.reporting import report, tables
from tail_jax.reporting.columns import ACCURACY, layout_of
from tail_jax.reporting.writers import ResultsError, read_results

_DIVERGED = 3  # exit code of `tail_jax.train`
_METRICS = {
    "R@1": "R@1 in %, mean of both directions and of the tasks after the last of them",
    ACCURACY: "accuracy in % among all classes, mean of the sessions after the last of them"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run: its folder below the sweep's, the --config arguments that describe it, and variables
    of the environment that it needs."""

    name: str
    method: str
    seed: int
    arguments: tuple[str, ...]
    trial: int = 0
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def plans(config: str, names, seeds, orders, overrides) -> list[Plan]:
    """The runs of a sweep, seed by seed, so that a sweep that is stopped has whole seeds."""
    return [Plan(_folder(name, seed, order), name, seed, config_arguments(
                config, overrides, method=name, seed=seed,
                **({} if order == "paper" else {"order": order})))
            for order in orders for seed in seeds for name in names]


def trial_plans(config: str, grids: dict, content: dict, seeds, overrides,
                tasks: int = 2) -> list[Plan]:
    """The runs of a search; folders have the names of trials, so a new grid keeps what is done."""
    result = []
    for seed in seeds:
        for name, grid in grids.items():
            for number, trial in enumerate(grid):
                what = ",".join(f"{key}={value}" for key, value in sorted(trial.items()))
                own = [f"method.{key}={value}"
                       for key, value in (best.common(content, name) | trial).items()]
                arguments = config_arguments(
                    config, [*overrides, *own, "eval.split=valid"], method=name, seed=seed,
                    tasks=tasks, settings="default")
                result.append(Plan(f"{name}-{seed}-{what}", name, seed, arguments, number))
    return result


def run_plans(wanted: list[Plan], workdir: pathlib.Path, parallel: int) -> list[jobs.Failure]:
    """Runs what has no results yet, `parallel` at a time; returns what failed.

    Raises:
        ValueError: if a folder holds a run with another configuration.
    """
    configs = {plan.name: cli.parse_config(plan.arguments) for plan in wanted}
    changed = []
    for plan in wanted:
        if (workdir / plan.name / "config.json").exists():
            try:
                cli.check_config(workdir / plan.name, settings.with_checkpoint(configs[plan.name]))
            except cli.UserError as error:
                changed.append(str(error))
    if changed:
        others = f" (and {len(changed) - 1} more such folders)" if changed[1:] else ""
        raise cli.UserError(changed[0] + others)
    left = [plan for plan in wanted if not (workdir / plan.name / "results.json").exists()]
    print(f"{len(wanted)} runs, {len(wanted) - len(left)} of them done; logs in {workdir / 'log'}",
          file=sys.stderr)
    if not left:
        return []
    with jobs.locked(workdir) as lock:
        logs = workdir / "log"
        first = {plan.seed: plan for plan in reversed(left)
                 if configs[plan.name]["backbone"]["kind"] == "pretrain"
                 and not configs[plan.name]["model"]["checkpoint"]}
        failures = jobs.run([_preparation(first[seed], workdir) for seed in sorted(first)], 1, logs,
                            lock)
        lost = {int(failure.job.name.rpartition("-")[2]) for failure in failures}
        if lost:
            print(f"without a backbone, not started: {sum(p.seed in lost for p in left)} runs",
                  file=sys.stderr)
        left = [plan for plan in left if plan.seed not in lost]
        # What another process has finished while this one waited for the lock is found by the run.
        todo = [jobs.Job(plan.name, plan.method, "tail_jax.train",
                         (*plan.arguments, f"--workdir={workdir / plan.name}"), plan.environment)
                for plan in left]
        return failures + jobs.run(todo, parallel, logs, lock, _seconds(wanted, workdir))


def prepare(config: dict, workdir: pathlib.Path) -> None:
    """Makes the corpora and the backbone of a configuration; the runs find them in the cache."""
    from data_pipelines.streams import build_stream
    from tail_jax.run import prepare_backbone
    from tail_jax.train import train

    settings.start_jax()
    stream = build_stream(settings.stream_spec(config))
    prepare_backbone(config, stream, workdir, pretrain=train)


def write_reports(workdir: pathlib.Path) -> None:
    """A report for every order of tasks among the finished runs in `workdir`."""
    orders: dict[tuple, dict] = {}
    for folder, results in report.read_runs(f"{glob.escape(str(workdir))}/*").items():
        orders.setdefault(tuple(results["order"]), {})[folder] = results
    for runs in orders.values():
        folder, results = next(iter(runs.items()))
        usual = _folder(results["method"], results["seed"], "paper")
        order = pathlib.Path(folder).name.removeprefix(usual)
        output = workdir / f"report{order}"
        print(report.write_report(runs, output))
        print(f"Report: {output / 'report.md'}")


def choose(grids: dict, wanted: list[Plan], workdir: pathlib.Path, failures,
           tasks: int = 2) -> dict[str, list]:
    """Score in percent of every trial by method, mean over seeds; None for one that diverged.

    A method with a trial that failed otherwise is left out.

    Raises:
        ValueError: if a run is not one on validation sets of the first tasks.
    """
    codes = {failure.job.name: failure.code for failure in failures}
    broken = {plan.method for plan in wanted
              if codes.get(plan.name, 0) not in (0, _DIVERGED)
              or (plan.name not in codes and not (workdir / plan.name / "results.json").exists())}
    scores: dict[str, list] = {}
    for name, grid in grids.items():
        if name in broken:
            continue
        by_trial: list[list] = [[] for _ in grid]
        for plan in wanted:
            if plan.method == name:
                by_trial[plan.trial].append(None if plan.name in codes
                                            else _score(workdir / plan.name, tasks))
        scores[name] = [None if None in values else sum(values) / len(values)
                        for values in by_trial]
    return scores


def record(path, content: dict, grids: dict, scores: dict, metric: str = "R@1",
           **found) -> list[str]:
    """Writes the best trial of every method of `scores` into the file; returns lines for people."""
    lines = []
    for name, values in scores.items():
        shown = [None if value is None else round(value, 2) for value in values]
        finite = [value for value in values if value is not None]
        if not finite:
            lines.append(f"{name}: every trial diverged, nothing is written")
            continue
        trial = grids[name][values.index(max(finite))]
        entry = content["methods"].setdefault(name, {})
        edge = best.edges(grids[name], trial)
        entry["settings"] = best.common(content, name) | trial
        entry["found"] = found | {
            "metric": _METRICS[metric], "trials": len(values), "edge": edge,
            "scores": [{"settings": t, metric: s} for t, s in zip(grids[name], shown)]}
        lines.append(f"{name}: " + ", ".join(
            f"{t} {'diverged' if s is None else s}" for t, s in zip(grids[name], shown)))
        lines += [f"warning: {name}: the best {key}, {trial[key]}, is at the edge of its grid"
                  for key in edge]
    best.write(path, content)
    return lines


def tune(config: str, names, seeds, trials: int, overrides, path: pathlib.Path,
         workdir: pathlib.Path, parallel: int, tasks: int = 2) -> list[jobs.Failure]:
    """The search; see the top of this file."""
    content, kind = best.read(path), _stream(config)["kind"]
    grids = best.grids(content, best.tuned_methods(content, names), trials, kind == "classes")
    if not grids:
        raise cli.UserError(f"--methods: nothing to tune; {', '.join(names)} do not train, or are "
                            "like another")
    wanted = trial_plans(config, grids, content, seeds, overrides, tasks)
    failures = run_plans(wanted, workdir, parallel)
    scores = choose(grids, wanted, workdir, failures, tasks)
    # What they ran on; scores are empty without a run that is done.
    done = next((read_results(workdir / plan.name) for plan in wanted
                 if (workdir / plan.name / "results.json").exists()), {})
    for line in record(path, content, grids, scores, ACCURACY if kind == "classes" else "R@1",
                       split="valid", seeds=seeds, stream=done.get("stream"),
                       tasks=done.get("tasks"), commit=cli.commit(),
                       date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
                       command=shlex.join(["python", "-m", "tail_jax.sweep", *sys.argv[1:]])):
        print(line)
    print(f"{len(scores)} methods tuned: {path}")
    # A trial that diverges is an answer.
    return [failure for failure in failures if failure.code != _DIVERGED]


def config_arguments(config: str, overrides, **values) -> tuple[str, ...]:
    """--config with these arguments after the colon, and the fields of `overrides`."""
    path, _, given = config.partition(":")
    joined = ",".join(filter(None, [given, *(f"{key}={value}" for key, value in values.items())]))
    return (f"--config={path}:{joined}", *(f"--config.{override}" for override in overrides))


def _preparation(plan: Plan, workdir: pathlib.Path) -> jobs.Job:
    config, *overrides = plan.arguments
    return jobs.Job(f"backbone-{plan.seed}", "backbone", "tail_jax.sweep", (
        "--prepare", config, f"--methods={plan.method}", f"--seeds={plan.seed}",
        *(f"--set={override.removeprefix('--config.')}" for override in overrides),
        f"--workdir={workdir}"))


def _folder(method: str, seed: int, order: str) -> str:
    return f"{method}-{seed}" + ("" if order == "paper" else f"-{order}")


def _score(folder: pathlib.Path, tasks: int) -> float:
    results = read_results(folder)
    if results.get("evaluation_split") != "valid" or len(results["tasks"]) != tasks:
        raise ResultsError(f"{folder}: measured on the {results.get('evaluation_split')} sets of "
                           f"{len(results['tasks'])} tasks; settings are chosen on the valid sets "
                           f"of {tasks}")
    last = tables.mean_matrix([results], layout_of(results).metric)[-1]
    return 100 * sum(last) / len(last)


def _stream(config: str) -> dict:
    return cli.parse_config(config_arguments(config, ()))["stream"]


def _seconds(wanted: list[Plan], workdir: pathlib.Path) -> dict[str, float]:
    """What runs of each method took that are there already."""
    spent: dict[str, list[float]] = {}
    for plan in wanted:
        if (workdir / plan.name / "results.json").exists():
            total = (read_results(workdir / plan.name).get("wall_seconds") or {}).get("total")
            spent.setdefault(plan.method, []).extend([total] if total else [])
    return {method: sum(values) / len(values) for method, values in spent.items() if values}


def chosen_methods(text: str, config: str) -> list[str]:
    """The names that a --methods flag stands for; all are those for the configuration's stream."""
    if text == "all":
        what = "classifies" if _stream(config)["kind"] == "classes" else "retrieves"
        return methods.for_streams(what, ablations=True)
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in methods.METHODS]
    if unknown or not names or len(set(names)) < len(names):
        raise cli.UserError(f"--methods={text}: "
                            + (f"no methods {unknown}" if unknown else "none, or one twice")
                            + f"; expected all, or some of {','.join(methods.METHODS)}")
    return names


def _checked(flag: str, values: list[str]) -> list[str]:
    if not values or len(set(values)) < len(values) or not all(values):
        raise cli.UserError(f"--{flag}={','.join(values)}: expected different values, with commas")
    return values


def main() -> int:
    """The command."""
    values = flags.FLAGS
    workdir = pathlib.Path(values.workdir)
    names = chosen_methods(values.methods, values.config)
    seeds = _checked("seeds", values.seeds)
    if not all(seed.isdecimal() for seed in seeds):
        raise cli.UserError(f"--seeds={','.join(seeds)}: expected whole numbers, with commas")
    seeds, overrides = [int(seed) for seed in seeds], values.set or []
    common = values.config, names, seeds
    if values.prepare:
        for plan in plans(*common, ["paper"], overrides):
            prepare(cli.parse_config(plan.arguments), workdir)
        return 0
    if values.tune:
        taken = [o for o in overrides if o.startswith(
            ("eval.split", "method.", "stream.tasks", "stream.first"))]
        if taken:
            raise cli.UserError(f"--set={taken[0]}: the search sets this itself")
        failures = tune(*common, values.trials, overrides, pathlib.Path(values.tune), workdir,
                        values.jobs, values.tuned_tasks)
    else:
        wanted = plans(*common, _checked("orders", values.orders), overrides)
        failures = run_plans(wanted, workdir, values.jobs)
    for failure in failures:
        print(f"failed: {failure.job.name}, {failure.reason}", file=sys.stderr)
    if not values.tune and any((workdir / p.name / "results.json").exists() for p in wanted):
        write_reports(workdir)
    return 1 if failures else 0


def define_flags() -> None:
    """The flags; --config is read for every run, so it is plain text here."""
    flags.DEFINE_string("config", None, "Configuration file that takes method= and seed=, e.g. "
                        "configs/tail_embedded.py; other arguments may follow a colon.",
                        required=True)
    flags.DEFINE_string("workdir", None, "Folder of the sweep; start again there to go on.",
                        required=True)
    flags.DEFINE_string("methods", "all", "all, or names with commas.")
    flags.DEFINE_list("seeds", ["0"], "Seeds, with commas.")
    flags.DEFINE_list("orders", ["paper"], "Orders of the tasks, with commas: paper, or what the "
                      "configuration takes as order=, such as reverse or names joined by +.")
    flags.DEFINE_integer("jobs", 1, "Runs at a time; times in the report mean something for 1.",
                         lower_bound=1)
    flags.DEFINE_multi_string("set", None, "A field of the configuration, as in --set='train."
                              "duration=2 epochs'; may be repeated.")
    flags.DEFINE_string("tune", None, "Search best settings and write them into this file.")
    flags.DEFINE_integer("trials", 3, "Trials of every method in a search.", lower_bound=1)
    flags.DEFINE_integer("tuned_tasks", 2, "Tasks of a search, counted from the first.",
                         lower_bound=1)
    flags.DEFINE_boolean("prepare", False, "Make corpora and backbones of the seeds, and no more.")


if __name__ == "__main__":
    cli.run(main, define_flags)
