"""From clips and texts to embeddings: batches of few shapes, and the front end ahead of the device.

Inputs wait in a bin for their length until the bin fills a batch; what is left at the end shares
batches. So any list of lengths costs little padding, memory does not grow with the list, and there
are at most as many programs as lengths times powers of two up to the size of a batch.
"""

from __future__ import annotations

import bisect
import collections
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from data_pipelines import cores, map_ahead, padded_lengths
from tail_jax.models.dual_encoder import DualEncoder

TEMPLATE = "This is a sound of {}."
# Rows a batch. On a CPU a row of audio for each core is as much as its caches hold (HTSAT-tiny on
# two cores: 84 ms a clip with 2 rows, 110 with 8).
BATCH = {"cpu": {"audio": min(cores(), 16), "text": 64},
         "accelerator": {"audio": 32, "text": 512}}
# What counts as one row, so that all batches are about one size. Log-mels count as they are.
SECONDS_PER_ROW, TOKENS_PER_ROW = 10, 16
_SHORTEST_SECONDS, _SHORTEST_TOKENS = 1, 8
_AUDIO_STEPS, _TEXT_STEPS = 4, 8  # lengths an octave that inputs are padded to
_TEXTS_AT_ONCE = 4096  # tokenized ahead of the device


class Embeddings:
    """Embeds with one model; its methods are those of `Backbone`, which document the policies.

    Each result is a function of its clip or text alone: the same in any batch and any order, up to
    the rounding of float32 (1e-5).

    Attributes:
        traces: how many programs were made, for tests.
    """

    def __init__(self, model: DualEncoder, params: dict, front_end: Any = None,
                 tokenizer: os.PathLike | str | None = None, max_tokens: int = 0,
                 name: str = "model", tuning: dict | None = None,
                 encoders: dict[str, Callable] | None = None):
        """Args:
            model: the description.
            params: NumPy tree; goes to the device on first use.
            front_end: `data_pipelines.front_end.FrontEnd`, for models with an audio tower.
            tokenizer: path of a tokenizer.json, for models with a text tower.
            max_tokens: longest text, begin and end included; what is longer is cut.
            name: of the model, for messages.
            tuning: what a method learned beside the parameters, as the encoders take it.
            encoders: {audio, text}: functions (params, tuning, input, mask) -> outputs; None are
                those of the model.
        """
        self.model, self.front_end, self.name = model, front_end, name
        self.traces = 0
        self._host_params, self._tokenizer_path = (params, tuning), tokenizer
        self._max_tokens = max_tokens
        encoders = encoders or {"audio": model.encode_audio, "text": model.encode_text}
        self._encode = {side: self._jit(encode) for side, encode in encoders.items()}
        # Alone among the outputs: what else the towers return is not computed then.
        self._embed = {side: self._jit(encode, "embedding") for side, encode in encoders.items()}

    def embed_audio(self, clips, sampling_rate=None, policy: str | None = None,
                    batch_size: int | None = None, progress: bool = True,
                    failures: dict[int, str] | None = None) -> np.ndarray:
        """Embeddings of clips, float32 [n, d] with rows of unit length.

        Args:
            clips: a clip or a list of them: paths of audio files, or arrays [S], [S, C] or [C, S]
                (see `data_pipelines.waveforms.to_mono`). Channels are averaged, other rates
                resampled.
            sampling_rate: of the arrays, Hz: one number, or one for each clip; None is the
                model's. Files know their own.
            policy: what becomes of clips that are not as long as the model's window, see
                `data_pipelines.front_end.FrontEnd`; with "chunk_mean" a clip is the mean of its
                windows' embeddings, brought to unit length.
            batch_size: rows of a batch: log-mels, or 10 s of waveforms, so that shorter ones are
                more and longer ones fewer; None is what the device likes.
            progress: a bar on the terminal, where it takes long.
            failures: a dict gets {number of the clip: why} of clips that cannot be used, whose
                rows are zeros; without one the first such clip is an error.

        Raises:
            ValueError: a clip that cannot be used, naming it; a model without audio tower.
        """
        clips, rates = self._clips(clips, sampling_rate, policy)
        batch_size = _batch_size(batch_size, "audio")
        total = np.zeros((len(clips), self.model.embedding), np.float32)
        if self.front_end.is_waveform:
            second = self.front_end.sampling_rate
            buckets = padded_lengths(_SHORTEST_SECONDS * second, self.front_end.window_samples,
                                     _AUDIO_STEPS)
            unit = SECONDS_PER_ROW * second
        else:
            buckets = unit = None
        rows = self._audio_rows(clips, rates, policy, progress, failures)
        for numbers, embedding in self._run("audio", rows, buckets, batch_size, unit):
            np.add.at(total, numbers, embedding)
        # Every clip has a row of unit length; windows of a clip hardly ever cancel out.
        return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)

    def embed_text(self, texts, batch_size: int | None = None, progress: bool = True) -> np.ndarray:
        """Embeddings of a text or a list of them, float32 [n, d] with rows of unit length.

        Args:
            texts: what is longer than the model takes is cut, its end token kept.
            batch_size: texts of 16 tokens a batch; shorter ones are more and longer ones fewer.
                None is what the device likes.
            progress: a bar on the terminal, where it takes long.

        Raises:
            ValueError: a text that is no string; a model without text tower or tokenizer.
        """
        texts = self._texts(texts)
        batch_size = _batch_size(batch_size, "text")
        out = np.zeros((len(texts), self.model.embedding), np.float32)
        buckets = padded_lengths(_SHORTEST_TOKENS, self._max_tokens, _TEXT_STEPS)
        rows = self._text_rows(texts, progress)
        for numbers, embedding in self._run("text", rows, buckets, batch_size, TOKENS_PER_ROW):
            out[numbers] = embedding
        return out

    def classify(self, clips, class_names: Sequence[str], template: str = TEMPLATE,
                 sampling_rate=None, policy: str | None = None, batch_size: int | None = None,
                 progress: bool = True) -> np.ndarray:
        """Probabilities of classes that are given by name, float32 [n, classes].

            softmax over classes of min(e^logit_scale, 100) <a, t>,

        t the embedding of the template with the name of the class put in (Wu et al. 2023).

        Args:
            clips, sampling_rate, policy, batch_size, progress: as of `embed_audio`.
            class_names: one or more.
            template: a text with {} where the name goes.

        Raises:
            ValueError: as `embed_audio` and `embed_text`, and if the model has one tower only,
                there are no classes, or the template has no {}.
        """
        if len(self.model.towers) < 2:
            raise ValueError(f"{self.name}: a model of {[*self.model.towers][0]} alone; classify "
                             "compares clips with texts and needs both towers")
        if isinstance(class_names, str) or not len(class_names):
            raise ValueError(f"class_names is {class_names!r}; expected a list of names")
        if "{}" not in template:
            raise ValueError(f"template is {template!r}; expected a text with {{}} where the name "
                             "of the class goes")
        names = self._texts(class_names, "class_names")
        texts = self.embed_text([template.replace("{}", name) for name in names], progress=False)
        audio = self.embed_audio(clips, sampling_rate, policy, batch_size, progress)
        scale = min(np.exp(np.float64(self._host_params[0]["logit_scale"])), 100.0)
        logits = scale * audio.astype(np.float64) @ texts.T
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)

    def prepare_audio(self, clips, sampling_rate=None, policy: str | None = None):
        """(audio, mask) as `encode_audio` takes them: rows [rows, *input_shape] of all clips.

        Rows are in the order of the clips, one each but with "chunk_mean". The mask is None for
        log-mels; waveforms are padded to the longest and the mask is False there. Raises as
        `embed_audio`.
        """
        clips, rates = self._clips(clips, sampling_rate, policy)
        if not clips:
            raise ValueError("no clips; expected one or more")
        rows = [row for _, row in self._audio_rows(clips, rates, policy, False)]
        length = max(map(len, rows)) if self.front_end.is_waveform else None
        return _stack(rows, len(rows), length)

    def prepare_text(self, texts):
        """(token ids, mask), each [texts, longest], as `encode_text` takes them.

        Raises as `embed_text`.
        """
        texts = self._texts(texts)
        if not texts:
            raise ValueError("no texts; expected one or more")
        rows = [row for _, row in self._text_rows(texts, False)]
        return _stack(rows, len(rows), max(map(len, rows)))

    def encode_audio(self, audio, mask=None) -> dict:
        """All that the audio tower gives for prepared rows: tokens, hidden (a list), pooled, ...

        One program for each shape, see `DualEncoder.encode_audio`; arrays stay on the device.
        """
        self._need("audio", "encode_audio")
        return self._encode["audio"](self._params, audio, mask)

    def encode_text(self, token_ids, mask) -> dict:
        """The same for token ids and mask [B, N], see `DualEncoder.encode_text`."""
        self._need("text", "encode_text")
        return self._encode["text"](self._params, token_ids, mask)

    @functools.cached_property
    def _params(self):
        params, tuning = self._host_params
        if self.model.dtype != "float32":
            from tail_jax.training.step import cast_frozen
            params = cast_frozen(params, self.model.dtype)
        return jax.device_put((params, tuning))

    @functools.cached_property
    def _tokenizer(self):
        from data_pipelines.text import Tokenizer
        return Tokenizer.load(self._tokenizer_path)

    def _jit(self, encode: Callable, output: str | None = None):
        def run(params, *inputs):
            self.traces += 1
            # Accelerators would multiply float32 with 8 to 11 bits; bfloat16 is there for that.
            precision = "highest" if self.model.dtype == "float32" else None
            with jax.default_matmul_precision(precision):
                out = encode(*params, *inputs)
            return out[output] if output else out
        return jax.jit(run)

    def _need(self, side: str, what: str) -> None:
        if side not in self.model.towers:
            raise ValueError(f"{self.name}: a model of {[*self.model.towers][0]} alone; {what} "
                             f"needs one with {side}")

    def _clips(self, clips, sampling_rate, policy) -> tuple[list, list]:
        """(clips, their rates), of what a user may pass."""
        from data_pipelines.front_end import POLICIES

        self._need("audio", "embed_audio")
        if self.front_end is None:
            raise ValueError(f"{self.name}: has no front end; load it from a folder that has one")
        if policy not in POLICIES:
            raise ValueError(f"policy is {policy!r}; expected one of {POLICIES}")
        one = isinstance(clips, (str, os.PathLike)) or hasattr(clips, "__array__")
        clips = [clips] if one else list(clips)
        if sampling_rate is None or np.ndim(sampling_rate) == 0:
            rates = [sampling_rate] * len(clips)
        else:
            rates = list(sampling_rate)
            if len(rates) != len(clips):
                raise ValueError(f"{len(rates)} sampling rates for {len(clips)} clips; expected "
                                 "one number, or one for each clip")
        return clips, [self.front_end.sampling_rate if r is None else r for r in rates]

    def _texts(self, texts, what: str = "texts") -> list[str]:
        self._need("text", "embed_text")
        if self._tokenizer_path is None:
            raise ValueError(f"{self.name}: has no tokenizer; put tokenizer.json (or vocabulary "
                             "and merges) beside its weights and load it again")
        texts = [texts] if isinstance(texts, str) else list(texts)
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{what}[{number}] is {text!r}, a {type(text).__name__}; expected "
                                 "a string")
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(f"{what}[{number}] is {text!r}, which is no Unicode text (half "
                                 "of a surrogate pair); decode it again")
        return texts

    def _audio_rows(self, clips, rates, policy, progress,
                    failures=None) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the clip, row), clips in order."""
        def prepare(number, clip, rate):
            try:
                return number, _prepare(self.front_end, policy, number, clip, rate)
            except ValueError as error:
                if failures is None:
                    raise
                failures[number] = str(error)
                return number, ()

        ready = map_ahead(prepare, range(len(clips)), clips, rates)
        for number, rows in _bar(ready, len(clips), "embedding audio", progress):
            for row in rows:
                yield number, row

    def _text_rows(self, texts, progress) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the text, token ids without padding), texts in order."""
        def tokenized():
            for first in range(0, len(texts), _TEXTS_AT_ONCE):
                ids, mask = self._tokenizer.encode(texts[first:first + _TEXTS_AT_ONCE],
                                                   self._max_tokens)
                known = self.model.text.vocab_size
                if ids.max(where=mask, initial=0) >= known:  # the device would make NaN of it
                    raise ValueError(f"{self._tokenizer_path}: gave the token {ids[mask].max()}; "
                                     f"{self.name} knows {known}, so they do not belong together")
                yield from (row[:length] for row, length in zip(ids, mask.sum(axis=1)))

        yield from enumerate(_bar(tokenized(), len(texts), "embedding texts", progress))

    def _run(self, side: str, rows, buckets, batch_size: int, unit):
        """(numbers, embeddings) of `rows`, batch by batch; the device is one batch behind."""
        waiting = None
        for length, most, items in _batches(rows, buckets, batch_size, unit):
            numbers, arrays = zip(*items)
            padded = min(most, 1 << (len(arrays) - 1).bit_length())
            out = self._embed[side](self._params, *_stack(arrays, padded, length))
            if waiting:
                yield waiting[0], np.asarray(waiting[1])[:len(waiting[0])]
            waiting = [*numbers], out
        if waiting:
            yield waiting[0], np.asarray(waiting[1])[:len(waiting[0])]


def _batches(rows: Iterable[tuple[int, np.ndarray]], buckets: list[int] | None, batch_size: int,
             unit: int | None) -> Iterator[tuple[int | None, int, list]]:
    """(length to pad to, most rows, items) of batches of `rows` of similar length.

    Rows of one length (`buckets` None) are taken as they come.
    """
    def bucket(row):
        return buckets and buckets[bisect.bisect_left(buckets, len(row))]

    def capacity(length):
        return batch_size if length is None else max(1, batch_size * unit // length)

    bins = collections.defaultdict(list)
    for item in rows:
        length = bucket(item[1])
        bins[length].append(item)
        if len(bins[length]) == capacity(length):
            yield length, len(bins[length]), bins.pop(length)
    rest = sorted((item for items in bins.values() for item in items),
                  key=lambda item: -len(item[1]))
    while rest:
        length = bucket(rest[0][1])
        most = capacity(length)
        yield length, most, rest[:most]
        rest = rest[most:]


def _stack(arrays: Sequence[np.ndarray], rows: int, length: int | None):
    """(batch, mask): arrays padded by zeros to `length`, and by repetitions of the first to `rows`.

    Without a length they are equally long, and the mask is None.
    """
    arrays = [*arrays, *[arrays[0]] * (rows - len(arrays))]
    if length is None:
        return np.stack(arrays), None
    batch, mask = np.zeros((rows, length), arrays[0].dtype), np.zeros((rows, length), bool)
    for row, array in enumerate(arrays):
        batch[row, :len(array)], mask[row, :len(array)] = array, True
    return batch, mask


def _prepare(front_end, policy, number: int, clip, rate):
    """The rows of one clip; its errors name it."""
    from data_pipelines.waveforms import to_mono

    if isinstance(clip, (str, os.PathLike)):
        from data_pipelines.audio import read_audio
        name, waveform = clip, read_audio(clip, front_end.sampling_rate)  # its errors name the path
    else:
        name = f"clip {number}"
        try:
            waveform = to_mono(np.asarray(clip), rate, front_end.sampling_rate)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    try:
        return front_end.rows(waveform, policy)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _bar(items: Iterable, total: int, what: str, show: bool) -> Iterable:
    if not show:
        return items
    from data_pipelines import progress
    return progress(items, total, what)


def _batch_size(batch_size: int | None, side: str) -> int:
    if batch_size is None:
        return BATCH["cpu" if jax.default_backend() == "cpu" else "accelerator"][side]
    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; expected a whole number, 1 or more")
    return batch_size
