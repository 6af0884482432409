"""Incremental-learning methods, one file of pure hooks each; `build` finds one by name."""

from __future__ import annotations

import dataclasses
from typing import Mapping

from tail_jax.methods.ablations import ABLATIONS
from tail_jax.methods.adapter import CLAPAdapter
from tail_jax.methods.base import Method
from tail_jax.methods.closed_form import ACIL, APER, LDA, NCM, FeCAM, RanPAC
from tail_jax.methods.coda import CODAPrompt
from tail_jax.methods.dualprompt import DualPrompt
from tail_jax.methods.eat import EAT
from tail_jax.methods.ewc import EWC
from tail_jax.methods.full import Frozen, Joint, Sequential
from tail_jax.methods.hide import HiDePrompt
from tail_jax.methods.icarl import ICaRL
from tail_jax.methods.inflora import InfLoRA
from tail_jax.methods.l2p import L2P
from tail_jax.methods.lae import LAE
from tail_jax.methods.lora import JointLora, Lora, LoraDistilled
from tail_jax.methods.lorasub import LoRASub
from tail_jax.methods.lwf import LwF, LwFFeature, LwFSimilarity
from tail_jax.methods.modx import ModX
from tail_jax.methods.pace import PACE
from tail_jax.methods.ptat import PTAT, Prompts
from tail_jax.methods.ptat_plus import PTATPlus
from tail_jax.methods.replay import DarkReplay, Replay
from tail_jax.methods.slca import SLCA
from tail_jax.methods.sprompt_pp import SPromptPlusPlus
from tail_jax.methods.sprompts import SPrompts
from tail_jax.tuning.prompts import PromptConfig

METHODS: dict[str, type[Method]] = {
    "frozen": Frozen,
    "sequential": Sequential,
    "joint": Joint,
    "prompts": Prompts,
    "ptat": PTAT,
    "ptat_plus": PTATPlus,
    "lwf": LwF,
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
    "sprompt_pp": SPromptPlusPlus,
    "hide": HiDePrompt,
    "lora": Lora,
    "lora_distil": LoraDistilled,
    "joint_lora": JointLora,
    "inflora": InfLoRA,
    "lorasub": LoRASub,
    "slca": SLCA,
    "icarl": ICaRL,
    "lae": LAE,
    "clap_adapter": CLAPAdapter,
    "eat": EAT,
    "ncm": NCM,
    "aper": APER,
    "lda": LDA,
    "fecam": FeCAM,
    "acil": ACIL,
    "ranpac": RanPAC,
    "pace": PACE,
} | ABLATIONS


def defaults(name: str, classes: bool = False) -> dict:
    """The settings of the method `name` with their defaults, as `config.method` holds them.

    Args:
        classes: whether for class-incremental streams, where some methods have other defaults.

    Raises:
        ValueError: if there is no such method.
    """
    if name not in METHODS:
        named = ", ".join(for_streams("classifies" if classes else "retrieves"))
        raise ValueError(f"no method {name!r}; expected one of {named}, or an ablation "
                         "(methods/ablations.py)")
    return {"name": name} | dataclasses.asdict(METHODS[name](**_class_defaults(name, classes)))


def build(config: Mapping, tasks: int = 0, classes: int | None = None) -> Method:
    """The method that `config` (name and settings) describes, for a stream of `tasks` tasks.

    Args:
        classes: of the stream; 0 for one of audio-text corpora, None for any.

    Raises:
        ValueError: on an unknown name, an unknown setting, a value out of range, or a method that
            is not for such a stream.
    """
    config = dict(config)
    known = defaults(config.pop("name", None), bool(classes))
    _check(config, known, "method")
    config = _class_defaults(known["name"], classes) | config
    if "prompts" in config:
        _check(config["prompts"], known["prompts"], "method.prompts")
        config["prompts"] = PromptConfig(**config["prompts"])
    if "tasks" in known:
        config["tasks"] = config.get("tasks") or tasks
        if config["tasks"] < tasks:
            raise ValueError(f"method.tasks is {config['tasks']}; expected at least {tasks}, "
                             "the tasks of the stream, or 0 for just these")
    method = METHODS[known["name"]](**config)
    kinds = {"audio-text": method.retrieves, "class-incremental": method.classifies}
    kind = "class-incremental" if classes else "audio-text"
    if classes is not None and not kinds[kind]:
        fitting = for_streams("classifies" if classes else "retrieves")
        raise ValueError(f"method {known['name']!r} is not for {kind} streams; expected one of "
                         f"{', '.join(fitting)}")
    return method


def for_streams(what: str, ablations: bool = False) -> list[str]:
    """Names of the methods that can do `what`: 'retrieves' or 'classifies'."""
    return [name for name, kind in METHODS.items()
            if getattr(kind, what) and (ablations or name not in ABLATIONS)]


def _class_defaults(name: str, classes: int | None) -> dict:
    """What defaults other than a method's own are; one that is for class streams alone has none."""
    return METHODS[name].class_defaults if classes and METHODS[name].retrieves else {}


def _check(config: Mapping, known: Mapping, where: str) -> None:
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise ValueError(f"{where} has no settings {unknown}; expected some of {[*known]}")
    for name, value in config.items():  # rates, weights, sizes, counts: none has a use below 0
        if isinstance(value, (int, float)) and not value >= 0:
            raise ValueError(f"{where}.{name} is {value}; expected 0 or more")
