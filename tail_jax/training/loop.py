"""The loop over the steps of one task: batches in, metrics out, checkpoints in between."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import signal
import sys
import time
from typing import Any, Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from tail_jax import hosts
from tail_jax.training.sharding import put_batch

# What the step reads of a batch; the rest (clip names, say) stays on the host.
STEP_KEYS = ("audio", "token_ids", "token_mask", "clip_id", "caption_key", "label", "mask")


class Diverged(RuntimeError):
    """The loss or a gradient was not finite."""


class Preempted(SystemExit):
    """SIGTERM or SIGINT arrived; the state was saved."""


@contextlib.contextmanager
def watch_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGTERM or SIGINT has arrived.

    Ctrl-C after either ends the run as it is. SIGTERM does not: what sends it (Slurm to all
    processes, a script that has had Ctrl-C) may send it again, and has SIGKILL.
    """
    received: list[int] = []

    def handler(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    try:
        before = {n: signal.signal(n, handler) for n in numbers}
    except ValueError:  # not the main thread: whoever owns it handles signals
        before = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Progress:
    """A tqdm bar on a terminal, otherwise a plain line every few seconds; of the first host."""

    def __init__(self, title: str, total: int, start: int = 0, every_seconds: float = 20.0):
        self._title, self._total, self._start, self._every = title, total, start, every_seconds
        self._began = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty() and hosts.is_first():
            self._bar = tqdm(total=total, initial=start, desc=title, unit="step", leave=False)

    def update(self, done: int, loss: float) -> None:
        """Shows that `done` of all steps are finished."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if done == self._total or now - self._last >= self._every:
            self._last = now
            rate = (done - self._start) / max(now - self._began, 1e-9)
            hosts.say(f"{self._title}: step {done}/{self._total}, {rate:.2f} steps/s, "
                      f"{(self._total - done) / max(rate, 1e-9):.0f} s left, loss {loss:.3f}")

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()


@dataclasses.dataclass
class TaskLoop:
    """Runs the steps of one task.

    Attributes:
        step: the compiled train step.
        mesh: where batches go.
        key: of the task; the step folds its number in.
        write: called with (step, metrics) every `log_every` steps and at the last.
        save: called with (step, trainable, opt_state) to write a checkpoint.
        refresh: called with (step, trainable) before each step, the `aux` that it gets; None for
            the same all the time.
        stop: tells whether to save and leave; all hosts do so at the same step.
        clip_name: name of a `clip_id`, for messages.
        log_every: steps between metrics on disk.
        save_seconds: longest time between checkpoints.
        keys: entries of a batch that the step reads.
        seconds: from the end of each step to the end of the next, filled by `run`; the first step,
            which may compile, is in none of them.
    """

    step: Any
    mesh: Any
    key: jax.Array
    write: Callable[[int, dict], None]
    save: Callable[[int, Any, Any], None]
    stop: Callable[[], bool]
    clip_name: Callable[[int], str] = str
    log_every: int = 10
    save_seconds: float = 300.0
    keys: tuple[str, ...] = STEP_KEYS
    refresh: Callable[[int, Any], Any] | None = None
    seconds: list[float] = dataclasses.field(default_factory=list, init=False)

    def run(self, title, batches, trainable, opt_state, frozen, aux, mask, start, total):
        """Steps `start` to `total`; returns (trainable, opt_state).

        Raises:
            Diverged: on a loss or gradient that is not finite, naming step and clips; the last
                checkpoint is older than that step.
            Preempted: after a signal, with the state saved.
        """
        pending: collections.deque = collections.deque()
        progress = Progress(title, total, start)
        saved, ended, agreed = time.monotonic(), None, hosts.Agreement(self.mesh)

        def settle(keep: int) -> None:
            nonlocal ended
            # Metrics are read a step late, so that the device never waits for the host.
            while len(pending) > keep:
                number, metrics, batch = pending.popleft()
                values = {k: float(v) for k, v in jax.device_get(metrics).items()}
                before, ended = ended, time.monotonic()
                if before is not None:
                    self.seconds.append(ended - before)
                bad = [f"{k} is {v}" for k, v in values.items() if not np.isfinite(v)]
                if bad:
                    raise Diverged(f"{title}: {', '.join(bad)} at step {number + 1}; "
                                   f"{self._suspects(batch)}; the last good checkpoint is kept")
                if (number + 1) % self.log_every == 0 or number + 1 == total:
                    self.write(number + 1, values)
                progress.update(number + 1, values["loss"])

        try:
            for number in range(start, total):
                batch = next(batches)
                aux = aux if self.refresh is None else self.refresh(number, trainable)
                position = jnp.asarray([number, total], jnp.int32)
                device_batch = put_batch({k: batch[k] for k in self.keys if k in batch}, self.mesh)
                trainable, opt_state, metrics = self.step(
                    trainable, opt_state, frozen, aux, mask, device_batch, self.key, position)
                pending.append((number, metrics, batch))
                settle(keep=1)
                due, stop = agreed(time.monotonic() - saved > self.save_seconds, self.stop())
                if due or stop:
                    settle(keep=0)  # never save a state that has not been seen to be finite
                    self.save(number + 1, trainable, opt_state)
                    saved = time.monotonic()
                    agreed.forget()
                    if stop:
                        raise Preempted(143)
            settle(keep=0)
        finally:
            progress.close()
        return trainable, opt_state

    def _suspects(self, batch: dict[str, np.ndarray]) -> str:
        """What of a batch that went wrong may be to blame."""
        real = batch["mask"]
        broken = real & ~np.isfinite(batch["audio"]).all(axis=(1, 2))
        rows = broken if broken.any() else real
        names = list(dict.fromkeys(self.clip_name(int(i)) for i in batch["clip_id"][rows]))
        listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        if broken.any():
            return f"the audio features of clips {listed} are not finite; mend or remove them"
        return (f"its batch holds clips {listed}; lower the learning rate and start in a new "
                "workdir")
