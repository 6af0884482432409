"""Runs of a list one after another, on all the processes that were started; of test_hosts.py.

    python -m tests.training.many_hosts JOBS_JSON

A job is {config, workdir} and, for one that is interrupted, {signal, process, step}: that process
sends itself that signal after so many steps. With {evaluate: FILE} the run is measured again, and
each process writes what it found to FILE and its number. {trouble: true} is no run: process 1 alone
meets an error, and then computes something else.
"""

import json
import os
import pathlib
import signal
import sys
from unittest import mock

import jax

from tail_jax import hosts, settings
from tail_jax.evaluate import evaluate
from tail_jax.train import train
from tail_jax.training.loop import Preempted
from tail_jax.training.step import TrainStep


def run(job):
    """One job, to its end or interruption."""
    original, seen = TrainStep.__call__, 0

    def step(*args):
        nonlocal seen
        result = original(*args)
        seen += 1
        if seen == job.get("step") and job["process"] == jax.process_index():
            os.kill(os.getpid(), getattr(signal, job["signal"]))
        return result

    workdir = pathlib.Path(job["workdir"])
    with mock.patch.object(TrainStep, "__call__", step):
        try:
            train(job["config"], workdir)
        except Preempted:
            print(f"{workdir.name}: stopped after {seen} steps", flush=True)
    if "evaluate" in job:
        row = evaluate(workdir)["row"]
        pathlib.Path(f"{job['evaluate']}{jax.process_index()}").write_text(json.dumps(row))


def trouble():
    """Prints what each process raises."""
    number = jax.process_index()

    def read():
        if number == 1:
            raise OSError("no such disk")

    for function in (lambda: hosts.together(read), lambda: hosts.first_then_others(read),
                     lambda: hosts.check_same(lambda: str(number) * 8, "the method")):
        try:
            function()
        except (OSError, ValueError) as error:
            print(f"{number}: {error}", flush=True)
    print(f"{number}: {hosts.any_host(number == 1)}, {hosts.ask_first(lambda: number == 1)}",
          flush=True)


if __name__ == "__main__":
    settings.start_jax(many_hosts=True)
    for each in json.loads(pathlib.Path(sys.argv[1]).read_text()):
        trouble() if "trouble" in each else run(each)
