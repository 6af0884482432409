"""Input pipelines: caption folders on disk -> padded, masked NumPy batches, through tf.data.

Nothing here imports `tail_jax`, and importing a module of this package does not import TensorFlow.
"""

import atexit
import collections
import concurrent.futures
import contextlib
import functools
import os
import weakref
from collections.abc import Callable, Iterator, Sequence

_LISTED = 20
# A progress bar only where somebody would begin to wonder.
PROGRESS_DELAY_SECONDS = 5.0

_open_iterators: weakref.WeakSet = weakref.WeakSet()


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
    # Nothing here uses oneDNN, whose notice would greet every user twice.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow

    tensorflow.config.set_visible_devices([], "GPU")
    return tensorflow


def iterate(dataset) -> Iterator:
    """Returns an iterator over a `tf.data.Dataset` that gives NumPy arrays.

    Threads of tf.data that call back into Python can keep an ending interpreter waiting for ever;
    these iterators are closed before it begins to end. Nothing is tuned as they run: the thread
    that does so sleeps 10, 20, 40, ... ms, and an iterator closes when it next wakes, up to a half
    of its life later.
    """
    options = load_tensorflow().data.Options()
    options.autotune.enabled = False
    dataset = dataset.with_options(options)
    iterator = _generate(dataset)
    _open_iterators.add(iterator)
    return iterator


def _generate(dataset):
    iterator = dataset.as_numpy_iterator()
    try:
        yield from iterator
    finally:
        # The traceback of an error holds this frame, which must not hold the threads.
        del iterator


@atexit.register
def _close_open_iterators() -> None:
    for iterator in list(_open_iterators):
        # ValueError: a daemon thread is inside it; it cannot be closed from here.
        with contextlib.suppress(ValueError):
            iterator.close()


def cores() -> int:
    """Number of cores that this process may run on; Slurm, containers and taskset give some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_ahead(function: Callable, *lists: Sequence, threads: int | None = None) -> Iterator:
    """Returns `map` in threads (one per core), a few results ahead of who takes them."""
    threads = threads or cores()
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    ahead: collections.deque = collections.deque()
    try:
        for arguments in zip(*lists):
            ahead.append(pool.submit(function, *arguments))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def listing(title: str, lines: Sequence[str]) -> str:
    """Returns `title` and the first 20 of `lines` below it, with the number of those left out."""
    shown = [f"  {line}" for line in lines[:_LISTED]]
    if len(lines) > _LISTED:
        shown.append(f"  ... and {len(lines) - _LISTED} more")
    return "\n".join([f"{title}:", *shown])


def progress(items, total: int, what: str):
    """Returns `items`, with a progress bar (on a terminal) if going through them takes long."""
    import tqdm

    return tqdm.tqdm(
        items, total=total, desc=what, delay=PROGRESS_DELAY_SECONDS, leave=False, disable=None
    )


def padded_lengths(first: int, last: int, steps: int) -> list[int]:
    """Lengths that inputs are padded to: (1 + i / steps) 2^k times `first`, up to `last`.

    But in the first, at most one part in `steps` is padding, half of that if lengths are spread
    evenly; every length is a program that has to be compiled.
    """
    lengths, size = [], first
    while size < last:
        lengths += [size * (steps + i) // steps for i in range(steps)]
        size *= 2
    return [length for length in lengths if length < last] + [last]
