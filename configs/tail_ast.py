"""The TAIL stream at full size on AST-base and BERT-base with new heads: configuration A.

    python -m tail_jax.describe --config=configs/tail_ast.py:method=ptat
    python -m tail_jax.train --config=configs/tail_ast.py:method=ptat --workdir=DIR \
        --config.model.checkpoint=AST+BERT --config.data.root=CORPORA

AST and BERT are two checkpoint folders, CORPORA the --data_dir of
`python -m data_pipelines.build`, run once for each of `tail_clap.TASKS`.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import common, tail_clap
from data_pipelines.front_end import KALDI

# What AST's checkpoints were trained on: 1,024 frames of Kaldi's filterbank.
LOG_MEL = dataclasses.replace(KALDI, frames=1024)


def get_config(arg=None) -> ConfigDict:
    args = common.parse(arg, method="ptat", seed=0)
    # 1,024 frames of 25 ms, 10 ms apart, are 10.255 s.
    config = common.base_config(args["method"], args["seed"], "ast-base", LOG_MEL,
                                window_seconds=10.255, max_tokens=77)
    if "heads_learning_rate" in config.method:
        config.method.heads_learning_rate = 1e-3  # new heads
    return tail_clap.tail_stream(config)
