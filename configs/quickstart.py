"""Four embedded corpora, one after another, on a backbone pretrained here: minutes on two cores.

    python -m tail_jax.train --config=configs/quickstart.py:method=ptat,seed=0 --workdir=DIR
"""

from ml_collections import ConfigDict

from configs import common, pretrain

TASKS = ("audiocaps_like", "clotho_like", "bbc_like", "audioset_like")



def get_config(arg=None) -> ConfigDict:
    args = common.parse(arg, method="ptat", seed=0, model="mini-ast")
    config = common.base_config(args["method"], args["seed"], args["model"], common.MINI_LOG_MEL,
                                window_seconds=2.55, max_tokens=24)
    tune(config)
    config.backbone.pretrain = pretrain.embed(config)
    config.stream.kind = "embedded"
    config.stream.name = "embedded"
    config.stream.tasks = tuple({"name": name} for name in TASKS)
    config.train.duration = "6 epochs"
    return config


def tune(config: ConfigDict) -> None:
    """Rates for the mini presets, found on validation sets (see launch/sweep.sh)."""
    if "heads_learning_rate" in config.method:
        config.method.learning_rate = 1e-2
        config.method.heads_learning_rate = 3e-3
    else:
        config.method.learning_rate = 5e-4
