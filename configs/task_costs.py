"""What a method costs when tasks become many: the four embedded corpora again and again.

    python -m tail_jax.benchmark --suite=tasks --output=FILE --workdir=DIR
    python -m tail_jax.train --config=configs/task_costs.py:method=ptat,tasks=32 --workdir=DIR

Model, methods and batches are the benchmark's (`tail_embedded.py`). The backbone is random and the
splits are small, for cost depends on neither: what is trained is not meant to be any good, and the
result matrices of many tasks would take longer than their training.
"""

from ml_collections import ConfigDict

from configs import common, quickstart, tail_embedded


def get_config(arg=None) -> ConfigDict:
    args = common.parse(arg, method="ptat", seed=0, model="mini-ast", tasks=2)
    if args["tasks"] < 1:
        raise ValueError(f"config argument tasks={args['tasks']}; expected 1 or more")
    config = tail_embedded.get_config(
        f"method={args['method']},seed={args['seed']},model={args['model']}")
    config.backbone.kind = "random"
    config.stream.name = "embedded-repeated"
    corpora = quickstart.TASKS
    config.stream.tasks = tuple(
        {"name": f"{corpora[k % len(corpora)]}_{k // len(corpora) + 1}",
         "folder": corpora[k % len(corpora)]} for k in range(args["tasks"]))
    config.stream.limit = 8  # clips of a split
    config.eval.batch_size = 16
    config.train.duration = "8 steps"
    config.train.log_every = 1
    return config
