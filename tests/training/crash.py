"""Runs `train` and ends the process at a chosen moment; a program of test_resume.py.

    python -m tests.training.crash CONFIG_JSON WORKDIR SIGNAL WHERE COUNT

WHERE is `save` (right after a checkpoint), `step` (after a step), `half` (in the middle of writing a
checkpoint) or `row` (after a row was measured, before it is saved); COUNT says which one.
"""

import json
import os
import pathlib
import signal
import sys

from tail_jax import settings
from tail_jax import train as train_module
from tail_jax.training.checkpoints import Checkpoints
from tail_jax.training.step import TrainStep


def main(config, workdir, number, where, count):
    settings.start_jax()
    seen = 0

    def maybe_die():
        nonlocal seen
        seen += 1
        if seen == int(count):
            os.kill(os.getpid(), getattr(signal, number))

    def after(owner, name):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            maybe_die()
            return result

        setattr(owner, name, wrapped)

    if where == "save":
        after(Checkpoints, "save")
    elif where == "step":
        after(TrainStep, "__call__")
    elif where == "row":
        after(train_module, "measure")
    elif where == "half":
        after(os, "rename")  # Orbax renames its finished folders
    train_module.train(json.loads(pathlib.Path(config).read_text()), pathlib.Path(workdir))


if __name__ == "__main__":
    main(*sys.argv[1:])
