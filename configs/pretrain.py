"""Contrastive pretraining of a mini backbone from scratch, on the embedded base corpus.

    python -m tail_jax.train --config=configs/pretrain.py:model=mini-ast,seed=0 --workdir=DIR

The backbone lies in DIR/backbone afterwards. Other experiments do this by themselves.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg=None) -> ConfigDict:
    args = common.parse(arg, model="mini-ast", seed=0)
    config = common.base_config("sequential", args["seed"], args["model"], common.MINI_LOG_MEL,
                                window_seconds=2.55, max_tokens=24)
    config.backbone = {"kind": "random", "pretrain": {}}
    config.method.learning_rate = 2e-3
    config.method.weight_decay = 0.05
    config.stream.kind = "embedded"
    config.stream.name = "embedded-base"
    config.stream.tasks = ({"name": "base"},)
    config.train.duration = "700 steps"
    config.train.batch_size = 128
    return config


def inner() -> ConfigDict:
    """What `config.backbone.pretrain` holds; model and front end are those of the experiment."""
    own = get_config()
    return ConfigDict({k: own[k] for k in ("seed", "method", "stream", "optimizer", "train")})
