"""Settings that experiments share; every other file of this folder is one experiment."""

import dataclasses

from ml_collections import ConfigDict, config_dict

from data_pipelines.batches import DataSettings
from data_pipelines.log_mel import LogMelSettings
from tail_jax import methods
from tail_jax.models.presets import preset
from tail_jax.training.optimizers import OptimizerConfig

# 16 kHz, 128 frames of 20 ms, 32 bands: what the mini presets take.
MINI_LOG_MEL = LogMelSettings(sampling_rate=16000, n_fft=640, hop_length=320, n_mels=32, fmin=50.0,
                              fmax=8000.0)


def mini_front_end(seconds: float) -> tuple[LogMelSettings, float]:
    """Front end of about so many seconds in 128 frames of 32 bands, and its window in seconds.

    A window is 127.5 hops of whole samples, so it differs from `seconds` by half a sample a frame
    at most (4 ms): 2.55 s gives MINI_LOG_MEL. A frame is two hops long, and at least 25 ms: that
    resolves the lowest bands, whose centres are 90 Hz apart.

    Raises:
        ValueError: below 0.1 s or above 10.2 s.
    """
    if not 0.1 <= seconds <= 10.2:
        raise ValueError(f"config argument seconds={seconds}; expected 0.1 to 10.2, the window "
                         "that 128 frames cover")
    hop = round(seconds * MINI_LOG_MEL.sampling_rate / 127.5)
    return (dataclasses.replace(MINI_LOG_MEL, n_fft=max(2 * hop, 400), hop_length=hop),
            127.5 * hop / MINI_LOG_MEL.sampling_rate)


def parse(arg: str | None, **defaults) -> dict:
    """'method=ptat,seed=1' -> a dict with the types of the defaults.

    Raises:
        ValueError: on anything that is not key=value with a known key.
    """
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in defaults:
            raise ValueError(f"config argument {part!r}; expected key=value with a key of "
                             f"{', '.join(defaults)}")
        values[key] = type(defaults[key])(value)
    return values


def arrange(tasks: tuple, order: str, count: int = 0) -> tuple[tuple, tuple]:
    """(tasks, order) for `config.stream`: the first `count` (0: all) of `tasks` in `order`.

    Args:
        tasks: dicts with a name, in the order of the paper.
        order: "paper", "reverse", or all names joined by +.

    Raises:
        ValueError: if the order is no permutation of the names, or the count is out of range.
    """
    names = [task["name"] for task in tasks]
    chosen = {"paper": names, "reverse": names[::-1]}.get(order, order.split("+"))
    if sorted(chosen) != sorted(names):
        raise ValueError(f"config argument order={order}; expected paper, reverse or each of "
                         f"{', '.join(names)} once, joined by +")
    if not 0 <= count <= len(names):
        raise ValueError(f"config argument tasks={count}; expected 0 (all) to {len(names)}")
    chosen = chosen[:count or None]
    kept = tuple(task for task in tasks if task["name"] in chosen)
    return kept, () if order == "paper" else tuple(chosen)


def base_config(method: str, seed: int, model: str, log_mel: LogMelSettings, *,
                window_seconds: float, max_tokens: int, classes: bool = False) -> ConfigDict:
    """The fields of every experiment, with the defaults of the specification.

    Args:
        classes: whether the method's settings are those of class-incremental streams.
    """
    data = dataclasses.asdict(DataSettings(
        log_mel=log_mel, window_seconds=window_seconds, max_tokens=max_tokens,
        cache_dir="runs/cache"))
    data["root"] = "runs/cache"
    data["num_parallel"] = config_dict.placeholder(int)
    data["spec_augment"] = config_dict.placeholder(dict)
    return ConfigDict({
        "seed": seed,
        "model": preset(model).to_dict() | {"checkpoint": ""},
        "backbone": {"kind": "pretrain", "pretrain": {}},
        "method": methods.defaults(method, classes),
        "data": data,
        "stream": {"kind": "folders", "name": "", "tasks": (), "scenes": {}, "order": (),
                   "limit": 0},
        "optimizer": dataclasses.asdict(OptimizerConfig()),
        # remat: none, or blocks: the backward pass computes the towers' blocks again.
        "train": {"duration": "10 epochs", "batch_size": 128, "accumulation": 1, "remat": "none",
                  "log_every": 10, "save_seconds": 300.0, "tuning_files": "all",
                  "keep_features": True, "keep_memory_bytes": 2**30, "keep_disk_bytes": 2**35},
        "eval": {"split": "test", "batch_size": 256},
        # Devices along each axis, data = -1: all that are left. Rows of a batch are split over data
        # and fsdp, wide layers over model, large parameters over fsdp.
        "mesh": {"data": -1, "model": 1, "fsdp": 1},
    })
