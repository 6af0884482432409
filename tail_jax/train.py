"""Trains a method on a stream of corpora, one task after another, and measures what it keeps.

    python -m tail_jax.train --config=configs/quickstart.py:method=ptat,seed=0 --workdir=DIR

config -> stream -> backbone -> for each task: begin, steps, end, one row of every result matrix,
checkpoint -> results.json. Killed at any moment and started again with the same command, a run
ends in the same bits.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import pathlib
import platform
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from data_pipelines.batches import SplitReader, merge_splits
from data_pipelines.corpora import normalise_caption
from data_pipelines.streams import build_stream
from data_pipelines.text import Tokenizer
from tail_jax import backbone as backbones
from tail_jax import cli, methods, settings
from tail_jax.evaluation.continual import summarize
from tail_jax.evaluation.retrieval import TaskEmbeddings, evaluate_row
from tail_jax.models.dual_encoder import BUFFERS, DualEncoder
from tail_jax.reporting.writers import JsonLinesWriter, read_results, write_json_atomic
from tail_jax.training import sharding, teacher
from tail_jax.training.checkpoints import Checkpoints, save_tree
from tail_jax.training.embedder import Embedder
from tail_jax.training.loop import Preempted, TaskLoop, watch_signals
from tail_jax.training.optimizers import OptimizerConfig, make_optimizer, parse_duration
from tail_jax.training.step import cast_frozen, make_train_step
from tail_jax.tuning.masks import count

# PRNG streams of a run; each is folded into the key of its seed.
INIT_KEY, STEP_KEY = 0, 1


def train(config: dict, workdir: pathlib.Path) -> dict:
    """Runs `config` (plain dicts) in `workdir`, from wherever it was left; returns the results.

    Raises:
        ValueError: for settings or data that cannot be used, in one line.
        Diverged: when the loss stops being finite.
        Preempted: after SIGTERM, with the state saved.
    """
    workdir = pathlib.Path(workdir)
    cli.check_config(workdir, config)
    if (workdir / "results.json").exists():
        return read_results(workdir)
    began = time.monotonic()

    # --- Devices, stream, backbone ------------------------------------------------------------
    mesh = sharding.make_mesh(**config["mesh"])
    method = methods.build(config["method"])
    stream = build_stream(settings.stream_spec(config))
    backbone = prepare_backbone(config, stream, workdir)
    model, tokenizer = backbone.model, Tokenizer.load(backbone.tokenizer)
    data = settings.data_settings(config["data"])
    read = lambda split: SplitReader(split, tokenizer, data)
    tests = [read(getattr(task, config["eval"]["split"])) for task in stream.tasks]
    trains = [read(task.train) for task in stream.tasks] if method.trains else []
    report_skipped(trains + tests)

    # --- The method: state beside a frozen backbone -------------------------------------------
    key = jax.random.key(config["seed"])
    state = method.init(jax.random.fold_in(key, INIT_KEY), model, backbone.params)
    frozen = cast_frozen(method.frozen(backbone.params), model.dtype)
    frozen = sharding.put_tree(frozen, sharding.parameter_shardings(frozen, mesh))
    state = place(state, mesh)
    batch_size, tc = config["train"]["batch_size"], config["train"]
    optimizer = make_optimizer(OptimizerConfig(**config["optimizer"]), method, state["trainable"])
    mask = method.update_mask(state)
    step = make_train_step(model, method, optimizer, mesh, state["trainable"], frozen,
                           tc["accumulation"])
    embedder = Embedder(model, method, mesh, config["eval"]["batch_size"])

    # --- The plan: what is trained on, and which row of the matrices follows ------------------
    steps = [parse_duration(tc["duration"], len(r.pairs), batch_size) for r in trains]
    if not method.trains:
        plan = [(task.name, None, 0) for task in stream.tasks]
    elif method.joint:
        merged = read(merge_splits([task.train for task in stream.tasks]))
        plan = [("+".join(task.name for task in stream.tasks), merged, sum(steps))]
    else:
        plan = [(task.name, reader, n) for task, reader, n in zip(stream.tasks, trains, steps)]
    rows_after = [len(stream.tasks)] if method.joint else list(range(1, len(plan) + 1))

    # --- Resume -------------------------------------------------------------------------------
    checkpoints = Checkpoints(workdir / "checkpoints")
    opt_state = jax.jit(optimizer.init)(state["trainable"])
    progress = checkpoints.progress() or {
        "number": 0, "task": 0, "step": 0, "global_step": 0, "rows": {}, "train_seconds": {},
        "evaluation_seconds": 0.0}
    if progress["number"]:
        restored = checkpoints.restore(pack(state, opt_state))
        state, opt_state = unpack(restored, opt_state)
        print(f"{workdir}: resumes at task {progress['task'] + 1}, step {progress['step']}",
              file=sys.stderr)
    metrics = JsonLinesWriter(workdir / "metrics.jsonl", resume_step=progress["global_step"])

    def save(state, opt_state, **changes):
        progress.update(changes, number=progress["number"] + 1)
        checkpoints.save(progress["number"], pack(state, opt_state), progress)

    def measure(row: int, trainable, aux, embedder=embedder, frozen=frozen) -> None:
        start = time.monotonic()
        fresh = []
        for task, reader in enumerate(tests):
            fresh.append(TaskEmbeddings(
                embedder.audio(reader, trainable, frozen, aux),
                embedder.text(reader, trainable, frozen, aux), reader.split.caption_clip,
                [normalise_caption(c) for c in reader.split.captions]))
        folder = workdir / "galleries"
        if row and not method.joint:
            save_tree(folder / f"task_{row}.safetensors",
                      {"audio": fresh[row - 1].audio, "text": fresh[row - 1].text},
                      {"kind": "gallery", "task": stream.tasks[row - 1].name})
        stale = [load_gallery(folder / f"task_{j + 1}.safetensors") if j < row and not method.joint
                 else None for j in range(len(tests))]
        progress["rows"][str(row)] = evaluate_row(fresh, stale, row)
        progress["evaluation_seconds"] += time.monotonic() - start

    with watch_signals() as stop:
        # --- Before the first task: the pretrained model alone ---------------------------------
        if not progress["rows"]:
            bare = methods.build(methods.defaults("frozen"))
            params = sharding.put_tree(
                backbone.params, sharding.parameter_shardings(backbone.params, mesh))
            measure(0, {}, {}, Embedder(model, bare, mesh, config["eval"]["batch_size"]), params)
            del params
            save(state, opt_state)

        # --- Tasks ------------------------------------------------------------------------------
        for task in range(progress["task"], len(plan)):
            name, reader, total = plan[task]
            if progress["step"] == 0:
                state = method.begin_task(state, task)
                opt_state = jax.jit(optimizer.init)(state["trainable"])
            if total:
                start_seconds = progress["train_seconds"].get(name, 0.0)
                start = time.monotonic()
                elapsed = lambda: start_seconds + time.monotonic() - start
                before = progress["global_step"] - progress["step"]
                batches = training_batches(config, method, reader, embedder, state, frozen, task,
                                           progress["step"])
                loop = TaskLoop(
                    step, mesh, jax.random.fold_in(jax.random.fold_in(key, STEP_KEY), task),
                    write=lambda n, values: metrics.write(before + n, task=name, **values),
                    save=lambda n, trainable, opt: save(
                        state | {"trainable": trainable}, opt, step=n, global_step=before + n,
                        train_seconds=progress["train_seconds"] | {name: elapsed()}),
                    stop=stop, log_every=tc["log_every"], save_seconds=tc["save_seconds"])
                trainable, opt_state = loop.run(
                    f"{config['method']['name']}: {name}", batches, state["trainable"], opt_state,
                    frozen, state["aux"], mask, progress["step"], total)
                state = state | {"trainable": trainable}
                progress["train_seconds"][name] = elapsed()
                progress["global_step"] = before + total
            state = method.end_task(state, task)
            measure(rows_after[task], state["trainable"], state["aux"])
            header = {"kind": "tuning", "method": config["method"], "task": name,
                      "backbone": backbone.name, "backbone_sha256": backbone.sha256,
                      "model": model.to_dict()}
            if method.trains:
                save_tree(workdir / "tuning" / f"task_{rows_after[task]}.safetensors",
                          jax.device_get(state["trainable"]), header)
            save(state, opt_state, task=task + 1, step=0)
            if stop() and task + 1 < len(plan):
                raise Preempted(143)
    metrics.close()
    checkpoints.close()

    # --- Results ------------------------------------------------------------------------------
    if method.trains and not method.frozen(backbone.params):
        params = jax.device_get(method.resolve(model, state["trainable"], {})[0])
        backbones.save_backbone(workdir / "backbone", config["method"]["name"], model, params,
                                backbone.front_end, backbone.tokenizer)
    results = summary(config, stream, backbone, state, progress, len(tests))
    results["trace_count"] = step.traces
    results["wall_seconds"]["total"] = time.monotonic() - began
    write_json_atomic(workdir / "results.json", results)
    return read_results(workdir)


def prepare_backbone(config: dict, stream, workdir: pathlib.Path) -> backbones.Backbone:
    """The backbone that `config.backbone` asks for: from a folder, pretrained here, or random.

    Pretraining is a run of `train` in a folder named by the hash of everything it depends on, so
    it happens once, and resumes when killed.
    """
    kind, front_end = config["backbone"]["kind"], backbones.front_end_of(config["data"])
    if kind == "checkpoint":
        if not config["backbone"]["path"]:
            raise ValueError("backbone.path is empty; pass --config.backbone.path=DIR, a backbone "
                             "folder such as WORKDIR/backbone of a pretraining run")
        backbone = backbones.load_backbone(config["backbone"]["path"])
        if backbone.front_end != front_end:
            raise ValueError(f"{config['backbone']['path']}: made for the front end "
                             f"{backbone.front_end}, config.data says {front_end}")
        return backbone
    if kind == "pretrain":
        inner = config | config["backbone"]["pretrain"] | {
            "backbone": {"kind": "random", "path": "", "pretrain": {}}}
        inner["stream"] = inner["stream"] | {"limit": 0}
        base = build_stream(settings.stream_spec(inner))
        digest = backbones.content_hash(
            {k: v for k, v in inner.items() if k not in ("data", "mesh", "eval")}, front_end,
            settings.corpus_hash(base))
        folder = pathlib.Path(config["data"]["cache_dir"]) / "backbones" / digest
        if not (folder / "backbone" / backbones.WEIGHTS).exists():
            print(f"pretraining the backbone in {folder} (once)", file=sys.stderr)
            train(inner, folder)
        return dataclasses.replace(backbones.load_backbone(folder / "backbone"),
                                   name=f"{stream_name(inner)}-{digest}")
    if kind != "random":
        raise ValueError(f"backbone.kind is {kind!r}; expected checkpoint, pretrain or random")
    model = DualEncoder.from_dict(config["model"])
    captions = [caption for task in stream.tasks for caption in task.train.captions]
    tokenizer = Tokenizer.train(captions, model.text.vocab_size)
    tokenizer.save(workdir / "tokenizer.json")
    data = settings.data_settings(config["data"])
    mean, var = settings.mel_statistics(
        SplitReader(stream.tasks[0].train, tokenizer, data), config["eval"]["batch_size"])
    return backbones.random_backbone(model, config["seed"], front_end, workdir / "tokenizer.json",
                                     mean, var)


def stream_name(config: dict) -> str:
    """The name of the stream, for people."""
    return config["stream"]["name"] or config["stream"]["kind"]


def training_batches(config, method, reader, embedder, state, frozen, task, start_step):
    """The batches of a task from `start_step` on, with the teacher's embeddings where they can be kept."""
    seed = int(np.random.SeedSequence([config["seed"], task]).generate_state(1)[0])
    batches = reader.train_batches(config["train"]["batch_size"], seed, start_step,
                                   jax.process_index(), jax.process_count())
    if not (method.has_teacher and config["train"]["cache_teacher"] and reader.fixed_inputs):
        return batches
    old, aux = state["aux"]["teacher"], state["aux"]
    return teacher.cached(batches, embedder.audio(reader, old, frozen, aux, training=True),
                          embedder.text(reader, old, frozen, aux))


def place(state, mesh):
    """The state on the mesh: the trainable tree by the rules, everything else on every device."""
    small = sharding.put_tree(state["trainable"],
                              sharding.parameter_shardings(state["trainable"], mesh))
    here = sharding.replicated(mesh)
    return state | {"trainable": small, "aux": jax.tree.map(
        lambda x: jax.device_put(np.array(x), here), state["aux"])}


def pack(state, opt_state):
    """What a checkpoint holds; the optimizer's state as a plain list of arrays."""
    return {"state": state, "optimizer": jax.tree.leaves(opt_state)}


def unpack(packed, opt_state):
    """(state, optimizer state) of what `pack` made."""
    treedef = jax.tree.structure(opt_state)
    return packed["state"], jax.tree.unflatten(treedef, packed["optimizer"])


def load_gallery(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """(audio, text) embeddings of a test set as stored at the end of its task."""
    tree, _ = backbones.load_tree(path)
    return tree["audio"], tree["text"]


def report_skipped(readers) -> None:
    """Counts and lists clips left out because of `data.on_error=skip`."""
    for reader in readers:
        for problem in reader.problems:
            print(f"skipped {reader.split.corpus}/{reader.split.name}: {problem.message}",
                  file=sys.stderr)
        if reader.problems:
            print(f"skipped {len(reader.problems)} clips of {reader.split.corpus}/"
                  f"{reader.split.name}", file=sys.stderr)


def summary(config, stream, backbone, state, progress, tasks: int) -> dict:
    """`results.json`: matrices with a row for each number of tasks done, and what follows from them."""
    measured = {int(row): values for row, values in progress["rows"].items()}
    names = [task.name for task in stream.tasks]
    matrices = {key: [measured[row][key] if row in measured else [None] * tasks
                      for row in range(tasks + 1)] for key in measured[0]}
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {
        "schema": 1, "method": config["method"]["name"], "stream": stream_name(config),
        "tasks": names, "seed": config["seed"], "order": names,
        "evaluation_split": config["eval"]["split"],
        "backbone": {"name": backbone.name, "sha256": backbone.sha256,
                     "parameters": count(backbone.params, BUFFERS)},
        "trainable_parameters": count(state["trainable"], BUFFERS),
        "total_parameters": count(backbone.params, BUFFERS),
        "matrices": matrices, "summary": summarize(matrices),
        "wall_seconds": {"train": progress["train_seconds"],
                         "evaluate": progress["evaluation_seconds"]},
        "peak_memory_bytes": stats.get(
            "peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        "versions": {name: importlib.metadata.version(name)
                     for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")}
        | {"python": platform.python_version()},
        "device": f"{device.device_kind} x {jax.device_count()}",
    }


def main() -> None:
    """The command."""
    settings.start_jax()
    config = cli.plain(CONFIG.value)
    results = train(config, pathlib.Path(WORKDIR.value))
    print(results["summary"]["text_to_audio/R@1/own/fresh"])
    print(f"results: {pathlib.Path(WORKDIR.value) / 'results.json'}")


CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; start again there to resume.")
flags.mark_flags_as_required(["config", "workdir"])

if __name__ == "__main__":
    cli.run(main)
