"""What a configuration would train, and what a step of it costs; needs no weights, and no data but
the tables of a class-incremental corpus, whose classes have to be counted.

    python -m tail_jax.describe --config=configs/tail_clap.py [--json=FILE]
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from data_pipelines.streams import build_stream
from tail_jax import cli, methods, settings
from tail_jax.models.dual_encoder import BUFFERS, DualEncoder
from tail_jax.reporting.writers import write_json_atomic
from tail_jax.training import sharding
from tail_jax.training.kept import Features
from tail_jax.training.optimizers import OptimizerConfig, make_optimizer
from tail_jax.training.step import cast_frozen, make_train_step
from tail_jax.tuning.masks import count, leaf_name

# PTAT's budget: at most this share of what full fine-tuning trains (abstract of arXiv 2503.04258).
PTAT_SHARE = 0.0242


def describe(config: dict) -> dict:
    """Counts, bytes, FLOPs and shardings of the train step of `config` (plain dicts)."""
    config = settings.with_checkpoint(config)
    model, classes = settings.described_model(config), None
    if config["stream"]["kind"] == "classes":
        stream = build_stream(settings.stream_spec(config))
        tasks, classes = len(stream.tasks), len(stream.classes)
        model = DualEncoder(model.audio, None, dtype=model.dtype, classes=classes)
    else:
        tasks = max(len(config["stream"]["tasks"]), 1)
    method = methods.build(config["method"], tasks, classes)
    mesh = sharding.make_mesh(**config["mesh"])
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(lambda p: method.init(jax.random.key(0), model, p), params)
    frozen = jax.eval_shape(lambda p: cast_frozen(method.frozen(p), model.dtype), params)
    if model.classes:
        some = jax.ShapeDtypeStruct((model.classes,), jnp.bool_)
        state["aux"] = state["aux"] | {"classes": {"current": some, "seen": some}}
    trainable = state["trainable"]
    data, total = settings.data_settings(config["data"]), count(params, BUFFERS)
    report = {
        "method": config["method"]["name"],
        "parameters": {group: count(tree, BUFFERS) for group, tree in params.items()},
        "total_parameters": total,
        "trainable": {group: count(tree, BUFFERS) for group, tree in trainable.items()},
        "trainable_parameters": count(trainable, BUFFERS),
        "trainable_share": count(trainable, BUFFERS) / total,
        "bytes": {"frozen": _bytes(frozen), "trainable": _bytes(trainable),
                  "teacher_and_statistics": _bytes(state["aux"]),
                  "memory": _bytes(method.memory(model, data.audio_shape, data.max_tokens))},
        "mesh": dict(mesh.shape), "devices": jax.device_count(),
        "shardings": _shardings(frozen, mesh) | _shardings(trainable, mesh),
    }
    if not method.trains:
        return report
    optimizer = make_optimizer(OptimizerConfig(**config["optimizer"]), method, trainable)
    opt_state = jax.eval_shape(optimizer.init, trainable)
    report["bytes"]["optimizer"] = _bytes(opt_state)
    step = make_train_step(model, method, optimizer, mesh, trainable, frozen,
                           config["train"]["accumulation"], config["train"].get("remat", "none"))
    lowered = step.function.lower(
        trainable, opt_state, frozen, state["aux"],
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((), jnp.bool_), trainable),
        batch_shapes(config, model, method, state, frozen),
        jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((2,), jnp.int32))
    report["flops_per_step"] = lowered.cost_analysis()["flops"]
    report["batch_size"] = config["train"]["batch_size"]
    return report


def batch_shapes(config: dict, model, method, state: dict, frozen) -> dict:
    """Shapes of a training batch as the first step takes it, where inputs are fixed."""
    rows, shape = config["train"]["batch_size"], jax.ShapeDtypeStruct
    batch = model.input_shapes(rows, config["data"]["max_tokens"])
    ids = ("clip_id", "label") if model.classes else ("clip_id", "caption_key")
    batch |= {name: shape((rows,), jnp.int32) for name in ids}
    batch["mask"] = shape((rows,), jnp.bool_)
    if config["train"]["keep_features"]:
        features = Features(method, tuple(method.kept(model, state, 0, 0)))
        batch |= features.shapes(model, state["trainable"], frozen, state["aux"], rows)
    return batch | method.replay_shapes(model, rows)


def _bytes(tree) -> int:
    return int(sum(np.prod(x.shape, dtype=np.int64) * x.dtype.itemsize
                   for x in jax.tree.leaves(tree)))


def _shardings(tree, mesh) -> dict[str, str]:
    """{spec: number of leaves split that way}, of leaves that are split at all."""
    specs: dict[str, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(
            sharding.parameter_shardings(tree, mesh)):
        if any(leaf.spec):
            specs[leaf_name(path)] = str(leaf.spec)
    return specs


def text(report: dict) -> str:
    """The report for a terminal."""
    line = lambda name, value: f"{name:<32}{value:>16,}"
    share = report["trainable_share"]
    lines = [f"method {report['method']}, {report['devices']} device(s), mesh {report['mesh']}", "",
             *(line(f"parameters: {k}", v) for k, v in report["parameters"].items()),
             line("parameters: total", report["total_parameters"]), "",
             *(line(f"trainable: {k}", v) for k, v in report["trainable"].items()),
             line("trainable: total", report["trainable_parameters"]),
             f"trainable share                 {100 * share:>15.3f}%"]
    if report["method"] == "ptat":
        verdict = "within" if share <= PTAT_SHARE else "ABOVE"
        lines.append(f"  {verdict} PTAT's budget of {100 * PTAT_SHARE:.2f} % of the parameters")
    lines += ["", *(line(f"bytes: {k}", v) for k, v in report["bytes"].items())]
    if "flops_per_step" in report:
        lines.append(f"{'FLOPs a step':<32}{report['flops_per_step']:>16.3e}   "
                     f"(batch {report['batch_size']})")
    split = len(report["shardings"])
    lines.append(f"{split} leaves are split over the mesh by name, the rest is on every device")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    report = describe(cli.plain(flags.FLAGS.config))
    print(text(report))
    if flags.FLAGS.json:
        write_json_atomic(pathlib.Path(flags.FLAGS.json), report)


def define_flags() -> None:
    """--config and --json."""
    cli.define_config()
    flags.DEFINE_string("json", None, "Write the report to this file, too.")


if __name__ == "__main__":
    cli.run(main, define_flags)
