"""From plain configuration dicts to the objects that the commands work with."""

from __future__ import annotations

import hashlib
import os
import pathlib

import jax
import numpy as np

from data_pipelines.augment import SpecAugment
from data_pipelines.batches import DataSettings
from data_pipelines.corpora import SPLIT_NAMES
from data_pipelines.log_mel import LogMelSettings
from tail_jax.training.optimizers import OptimizerConfig, parse_duration


def start_jax() -> None:
    """Turns the persistent compilation cache on: the second run of a shape starts at once."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR",
                           os.path.expanduser("~/.cache/tail_jax/compiled"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def check(config: dict, devices: int) -> None:
    """Looks at the values before anything is read; `devices` is the mesh's `data` axis.

    Raises:
        ValueError: names the first field out of range, what it is and what is expected.
    """
    train, evaluation = config["train"], config["eval"]
    for name, value, least in (
            ("seed", config["seed"], 0), ("train.batch_size", train["batch_size"], 1),
            ("train.accumulation", train["accumulation"], 1),
            ("train.log_every", train["log_every"], 1),
            ("train.save_seconds", train["save_seconds"], 0),
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
    OptimizerConfig(**config["optimizer"])
    parse_duration(train["duration"], 1, 1)
    if evaluation["split"] not in SPLIT_NAMES:
        raise ValueError(f"eval.split is {evaluation['split']!r}; expected one of "
                         f"{', '.join(SPLIT_NAMES)}")


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
