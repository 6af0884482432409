"""What a configuration would train, and what a step of it costs; needs no weights, and no data but
the tables of a class-incremental corpus, whose classes have to be counted.

    python -m tail_jax.describe --config=configs/tail_clap.py [--json=FILE]
    python -m tail_jax.describe --config=configs/tail_clap.py --topology=v5e:2x2,v5e:4x4 \
        [--batch_per_chip=64] [--programs=train_step,embed_audio,embed_text] [--json=FILE]

The second compiles the programs of a run for TPU slices, on a machine that need not have one, and
prints a table of what each chip would hold, compute, read and send.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import flags

from tail_jax import cli, settings
from tail_jax.costs.programs import PROGRAMS, Shapes, lower, lower_step, measure_on, shapes_of
from tail_jax.costs.slices import Slice, check_compiler, devices, parse_slices
from tail_jax.costs.table import slices_table
from tail_jax.models.dual_encoder import BUFFERS
from tail_jax.reporting.writers import write_json_atomic
from tail_jax.training import sharding
from tail_jax.tuning.masks import count, leaf_name

# PTAT's budget: at most this share of what full fine-tuning trains (abstract of arXiv 2503.04258).
PTAT_SHARE = 0.0242


def describe(config: dict, slices: Sequence[Slice] = (), *, batch_per_chip: int | None = None,
             names: Sequence[str] = PROGRAMS, progress: Callable[[str], None] | None = None
             ) -> dict:
    """Counts, bytes, FLOPs and shardings of the train step of `config` (plain dicts).

    Args:
        slices: TPU slices to compile the programs of a run for; none asks for the operations of the
            step alone, here.
        batch_per_chip: rows of a batch on each part of the mesh's rows; None leaves
            `train.batch_size` and `eval.batch_size` as they are, over all chips.
        names: of PROGRAMS, which to compile.
        progress: told what is compiled next.

    Raises:
        ValueError: where a slice cannot be compiled for, or cannot share the batch equally.
    """
    config = settings.with_checkpoint(config)
    meshes, configs = {}, {}
    for where in slices:
        mesh = meshes[where.name] = sharding.make_mesh(**config["mesh"], devices=devices(where))
        parts = sharding.row_parts(mesh)
        configs[where.name] = _with_batch(config, batch_per_chip, parts)
        settings.check(configs[where.name], parts)
    shapes = shapes_of(config)
    mesh = next(iter(meshes.values()), None) or sharding.make_mesh(**config["mesh"])
    report = _sizes(shapes) | {
        "mesh": dict(mesh.shape), "devices": mesh.size,
        "shardings": _shardings(shapes.frozen, mesh) | _shardings(shapes.state["trainable"], mesh)}
    if not slices:
        if shapes.method.trains:
            report["flops_per_step"] = lower_step(shapes, mesh).cost_analysis()["flops"]
        return report
    report |= {"slices": [], "commit": cli.commit(), "versions": {
        package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "libtpu")}}
    for where in slices:
        mesh, own, programs = meshes[where.name], configs[where.name], {}
        for name, lowered in lower(shapes_of(own), mesh, names):
            if progress:
                progress(f"compiling {name} for {where.name}")
            programs[name] = measure_on(lowered, where)
        report["slices"].append({
            "topology": where.name, "chips": where.chips, "mesh": dict(mesh.shape),
            "batch_size": {"train_step": own["train"]["batch_size"],
                           **dict.fromkeys(PROGRAMS[1:], own["eval"]["batch_size"])},
            "accumulation": own["train"]["accumulation"], "programs": programs})
    return report


def _with_batch(config: dict, batch_per_chip: int | None, parts: int) -> dict:
    if batch_per_chip is None:
        return config
    rows = {"batch_size": batch_per_chip * parts}
    return config | {"train": config["train"] | rows, "eval": config["eval"] | rows}


def _sizes(shapes: Shapes) -> dict:
    """Numbers of parameters, and bytes of what a run holds, all devices together."""
    config, model, method = shapes.config, shapes.model, shapes.method
    trainable, total = shapes.state["trainable"], count(shapes.params, BUFFERS)
    data = settings.data_settings(config["data"])
    report = {
        "method": config["method"]["name"],
        "parameters": {group: count(tree, BUFFERS) for group, tree in shapes.params.items()},
        "total_parameters": total,
        "trainable": {group: count(tree, BUFFERS) for group, tree in trainable.items()},
        "trainable_parameters": count(trainable, BUFFERS),
        "trainable_share": count(trainable, BUFFERS) / total,
        "bytes": {"frozen": _bytes(shapes.frozen), "trainable": _bytes(trainable),
                  "teacher_and_statistics": _bytes(shapes.state["aux"]),
                  "memory": _bytes(method.memory(model, data.audio_shape, data.max_tokens))}}
    if method.trains:
        report["bytes"]["optimizer"] = _bytes(shapes.optimizer_state)
        report["batch_size"] = config["train"]["batch_size"]
    return report


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
    if "slices" in report:
        lines += ["", slices_table(report)]
    return "\n".join(lines)


def main() -> None:
    """The command."""
    flag, slices = flags.FLAGS, ()
    if flag.topology:
        slices = parse_slices(flag.topology)
        check_compiler()
        jax.config.update("jax_platforms", "cpu")  # a chip here, if any, is for others
    unknown = [name for name in flag.programs if name not in PROGRAMS]
    if unknown:
        raise ValueError(f"--programs has {unknown[0]!r}; expected some of {', '.join(PROGRAMS)}")
    if (flag.batch_per_chip or flag["programs"].present) and not slices:
        raise ValueError("--batch_per_chip and --programs are for --topology")
    report = describe(cli.plain(flag.config), slices, batch_per_chip=flag.batch_per_chip,
                      names=flag.programs, progress=lambda line: print(line, file=sys.stderr))
    print(text(report))
    if flag.json:
        write_json_atomic(pathlib.Path(flag.json), report)


def define_flags() -> None:
    """--config, --json, --topology and what goes with it."""
    cli.define_config()
    flags.DEFINE_string("json", None, "Write the report to this file, too.")
    flags.DEFINE_string("topology", None, "TPU slices to compile for, e.g. v5e:2x2,v5e:16x16.")
    flags.DEFINE_integer("batch_per_chip", None, "Rows of a batch on each part of the mesh's rows, "
                         "in place of the batch sizes of the configuration.", lower_bound=1)
    flags.DEFINE_list("programs", list(PROGRAMS), "Which programs to compile.")


if __name__ == "__main__":
    cli.run(main, define_flags)
