"""Four tasks of real recordings: two of ESC-10's sounds, two of FSDD's spoken digits.

    python -m tail_jax.train --config=configs/real_audio.py:method=ptat,seed=0 --workdir=DIR \
        --config.data.root=FOLDER_WITH_esc10_AND_fsdd

The backbone is pretrained on the embedded base corpus, with the seed of the run: it has heard no
recording and no digit. Methods have the settings that were found on the embedded corpora.
"""

from ml_collections import ConfigDict

from configs import common, pretrain, tail_embedded
from data_pipelines.log_mel import LogMelSettings
from tail_jax import best

# 5.1 s, which hold ESC-10's 5 s, in the 128 frames of the mini presets.
LOG_MEL = LogMelSettings(sampling_rate=16000, n_fft=1280, hop_length=640, n_mels=32, fmin=50.0,
                         fmax=8000.0)
TASKS = (
    ("esc10_living", "esc10", ("crying_baby", "dog", "rooster", "sneezing")),
    ("esc10_nature_machines", "esc10", ("chainsaw", "clock_tick", "crackling_fire", "helicopter",
                                        "rain", "sea_waves")),
    ("fsdd_0_to_4", "fsdd", ("zero", "one", "two", "three", "four")),
    ("fsdd_5_to_9", "fsdd", ("five", "six", "seven", "eight", "nine")),
)


def get_config(arg=None) -> ConfigDict:
    args = common.parse(arg, method="ptat", seed=0, model="mini-ast")
    config = common.base_config(args["method"], args["seed"], args["model"], LOG_MEL,
                                window_seconds=5.1, max_tokens=32)
    best.apply(config.method, tail_embedded.BEST)
    config.backbone.pretrain = pretrain.inner()
    config.backbone.pretrain.seed = args["seed"]
    config.data.root = "data"
    config.stream.name = "real_audio"
    config.stream.tasks = tuple({"name": name, "folder": folder, "labels": labels}
                                for name, folder, labels in TASKS)
    config.train.duration = "120 steps"
    return config
