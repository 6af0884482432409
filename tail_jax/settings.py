"""From plain configuration dicts to the objects that the commands work with."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import os

import jax
import numpy as np

from data_pipelines.augment import SpecAugment
from data_pipelines.batches import DataSettings
from data_pipelines.corpora import SPLIT_NAMES
from data_pipelines.log_mel import LogMelSettings
from tail_jax import backbone as backbones
from tail_jax import hosts, process
from tail_jax.cli import plain
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.training.optimizers import OptimizerConfig, parse_duration
from tail_jax.training.step import REMAT


def start_jax(many_hosts: bool = False) -> None:
    """Turns the compilation cache on (`process.keep_programs`): a shape's second run starts at once.

    Freed memory is kept (`process.keep_freed_memory`) but for what is free when a program has been
    compiled, in pieces that the next would not fit in. Where jax has no accelerator to run on, a
    call of a program returns when it is done: in a thread of its own it tells that its results
    are there before it gives its temporary memory back, and the next call takes another.
    With `many_hosts` it joins those that the environment names (`hosts.join`).

    Raises:
        ValueError: if they cannot be joined, or this command runs on one host only.
    """
    (hosts.join if many_hosts else hosts.refuse)()
    process.keep_programs()
    # jax must not be asked: it would start.
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    if jax.config.jax_platforms == "cpu" or not (plugins or importlib.util.find_spec("libtpu")):
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if process.keep_freed_memory():
        jax.monitoring.register_event_duration_secs_listener(_after_compiling)


def _after_compiling(event: str, seconds: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":  # or found in the cache
        process.give_back_freed_memory()


def check(config: dict, devices: int) -> None:
    """Looks at the values before anything is read; `devices` share the rows of a batch.

    Raises:
        ValueError: names the first field out of range, what it is and what is expected.
    """
    train, evaluation = config["train"], config["eval"]
    for name, value, least in (
            ("seed", config["seed"], 0), ("train.batch_size", train["batch_size"], 1),
            ("train.accumulation", train["accumulation"], 1),
            ("train.log_every", train["log_every"], 1),
            ("train.save_seconds", train["save_seconds"], 0),
            # Runs made earlier, which can still be measured, have neither.
            ("train.keep_memory_bytes", train.get("keep_memory_bytes", 0), 0),
            ("train.keep_disk_bytes", train.get("keep_disk_bytes", 0), 0),
            ("eval.batch_size", evaluation["batch_size"], 1)):
        if value < least:
            raise ValueError(f"{name} is {value}; expected {least} or more")
    for name, value, parts in (
            ("train.batch_size", train["batch_size"], devices * train["accumulation"]),
            ("eval.batch_size", evaluation["batch_size"], devices)):
        if value % parts:
            accumulated = f" and {train['accumulation']} parts each" if parts != devices else ""
            raise ValueError(f"{name} is {value}, which {devices} devices of the data axis"
                             f"{accumulated} cannot share equally; expected a multiple of {parts}")
    if train.get("remat", "none") not in REMAT:
        raise ValueError(f"train.remat is {train['remat']!r}; expected one of {', '.join(REMAT)}")
    OptimizerConfig(**config["optimizer"])
    parse_duration(train["duration"], 1, 1)
    if train.get("tuning_files", "all") not in ("all", "last"):
        raise ValueError(f"train.tuning_files is {train['tuning_files']!r}; expected 'all', one "
                         "for each task, or 'last'")
    if evaluation["split"] not in SPLIT_NAMES:
        raise ValueError(f"eval.split is {evaluation['split']!r}; expected one of "
                         f"{', '.join(SPLIT_NAMES)}")


def with_checkpoint(config: dict) -> dict:
    """`config` with the model and the front end of `model.checkpoint`, where there is one.

    What the checkpoint decides replaces what the configuration says, and where these differ in
    the front end, a line on stderr tells. `model.dtype` and `data.max_tokens` stay the user's;
    two checkpoints joined by + keep the pooling of `model.text` and `model.embedding`.

    Raises:
        ValueError: if it cannot be read, or cannot be trained for retrieval.
    """
    path = config["model"]["checkpoint"]
    if not path:
        return config
    parts = checkpoint_parts(path)
    described = [backbones.describe(part) for part in parts]
    model, front_end, _ = described[0]
    max_tokens = described[-1][2]
    if len(parts) == 2:
        text = described[1][0].text
        if model.audio is None or text is None:
            raise ValueError(f"model.checkpoint is {path!r}; expected one with an audio tower, "
                             "then one with a text tower")
        pools = {text.pool, config["model"]["text"]["pool"]}
        if pools == {"cls", "mean"}:  # a pooler has weights: it is there or not
            text = dataclasses.replace(text, pool=config["model"]["text"]["pool"])
        model = DualEncoder(model.audio, text, config["model"]["embedding"])
    if len(model.towers) < 2 and config["stream"]["kind"] != "classes":
        raise ValueError(f"model.checkpoint is {path!r}, a model of {[*model.towers][0]} alone; "
                         "retrieval needs two towers: join an audio and a text checkpoint as "
                         "AUDIO+TEXT")
    if front_end is None or front_end.is_waveform:
        raise ValueError(f"model.checkpoint is {path!r}, which takes waveforms; training feeds "
                         "log-mels only, such a model can embed")
    if model.text is not None and config["data"]["max_tokens"] > max_tokens:
        raise ValueError(f"data.max_tokens is {config['data']['max_tokens']}; {path} takes "
                         f"{max_tokens} at most")
    front = {"log_mel": dataclasses.asdict(front_end.settings),
             "window_seconds": front_end.window_seconds}
    before = config["data"]["log_mel"] | {"window_seconds": config["data"]["window_seconds"]}
    after = front["log_mel"] | {"window_seconds": front["window_seconds"]}
    changes = [f"{k} {before.get(k)!r} -> {after[k]!r}" for k in after if before.get(k) != after[k]]
    if changes:
        hosts.say(f"{path}: its front end replaces that of the configuration: "
                  f"{', '.join(changes)}")
    kept = {k: config["model"][k] for k in ("dtype", "checkpoint")}
    return config | {"model": plain(model.to_dict()) | kept, "data": config["data"] | front}


def checkpoint_parts(path: str) -> list[str]:
    """The one or two paths that `model.checkpoint` names."""
    return [path] if os.path.exists(path) or path.count("+") != 1 else path.split("+")


def described_model(config: dict) -> DualEncoder:
    """The model that `config.model` describes."""
    return DualEncoder.from_dict({k: v for k, v in config["model"].items() if k != "checkpoint"})


def data_settings(config: dict) -> DataSettings:
    """`config.data` as the pipeline takes it."""
    values = {k: v for k, v in config.items() if k != "root"}
    if values.get("spec_augment"):
        values["spec_augment"] = SpecAugment(**values["spec_augment"])
    return DataSettings(**values | {"log_mel": LogMelSettings(**config["log_mel"])})


def stream_spec(config: dict) -> dict:
    """`config.stream` as `build_stream` takes it; embedded corpora are made in the cache."""
    root = config["data"]["root"]
    if config["stream"]["kind"] == "embedded":
        root = os.path.join(config["data"]["cache_dir"], "corpora")
    return config["stream"] | {"root": root}


def corpus_hash(stream) -> str:
    """Hash of the clips' names and captions of a stream."""
    digest = hashlib.sha256()
    for task in stream.tasks:
        for clip in task.train.clips:
            digest.update(f"{clip.id}\n{clip.path.parent.parent.name}\n{clip.captions}\n".encode())
    return digest.hexdigest()[:12]


def mel_statistics(reader, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of each mel band over a split, [mels] float64."""
    total = square = rows = 0
    for batch in reader.audio_batches(batch_size):
        x = batch["audio"][batch["mask"]].astype(np.float64)
        total, square = total + x.sum((0, 1)), square + (x**2).sum((0, 1))
        rows += x.shape[0] * x.shape[1]
    mean = total / rows
    return mean, square / rows - mean**2
