"""The loader of training against the sum of its parts, and its memory over epochs.

FLAC files of noise, of which every second one has to be resampled, become log-mel batches through
`SplitReader` that keeps no features. The parts are done one after another, each by as many threads
as the loader has and each holding only what it needs: reading (decoding, resampling, filling up),
the log-mel, and putting rows into batches. A loader that computes what it need not, or whose
threads wait for each other, is slower than this sum. With a cache the first pass, which writes the
features, is compared with the same parts. Memory is the resident set of a process that does nothing
else, after epochs of training without a cache: it must not grow.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import tempfile
import time

import numpy as np
import soundfile

from data_pipelines import cores
from data_pipelines.audio import read_chunk
from data_pipelines.batches import DataSettings, SplitReader
from data_pipelines.corpora import Clip, Split
from data_pipelines.front_end import CLAP
from data_pipelines.log_mel import log_mel
from data_pipelines.waveforms import chunk_starts
from tail_jax.benchmarks import OURS, Comparison, Measured, Options, measured
from tail_jax.benchmarks.embed import waveforms
from tail_jax.process import resident_bytes, run_python

PARTS, EARLIER = "sum of its parts", "earlier"
BATCH = 16
EPOCHS = 20
# Clips, their seconds.
SIZES = {"full": (128, 10.0), "tiny": (8, 10.0)}
_RATES = (48000, 44100)
_MEASURE = """
import json, sys
from tail_jax.benchmarks import loader
folder, seconds, epochs = sys.argv[1:]
print(json.dumps(loader.memory(folder, float(seconds), int(epochs))))
"""


def run(options: Options) -> Measured:
    """Seconds of an epoch, and of a first pass that fills a cache; MB after epochs 2 and 20.

    Raises:
        ValueError: the system does not tell memory as Linux does.
    """
    clips, seconds = SIZES[options.size]
    clips = options.items or clips
    settings = DataSettings(CLAP, window_seconds=seconds, num_parallel=cores())
    with tempfile.TemporaryDirectory() as folder:
        split = write_clips(pathlib.Path(folder), clips, seconds)
        reader = SplitReader(split, None, settings)
        expected = _epoch(reader)  # compiles nothing, but starts the threads; files are in memory
        difference = float(np.abs(expected - _parts(split, settings)[1]).max())
        cases = {"an epoch": {OURS: [], PARTS: []},
                 "the first pass with a cache": {OURS: [], PARTS: []}}
        for i in range(options.repeats):
            kept = dataclasses.replace(settings, cache_dir=os.path.join(folder, f"cache{i}"))
            passes = (lambda: _epoch(reader), lambda: _epoch(SplitReader(split, None, kept)))
            for one_pass, found in zip(passes, cases.values()):
                found[OURS].append(_seconds(one_pass))
                found[PARTS].append(_parts(split, settings)[0])
        printed = run_python(_MEASURE, folder, str(seconds), str(EPOCHS))
    epochs = json.loads(printed.splitlines()[-1])
    name = f"{clips} clips of {seconds:g} s, {cores()} threads"
    return measured([
        *(Comparison(f"{name}: {case}", clips, found, difference)
          for case, found in cases.items()),
        *(_memory_case(epochs, epoch, base) for epoch, base in ((2, 1), (EPOCHS, 2)))],
        options.repeats)


def _memory_case(epochs: list[int], epoch: int, base: int) -> Comparison:
    now, earlier = epochs[epoch - 1] / 1e6, epochs[base - 1] / 1e6
    return Comparison(f"memory after {epoch} epochs, against {base}", 1,
                      {OURS: [now], EARLIER: [earlier]}, abs(now - earlier), "MB")


def write_clips(folder: pathlib.Path, clips: int, seconds: float) -> Split:
    """FLAC files of noise, 16 bits, at the rates of `_RATES` in turn."""
    for i, rate in enumerate(_RATES[i % len(_RATES)] for i in range(clips)):
        (samples,) = waveforms(rate, [seconds])
        soundfile.write(folder / f"{i:05}.flac", np.roll(samples, i), rate)
    return read_clips(folder)


def read_clips(folder) -> Split:
    """The split of a folder of FLAC files."""
    paths = sorted(pathlib.Path(folder).glob("*.flac"))
    return Split("noise", "train", tuple(Clip(path.name, path, ("noise",)) for path in paths))


def memory(folder: str, seconds: float, epochs: int) -> list[int]:
    """Resident bytes of this process after each of so many epochs of training batches."""
    reader = SplitReader(read_clips(folder), None, DataSettings(CLAP, window_seconds=seconds))
    batches = reader.train_batches(BATCH, seed=0)
    resident = []
    for _ in range(epochs):
        for _ in range(reader.steps_per_epoch(BATCH)):
            next(batches)
        resident.append(resident_bytes())
    return resident


def _epoch(reader: SplitReader) -> np.ndarray:
    """The first values of every clip's row, of one pass in order."""
    return np.concatenate([batch["audio"][batch["mask"]][:, :8]
                           for batch in reader.audio_batches(BATCH, training=True)])


def _parts(split: Split, settings: DataSettings) -> tuple[float, np.ndarray]:
    """(seconds of all parts of a pass, what `_epoch` gives)."""
    front_end = settings.log_mel

    def read(clip):
        return read_chunk(clip.path, front_end.sampling_rate, settings.window_samples,
                          lambda frames, window: chunk_starts(frames, window, 1)[0],
                          front_end.fill)

    total, rows = 0.0, []
    with concurrent.futures.ThreadPoolExecutor(settings.num_parallel) as pool:
        for first in range(0, len(split.clips), BATCH):
            start = time.perf_counter()
            chunks = [*pool.map(read, split.clips[first:first + BATCH])]
            mels = [*pool.map(lambda chunk: log_mel(chunk[0], front_end, chunk[1]), chunks)]
            batch = np.zeros((BATCH, *settings.audio_shape), np.float32)
            np.stack(mels, out=batch[:len(mels)])
            rows.append(batch[:len(mels), :8])
            total += time.perf_counter() - start
    return total, np.concatenate(rows)


def _seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
