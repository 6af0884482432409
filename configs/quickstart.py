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
    config.backbone.pretrain = pretrain.inner()
    config.stream.kind = "embedded"
    config.stream.name = "embedded"
    config.stream.tasks = tuple({"name": name} for name in TASKS)
    config.train.duration = "8 epochs"
    return config


# Best of three rates each by the mean R@1 on the four validation sets after the last task, at seed
# 100. PTAT's other settings are the specification's defaults. The benchmark, `tail_embedded.py`,
# has its own settings in configs/best.
RATES = {"sequential": 5e-4, "joint": 1e-3, "prompts": 5e-3, "ptat": 2e-2}


def tune(config: ConfigDict) -> None:
    """Sets the rates for the mini presets."""
    config.method.learning_rate = RATES.get(config.method.name, config.method.learning_rate)
    if "heads_learning_rate" in config.method:
        config.method.heads_learning_rate = 3e-3
