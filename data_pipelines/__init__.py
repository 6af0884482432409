"""Input pipelines: caption folders on disk -> padded, masked NumPy batches, through tf.data.

Nothing here imports `tail_jax`, and importing a module of this package does not import TensorFlow.
"""

import functools
import os
from collections.abc import Sequence

_LISTED = 20


@functools.cache
def load_tensorflow():
    """Returns the `tensorflow` module, imported on first use and kept off every GPU.

    All modules of this package get TensorFlow here: left alone it would reserve the memory of the
    accelerator that JAX needs, and the import takes seconds that a reader of settings should not
    pay.

    Raises:
      RuntimeError: TensorFlow was already used with a GPU in this process.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow

    tensorflow.config.set_visible_devices([], "GPU")
    return tensorflow


def listing(title: str, lines: Sequence[str]) -> str:
    """Returns `title` and the first 20 of `lines` below it, with the number of those left out."""
    shown = [f"  {line}" for line in lines[:_LISTED]]
    if len(lines) > _LISTED:
        shown.append(f"  ... and {len(lines) - _LISTED} more")
    return "\n".join([f"{title}:", *shown])
