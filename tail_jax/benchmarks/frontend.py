"""Log-mel features against librosa's, and against transformers' feature extractors if installed.

Per core both sides take one clip after another on one thread, BLAS too; on all cores both have a
thread a core, as the pipeline of training has. librosa gets float32, its users' type and its
fastest; ours computes in float64. librosa has not Kaldi's pre-emphasis and filters, which AST has:
against it stand AST's rate, transform and hop with 64 filters of Slaney's, and AST itself against
transformers.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import threadpoolctl

from data_pipelines import cores
from data_pipelines.front_end import CLAP, KALDI, FrontEnd
from data_pipelines.log_mel import LogMelSettings, log_mel
from tail_jax.benchmarks import OURS, Comparison, Measured, Options, compare, measured
from tail_jax.benchmarks.embed import waveforms

LIBROSA, TRANSFORMERS = "librosa", "transformers"
SPEECH = LogMelSettings(16000, n_fft=512, hop_length=160, n_mels=64, fmin=20.0, fmax=8000.0)
# Clips of a measurement on one thread and their length; those of one on all cores.
SIZES = {"full": (8, 10.0, 32), "tiny": (2, 1.0, 4)}


def run(options: Options) -> Measured:
    """Seconds for CLAP's and AST's features."""
    one, seconds, many = SIZES[options.size]
    with threadpoolctl.threadpool_limits(1):
        found = [_compare(name, settings, [seconds] * one, options.repeats)
                 for name, settings in (("CLAP", CLAP), ("AST's rate", SPEECH))]
        found.append(_compare("CLAP", CLAP, [seconds] * many, options.repeats,
                              threads=cores()))
        theirs = _extractors()
        for name, (front_end, extract) in theirs.items():
            clips = waveforms(front_end.sampling_rate, [seconds] * one)
            found.append(compare(f"{_case(name, front_end.settings, clips)}, one thread", one,
                                 options.repeats, {
                OURS: lambda: np.stack([front_end.rows(clip)[0] for clip in clips]),
                TRANSFORMERS: lambda: np.stack([extract(clip) for clip in clips])}))
    result = measured(found, options.repeats)
    return result if theirs else dataclasses.replace(
        result, note=result.note + "; transformers is not installed")


def librosa_log_mel(waveform: np.ndarray, settings: LogMelSettings) -> np.ndarray:
    """[frames, mels] in dB, as a user of librosa computes them."""
    import librosa
    mel = librosa.feature.melspectrogram(
        y=waveform, sr=settings.sampling_rate, n_fft=settings.n_fft,
        hop_length=settings.hop_length, n_mels=settings.n_mels, fmin=settings.fmin,
        fmax=settings.fmax, htk=settings.mel_scale == "htk", norm=settings.norm,
        pad_mode=settings.pad_mode)
    return librosa.power_to_db(mel, ref=1.0, amin=settings.floor, top_db=None).T


def _compare(name: str, settings: LogMelSettings, seconds: list[float], repeats: int,
             threads: int = 1) -> Comparison:
    clips = waveforms(settings.sampling_rate, seconds)
    case = f"{_case(name, settings, clips)}, {'one thread' if threads == 1 else 'all cores'}"
    sides = {OURS: lambda clip: log_mel(clip, settings),
             LIBROSA: lambda clip: librosa_log_mel(clip, settings)}
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        each = map if threads == 1 else pool.map
        return compare(case, len(clips), repeats, {
            who: lambda side=side: np.stack([*each(side, clips)]) for who, side in sides.items()})


def _case(name: str, settings: LogMelSettings, clips: Sequence[np.ndarray]) -> str:
    rate = settings.sampling_rate
    return f"{len(clips)} clips of {len(clips[0]) / rate:g} s at {rate // 1000} kHz ({name})"


def _extractors() -> dict[str, tuple[FrontEnd, Callable[[np.ndarray], np.ndarray]]]:
    """Front ends of ours and the same of transformers; none if it is not installed."""
    try:
        import transformers
    except ImportError:
        return {}
    clap = transformers.ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad",
                                             frequency_min=CLAP.fmin, frequency_max=CLAP.fmax)
    ast = transformers.ASTFeatureExtractor(do_normalize=False)

    def extract(extractor, name):
        return lambda clip: np.asarray(
            extractor(clip, sampling_rate=extractor.sampling_rate, return_tensors="np")[name]
        ).squeeze()

    return {"CLAP": (FrontEnd(CLAP, 10.0), extract(clap, "input_features")),
            "AST": (FrontEnd(dataclasses.replace(KALDI, frames=1024), 10.0),
                    extract(ast, "input_values"))}
