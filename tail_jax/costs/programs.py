"""The programs of a run, lowered from shapes alone, and what the compiler says they cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from data_pipelines.streams import build_stream
from tail_jax import methods, settings
from tail_jax.costs.collectives import count_loops, read_collectives, summarize
from tail_jax.costs.roofline import roofline
from tail_jax.costs.slices import Slice
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.training import sharding
from tail_jax.training.embedder import Embedder
from tail_jax.training.kept import Features
from tail_jax.training.optimizers import Optimizer, OptimizerConfig, make_optimizer
from tail_jax.training.step import cast_frozen, make_train_step

# Of a run: the step, and how clips and captions are embedded, or clips classified.
PROGRAMS = ("train_step", "embed_audio", "embed_text", "scores")


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a run of `config` holds as its first step is taken: shapes in place of arrays.

    Attributes:
        params: the backbone, float32.
        state: of the method.
        frozen: the backbone as the step takes it.
        optimizer: None where the method is not trained.
        batch: of a train step, where inputs are fixed.
    """

    config: dict
    model: DualEncoder
    method: Any
    params: dict
    state: dict
    frozen: dict
    optimizer: Optimizer | None
    batch: dict[str, jax.ShapeDtypeStruct]

    @property
    def optimizer_state(self):
        """Fresh."""
        return jax.eval_shape(self.optimizer.init, self.state["trainable"])


def shapes_of(config: dict) -> Shapes:
    """Of a configuration (plain dicts), its checkpoint's model taken; reads no weights, and no
    data but the tables of a corpus whose classes have to be counted."""
    model, classes = settings.described_model(config), None
    if config["stream"]["kind"] == "classes":
        stream = build_stream(settings.stream_spec(config))
        tasks, classes = len(stream.tasks), len(stream.classes)
        model = DualEncoder(model.audio, None, dtype=model.dtype, classes=classes)
    else:
        tasks = max(len(config["stream"]["tasks"]), 1)
    method = methods.build(config["method"], tasks, classes)
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(lambda p: method.init(jax.random.key(0), model, p), params)
    frozen = jax.eval_shape(lambda p: cast_frozen(method.frozen(p), model.dtype), params)
    if model.classes:
        some = jax.ShapeDtypeStruct((model.classes,), jnp.bool_)
        state["aux"] = state["aux"] | {"classes": {"current": some, "seen": some}}
    optimizer, batch = None, {}
    if method.trains:
        optimizer = make_optimizer(OptimizerConfig(**config["optimizer"]), method,
                                   state["trainable"])
        batch = _batch_shapes(config, model, method, state, frozen)
    return Shapes(config, model, method, params, state, frozen, optimizer, batch)


def _batch_shapes(config: dict, model, method, state: dict, frozen) -> dict:
    """Shapes of a training batch as the first step takes it, where inputs are fixed."""
    rows, shape = config["train"]["batch_size"], jax.ShapeDtypeStruct
    data = settings.data_settings(config["data"])
    batch = model.input_shapes(rows, data.max_tokens)
    batch["audio"] = shape((rows, *data.audio_shape), jnp.float32)
    ids = ("clip_id", "label") if model.classes else ("clip_id", "caption_key")
    batch |= {name: shape((rows,), jnp.int32) for name in ids}
    batch["mask"] = shape((rows,), jnp.bool_)
    if config["train"]["keep_features"]:
        features = Features(method, tuple(method.kept(model, state, 0, 0)))
        batch |= features.shapes(model, state["trainable"], frozen, state["aux"], rows)
    return batch | method.replay_shapes(model, rows)


def lower_step(shapes: Shapes, mesh: Mesh) -> jax.stages.Lowered:
    """The train step for a mesh, its arrays as a run places them."""
    trainable, aux = shapes.state["trainable"], shapes.state["aux"]
    step = make_train_step(shapes.model, shapes.method, shapes.optimizer, mesh, trainable,
                           shapes.frozen, shapes.config["train"]["accumulation"],
                           shapes.config["train"].get("remat", "none"))
    return step.function.lower(
        trainable, shapes.optimizer_state, shapes.frozen,
        _placed(aux, sharding.aux_shardings(trainable, aux, mesh)),
        jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.bool_), trainable),
        shapes.batch, jax.eval_shape(lambda: jax.random.key(0)),
        jax.ShapeDtypeStruct((2,), jnp.int32))


def lower(shapes: Shapes, mesh: Mesh,
          names: Sequence[str] = PROGRAMS) -> Iterator[tuple[str, jax.stages.Lowered]]:
    """(name, program) of those programs of a run that are named, one after another."""
    if shapes.method.trains and "train_step" in names:
        yield "train_step", lower_step(shapes, mesh)
    trainable, aux = shapes.state["trainable"], shapes.state["aux"]
    data = settings.data_settings(shapes.config["data"])
    embedder = Embedder(shapes.model, shapes.method, mesh, shapes.config["eval"]["batch_size"])
    arguments = (
        _placed(trainable, sharding.parameter_shardings(trainable, mesh)),
        _placed(shapes.frozen, sharding.parameter_shardings(shapes.frozen, mesh)),
        _placed(aux, sharding.aux_shardings(trainable, aux, mesh)))
    used = ("scores",) if shapes.model.classes else ("embed_audio", "embed_text")
    for name in used:
        if name in names:
            yield name, embedder.lower(name, *arguments, data.audio_shape, data.max_tokens)


def _placed(tree, shardings):
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
                        tree, shardings)


def measure(compiled: jax.stages.Compiled) -> dict:
    """What the compiler says of a program, a device.

    Returns:
        flops, accessed_bytes: of one run; a loop's body is counted once, however often it runs.
        memory: bytes of arguments, outputs that are not arguments (donated ones are), temporaries,
            code, and their sum `total`.
        collectives: as `summarize` gives them; sent_bytes: what each device sends in all.
        loops: how many there are.
    """
    cost, memory, text = compiled.cost_analysis(), compiled.memory_analysis(), compiled.as_text()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes}
    collectives = read_collectives(text)
    return {"flops": cost.get("flops", 0.0), "accessed_bytes": cost.get("bytes accessed", 0.0),
            "memory": parts | {"total": sum(parts.values())},
            "collectives": summarize(collectives),
            "sent_bytes": sum(each.sent for each in collectives), "loops": count_loops(text)}


def measure_on(lowered: jax.stages.Lowered, where: Slice) -> dict:
    """`measure` of a program compiled for a slice, and whether it fits and its roofline.

    A program that the compiler refuses for want of memory has `fits` False, and what the compiler
    says under `refused`.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        words = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        return {"fits": False, "refused": words}
    report = measure(compiled)
    least = roofline(where.chip, where.shape, report["flops"], report["accessed_bytes"],
                     report["sent_bytes"])
    return report | {
        "fits": report["memory"]["total"] <= where.chip.memory,
        "seconds": {"compute": least.compute, "memory": least.memory, "network": least.network,
                    "roofline": least.seconds}, "bound": least.bound}
