"""What the suites `step` and `memory` train: a CLAP, one batch, and our side of it.

The batch is made up: noise of 10 s as log-mels, and captions of usual lengths in rows as long as
`configs/tail_clap.py` pads them. Clips and captions are distinct.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import tail_clap
from data_pipelines.streams import Stream
from data_pipelines.text import Tokenizer
from tail_jax import backbone as backbones
from tail_jax import cli, methods, settings
from tail_jax.benchmarks.embed import captions
from tail_jax.pretrained import find_tokenizer
from tail_jax.run import STEP_KEY, Run, frozen_on_devices
from tail_jax.training import sharding
from tail_jax.training.kept import Features
from tail_jax.training.optimizers import OptimizerConfig, make_optimizer, schedule
from tail_jax.training.step import make_train_step

# Of a batch, where nothing is said: enough that an accelerator does not wait for the host.
ROWS = {"cpu": 8, "accelerator": 64}
# Of the task, for the schedule: what is measured lies at the start of its warm-up. Adam's first
# updates are signs, also of gradients that are all rounding: at ten times the rates, prompts of the
# two sides were 7e-4 apart after a few steps.
STEPS = 1000


def configuration(method: str, folder, size: str, rows: int | None = None) -> dict:
    """`configs/tail_clap.py` (plain dicts) with the checkpoint in `folder`.

    Batches have `rows`, or as many as ROWS says. Towers compute in float32 on a CPU and in
    bfloat16 on an accelerator.

    Raises:
        ValueError: the checkpoint is not of a CLAP that the suites train.
    """
    config = cli.plain(tail_clap.get_config(f"method={method}"))
    on_cpu = jax.default_backend() == "cpu"
    dtype = "float32" if on_cpu else "bfloat16"
    config["model"] |= {"checkpoint": str(folder), "dtype": dtype}
    config["train"]["batch_size"] = rows or ROWS["cpu" if on_cpu else "accelerator"]
    if size == "tiny":
        config["data"]["max_tokens"] = 24
    config = settings.with_checkpoint(config)
    if config["model"]["audio"].get("fusion"):
        raise ValueError(f"{folder} is a fused CLAP; expected one that takes a single log-mel, such "
                         "as clap-htsat-unfused")
    return config


def batch_of(config: dict, tokenizer: pathlib.Path | None = None) -> dict[str, np.ndarray]:
    """A training batch as the reader gives it; with the checkpoint's tokenizer, or that one."""
    tokenizer = tokenizer or find_tokenizer(pathlib.Path(config["model"]["checkpoint"]))
    data, rows = settings.data_settings(config["data"]), config["train"]["batch_size"]
    ids, mask = Tokenizer.load(tokenizer).encode(captions(rows), data.max_tokens)
    noise = np.random.default_rng(0).normal(-40, 20, (rows, *data.audio_shape))
    number = np.arange(rows, dtype=np.int32)
    return {"audio": noise.astype(np.float32), "token_ids": ids, "token_mask": mask,
            "clip_id": number, "caption_key": number, "mask": np.ones(rows, bool)}


class Ours:
    """A method on a CLAP: the state between its steps, and what the steps take beside it.

    On one device, as the peer.
    """

    def __init__(self, config: dict):
        model = settings.described_model(config)
        backbone = dataclasses.replace(backbones.load(config["model"]["checkpoint"]), model=model)
        self.config, self.model, self.tokenizer = config, model, backbone.tokenizer
        self.method = methods.build(config["method"], len(config["stream"]["tasks"]))
        self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
        self.frozen = frozen_on_devices(self.method, backbone, self.mesh)
        self._run = Run(config, pathlib.Path(), self.mesh, self.method, Stream("", ()), backbone,
                        self.frozen, ())
        self.state = self._run.initial_state()
        trainable = self.state["trainable"]
        self.train_step = self._step_on(self.mesh)
        self.opt_state = self.train_step.init_optimizer(trainable)
        self.key, self.steps = jax.random.fold_in(self._run.key, STEP_KEY), 0
        self.update_mask = self.method.update_mask(self.state)

    def _step_on(self, mesh):
        config, trainable = self.config, self.state["trainable"]
        optimizer = make_optimizer(OptimizerConfig(**config["optimizer"]), self.method, trainable)
        return make_train_step(self.model, self.method, optimizer, mesh, trainable, self.frozen,
                               config["train"]["accumulation"], config["train"]["remat"])

    def begin_task(self, task: int = 1) -> None:
        """Starts task 0, 1, ...; the optimizer's state stays, so that times are of any step."""
        self.state = self._run.begin_task(self.state, task, None)

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch on the devices."""
        return sharding.put_batch(batch, self.mesh)

    def with_kept(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The batch with the rows of what is kept in this task (`training/kept.py`)."""
        names = tuple(self.method.kept(self.model, self.state, 1, 0))
        compute = jax.jit(lambda *args: Features(self.method, names)(self.model, *args))
        state = self.state
        return batch | compute(state["trainable"], self.frozen, state["aux"], batch)

    def arguments(self, batch: dict[str, jax.Array]) -> tuple:
        """What the next step takes."""
        position = jnp.asarray([self.steps, STEPS], jnp.int32)
        return (self.state["trainable"], self.opt_state, self.frozen, self.state["aux"],
                self.update_mask, batch, self.key, position)

    def step(self, batch: dict[str, jax.Array]) -> float:
        """Takes a step and waits for it; returns the loss."""
        trainable, self.opt_state, metrics = self.train_step(*self.arguments(batch))
        self.state = self.state | {"trainable": trainable}
        self.steps += 1
        jax.block_until_ready((trainable, self.opt_state, metrics))
        return float(metrics["loss"])

    def cost(self, batch: dict[str, jax.Array]) -> tuple[float, float]:
        """(operations, bytes) of a step: those that its program asks for before a compiler has seen
        it (calls of a GPU's library are not counted later), and what it reads and writes compiled.
        """
        arguments = self.arguments(batch)
        asked = self._step_on(sharding.make_mesh(devices=jax.devices("cpu")[:1])).function.lower(
            *jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments))
        compiled = self.train_step.function.lower(*arguments).compile()
        return asked.cost_analysis()["flops"], compiled.cost_analysis()["bytes accessed"]

    def embed(self, prompted: bool):
        """Function (batch) -> (audio, text) embeddings, with what was learned or without it."""
        @jax.jit
        def run(trainable, frozen, batch):
            params, tuning = self.method.resolve(self.model, trainable, frozen)
            tuning = tuning if prompted else None
            return [self.model.encode(side, params, tuning, batch)["embedding"]
                    for side in self.model.towers]

        # The state of the moment: steps donate that of before.
        return lambda batch: jax.block_until_ready(run(self.state["trainable"], self.frozen, batch))

    def state_bytes(self) -> int:
        """Bytes of what is trained and of the optimizer's state."""
        return sum(x.nbytes for x in jax.tree.leaves((self.state["trainable"], self.opt_state)))


def torch_settings(config: dict) -> Any:
    """What the peer trains with, of a configuration of ours."""
    from tail_jax.benchmarks.torch_clap import Settings

    method, optimizer = config["method"], config["optimizer"]
    if method["name"] == "ptat":
        rates = {"prompts": method["learning_rate"], "heads": method["heads_learning_rate"],
                 "logit_scale": method["scale_learning_rate"]}
        distilled = {name: (method[f"{name}_weight"], method[f"{name}_temperature"])
                     for name in ("similarity", "feature")}
    else:
        rates, distilled = {"all": method["learning_rate"]}, {}
    warmup = optimizer["warmup"]
    return Settings(rates, method["weight_decay"], (optimizer["b1"], optimizer["b2"]),
                    optimizer["epsilon"], optimizer["clip"],
                    lambda step: float(schedule(step, STEPS, warmup)), config["model"]["dtype"],
                    **distilled)


def make_peer(config: dict, device: str, ours: Ours | None = None):
    """The peer's trainer on a device, with the prompts that `ours` has, or new ones."""
    from tail_jax.benchmarks.torch_clap import Trainer

    prompts = None
    if config["method"]["name"] == "ptat":
        prompts = jax.device_get(ours.state["trainable"]["prompts"] if ours else methods.build(
            config["method"]).init_tuning(jax.random.key(0), settings.described_model(config)))
    return Trainer(config["model"]["checkpoint"], torch_settings(config), prompts, device)


def peer_tree(peer, folder) -> dict:
    """What the peer has trained, as our tree of the same."""
    if peer.prompts is not None:
        return peer.learned()
    with tempfile.TemporaryDirectory() as own:
        peer.model.save_pretrained(own)
        for path in pathlib.Path(folder).glob("*.json"):
            if not (pathlib.Path(own) / path.name).exists():
                shutil.copy(path, own)
        return backbones.load(own).params
