"""Reads a checkpoint of any known kind and writes it as another.

    python -m tail_jax.convert --checkpoint=DIR --output=DIR                 our own safetensors
    python -m tail_jax.convert --checkpoint=DIR --output=DIR --format=clap   for transformers

The first loads fast and carries its front end, tokenizer and hash; the second is the Hugging Face
layout of CLAP, for a dual encoder of HTSAT and RoBERTa that was fine-tuned here.
"""

from __future__ import annotations

import pathlib

from absl import flags

from data_pipelines.text import Tokenizer
from tail_jax import backbone as backbones
from tail_jax import cli
from tail_jax.pretrained.export import export_clap
from tail_jax.tuning.masks import count

FORMATS = ("tail_jax", "clap")


def convert(checkpoint, output, tuning=None, to: str = "tail_jax") -> None:
    """Writes the model of `checkpoint` into the folder `output`, in the layout `to` (`FORMATS`).

    Args:
        checkpoint: anything that `tail_jax.load` reads.
        output: a folder that does not exist yet or is empty.
        tuning: a tuning file whose parameters are put in. Prompts are no parameters of the model
            and cannot be written; projection heads and fine-tuned towers can.

    Raises:
        ValueError: if it cannot be read, or not be written in that layout.
    """
    output = pathlib.Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: is there already; expected a new or empty folder")
    backbone = backbones.load(checkpoint, tuning)
    if backbone.tuning is not None:
        raise ValueError(f"{tuning}: holds prompts or other tuning beside the model, which no "
                         "checkpoint layout has; load it with tail_jax.load(checkpoint, tuning)")
    if to == "clap":
        if backbone.tokenizer is None:
            raise ValueError(f"{checkpoint}: has no tokenizer, which that layout needs")
        export_clap(backbone.model, backbone.params, backbone.front_end,
                    Tokenizer.load(backbone.tokenizer), output)
    else:
        backbones.save_backbone(output, backbone)
    print(f"{output}: {count(backbone.params):,} numbers, sha256 {backbone.sha256[:12]}")


def main() -> None:
    """The command."""
    args = flags.FLAGS
    convert(args.checkpoint, args.output, args.tuning, args.format)


def define_flags() -> None:
    """--checkpoint, --output, --tuning and --format."""
    flags.DEFINE_string("checkpoint", None, "Checkpoint folder or weight file.", required=True)
    flags.DEFINE_string("output", None, "Folder to write.", required=True)
    flags.DEFINE_string("tuning", None, "Tuning file whose parameters are put in.")
    flags.DEFINE_enum("format", "tail_jax", FORMATS, "Layout to write.")


if __name__ == "__main__":
    cli.run(main, define_flags)
