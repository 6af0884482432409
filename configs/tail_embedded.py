"""The benchmark on the four embedded corpora: every seed with a backbone of its own.

    python -m tail_jax.sweep --config=configs/tail_embedded.py --methods=all --seeds=0,1,2 \
        --workdir=DIR
    python -m tail_jax.train --config=configs/tail_embedded.py:method=ptat,seed=0 --workdir=DIR

Model, data and durations are the quickstart's. The backbone is pretrained with the seed of the run,
so that intervals over seeds hold the scatter of backbones too. Arguments beside method, seed and
model: `order` of the tasks (paper, reverse, or the names joined by +), `tasks`, how many of them
counted from the first (0: all), and `settings`, `best` (configs/best/embedded.json) or `default`
(the method's own).
"""

import pathlib

from ml_collections import ConfigDict

from configs import common, quickstart
from tail_jax import best, methods

BEST = pathlib.Path(__file__).parent / "best" / "embedded.json"


def get_config(arg=None) -> ConfigDict:
    args = common.parse(arg, method="ptat", seed=0, model="mini-ast", order="paper", tasks=0,
                        settings="best")
    config = quickstart.get_config(f"method={args['method']},seed={args['seed']},"
                                   f"model={args['model']}")
    config.method = ConfigDict(methods.defaults(args["method"]))
    if args["settings"] == "best":
        best.apply(config.method, BEST)
    elif args["settings"] != "default":
        raise ValueError(f"config argument settings={args['settings']}; expected best or default")
    config.backbone.pretrain.seed = args["seed"]
    config.stream.tasks, config.stream.order = common.arrange(
        config.stream.tasks, args["order"], args["tasks"])
    return config
