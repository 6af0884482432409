"""Incremental audio-text learning in JAX.

    backbone = tail_jax.load("WORKDIR/backbone")
    tuning, header = tail_jax.load_tuning("WORKDIR/tuning/task_4.safetensors", backbone)

Imports happen on use: this module alone costs nothing.
"""


def load(path):
    """The backbone in a folder, see `tail_jax.backbone.load_backbone`."""
    from tail_jax.backbone import load_backbone
    return load_backbone(path)


def load_tuning(path, backbone=None):
    """(trainable tree, header) of a tuning file, see `tail_jax.backbone.load_tuning`."""
    from tail_jax import backbone as backbones
    return backbones.load_tuning(path, backbone)
