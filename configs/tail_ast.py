"""The TAIL stream at full size on AST-base and BERT-base with new heads: configuration A.

    python -m tail_jax.describe --config=configs/tail_ast.py:method=ptat
"""

from ml_collections import ConfigDict

from configs import common, tail_clap
from data_pipelines.log_mel import LogMelSettings

# AST's 1,024 frames of 10 ms and 128 bands at 16 kHz. Its checkpoints were trained on Kaldi's
# filterbank, which this front end approximates.
LOG_MEL = LogMelSettings(sampling_rate=16000, n_fft=400, hop_length=160, n_mels=128, fmin=20.0,
                         fmax=8000.0, mel_scale="htk", norm=None)


def get_config(arg=None) -> ConfigDict:
    args = common.parse(arg, method="ptat", seed=0)
    config = common.base_config(args["method"], args["seed"], "ast-base", LOG_MEL,
                                window_seconds=10.23, max_tokens=77)
    if "heads_learning_rate" in config.method:
        config.method.heads_learning_rate = 1e-3  # new heads
    return tail_clap.tail_stream(config)
