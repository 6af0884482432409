"""Many hosts: how a command joins them, who writes, and what they have to agree on.

A run on several hosts is the same command on each, with

    TAIL_JAX_COORDINATOR   HOST:PORT of the first one, or `auto`: jax finds out (TPU slices, Slurm)
    TAIL_JAX_PROCESSES     how many there are; not with `auto`
    TAIL_JAX_PROCESS       which one this is, from 0; not with `auto`

in the environment, and the folder of the run and `data.cache_dir` on a disk that all of them share.
Every process runs the same program: what it decides must be the same on all, or they wait for each
other for ever. So files are written by the first alone, and what depends on a clock, a signal or a
file is asked of all, or of the first, by the functions here. In a run of one process they do
nothing.

A host is a process here; there may be several of them on a machine.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any, Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

COORDINATOR, PROCESSES, PROCESS = (
    "TAIL_JAX_COORDINATOR", "TAIL_JAX_PROCESSES", "TAIL_JAX_PROCESS")
# A host that fails alone leaves after this many seconds, and takes the others along.
_SHUTDOWN_SECONDS = 60


def join() -> None:
    """Joins the hosts that the environment names; before anything else is asked of jax.

    Raises:
        ValueError: if a setting is missing or cannot be used, in one line.
        ConnectionError: if the others did not answer, which they may the next time.
    """
    given = {name: os.environ[name] for name in (COORDINATOR, PROCESSES, PROCESS)
             if os.environ.get(name)}
    if not given:
        return
    if COORDINATOR not in given:
        raise ValueError(f"{', '.join(given)} is set without {COORDINATOR}; set it to HOST:PORT of "
                         "the first process, or to auto")
    if given[COORDINATOR] == "auto":
        if len(given) > 1:
            raise ValueError(f"{COORDINATOR} is auto and {', '.join([*given][1:])} is set, too; "
                             "unset it, or name HOST:PORT")
        where = {}
    else:
        count, number = _number(given, PROCESSES, 1), _number(given, PROCESS, 0)
        if number >= count:
            raise ValueError(f"{PROCESS} is {number}; expected 0 to {count - 1}, one less than "
                             f"{PROCESSES}")
        if not given[COORDINATOR].rpartition(":")[2].isdigit() or ":" not in given[COORDINATOR]:
            raise ValueError(f"{COORDINATOR} is {given[COORDINATOR]!r}; expected HOST:PORT of the "
                             "first process, or auto")
        where = {"coordinator_address": given[COORDINATOR], "num_processes": count,
                 "process_id": number, "cluster_detection_method": "deactivate"}
    # jax's own handler of SIGTERM would take it from ours; `Agreement` tells the others.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of several CPU processes
    try:
        jax.distributed.initialize(**where, shutdown_timeout_seconds=_SHUTDOWN_SECONDS)
    except (ValueError, RuntimeError) as error:
        kind = ConnectionError if isinstance(error, RuntimeError) else ValueError
        raise kind(f"{COORDINATOR} is {given[COORDINATOR]}, and jax could not join the other "
                   f"hosts: {error}") from error


def refuse() -> None:
    """For commands of one host.

    Raises:
        ValueError: if the environment says that there are more.
    """
    if os.environ.get(COORDINATOR):
        raise ValueError(f"{COORDINATOR} is set, but of the commands only train and evaluate run "
                         "on several hosts; unset it")


def _number(given: dict, name: str, least: int) -> int:
    value = given.get(name, "")
    if not value.isdigit() or int(value) < least:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least {least}, "
                         f"beside {COORDINATOR}={given[COORDINATOR]}")
    return int(value)


def is_first() -> bool:
    """Whether this host is the one that writes."""
    return jax.process_index() == 0


def say(*words: Any) -> None:
    """Prints a line on stderr, once."""
    if is_first():
        print(*words, file=sys.stderr, flush=True)


def together(function: Callable[[], Any]) -> Any:
    """What `function` gives on this host, when it has ended on all.

    Raises:
        What it raised here; a ValueError where it raised on another host.
    """
    if jax.process_count() == 1:
        return function()
    result = error = None
    try:
        result = function()
    except Exception as raised:
        error = raised
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array(error is not None)))
    if error is not None:
        raise error
    if len(failed):
        raise ValueError(f"process {failed[0]} could not go on, see its message; this is "
                         f"process {jax.process_index()}")
    return result


def on_first(function: Callable[[], Any]) -> None:
    """Runs `function`, which writes, on the first host; returns when it is done. Raises as
    `together`."""
    together(function if is_first() else lambda: None)


def first_then_others(function: Callable[[], Any]) -> Any:
    """`function` on the first host, then on the others, which find what it made. Raises as
    `together`."""
    if jax.process_count() == 1:
        return function()
    result = together(function if is_first() else lambda: None)
    later = together((lambda: None) if is_first() else function)
    return result if is_first() else later


def ask_first(question: Callable[[], bool]) -> bool:
    """The first host's answer: of files, say, which others may see later. Raises as `together`."""
    answer = together(question if is_first() else lambda: False)
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.array(bool(answer))))


def any_host(flag: bool) -> bool:
    """Whether the flag is True on any host; all wait for it."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def check_same(digest: Callable[[], str], what: str) -> None:
    """Compares what hosts have each computed for themselves by its hash, in hexadecimal digits.

    Raises:
        ValueError: on all, if it is not the same on all.
    """
    if jax.process_count() == 1:
        return
    own = np.array([int(digest()[:7], 16)], np.int32)
    found = multihost_utils.process_allgather(own).reshape(-1)
    other = np.flatnonzero(found != found[0])
    if len(other):
        raise ValueError(f"{what} came to other numbers in process {other[0]} than in process 0; "
                         "expected machines of one kind, with the same libraries and files")


class Agreement:
    """Flags that are True on any host, told to all of them at the same step.

    The devices of several hosts need their time for that, and no host waits for it: at each step
    the answer is that to the question of the step before.
    """

    def __init__(self, mesh: Mesh):
        self._parts, self._any = NamedSharding(mesh, P(mesh.axis_names)), _any_row(mesh)
        self._count = sum(d.process_index == jax.process_index() for d in mesh.devices.flat)
        self._last = None

    def __call__(self, *flags: bool) -> list[bool]:
        """The flags, of this step in a run of one host, else of the step before on any host."""
        if jax.process_count() == 1:
            return [*flags]
        before = self._last
        self._last = self._any(jax.make_array_from_process_local_data(
            self._parts, np.tile(np.array(flags), (self._count, 1))))
        return [False] * len(flags) if before is None else np.asarray(before).tolist()

    def forget(self) -> None:
        """Leaves the last question without an answer: what it was about has been done."""
        self._last = None


@functools.lru_cache(maxsize=4)
def _any_row(mesh: Mesh):
    return jax.jit(lambda flags: flags.any(0), out_shardings=NamedSharding(mesh, P()))
