"""Incremental-learning methods, one file of pure hooks each; `build` finds one by name."""

from __future__ import annotations

import dataclasses
from typing import Mapping

from tail_jax.methods.ablations import ABLATIONS
from tail_jax.methods.adapter import CLAPAdapter
from tail_jax.methods.base import Method
from tail_jax.methods.coda import CODAPrompt
from tail_jax.methods.dualprompt import DualPrompt
from tail_jax.methods.ewc import EWC
from tail_jax.methods.full import Frozen, Joint, Sequential
from tail_jax.methods.l2p import L2P
from tail_jax.methods.lora import Lora, LoraDistilled
from tail_jax.methods.lwf import LwFFeature, LwFSimilarity
from tail_jax.methods.modx import ModX
from tail_jax.methods.ptat import PTAT, Prompts
from tail_jax.methods.ptat_plus import PTATPlus
from tail_jax.methods.replay import DarkReplay, Replay
from tail_jax.methods.sprompts import SPrompts
from tail_jax.tuning.prompts import PromptConfig

METHODS: dict[str, type[Method]] = {
    "frozen": Frozen,
    "sequential": Sequential,
    "joint": Joint,
    "prompts": Prompts,
    "ptat": PTAT,
    "ptat_plus": PTATPlus,
    "lwf_feature": LwFFeature,
    "lwf_similarity": LwFSimilarity,
    "ewc": EWC,
    "er": Replay,
    "der": DarkReplay,
    "modx": ModX,
    "l2p": L2P,
    "dualprompt": DualPrompt,
    "coda": CODAPrompt,
    "sprompts": SPrompts,
    "lora": Lora,
    "lora_distil": LoraDistilled,
    "clap_adapter": CLAPAdapter,
} | ABLATIONS


def defaults(name: str) -> dict:
    """The settings of the method `name` with their defaults, as `config.method` holds them.

    Raises:
        ValueError: if there is no such method.
    """
    if name not in METHODS:
        named = ", ".join(known for known in METHODS if known not in ABLATIONS)
        raise ValueError(f"no method {name!r}; expected one of {named}, or an ablation "
                         "(methods/ablations.py)")
    return {"name": name} | dataclasses.asdict(METHODS[name]())


def build(config: Mapping, tasks: int = 0) -> Method:
    """The method that `config` (name and settings) describes, for a stream of `tasks` tasks.

    Raises:
        ValueError: on an unknown name, an unknown setting or a value out of range.
    """
    config = dict(config)
    known = defaults(config.pop("name", None))
    _check(config, known, "method")
    if "prompts" in config:
        _check(config["prompts"], known["prompts"], "method.prompts")
        config["prompts"] = PromptConfig(**config["prompts"])
    if "tasks" in known:
        config["tasks"] = config.get("tasks") or tasks
        if config["tasks"] < tasks:
            raise ValueError(f"method.tasks is {config['tasks']}; expected at least {tasks}, "
                             "the tasks of the stream, or 0 for just these")
    return METHODS[known["name"]](**config)


def _check(config: Mapping, known: Mapping, where: str) -> None:
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise ValueError(f"{where} has no settings {unknown}; expected some of {[*known]}")
    for name, value in config.items():  # rates, weights, sizes, counts: none has a use below 0
        if isinstance(value, (int, float)) and not value >= 0:
            raise ValueError(f"{where}.{name} is {value}; expected 0 or more")
