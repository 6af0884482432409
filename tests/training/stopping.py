"""Stops a run in this process as a signal would."""

import contextlib

import pytest

from tail_jax import train as train_module


@contextlib.contextmanager
def stopped_after(batches: int):
    """The run inside saves and leaves after so many batches of all its stages together."""
    done, original = [], train_module.TaskLoop.run

    def counted(loop, title, given, *args):
        def seen():
            for batch in given:
                done.append(1)
                yield batch

        loop.stop = lambda: len(done) >= batches
        return original(loop, title, seen(), *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module.TaskLoop, "run", counted)
        with pytest.raises(SystemExit):
            yield
