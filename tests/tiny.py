"""A real run in miniature: three caption folders of tones and a model of a few thousand parameters.

It is also a configuration file, so that commands can be tested on it:

    python -m tail_jax.train --config=tests/tiny.py:root=FOLDER,method=ptat --workdir=DIR
"""

import csv
import dataclasses
import pathlib

import numpy as np
import soundfile
from ml_collections import ConfigDict

from configs import common
from data_pipelines.log_mel import LogMelSettings

RATE = 8000


@dataclasses.dataclass(frozen=True)
class TwoTowers:
    """What losses on given embeddings ask of a model."""

    embedding: int = 5
    classes: int = 0

    towers = {"audio": None, "text": None}


LOG_MEL = LogMelSettings(sampling_rate=RATE, n_fft=256, hop_length=128, n_mels=16, fmin=50.0,
                         fmax=4000.0)
# Train, valid and test clips of each task: no size is a multiple of a batch, no two are equal.
SIZES = {"low": (11, 3, 5), "high": (6, 3, 4), "noisy": (9, 2, 7)}


def write_folders(root: pathlib.Path) -> None:
    """Writes the three caption folders of `SIZES` below `root`."""
    for number, (task, sizes) in enumerate(SIZES.items()):
        random = np.random.default_rng(number)
        folder = root / task
        folder.mkdir(parents=True)
        with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["file_name", "caption", "label", "group", "split"])
            clip = 0
            for split, size in zip(("train", "valid", "test"), sizes):
                for _ in range(size):
                    # Shorter than the window, and long enough for two chunks.
                    time = np.arange(int(RATE * (0.3, 0.7, 1.3)[clip % 3])) / RATE
                    pitch = int(80 * (1 + number) * 1.17**clip) % 3500 + 60
                    sound = 0.3 * np.sin(2 * np.pi * pitch * time)
                    sound += 0.1 * number * random.normal(size=len(time))
                    soundfile.write(folder / f"{clip}.wav", sound.clip(-1, 1), RATE)
                    for j in range(2 + clip % 2):
                        caption = f"{task} tone of {pitch} hertz, take {j}"
                        table.writerow([f"{clip}.wav", caption, "", "", split])
                    clip += 1


def get_config(arg=None) -> ConfigDict:
    """`method`, `seed`, `root` (of the folders; the cache lies there too) and number of `tasks`."""
    args = common.parse(arg, method="ptat", seed=0, root="", tasks=3)
    config = common.base_config(args["method"], args["seed"], "mini-ast", LOG_MEL,
                                window_seconds=0.496, max_tokens=12)
    config.model.audio.update(frames=32, mels=16, patch=8, stride=8, width=16, layers=2, heads=2,
                              hidden=32)
    config.model.text.update(vocab_size=300, width=16, layers=2, heads=2, hidden=32,
                             max_positions=20)
    config.model.embedding = 8
    if "prompts" in config.method:
        config.method.prompts.length = 2
    # Less than the pairs of a task, and a few batches.
    small = {"capacity": 10, "queries": 40, "features": 24, "copies": 3, "reg_copies_per_step": 2,
             "boundary_capacity": 8}
    # One stage a task, as all methods have but this one.
    small |= ({"tune_from": 2, "warm_up": "", "freeze_head": False}
              if args["method"] == "pace" else {})
    config.method.update({k: v for k, v in small.items() if k in config.method})
    config.backbone.kind = "random"
    config.data.root = args["root"]
    config.data.cache_dir = str(pathlib.Path(args["root"]) / "cache")
    config.data.num_parallel = 1
    config.stream.name = "tiny"
    config.stream.tasks = tuple({"name": n, "folder": n} for n in [*SIZES][:args["tasks"]])
    config.train.duration = "2 epochs"
    config.train.batch_size = 8
    config.train.log_every = 1
    config.eval.batch_size = 8
    return config
