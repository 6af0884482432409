"""The TAIL stream at full size on CLAP (HTSAT-tiny, RoBERTa-base): configuration B.

    python -m tail_jax.describe --config=configs/tail_clap.py:method=ptat
    python -m tail_jax.train --config=configs/tail_clap.py:method=ptat --workdir=DIR \
        --config.model.checkpoint=CHECKPOINT --config.data.root=CORPORA

CORPORA is the --data_dir of `python -m data_pipelines.build`, run once for each of TASKS.
"""

from ml_collections import ConfigDict

from configs import common
from data_pipelines.front_end import CLAP

TASKS = ("audiocaps", "clotho", "bbc", "audioset_sl")


def get_config(arg=None) -> ConfigDict:
    args = common.parse(arg, method="ptat", seed=0)
    config = common.base_config(args["method"], args["seed"], "clap-htsat-tiny", CLAP,
                                window_seconds=10.0, max_tokens=77)
    return tail_stream(config)


def tail_stream(config: ConfigDict) -> ConfigDict:
    """The four corpora as they were built below `config.data.root`, in the paper's order."""
    config.model.dtype = "bfloat16"
    config.backbone.kind = "checkpoint"
    config.stream.name = "tail"
    config.stream.tasks = tuple({"name": name, "folder": name} for name in TASKS)
    config.data.cache_bytes = 64 << 30
    return config
