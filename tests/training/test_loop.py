"""What the loop over steps tells of their time, and what signals do to it."""

import signal
import time

import jax
import numpy as np
import pytest

from tail_jax.training import sharding
from tail_jax.training.loop import TaskLoop, watch_signals


@pytest.mark.parametrize("numbers, ends", [
    ("T", False), ("I", False), ("TT", False), ("IT", False), ("TI", True), ("II", True)])
def test_a_second_ctrl_c_ends_a_run_and_a_second_sigterm_does_not(numbers, ends):
    with watch_signals() as stop:
        assert not stop()
        *first, last = [{"T": signal.SIGTERM, "I": signal.SIGINT}[each] for each in numbers]
        for number in first:
            signal.raise_signal(number)
        if ends:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(last)
        else:
            signal.raise_signal(last)
        assert stop()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_seconds_of_steps_leave_out_the_first_which_may_compile(steps):

    def step(trainable, opt_state, frozen, aux, mask, batch, key, position):
        time.sleep(0.5 if position[0] == 0 else 0.02)
        return trainable, opt_state, {"loss": np.float32(1.0)}

    batch = {"mask": np.ones(4, bool), "clip_id": np.arange(4, dtype=np.int32)}
    loop = TaskLoop(step, sharding.make_mesh(), jax.random.key(0), write=lambda *_: None,
                    save=lambda *_: None, stop=lambda: False)
    loop.run("", iter([batch] * steps), {}, {}, {}, {}, {}, 0, steps)
    # The result of a step is looked at when the next has been started.
    assert len(loop.seconds) == steps - 1
    assert all(0 <= value < 0.4 for value in loop.seconds)
    assert sum(loop.seconds) >= 0.02 * (steps - 2)
