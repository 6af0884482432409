"""Incremental audio-text learning in JAX.

    model = tail_jax.load("CHECKPOINT")              # CLAP, AST, BERT, wav2vec 2.0, EAT, ...
    model.embed_audio(["dog.wav"]) @ model.embed_text(["a dog barks"]).T
    model = tail_jax.load("CHECKPOINT", tuning="WORKDIR/tuning/task_4.safetensors")

Imports happen on use: this module alone costs nothing.
"""


def load(path, tuning=None, dtype=None):
    """The model in a checkpoint folder or file, see `tail_jax.backbone.load`.

    What it compiles is kept for the next process, see `tail_jax.process.keep_programs`.
    """
    from tail_jax import backbone, process
    process.keep_programs()
    return backbone.load(path, tuning, dtype)


def load_tuning(path, backbone=None):
    """(trainable tree, header) of a tuning file, see `tail_jax.backbone.load_tuning`."""
    from tail_jax import backbone as backbones
    return backbones.load_tuning(path, backbone)
