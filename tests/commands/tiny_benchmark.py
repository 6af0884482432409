"""`tests/tiny.py` with the arguments of a benchmark, a backbone a seed, and a run that fails.

    python -m tail_jax.sweep --config=tests/commands/tiny_benchmark.py:root=FOLDER --workdir=DIR
"""

from ml_collections import ConfigDict

from configs import common
from tests import tiny


def get_config(arg=None) -> ConfigDict:
    args = common.parse(arg, method="ptat", seed=0, root="", order="paper", tasks=0,
                        settings="best")
    config = tiny.get_config(f"method={args['method']},seed={args['seed']},root={args['root']}")
    inner = tiny.get_config(f"method=sequential,seed={args['seed']},root={args['root']},tasks=1")
    inner.train.duration = "2 steps"
    config.backbone = {"kind": "pretrain", "pretrain": {
        key: inner[key] for key in ("seed", "method", "stream", "optimizer", "train")}}
    config.stream.tasks, config.stream.order = common.arrange(
        config.stream.tasks, args["order"], args["tasks"])
    fails = args["method"] == "frozen" and args["seed"] == 1
    config.train.duration = "forever" if fails else "8 steps"
    config.train.save_seconds = 0.0  # slow enough to be killed in the middle
    return config
