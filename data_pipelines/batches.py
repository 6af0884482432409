"""A split -> batches of NumPy arrays: training pairs, evaluation clips, evaluation captions."""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data_pipelines import cores, iterate, load_tensorflow, padded_lengths
from data_pipelines.audio import (
    AudioError,
    AudioProblem,
    header_length,
    read_chunk,
    usable_clips,
)
from data_pipelines.augment import SpecAugment, crop_start, mask_numbers, spec_augment
from data_pipelines.corpora import Split, caption_keys
from data_pipelines.features import ChunkPolicy, FeatureCache
from data_pipelines.log_mel import LogMelSettings, log_mel
from data_pipelines.text import Tokenizer
from data_pipelines.waveforms import chunk_starts

Batch = dict[str, np.ndarray]

_ENDLESS = np.iinfo(np.int64).max
_PREFETCHED_BATCHES = 2
# Rows of tokens have 32, 48, 64, 96, ... entries; each length is a program.
_SHORTEST_TOKENS, _TEXT_STEPS = 32, 2


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """How clips and captions become arrays.

    Attributes:
      log_mel: the front end.
      window_seconds: length of the audio of a row; shorter clips are filled up as `log_mel.fill`
        says.
      max_tokens: of a caption, begin and end included; longer ones are cut.
      max_chunks: most rows of a clip in evaluation.
      cache_dir: folder for features and audio checks; None computes features for each batch.
      cache_bytes: largest feature file of one split; a larger split computes features for each
        batch.
      on_error: "raise" or "skip" clips whose audio cannot be used.
      crop: training takes the "center" of clips longer than the window, or a "random" part, which
        is computed for each batch.
      spec_augment: masks on training audio, or None.
      num_parallel: clips read at once; None is one per core.
    """

    log_mel: LogMelSettings = LogMelSettings()
    window_seconds: float = 10.0
    max_tokens: int = 64
    max_chunks: int = 3
    cache_dir: str | None = None
    cache_bytes: int = 4 << 30
    on_error: str = "raise"
    crop: str = "center"
    spec_augment: SpecAugment | None = None
    num_parallel: int | None = None

    def __post_init__(self):
        for name, expected in {"crop": ("center", "random"), "on_error": ("raise", "skip")}.items():
            if getattr(self, name) not in expected:
                found = getattr(self, name)
                raise ValueError(f"data.{name} is {found!r}, expected one of {expected}")
        if self.max_chunks < 1:
            raise ValueError(f"data.max_chunks is {self.max_chunks}, expected 1 or more")
        self.log_mel.num_frames(self.window_samples)

    @property
    def window_samples(self) -> int:
        """Length of the audio of a row, in samples."""
        return round(self.window_seconds * self.log_mel.sampling_rate)

    @property
    def audio_shape(self) -> tuple[int, int]:
        """(frames, mels) of a row of audio."""
        return self.policy(1).row_shape

    def policy(self, max_chunks: int) -> ChunkPolicy:
        """Returns the rule that makes at most `max_chunks` rows of a clip."""
        return ChunkPolicy(self.log_mel, self.window_samples, max_chunks)


@dataclasses.dataclass(frozen=True)
class _AudioRows:
    """Rows of audio: of which clip, which of its chunks, and the features if they are kept."""

    clip: np.ndarray  # int32 [rows], row in the clips of the reader
    chunk: np.ndarray  # int32 [rows]
    values: np.ndarray | None  # float32 [rows, frames, mels]


class SplitReader:
    """Batches of one split.

    Making one encodes the captions, and decodes every clip once (features are computed in the same
    pass, where they are kept); a second reader of the same files finds both on disk.

    Args:
      split, settings: the clips, and how they and their captions become arrays.
      tokenizer: of the captions; None: no text, and a clip is one pair.
      classes: names in the order of their numbers; () for batches without labels.

    Attributes:
      split: the clips that can be used; the `clip_id` of a batch is a row of `split.clips`, the
        `caption_id` a row of `split.captions`.
      problems: clips left out with on_error="skip", as rows of the split that was given.
      labels: int32 [clips], the number of each clip's class; None without classes.
      pairs: int32 [pairs, 2], (clip row, caption row) of every caption; without text, (row, row).
      token_ids, token_mask: int32 and bool [captions, tokens]; None without text.
      caption_key: int32 [captions], equal where and only where normalised captions are; or None.

    Raises:
      AudioError: with on_error="raise", one error that names all files that cannot be used.
      ValueError: no clips, none that can be used, clips of other classes.
    """

    def __init__(
        self,
        split: Split,
        tokenizer: Tokenizer | None,
        settings: DataSettings,
        classes: Sequence[str] = (),
    ):
        self.settings = settings
        self._given = split
        labels = _class_numbers(split, classes) if classes else None
        if not split.clips:
            raise ValueError(
                f"corpus '{split.corpus}': split '{split.name}' has no clips; expected at least one"
            )
        self._cache = FeatureCache(settings.cache_dir, settings.cache_bytes, settings.num_parallel)
        self._random_crop = settings.crop == "random" and self._any_clip_exceeds_window()
        # (most rows of a clip, whether features are kept)
        self._train_key = (1, not self._random_crop)
        self._evaluation_key = (settings.max_chunks, True)
        # The rows that this split will be read by, so that one pass decides what can be used.
        first = self._train_key if split.name == "train" else self._evaluation_key
        rows, self.problems = self._read_rows(*first)
        kept = usable_clips(split.clips, self.problems, settings.on_error)
        if not kept:
            raise ValueError(
                f"corpus '{split.corpus}': none of the {len(split.clips)} clips of split "
                f"'{split.name}' can be used; the first: {self.problems[0].message}"
            )
        self.split = dataclasses.replace(split, clips=kept)
        self._rows_of = {first: self._renumber(rows)}
        self.labels = np.delete(labels, [p.row for p in self.problems]) if classes else None
        self.token_ids = self.token_mask = self.caption_key = None
        pair_clip = np.arange(len(kept), dtype=np.int32)
        if tokenizer is not None:
            texts, pair_clip = self.split.captions, self.split.caption_clip
            self.token_ids, self.token_mask = tokenizer.encode(texts, settings.max_tokens)
            self._tokens = self.token_mask.sum(1)
            self.caption_key = caption_keys(texts)
        self.pairs = np.stack([pair_clip, np.arange(len(pair_clip), dtype=np.int32)], axis=1)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Returns the number of batches that hold every pair once, the last one padded."""
        return _ceil_divide(len(self.pairs), batch_size)

    def train_batches(
        self,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        rows: np.ndarray | None = None,
        whole_text: bool = False,
    ) -> Iterator[Batch]:
        """Yields training batches without end, one (clip, caption) pair per row.

        Epoch e goes through all pairs in the order of a permutation drawn from (seed, e). A batch
        is a function of the arguments and of its step alone: what is yielded first is batch
        `start_step` of an iterator that began at 0.

        Args:
          batch_size: rows of the global batch, B.
          seed: of order, crops and masks.
          start_step: steps done before.
          rows: int [n], the rows of each global batch that this host reads; None is all, n = B.
          whole_text: rows of tokens have `max_tokens` entries in every batch.

        Yields:
          audio [n, frames, mels] float32; with a tokenizer token_ids [n, tokens] int32,
          token_mask bool (`tokens` is one of few lengths that holds the longest caption of the
          global batch), caption_id, caption_key [n] int32; with classes label [n] int32;
          clip_id [n] int32; mask [n] bool, False on the rows that fill the last batch of an
          epoch, which are zero in all arrays. The audio is read-only.
        """
        share = _share(batch_size, rows)
        if start_step < 0 or seed < 0:
            raise ValueError(f"start_step {start_step}, seed {seed}: expected 0 or more")
        settings = self.settings
        local = len(share)
        steps_per_epoch = self.steps_per_epoch(batch_size)
        rows = self._rows(self._train_key)

        def place(step: int, share=share) -> tuple[int, np.ndarray, np.ndarray]:
            """Returns epoch, pairs [local] (0 on padding) and mask [local]."""
            epoch, index = divmod(int(step), steps_per_epoch)
            place, mask = _slots(index, batch_size, len(self.pairs), share)
            return epoch, _permutation(seed, epoch, len(self.pairs))[place] * mask, mask

        def fields(step: int) -> Batch:
            _, pairs, mask = place(step)
            clip, caption = self.pairs[pairs].T
            arrays = {}
            if self.token_ids is not None:
                _, everywhere, used = place(step, np.arange(batch_size))
                together = None if whole_text else self.pairs[everywhere[used], 1]
                arrays = self._text(caption, together)
            if self.labels is not None:
                arrays["label"] = self.labels[clip]
            return _masked(mask, clip_id=clip, **arrays)

        def locate(slot: int) -> tuple[int, Callable[[int, int], int]] | None:
            step, i = divmod(int(slot), local)
            epoch, pairs, mask = place(step)
            if not mask[i]:
                return None
            pair = int(pairs[i])
            if self._random_crop:
                return int(self.pairs[pair, 0]), functools.partial(
                    crop_start, seed=seed, epoch=epoch, pair=pair
                )
            return int(self.pairs[pair, 0]), _chunk_chooser(1, 0)

        def gather(step: int) -> np.ndarray:
            _, pairs, mask = place(step)
            # One row per clip here, so the row of a clip is its number.
            return _masked(mask, audio=rows.values[self.pairs[pairs, 0]])["audio"]

        def augment(step: int, audio: np.ndarray) -> np.ndarray:
            epoch, pairs, mask = place(step)
            numbers = mask_numbers(settings.spec_augment, seed, epoch, len(self.pairs))[pairs]
            return _masked(mask, audio=spec_augment(audio, settings.spec_augment, numbers))["audio"]

        return self._batches(
            range(start_step, _ENDLESS // batch_size),
            local,
            fields,
            gather if rows.values is not None else None,
            locate,
            augment if settings.spec_augment is not None else None,
        )

    @property
    def fixed_inputs(self) -> bool:
        """Whether training sees every clip the same way each time: no random crops, no masks."""
        return not self._random_crop and self.settings.spec_augment is None

    def audio_batches(
        self, batch_size: int, training: bool = False, rows: np.ndarray | None = None
    ) -> Iterator[Batch]:
        """Yields the audio of every clip: one row per chunk, in clip order.

        Args:
          batch_size: rows of a batch.
          training: yield the one chunk of a clip that training sees (fixed inputs only) instead of
            the chunks of evaluation.
          rows: as in `train_batches`.

        Yields:
          audio [n, frames, mels] float32; clip_id [n] int32; mask [n] bool, False on the rows that
          fill the last batch. The embedding of a clip is the mean over its rows.
        """
        share = _share(batch_size, rows)
        key = self._train_key if training else self._evaluation_key
        rows = self._rows(key)
        total = len(rows.clip)

        def place(step: int) -> tuple[np.ndarray, np.ndarray]:
            return _slots(int(step), batch_size, total, share)

        def fields(step: int) -> Batch:
            row, mask = place(step)
            return _masked(mask, clip_id=rows.clip[row])

        def locate(slot: int) -> tuple[int, Callable[[int, int], int]] | None:
            step, i = divmod(int(slot), len(share))
            row = step * batch_size + int(share[i])
            if row >= total:
                return None
            return int(rows.clip[row]), _chunk_chooser(key[0], int(rows.chunk[row]))

        def gather(step: int) -> np.ndarray:
            row, mask = place(step)
            return _masked(mask, audio=rows.values[row])["audio"]

        return self._batches(
            range(_ceil_divide(total, batch_size)),
            len(share),
            fields,
            gather if rows.values is not None else None,
            locate,
        )

    def text_batches(self, batch_size: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        """Yields every caption once, short ones first: little of a batch is padding.

        Yields:
          token_ids, token_mask [n, tokens]; caption_id, caption_key [n] int32; mask [n] bool, False
          on the rows that fill the last batch; `rows` and `tokens` as in `train_batches`.
        """
        share = _share(batch_size, rows)
        if self.token_ids is None:
            raise ValueError(f"corpus '{self.split.corpus}' is read without a tokenizer: no text")
        order = np.argsort(self._tokens, kind="stable").astype(np.int32)
        # Slices of arrays in memory: tf.data would only add threads and copies.
        for step in range(_ceil_divide(len(order), batch_size)):
            place, mask = _slots(step, batch_size, len(order), share)
            together = order[step * batch_size : (step + 1) * batch_size]
            yield _masked(mask, **self._text(order[place] * mask, together))

    def _text(self, caption: np.ndarray, together: np.ndarray | None) -> Batch:
        """Returns fields of captions, cut to a length for all `together`; None: not cut."""
        tokens = self.settings.max_tokens
        if together is not None:
            lengths = padded_lengths(_SHORTEST_TOKENS, tokens, _TEXT_STEPS)
            tokens = lengths[bisect.bisect_left(lengths, self._tokens[together].max())]
        return {
            "caption_id": caption,
            "token_ids": self.token_ids[caption, :tokens],
            "token_mask": self.token_mask[caption, :tokens],
            "caption_key": self.caption_key[caption],
        }

    def _any_clip_exceeds_window(self) -> bool:
        policy = self.settings.policy(2)
        lengths = (header_length(clip.path) for clip in self._given.clips)
        return any(policy.count(length) > 1 for length in lengths if length)

    def _rows(self, key: tuple[int, bool]) -> _AudioRows:
        if key not in self._rows_of:
            rows, problems = self._read_rows(*key)
            if {problem.row for problem in problems} != {problem.row for problem in self.problems}:
                raise ValueError(
                    f"corpus '{self.split.corpus}': audio of split '{self.split.name}' changed "
                    f"while in use; files that cannot be read: {len(self.problems)} before, "
                    f"{len(problems)} now"
                )
            self._rows_of[key] = self._renumber(rows)
        return self._rows_of[key]

    def _read_rows(
        self, max_chunks: int, keep: bool
    ) -> tuple[_AudioRows, tuple[AudioProblem, ...]]:
        """Returns the rows of the clips that were given, and which of these cannot be used."""
        clips, policy = self._given.clips, self.settings.policy(max_chunks)
        features = self._cache.features(clips, policy) if keep else None
        if features is not None:
            clip, values, problems = features.rows_clip, features.values, features.problems
        else:
            lengths, problems = self._cache.check(clips)
            counts = [policy.count(length) if length else 0 for length in lengths]
            clip, values = np.repeat(np.arange(len(clips), dtype=np.int32), counts), None
        chunk = (np.arange(len(clip)) - np.searchsorted(clip, clip)).astype(np.int32)
        return _AudioRows(clip, chunk, values), problems

    def _renumber(self, rows: _AudioRows) -> _AudioRows:
        """Returns rows that number the clips in use instead of those that were given."""
        used = np.ones(len(self._given.clips), bool)
        used[[problem.row for problem in self.problems]] = False
        number = np.cumsum(used, dtype=np.int32) - np.int32(1)
        return dataclasses.replace(rows, clip=number[rows.clip])

    def _batches(
        self,
        steps: range,
        size: int,
        fields: Callable[[int], Batch],
        gather: Callable[[int], np.ndarray] | None,
        locate: Callable[[int], tuple[int, Callable[[int, int], int]] | None],
        augment: Callable[[int, np.ndarray], np.ndarray] | None = None,
    ) -> Iterator[Batch]:
        """Yields the batches of `steps`, the audio through tf.data.

        Args:
          steps: numbers of the batches.
          size: rows of a batch.
          fields: step -> all but the audio.
          gather: step -> audio [size, frames, mels], where features are kept.
          locate: row number over all steps -> (clip, first frame chooser), None on padding.
          augment: (step, audio) -> audio.
        """
        tf = load_tensorflow()
        settings = self.settings
        parallel = settings.num_parallel or cores()
        failures: list[AudioError] = []

        def compute(slot):
            found = locate(slot)
            if found is None:
                return np.zeros(settings.audio_shape, np.float32)
            clip, choose_start = found
            try:
                waveform, valid = read_chunk(
                    self.split.clips[clip].path,
                    settings.log_mel.sampling_rate,
                    settings.window_samples,
                    choose_start,
                    settings.log_mel.fill,
                )
            except AudioError as error:
                failures.append(error)
                raise
            return log_mel(waveform, settings.log_mel, valid)

        def row(slot):
            values = tf.numpy_function(compute, [slot], tf.float32)
            return tf.ensure_shape(values, settings.audio_shape)

        numbers = tf.data.Dataset.range(steps.start, steps.stop)
        if gather is not None:
            audio = numbers.map(lambda step: tf.numpy_function(gather, [step], tf.float32))
        else:
            slots = tf.data.Dataset.range(steps.start * size, steps.stop * size)
            audio = slots.map(row, num_parallel_calls=parallel, deterministic=True).batch(size)
        if augment is not None:
            audio = tf.data.Dataset.zip(numbers, audio).map(
                lambda *inputs: tf.numpy_function(augment, inputs, tf.float32)
            )
        audio = iterate(audio.prefetch(_PREFETCHED_BATCHES))
        for step in steps:
            try:
                values = next(audio)
            except tf.errors.OpError:
                if failures:
                    raise failures[0] from None
                raise
            yield {"audio": values, **fields(step)}


def _class_numbers(split: Split, classes: Sequence[str]) -> np.ndarray:
    """Returns int32 [clips]: the number of each clip's label in `classes`."""
    numbers = dict(zip(classes, range(len(classes))))
    unknown = sorted({clip.label for clip in split.clips} - numbers.keys())
    if unknown:
        raise ValueError(
            f"corpus '{split.corpus}': split '{split.name}' has clips of the classes "
            f"{', '.join(map(repr, unknown))}; expected some of the {len(classes)} that were given"
        )
    return np.array([numbers[clip.label] for clip in split.clips], np.int32)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(length)


def _slots(
    step: int, batch_size: int, total: int, share: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what is in the rows `share` of batch `step`, in order, 0 on padding, and the mask."""
    row = step * batch_size + share
    mask = row < total
    return row * mask, mask


def _masked(mask: np.ndarray, **arrays: np.ndarray) -> Batch:
    """Returns the arrays with zeros where `mask` [batch] is False, and the mask."""
    if not mask.all():
        for name, array in arrays.items():
            arrays[name] = array.copy()
            arrays[name][~mask] = 0
    return {**arrays, "mask": mask}


def _chunk_chooser(max_chunks: int, chunk: int) -> Callable[[int, int], int]:
    return lambda frames, window: chunk_starts(frames, window, max_chunks)[chunk]


def _ceil_divide(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _share(batch_size: int, rows: np.ndarray | None) -> np.ndarray:
    """Returns the rows of a batch that are read, int32 [n]."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
    share = np.arange(batch_size, dtype=np.int32) if rows is None else np.asarray(rows, np.int32)
    if not len(share) or not 0 <= share.min() <= share.max() < batch_size:
        raise ValueError(f"rows {share} of a batch of {batch_size}; expected some of its rows")
    return share
