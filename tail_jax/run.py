"""A run: what a configuration stands for, ready to be trained or measured."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from typing import Any, Callable

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines.batches import SplitReader
from data_pipelines.corpora import Split, normalise_caption
from data_pipelines.streams import Stream, build_stream
from data_pipelines.text import Tokenizer
from tail_jax import backbone as backbones
from tail_jax import methods, settings
from tail_jax.backbone import Backbone
from tail_jax.evaluation.retrieval import TaskEmbeddings
from tail_jax.methods.base import Method, State
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.training import sharding
from tail_jax.training.checkpoints import load_tree, save_tree
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
        return state | ({"memory": memory} if memory else {}) | {
            "trainable": sharding.place(state["trainable"], self.mesh),
            "aux": sharding.put_tree(state["aux"], self._aux_shardings(state))}

    def begin_task(self, state: State, task: int, data: TaskData | None) -> State:
        """`method.begin_task`; new arrays go to all devices, so that the step stays one program."""
        return self._placed(self.method.begin_task(state, task, data))

    def end_task(self, state: State, task: int, data: TaskData | None) -> State:
        """`method.end_task`, its arrays placed in the same way."""
        return self._placed(self.method.end_task(state, task, data))

    def _placed(self, state: State) -> State:
        where = sharding.parameter_shardings(state["trainable"], self.mesh)
        return state | {"trainable": jax.device_put(state["trainable"], where),
                        "aux": jax.device_put(state["aux"], self._aux_shardings(state))}

    def _aux_shardings(self, state: State) -> dict:
        """Trees like `trainable` (teachers, Fisher) lie as it does, the rest on every device."""
        where = sharding.parameter_shardings(state["trainable"], self.mesh)
        here, like = sharding.replicated(self.mesh), jax.tree.structure(where)
        return {name: where if jax.tree.structure(tree) == like
                else jax.tree.map(lambda _: here, tree) for name, tree in state["aux"].items()}

    def task_data(self, reader: SplitReader, task: int, hook: int) -> TaskData:
        """What hook 0 (`begin_task`) or 1 (`end_task`) sees of task `task`."""
        key = jax.random.fold_in(jax.random.fold_in(self.key, HOOK_KEY), 2 * task + hook)
        seed = np.random.SeedSequence([self.config["seed"], task, hook]).generate_state(1)[0]
        return TaskData(self.model, self.frozen, reader, key, int(seed),
                        self.config["train"]["batch_size"], self.mesh)

    def embed(self, state: State) -> list[TaskEmbeddings]:
        """The measured split of every task under the method's state."""
        return self._embed(self.embedder, state, self.frozen)

    def embed_backbone(self) -> list[TaskEmbeddings]:
        """The measured split of every task under the pretrained model alone."""
        bare = methods.build(methods.defaults("frozen"))
        params = _frozen_on_devices(bare, self.backbone, self.mesh)
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
        save_tree(self._gallery(row), {"audio": embedded.audio, "text": embedded.text},
                  {"kind": "gallery", "task": self.stream.tasks[row - 1].name})

    def galleries(self, row: int) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """(audio, text) of every task as stored at its end, up to row `row`; None: not stored."""
        stored: list = [None] * len(self.tests)
        for task in range(row):
            if self._gallery(task + 1).exists():
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
    settings.check(config, mesh.shape["data"])
    stream = build_stream(settings.stream_spec(config))
    method = methods.build(config["method"], len(stream.tasks))
    backbone = prepare_backbone(config, stream, workdir, pretrain)
    tests = tuple(read(config, backbone.tokenizer, getattr(task, config["eval"]["split"]))
                  for task in stream.tasks)
    return Run(config, workdir, mesh, method, stream, backbone,
               _frozen_on_devices(method, backbone, mesh), tests)


def read(config: dict, tokenizer: pathlib.Path, split: Split) -> SplitReader:
    """A reader of a split; tells of the clips that `data.on_error=skip` leaves out."""
    reader = SplitReader(split, Tokenizer.load(tokenizer), settings.data_settings(config["data"]))
    for problem in reader.problems:
        print(f"skipped {split.corpus}/{split.name}: {problem.message}", file=sys.stderr)
    if reader.problems:
        print(f"skipped {len(reader.problems)} clips of {split.corpus}/{split.name}",
              file=sys.stderr)
    return reader


def stream_name(config: dict) -> str:
    """The name of the stream, for people."""
    return config["stream"]["name"] or config["stream"]["kind"]


def prepare_backbone(config: dict, stream: Stream, workdir: pathlib.Path,
                     pretrain: Callable | None = None) -> Backbone:
    """The backbone that `config.backbone` asks for: from a folder, pretrained here, or random.

    Pretraining is a run of its own in a folder named by the hash of everything it depends on, so
    it happens once, and resumes when killed.
    """
    kind = config["backbone"]["kind"]
    if config["model"]["checkpoint"]:
        return _from_checkpoint(config)
    if kind == "checkpoint":
        raise ValueError("model.checkpoint is empty; pass --config.model.checkpoint=DIR, a "
                         "checkpoint folder or WORKDIR/backbone of a pretraining run")
    if kind == "pretrain":
        return _pretrained(config, pretrain)
    if kind != "random":
        raise ValueError(f"backbone.kind is {kind!r}; expected checkpoint, pretrain or random")
    model, tokenizer = settings.described_model(config), workdir / "tokenizer.json"
    if not tokenizer.exists():
        captions = [caption for task in stream.tasks for caption in task.train.captions]
        Tokenizer.train(captions, model.text.vocab_size).save(tokenizer)
    mean, var = settings.mel_statistics(read(config, tokenizer, stream.tasks[0].train),
                                        config["eval"]["batch_size"])
    return backbones.random_backbone(model, config["seed"], config["data"], tokenizer, mean, var)


def _from_checkpoint(config: dict) -> Backbone:
    parts = [backbones.load(part)
             for part in settings.checkpoint_parts(config["model"]["checkpoint"])]
    if len(parts) == 2:
        parts = [backbones.combine(*parts, config["model"]["embedding"], config["seed"])]
    backbone = parts[0]
    if backbone.tokenizer is None:
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
        {k: v for k, v in inner.items() if k not in ("data", "mesh", "eval")},
        {k: inner["data"][k] for k in ("log_mel", "window_seconds", "max_tokens")},
        settings.corpus_hash(build_stream(settings.stream_spec(inner))))
    folder = pathlib.Path(config["data"]["cache_dir"]) / "backbones" / digest
    if not (folder / "backbone" / backbones.WEIGHTS).exists():
        if pretrain is None:
            raise ValueError(f"{folder / 'backbone'}: no such backbone; expected the one that the "
                             "run was trained on, in the cache of config.data.cache_dir")
        print(f"pretraining the backbone in {folder} (once)", file=sys.stderr)
        pretrain(inner, folder)
    return dataclasses.replace(backbones.load(folder / "backbone"),
                               name=f"{stream_name(inner)}-{digest}")


def _frozen_on_devices(method: Method, backbone: Backbone, mesh: Mesh):
    frozen = cast_frozen(method.frozen(backbone.params), backbone.model.dtype)
    return sharding.place(frozen, mesh)
