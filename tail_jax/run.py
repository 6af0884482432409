"""A run: what a configuration stands for, ready to be trained or measured."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any, Callable

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines.batches import SplitReader
from data_pipelines.corpora import Split, normalise_caption
from data_pipelines.streams import Stream, build_stream
from data_pipelines.text import Tokenizer
from tail_jax import backbone as backbones
from tail_jax import hosts, methods, settings
from tail_jax.backbone import Backbone
from tail_jax.evaluation.classification import accuracy_row, predict
from tail_jax.evaluation.retrieval import TaskEmbeddings, evaluate_row
from tail_jax.process import peak_bytes
from tail_jax.methods.base import Method, State
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.training import sharding
from tail_jax.training.checkpoints import load_tree, save_tree, tree_hash
from tail_jax.training.embedder import Embedder
from tail_jax.training.step import cast_frozen
from tail_jax.training.task_data import TaskData

# PRNG streams of a run; each is folded into the key of its seed.
INIT_KEY, STEP_KEY, HOOK_KEY = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Run:
    """Devices, stream, backbone and method of a run in `workdir`.

    Attributes:
        frozen: what the method needs of the backbone, on the devices.
        tests: readers of the split that is measured, one a task.
    """

    config: dict
    workdir: pathlib.Path
    mesh: Mesh
    method: Method
    stream: Stream
    backbone: Backbone
    frozen: Any
    tests: tuple[SplitReader, ...]

    @property
    def model(self) -> DualEncoder:
        """The description of the backbone."""
        return self.backbone.model

    @property
    def key(self) -> jax.Array:
        """The key of the seed."""
        return jax.random.key(self.config["seed"])

    def initial_state(self) -> State:
        """The method's state before the first task, on the devices, sharing no memory."""
        key = jax.random.fold_in(self.key, INIT_KEY)
        state = self.method.init(key, self.model, self.backbone.params)
        data = settings.data_settings(self.config["data"])
        memory = self.method.memory(self.model, data.audio_shape, data.max_tokens)
        state = self._with_classes(state, 0)
        _check_same(state)
        return state | ({"memory": memory} if memory else {}) | {
            "trainable": sharding.place(state["trainable"], self.mesh),
            "aux": sharding.put_tree(state["aux"], self._aux_shardings(state))}

    def _with_classes(self, state: State, task: int) -> State:
        """The state with the classes of a task, and those seen by its end, in `aux`."""
        if not self.stream.classes:
            return state
        last = len(self.stream.tasks) if self.method.joint else task + 1
        current, seen = (self._labels(range(first, last)) for first in (
            0 if self.method.joint else task, 0))
        return state | {"aux": state["aux"] | {"classes": {"current": current, "seen": seen}}}

    def _labels(self, tasks) -> np.ndarray:
        """bool [C], the classes of these tasks."""
        names = {clip.label for task in tasks for clip in self.stream.tasks[task].train.clips}
        return np.array([name in names for name in self.stream.classes])

    def begin_task(self, state: State, task: int, data: TaskData | None) -> State:
        """`method.begin_task`; new arrays go to all devices, so that the step stays one program."""
        state = self._with_classes(state, task)
        return self._placed(self.method.begin_task(state, task, data))

    def begin_stage(self, state: State, task: int, stage: int, data: TaskData | None) -> State:
        """`method.begin_stage`, its arrays placed in the same way."""
        return self._placed(self.method.begin_stage(state, task, stage, data))

    def begin_epoch(self, state: State, data: TaskData) -> State:
        """`method.begin_epoch`, its arrays placed in the same way."""
        return self._placed(self.method.begin_epoch(state, data))

    def end_stage(self, state: State, task: int, stage: int, data: TaskData | None) -> State:
        """`method.end_stage`, its arrays placed in the same way."""
        return self._placed(self.method.end_stage(state, task, stage, data))

    def end_task(self, state: State, task: int, data: TaskData | None) -> State:
        """`method.end_task`, its arrays placed in the same way."""
        return self._placed(self.method.end_task(state, task, data))

    def _placed(self, state: State) -> State:
        _check_same(state)
        where = sharding.parameter_shardings(state["trainable"], self.mesh)
        return state | {"trainable": sharding.move(state["trainable"], where),
                        "aux": sharding.move(state["aux"], self._aux_shardings(state))}

    def _aux_shardings(self, state: State) -> dict:
        return sharding.aux_shardings(state["trainable"], state["aux"], self.mesh)

    def task_data(self, reader: SplitReader, task: int, hook: int) -> TaskData:
        """What hook 0 (`begin_task`), 1 (`end_task`), 2 + 2 s (`begin_stage` of stage s) or
        3 + 2 s (`end_stage`) sees of task `task`."""
        key = jax.random.fold_in(jax.random.fold_in(self.key, HOOK_KEY), 2 * task + hook % 2)
        if hook > 1:
            key = jax.random.fold_in(key, hook)
        seed = np.random.SeedSequence([self.config["seed"], task, hook]).generate_state(1)[0]
        return TaskData(self.model, self.frozen, reader, key, int(seed),
                        self.config["train"]["batch_size"], self.mesh)

    def measure(self, row: int, state: State) -> dict[str, list[float | None]]:
        """Row `row` of every result matrix, the number of tasks trained on; 0: the backbone alone.

        What later rows and readers need is kept in the folder of the run: galleries, predictions.
        """
        if self.stream.classes:
            predicted = self.predict(row, state)
            if row:
                self._keep_predictions(row, predicted)
            return self.accuracies(predicted)
        if self.model.text is None:
            return {}  # nothing to retrieve by: a backbone is being pretrained
        fresh = self.embed(state) if row else self.embed_backbone()
        if row and not self.method.joint:
            self.keep_gallery(row, fresh[row - 1])
        return evaluate_row(fresh, self.galleries(row), row)

    def predict(self, row: int, state: State) -> list[np.ndarray]:
        """int32 [n_j], the predicted classes of each session's clips, of the first `row`."""
        if not row:
            return []
        seen = self._labels(range(row))
        # Scores stay while what they are computed from does: methods that stop training at some
        # session have the clips of old sessions embedded once.
        aux = {name: tree for name, tree in state["aux"].items() if name != "classes"}
        version = tree_hash(sharding.to_host({"trainable": state["trainable"], "aux": aux}))
        if self._scores.get("version") != version:
            self._scores.clear()
            self._scores["version"] = version
        for task in range(row):
            if task not in self._scores:
                self._scores[task] = self.embedder.scores(
                    self.tests[task], state["trainable"], self.frozen, state["aux"])
        return [predict(self.method.decide(state, self._scores[task]), seen)
                for task in range(row)]

    def accuracies(self, predicted: list[np.ndarray]) -> dict[str, list[float | None]]:
        """The row of the accuracy matrix that these predictions of the first sessions give."""
        hits = [own == reader.labels for own, reader in zip(predicted, self.tests)]
        return {"accuracy/seen": accuracy_row(hits, len(self.tests))}

    def _keep_predictions(self, row: int, predicted: list[np.ndarray]) -> None:
        readers = self.tests[:row]
        hosts.on_first(lambda: save_tree(self.workdir / "predictions" / f"task_{row}.safetensors", {
            "predicted": np.concatenate(predicted),
            "label": np.concatenate([reader.labels for reader in readers]),
            "session": np.repeat(np.arange(1, row + 1, dtype=np.int32), [*map(len, predicted)])},
            {"kind": "predictions", "classes": [*self.stream.classes],
             "clips": [clip.id for reader in readers for clip in reader.split.clips]}))

    @functools.cached_property
    def _scores(self) -> dict:
        """{session: scores [n, k]} of the last `version` of the state that was measured."""
        return {}

    def embed(self, state: State) -> list[TaskEmbeddings]:
        """The measured split of every task under the method's state."""
        return self._embed(self.embedder, state, self.frozen)

    def embed_backbone(self) -> list[TaskEmbeddings]:
        """The measured split of every task under the pretrained model alone."""
        bare = methods.build(methods.defaults("frozen"))
        params = frozen_on_devices(bare, self.backbone, self.mesh)
        embedder = Embedder(self.model, bare, self.mesh, self.config["eval"]["batch_size"])
        return self._embed(embedder, {"trainable": {}, "aux": {}}, params)

    @functools.cached_property
    def embedder(self) -> Embedder:
        """The method's embedding functions, compiled once a run."""
        return Embedder(self.model, self.method, self.mesh, self.config["eval"]["batch_size"])

    def _embed(self, embedder, state, frozen):
        args = state["trainable"], frozen, state["aux"]
        return [TaskEmbeddings(
            embedder.audio(reader, *args), embedder.text(reader, *args), reader.split.caption_clip,
            [normalise_caption(caption) for caption in reader.split.captions])
            for reader in self.tests]

    def keep_gallery(self, row: int, embedded: TaskEmbeddings) -> None:
        """Stores the measured split of the task that row `row` follows, for the stale index."""
        hosts.on_first(lambda: save_tree(
            self._gallery(row), {"audio": embedded.audio, "text": embedded.text},
            {"kind": "gallery", "task": self.stream.tasks[row - 1].name}))

    def galleries(self, row: int) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """(audio, text) of every task as stored at its end, up to row `row`; None: not stored."""
        stored: list = [None] * len(self.tests)
        for task in range(row):
            if hosts.ask_first(self._gallery(task + 1).exists):
                tree, _ = load_tree(self._gallery(task + 1))
                stored[task] = tree["audio"], tree["text"]
        return stored

    def _gallery(self, row: int) -> pathlib.Path:
        return self.workdir / "galleries" / f"task_{row}.safetensors"


def open_run(config: dict, workdir: pathlib.Path, pretrain: Callable | None = None) -> Run:
    """Builds what `config` (plain dicts) describes.

    Args:
        config: as `config.json` of a run holds it.
        workdir: folder of the run.
        pretrain: `train`, called as pretrain(config, folder) where the backbone has still to be
            pretrained; without it, that is an error.

    Raises:
        ValueError, FileNotFoundError: for settings or data that cannot be used, in one line.
    """
    mesh = sharding.make_mesh(**config["mesh"])
    settings.check(config, sharding.row_parts(mesh))
    stream = hosts.first_then_others(lambda: build_stream(settings.stream_spec(config)))
    # A model of audio alone is pretrained on any stream.
    kind = len(stream.classes) if stream.classes or config["model"]["text"] else None
    method = methods.build(config["method"], len(stream.tasks), kind)
    backbone = prepare_backbone(config, stream, workdir, pretrain)
    hosts.check_same(lambda: backbone.sha256, "the backbone")
    if stream.classes:
        backbone = backbone.with_classes(len(stream.classes))
    tests = tuple(read(config, backbone.tokenizer, getattr(task, config["eval"]["split"]),
                       stream.classes) for task in stream.tasks)
    return Run(config, workdir, mesh, method, stream, backbone,
               frozen_on_devices(method, backbone, mesh), tests)


def read(config: dict, tokenizer: pathlib.Path | None, split: Split, classes=()) -> SplitReader:
    """A reader of a split; tells of the clips that `data.on_error=skip` leaves out."""
    # The first host computes the features that are kept, the others find them.
    reader = hosts.first_then_others(lambda: SplitReader(
        split, tokenizer and Tokenizer.load(tokenizer), settings.data_settings(config["data"]),
        classes))
    for problem in reader.problems:
        hosts.say(f"skipped {split.corpus}/{split.name}: {problem.message}")
    if reader.problems:
        hosts.say(f"skipped {len(reader.problems)} clips of {split.corpus}/{split.name}")
    return reader


def stream_name(config: dict) -> str:
    """The name of the stream, for people."""
    return config["stream"]["name"] or config["stream"]["kind"]


def peak_memory() -> int:
    """Bytes: the most that arrays took of the accelerator, or the largest resident set."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or peak_bytes()


def prepare_backbone(config: dict, stream: Stream, workdir: pathlib.Path,
                     pretrain: Callable | None = None) -> Backbone:
    """The backbone that `config.backbone` asks for: from a folder, pretrained here, or random.

    Pretraining is a run of its own in a folder named by the hash of everything it depends on, so
    it happens once, and resumes when killed.
    """
    kind = config["backbone"]["kind"]
    if config["model"]["checkpoint"]:
        return hosts.together(lambda: _from_checkpoint(config))
    if kind == "checkpoint":
        raise ValueError("model.checkpoint is empty; pass --config.model.checkpoint=DIR, a "
                         "checkpoint folder or WORKDIR/backbone of a pretraining run")
    if kind == "pretrain":
        return _pretrained(config, pretrain)
    if kind != "random":
        raise ValueError(f"backbone.kind is {kind!r}; expected checkpoint, pretrain or random")
    model, tokenizer = settings.described_model(config), workdir / "tokenizer.json"
    if model.text is None:
        tokenizer = None
    elif hosts.ask_first(lambda: not tokenizer.exists()):
        captions = [caption for task in stream.tasks for caption in task.train.captions]
        hosts.on_first(lambda: Tokenizer.train(captions, model.text.vocab_size).save(tokenizer))
    mean, var = settings.mel_statistics(
        read(config, tokenizer, stream.tasks[0].train, stream.classes),
        config["eval"]["batch_size"])
    return backbones.random_backbone(model, config["seed"], config["data"], tokenizer, mean, var)


def _from_checkpoint(config: dict) -> Backbone:
    parts = [backbones.load(part)
             for part in settings.checkpoint_parts(config["model"]["checkpoint"])]
    if len(parts) == 2:
        parts = [backbones.combine(*parts, config["model"]["embedding"], config["seed"])]
    backbone = parts[0]
    if backbone.tokenizer is None and backbone.model.text is not None:
        raise ValueError(f"{config['model']['checkpoint']}: has no tokenizer; put tokenizer.json "
                         "beside its weights")
    # Its values; pooling and type of the computation as `settings.with_checkpoint` settled them.
    return dataclasses.replace(backbone, model=settings.described_model(config))


def _pretrained(config: dict, pretrain: Callable | None) -> Backbone:
    # Augmentation is the experiment's affair: its backbone is that of the run without.
    inner = config | config["backbone"]["pretrain"] | {
        "backbone": {"kind": "random", "pretrain": {}},
        "data": config["data"] | {"crop": "center", "spec_augment": None}}
    inner["stream"] = inner["stream"] | {"limit": 0}
    digest = backbones.content_hash(
        {k: v for k, v in inner.items() if k not in ("data", "mesh", "eval", "train")},
        {k: inner["train"][k] for k in ("duration", "batch_size", "accumulation")},
        {k: inner["data"][k] for k in ("log_mel", "window_seconds", "max_tokens")},
        settings.corpus_hash(build_stream(settings.stream_spec(inner))))
    folder = pathlib.Path(config["data"]["cache_dir"]) / "backbones" / digest
    if hosts.ask_first(lambda: not (folder / "backbone" / backbones.WEIGHTS).exists()):
        if pretrain is None:
            raise ValueError(f"{folder / 'backbone'}: no such backbone; expected the one that the "
                             "run was trained on, in the cache of config.data.cache_dir")
        hosts.say(f"pretraining the backbone in {folder} (once)")
        pretrain(inner, folder)
    return dataclasses.replace(backbones.load(folder / "backbone"),
                               name=f"{stream_name(inner)}-{digest}")


def _check_same(state: State) -> None:
    """Of what a method computed on the hosts: all must have come to the same."""
    local = [leaf for leaf in jax.tree.leaves(state) if getattr(leaf, "is_fully_addressable", True)]
    hosts.check_same(lambda: tree_hash({str(n): leaf for n, leaf in enumerate(local)}),
                     "what the method computed between steps")


def frozen_on_devices(method: Method, backbone: Backbone, mesh: Mesh):
    """What the method needs of the backbone, in the type that its towers compute in."""
    frozen = cast_frozen(method.frozen(backbone.params), backbone.model.dtype)
    # On a CPU these are the backbone's own arrays where the type is: nothing writes to them.
    return sharding.move(frozen, sharding.parameter_shardings(frozen, mesh))
