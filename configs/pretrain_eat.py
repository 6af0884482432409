"""Self-supervised pretraining of a mini EAT from scratch, on the audio of the embedded base corpus.

    python -m tail_jax.train --config=configs/pretrain_eat.py:seed=0 --workdir=DIR

The backbone, an audio tower alone, lies in DIR/backbone afterwards. No caption is read.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg=None) -> ConfigDict:
    args = common.parse(arg, model="mini-eat", seed=0)
    config = common.base_config("eat", args["seed"], args["model"], common.MINI_LOG_MEL,
                                window_seconds=2.55, max_tokens=24)
    config.backbone = {"kind": "random", "pretrain": {}}
    config.stream.kind = "embedded"
    config.stream.name = "embedded-base-audio"
    config.stream.tasks = ({"name": "base"},)
    # Not searched. In 400 steps of one run (seed 0, decay_steps 400) the frame loss came to 0.64,
    # where the mean of each patch would have 0.78, and the variances of the targets over clips
    # stayed. A linear probe on ESC-10 (320 clips, folds 1 to 4, each predicted from the others; the
    # best of three penalties) rose from 60.3 to 66.6 % on the mean of the patches and from 61.9 to
    # 62.8 % on CLS, each with a standard error of 2.7. Longer runs were not probed.
    config.method.learning_rate = 2e-3
    config.train.duration = "1500 steps"
    config.train.batch_size = 32
    config.method.decay_steps = 1500  # the whole run, as EAT's rises over its own
    return config


def inner(seconds: float = 2.55) -> ConfigDict:
    """What `config.backbone.pretrain` holds; model and front end are those of the experiment.

    Args:
        seconds: its window. Scenes are as long, but no shorter than of the other experiments:
            silence behind shorter ones would be half of what is learned.
    """
    own = get_config()
    own.stream.scenes = {"seconds": seconds} if seconds > 2.55 else {}
    return ConfigDict({k: own[k] for k in ("seed", "method", "stream", "optimizer", "train")})
