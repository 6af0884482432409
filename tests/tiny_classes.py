"""A class-incremental run in miniature: tones of six classes in three sessions.

Also a configuration file, as `tiny.py`; `root` is the folder that `write_folder` wrote.
"""

import csv
import pathlib

import numpy as np
import soundfile
from ml_collections import ConfigDict

from configs import common
from tail_jax import methods
from tests.tiny import RATE
from tests.tiny import get_config as tiny_config

# Train, valid and test clips of each class.
SIZES = {"a": (5, 1, 2), "b": (7, 1, 3), "c": (5, 2, 2), "d": (6, 1, 4), "e": (5, 1, 1),
         "f": (8, 2, 3)}


def write_folder(root: pathlib.Path) -> None:
    """Writes `root`/tones: every class a chord of its own, every clip noise of its own."""
    random = np.random.default_rng(0)
    folder = root / "tones"
    folder.mkdir(parents=True)
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "caption", "label", "group", "split"])
        for number, (label, sizes) in enumerate(SIZES.items()):
            for clip in range(sum(sizes)):
                split = np.repeat(["train", "valid", "test"], sizes)[clip]
                time = np.arange(int(RATE * random.uniform(0.4, 0.7))) / RATE
                pitch = 200 * 1.6**number * random.uniform(0.97, 1.03)
                sound = 0.3 * np.sin(2 * np.pi * pitch * time)
                sound += 0.05 * random.normal(size=len(time))
                name = f"{label}{clip}.wav"
                soundfile.write(folder / name, sound.clip(-1, 1), RATE)
                for take in (1, 2):
                    table.writerow([name, f"tone {label}, take {take}", label, "", split])


def get_config(arg=None) -> ConfigDict:
    """`method`, `seed`, `root`, how many of the three `tasks` are run (0: all); one `settings`."""
    args = common.parse(arg, method="sequential", seed=0, root="", tasks=0, settings="default")
    config = tiny_config(f"method={args['method']},seed={args['seed']},root={args['root']}")
    del config.model.text
    config.model.text = None  # an audio tower, and its classifier
    # Its settings on class streams, but for the length of a session and sizes.
    config.method = ConfigDict(methods.defaults(args["method"], classes=True))
    small = {"epochs": 0, "capacity": 10, "alignment_epochs": 2, "centroids": 3, "expert_length": 2}
    config.method.update({k: v for k, v in small.items() if k in config.method})
    config.stream = ConfigDict({
        "kind": "classes", "name": "tones", "corpus": "folder", "folder": "tones", "sessions": 3,
        "first": args["tasks"], "split": "own"})
    return config
