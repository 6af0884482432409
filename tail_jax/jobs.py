"""Commands as child processes, some at a time, under a program that may be killed at any moment."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from typing import Iterator, Mapping, Sequence

_POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        name: of its log, unique.
        kind: jobs of one kind are expected to take equally long.
        module, arguments: what `python -m` runs.
        environment: variables that it has beside those of this process.
    """

    name: str
    kind: str
    module: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Failure:
    """A job that ended with an exit code other than 0; `reason` is for people, in one line."""

    job: Job
    code: int
    reason: str


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[int]:
    """Holds `folder` for this process and its jobs; yields the descriptor that `run` hands to them.

    Waits while another program, or a job that a killed one has left behind, holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"{folder}: waits for another sweep, or for a run that a killed one has left")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def run(jobs: Sequence[Job], parallel: int, logs: pathlib.Path, lock: int,
        seconds: Mapping[str, float] = {}) -> list[Failure]:
    """Runs all jobs, `parallel` at a time, in their order; a failed one does not stop the others.

    Output of a job is appended to logs/NAME.log. SIGTERM and SIGINT are handed on to the jobs that
    run, as SIGTERM; when these have ended the program leaves with 143.

    Args:
        seconds: what a job of a kind is expected to take, for the time that is left.

    Returns:
        the failures.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, failures, began = collections.deque(jobs), [], time.monotonic()
    running: dict[subprocess.Popen, tuple[Job, float]] = {}
    spent = {kind: [value] for kind, value in seconds.items()}
    with _signals() as received:
        handed_on = 0
        try:
            while running or (waiting and not received):
                while waiting and len(running) < parallel and not received:
                    job = waiting.popleft()
                    running[_start(job, logs, lock)] = job, time.monotonic()
                time.sleep(_POLL_SECONDS)
                if len(received) > handed_on:
                    handed_on = len(received)
                    _say(f"stopped by a signal; {len(running)} runs save their state")
                    _stop(running)
                for process in [p for p in running if p.poll() is not None]:
                    job, start = running.pop(process)
                    if received:
                        continue
                    took = time.monotonic() - start
                    if process.returncode:
                        log = logs / f"{job.name}.log"
                        failures.append(Failure(
                            job, process.returncode,
                            f"exit code {process.returncode}: {_last_line(log)} (see {log})"))
                        state = f"FAILED, {failures[-1].reason}"
                    else:
                        spent.setdefault(job.kind, []).append(took)
                        state = f"done in {_duration(took)}"
                    left = [*waiting, *(other for other, _ in running.values())]
                    _say(f"[{len(jobs) - len(left)}/{len(jobs)}] {job.name} {state}; "
                         f"{_duration(time.monotonic() - began)} passed"
                         + _remaining(left, spent, parallel))
        finally:
            _stop(running)  # none are left unless something broke here
        if received:
            _say("the same command goes on")
            sys.exit(143)
    return failures


def _start(job: Job, logs: pathlib.Path, lock: int) -> subprocess.Popen:
    # A session of its own: Ctrl-C on a terminal reaches the jobs through us alone, once.
    command = [sys.executable, "-m", job.module, *job.arguments]
    with open(logs / f"{job.name}.log", "a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(['python', *command[1:]])}\n")
        log.flush()
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                start_new_session=True, pass_fds=(lock,),
                                env={"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ,
                                     **job.environment})


def _stop(running) -> None:
    for process in running:
        process.send_signal(signal.SIGTERM)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Yields the list of the SIGTERM and SIGINT that have arrived."""
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {n: signal.signal(n, lambda number, frame: received.append(number)) for n in numbers}
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _last_line(log: pathlib.Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def _remaining(left: Sequence[Job], spent: Mapping[str, list[float]], parallel: int) -> str:
    means = {kind: sum(values) / len(values) for kind, values in spent.items()}
    if not left or not means:
        return ""
    usual = sum(means.values()) / len(means)
    total = sum(means.get(job.kind, usual) for job in left)
    return f", about {_duration(total / min(parallel, len(left)))} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
