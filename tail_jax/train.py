"""Trains a method on a stream of tasks, one after another, and measures what it keeps.

    python -m tail_jax.train --config=configs/quickstart.py:method=ptat,seed=0 --workdir=DIR

config -> stream -> backbone -> for each task: begin, the steps of its stages, end, one row of every
result matrix, checkpoint -> results.json. Killed at any moment and started again with the same
command, a run ends in the same bits.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import pathlib
import platform
import shutil
import statistics
import time
from typing import Any, Callable

import jax
import numpy as np
from absl import flags

from data_pipelines.batches import SplitReader
from data_pipelines.corpora import merge_splits
from tail_jax import backbone as backbones
from tail_jax import cli, hosts, settings
from tail_jax.evaluation.classification import summarize_pooled
from tail_jax.evaluation.continual import summarize
from tail_jax.methods.base import State
from tail_jax.models.dual_encoder import BUFFERS
from tail_jax.reporting import tables
from tail_jax.reporting.writers import JsonLinesWriter, read_results, write_json_atomic
from tail_jax.run import STEP_KEY, Run, open_run, peak_memory, read, stream_name
from tail_jax.training.checkpoints import Checkpoints, save_tree
from tail_jax.training.kept import NOTHING, Kept, Limits, keep
from tail_jax.training.loop import STEP_KEYS, Diverged, Preempted, TaskLoop, watch_signals
from tail_jax.training.optimizers import OptimizerConfig, make_optimizer, parse_duration
from tail_jax.training.sharding import local_rows, to_host
from tail_jax.training.step import make_train_step
from tail_jax.training.task_data import TaskData
from tail_jax.tuning.masks import count


def train(config: dict, workdir: pathlib.Path) -> dict:
    """Runs `config` (plain dicts) in `workdir`, from wherever it was left; returns the results.

    Raises:
        ValueError: for settings or data that cannot be used, in one line.
        Diverged: when the loss stops being finite.
        Preempted: after SIGTERM, with the state saved.
    """
    workdir, config = pathlib.Path(workdir), settings.with_checkpoint(config)
    hosts.on_first(lambda: cli.check_config(workdir, config))
    hosts.together(lambda: cli.check_config(workdir, config, write=False))
    if hosts.ask_first((workdir / "results.json").exists):
        return read_results(workdir)
    began = time.monotonic()

    # --- Devices, stream, backbone, method; what is trained on, in which order ----------------
    run = open_run(config, workdir, pretrain=train)
    plan = make_plan(run)
    state = run.initial_state()
    optimizer = make_optimizer(OptimizerConfig(**config["optimizer"]), run.method,
                               state["trainable"])
    step = make_train_step(run.model, run.method, optimizer, run.mesh, state["trainable"],
                           run.frozen, config["train"]["accumulation"],
                           config["train"].get("remat", "none"))
    opt_state = step.init_optimizer(state["trainable"])

    # --- Resume ---------------------------------------------------------------------------------
    checkpoints = Checkpoints(workdir / "checkpoints")
    progress = {
        "number": 0, "task": 0, "stage": 0, "step": 0, "global_step": 0, "rows": {},
        "train_seconds": {}, "hook_seconds": {}, "step_seconds": {}, "state_bytes": {},
        "evaluation_seconds": 0.0,
        "total_seconds": 0.0,
    } | (checkpoints.progress() or {})
    if progress["number"]:
        state, opt_state = unpack(checkpoints.restore(pack(state, opt_state)), opt_state)
        hosts.say(f"{workdir}: resumes at task {progress['task'] + 1}, step {progress['step']}")
    metrics = Metrics(workdir / "metrics.jsonl", progress["global_step"])
    seconds_before = progress["total_seconds"]
    total_seconds = lambda: seconds_before + time.monotonic() - began

    def save(state: State, opt_state: Any, **changes) -> None:
        progress.update(changes, number=progress["number"] + 1, total_seconds=total_seconds())
        checkpoints.save(progress["number"], pack(state, opt_state), progress)

    def timed(task: Task, function: Callable, *args) -> Any:
        """What the function gives; its seconds are those of the task's hooks."""
        start, spent = time.monotonic(), progress["hook_seconds"]
        result = function(*args)
        spent[task.name] = spent.get(task.name, 0.0) + time.monotonic() - start
        return result

    with watch_signals() as stop:
        # --- Before the first task: the pretrained model alone ---------------------------------
        if not progress["rows"]:
            measure(run, progress, 0, state)
            save(state, opt_state)

        # --- Tasks --------------------------------------------------------------------------------
        for number in range(progress["task"], len(plan)):
            task, data = plan[number], functools.partial(plan[number].data, run, number)
            if not progress["stage"] and not progress["step"]:
                state = timed(task, run.begin_task, state, number, data(0))
            for stage in range(progress["stage"], len(task.stages)):
                if not progress["step"]:
                    state = timed(task, run.begin_stage, state, number, stage, data(2 + 2 * stage))
                    opt_state = step.init_optimizer(state["trainable"])
                kept = timed(task, keep_features, run, task, number, stage, state,
                             data(2 + 2 * stage))
                state, opt_state = train_stage(
                    run, task, number + stage * len(plan), stage, state, opt_state, step, kept,
                    progress, metrics.write, save, stop)
                del kept  # its file ends with it
                state = timed(task, run.end_stage, state, number, stage, data(3 + 2 * stage))
                progress["step"] = 0
                if stage + 1 < len(task.stages):
                    save(state, opt_state, stage=stage + 1)
            state = timed(task, run.end_task, state, number, data(1))
            progress["state_bytes"][task.name] = tree_bytes(state)
            measure(run, progress, task.row, state)
            if run.method.trains:
                save_tuning(run, task, run.method.stored(state))
            save(state, opt_state, task=number + 1, stage=0, step=0)
            if number + 1 < len(plan) and hosts.any_host(stop()):
                raise Preempted(143)
    metrics.close()
    checkpoints.close()

    # --- Results ----------------------------------------------------------------------------------
    if run.method.trains and not run.frozen:  # the backbone itself was trained
        params, _ = run.method.resolve(run.model, to_host(state["trainable"]), {})
        hosts.on_first(lambda: backbones.save_backbone(workdir / "backbone", dataclasses.replace(
            run.backbone, name=config["method"]["name"], params=params, stored_hash="")))
    results = summary(run, state, progress)
    results["trace_count"] = step.traces
    results["wall_seconds"]["total"] = total_seconds()
    def end():
        write_json_atomic(workdir / "results.json", results)
        shutil.rmtree(workdir / "checkpoints")  # nothing is left to resume, and some are large

    hosts.on_first(end)
    return read_results(workdir)


class Metrics:
    """`metrics.jsonl`, which the first host writes (see `JsonLinesWriter`)."""

    def __init__(self, path: pathlib.Path, step: int):
        self._writer = hosts.together(
            lambda: JsonLinesWriter(path, resume_step=step) if hosts.is_first() else None)

    def write(self, step: int, **values) -> None:
        """Appends a row."""
        if self._writer:
            self._writer.write(step, **values)

    def close(self) -> None:
        """Closes the file."""
        if self._writer:
            self._writer.close()


@dataclasses.dataclass(frozen=True)
class Task:
    """One training of the plan.

    Attributes:
        name: of the task, or of all tasks joined by +.
        reader: its training split; None where nothing is trained.
        stages: (name, steps) of each stage it is trained in.
        row: of the result matrices that is measured afterwards, the number of tasks seen.
        keeps: features of frozen layers are computed once for each of its stages.
    """

    name: str
    reader: SplitReader | None
    stages: tuple[tuple[str, int], ...]
    row: int
    keeps: bool = False

    def data(self, run: Run, number: int, hook: int) -> TaskData | None:
        """What a hook of task `number` sees, numbered as `Run.task_data` says."""
        return self.reader and run.task_data(self.reader, number, hook)


def make_plan(run: Run) -> list[Task]:
    """What a method is trained on, in order: every task, all of them at once, or nothing."""
    tasks, schedule = run.stream.tasks, run.config["train"]
    if not run.method.trains:
        return [Task(task.name, None, (), row) for row, task in enumerate(tasks, 1)]
    reader = lambda split: read(run.config, run.backbone.tokenizer, split, run.stream.classes)
    readers = [reader(task.train) for task in tasks]
    sizes = [len(r.split.clips) for r in readers]
    stages = [tuple((stage.name, parse_duration(stage.duration or schedule["duration"],
                                                len(r.pairs), schedule["batch_size"]))
                    for stage in run.method.stages(number, sizes[:number + 1]))
              for number, r in enumerate(readers)]
    # One answer for all tasks, or the steps of a stage would be two programs.
    keeps = schedule["keep_features"] and all(r.fixed_inputs for r in readers)
    if run.method.joint:  # as many steps of each stage as the tasks have, one by one
        merged = reader(merge_splits([task.train for task in tasks]))
        together = tuple((same[0][0], sum(steps for _, steps in same)) for same in zip(*stages))
        return [Task("+".join(task.name for task in tasks), merged, together, len(tasks), keeps)]
    return [Task(task.name, r, own, row, keeps)
            for row, (task, r, own) in enumerate(zip(tasks, readers, stages), 1)]


def keep_features(run: Run, task: Task, number: int, stage: int, state: State,
                  data: TaskData) -> Kept:
    """What the steps of a stage find in their batches instead of computing it in each."""
    if not task.keeps:
        return NOTHING
    schedule = run.config["train"]
    limits = Limits(schedule["keep_memory_bytes"], schedule["keep_disk_bytes"], run.workdir)
    return keep(run.method, state, number, stage, data, limits)


def train_stage(run: Run, task: Task, number: int, stage: int, state: State, opt_state: Any, step,
                kept: Kept, progress: dict, write: Callable, save: Callable, stop: Callable):
    """Trains stage `stage` of a task from step progress['step'] on; returns (state, opt_state).

    `number` is that of this training among all of the run: of the task, in its first stage.
    """
    name, steps = task.stages[stage]
    earlier, start = progress["train_seconds"].get(task.name, 0.0), time.monotonic()
    seconds = lambda: progress["train_seconds"] | {task.name: earlier + time.monotonic() - start}
    before = progress["global_step"] - progress["step"]

    def refresh(step: int, trainable: Any) -> Any:
        nonlocal state
        if step and step % epoch == 0:
            state = run.begin_epoch(state | {"trainable": trainable}, data)
        return state["aux"]

    epoch = task.reader.steps_per_epoch(run.config["train"]["batch_size"])
    data = dataclasses.replace(task.data(run, number, 2 + 2 * stage), kept=kept)
    loop = TaskLoop(
        step, run.mesh, jax.random.fold_in(jax.random.fold_in(run.key, STEP_KEY), number),
        write=lambda n, values: write(before + n, task=task.name, **({"stage": name} if name else
                                                                     {}), **values),
        save=lambda n, trainable, opt_state: save(
            state | {"trainable": trainable}, opt_state, stage=stage, step=n,
            global_step=before + n, train_seconds=seconds()),
        stop=stop, clip_name=lambda row: (task.reader.split.clips[row].id if row >= 0
                                          else "of the memory"),
        log_every=run.config["train"]["log_every"],
        save_seconds=run.config["train"]["save_seconds"],
        keys=(*STEP_KEYS, *run.method.replay_shapes(run.model, 1), *kept.arrays),
        refresh=refresh if run.method.refreshes else None)
    trainable, opt_state = loop.run(
        f"{run.config['method']['name']}: {task.name}" + (name and f", {name}"),
        training_batches(run, task, number, state, kept, progress["step"]), state["trainable"],
        opt_state, run.frozen, state["aux"], run.method.update_mask(state), progress["step"],
        steps)
    usual = statistics.median(loop.seconds) if loop.seconds else None
    progress.update(train_seconds=seconds(), global_step=before + steps,
                    step_seconds=progress["step_seconds"] | {task.name: usual})
    return state | {"trainable": trainable}, opt_state


def training_batches(run: Run, task: Task, number: int, state: State, kept: Kept,
                     start_step: int):
    """This host's rows of the batches of a task from `start_step` on, with those of what is kept.

    A batch is the reader's rows and, after them, those of the memory, on however many hosts.
    """
    seed = int(np.random.SeedSequence([run.config["seed"], number]).generate_state(1)[0])
    size = run.config["train"]["batch_size"]
    replayed = run.method.replay_rows(state, size)
    rows, read, chosen = local_rows(run.mesh, size), None, slice(None)
    if rows is not None:  # each draws all rows of the memory, and takes its own
        read = rows[rows < size - replayed]
        read = read if len(read) else np.array([0])  # a batch is drawn for, and not used
        new = np.searchsorted(rows, size - replayed)
        chosen = np.concatenate([np.arange(new), rows[new:] - (size - replayed) + len(read)])
    batches = task.reader.train_batches(  # rows of the memory are whole
        size - replayed, seed, start_step, read, whole_text=replayed > 0)
    for step, batch in enumerate(batches, start_step):
        random = np.random.default_rng([seed, step])
        batch = run.method.replay(state, batch | kept.rows(batch), replayed, task.reader, random)
        yield {name: values[chosen] for name, values in batch.items()}


def measure(run: Run, progress: dict, row: int, state: State) -> None:
    """Adds row `row` of every result matrix to the progress."""
    start = time.monotonic()
    progress["rows"][str(row)] = run.measure(row, state)
    progress["evaluation_seconds"] += time.monotonic() - start


def save_tuning(run: Run, task: Task, tree: dict) -> None:
    """Writes what was learned so far, with the backbone it belongs to; earlier files go where the
    last is wanted alone."""
    method = run.config["method"]
    if "tasks" in method:  # as many as the stream had
        method = method | {"tasks": run.method.tasks}
    header = {"kind": "tuning", "method": method, "task": task.name,
              "backbone": run.backbone.name, "backbone_sha256": run.backbone.sha256,
              "model": run.model.to_dict()}
    tree, folder = to_host(tree), run.workdir / "tuning"

    def write():
        save_tree(folder / f"task_{task.row}.safetensors", tree, header)
        if run.config["train"]["tuning_files"] == "last":
            for row in range(1, task.row):
                (folder / f"task_{row}.safetensors").unlink(missing_ok=True)

    hosts.on_first(write)


def pack(state: State, opt_state: Any) -> dict:
    """What a checkpoint holds; the optimizer's state as a plain list of arrays."""
    return {"state": state, "optimizer": jax.tree.leaves(opt_state)}


def unpack(packed: dict, opt_state: Any) -> tuple[State, Any]:
    """(state, optimizer state) of what `pack` made."""
    treedef = jax.tree.structure(opt_state)
    return packed["state"], jax.tree.unflatten(treedef, packed["optimizer"])


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def summary(run: Run, state: State, progress: dict) -> dict:
    """`results.json`: matrices a row for each number of tasks done, and their summaries."""
    measured = {int(row): values for row, values in progress["rows"].items()}
    names = [task.name for task in run.stream.tasks]
    matrices = {key: [measured[row][key] if row in measured else [None] * len(names)
                      for row in range(len(names) + 1)] for key in measured[0]}
    summaries = summarize(matrices)
    if run.stream.classes:
        sizes = [len(reader.split.clips) for reader in run.tests]
        summaries["accuracy/pooled"] = summarize_pooled(matrices["accuracy/seen"], sizes)
    device = jax.local_devices()[0]
    total = count(run.backbone.params, BUFFERS)
    return {
        "schema": 1, "method": run.config["method"]["name"], "stream": stream_name(run.config),
        "tasks": names, "seed": run.config["seed"], "order": names,
        "evaluation_split": run.config["eval"]["split"],
        "backbone": {"name": run.backbone.name, "sha256": run.backbone.sha256,
                     "parameters": total},
        "trainable_parameters": count(state["trainable"], BUFFERS),
        "total_parameters": total,
        "state_bytes": progress["state_bytes"],
        "memory_bytes": tree_bytes(state.get("memory")),
        "memory_pairs": int(np.sum(state["memory"]["mask"])) if "memory" in state else 0,
        "matrices": matrices, "summary": summaries,
        "wall_seconds": {"train": progress["train_seconds"], "hooks": progress["hook_seconds"],
                         "step": progress["step_seconds"],
                         "evaluate": progress["evaluation_seconds"]},
        "peak_memory_bytes": peak_memory(),
        "versions": {name: importlib.metadata.version(name)
                     for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")}
        | {"python": platform.python_version()},
        "device": f"{device.device_kind} x {jax.device_count()}",
    }


def main() -> None:
    """The command."""
    settings.start_jax(many_hosts=True)
    workdir = pathlib.Path(flags.FLAGS.workdir)
    try:
        results = train(cli.plain(flags.FLAGS.config), workdir)
    except Diverged as error:
        cli.fail(error, 3)
    except Preempted:
        hosts.say(f"{workdir}: stopped by a signal, the state is saved; the same command resumes")
        raise
    if not hosts.is_first():
        return
    if "accuracy/seen" in results["matrices"]:
        print("accuracy in % among the classes seen, on every session after each:")
        print(tables.matrix_text(results["matrices"]["accuracy/seen"], results["tasks"]))
    elif results["matrices"]:
        print("R@1 in %, mean of both directions, on every corpus after each task:")
        print(tables.matrix_text(tables.mean_matrix([results], "R@1"), results["tasks"]))
    print(f"results: {workdir / 'results.json'}")


def define_flags() -> None:
    """--config and --workdir."""
    cli.define_config()
    flags.DEFINE_string("workdir", None, "Folder of the run; start again there to resume.",
                        required=True)


if __name__ == "__main__":
    cli.run(main, define_flags)
