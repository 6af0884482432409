"""Coupled audio-text prompts: the audio prompts are learned, linear maps make the text prompts.

    T_pre^l = A^l W_pre + b_pre,   T_post^l = A^l W_post + b_post,   A^l [n, d_a], W [d_a, d_t]

One (W_pre, W_post) serves all layers (PTAT's audio-text prompt generation; the structure is the
linear variant of DGL, AAAI 2024). An audio tower with stages of different width (HTSAT) has one
pair a stage ('per_stage'), or prompts of the text's width brought to each stage by a linear map
('common').
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from tail_jax.models.transformer import pair

COUPLINGS = ("linear_shared", "per_layer", "independent")
TEXT_SIDES = {"both": ("pre", "post"), "prefix": ("pre",), "suffix": ("post",)}


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Shape and coupling of the prompts.

    Attributes:
        length: prompts a layer, n; the text side has n before and n after the words.
        text_side: 'both', or 'prefix' or 'suffix' alone.
        depth: 'deep' (new prompts at every layer) or 'shallow' (first layer only; ViT towers).
        first_layer, last_layer: half-open range of audio layers with prompts; 0, 0 means all.
        coupling: 'linear_shared', 'per_layer' (a pair of maps for each layer) or 'independent'
            (text prompts of their own).
        htsat_map: 'per_stage' or 'common' (see the top of the file).
    """

    length: int = 4
    depth: str = "deep"
    first_layer: int = 0
    last_layer: int = 0
    coupling: str = "linear_shared"
    htsat_map: str = "per_stage"
    text_side: str = "both"

    def __post_init__(self):
        for name, allowed in (("depth", ("deep", "shallow")), ("coupling", COUPLINGS),
                              ("htsat_map", ("per_stage", "common")),
                              ("text_side", TEXT_SIDES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"prompts.{name} is {getattr(self, name)!r}; expected one of {list(allowed)}")
        if self.length < 1:
            raise ValueError(f"prompts.length is {self.length}; expected at least 1")
        if self.depth == "shallow" and (self.first_layer or self.last_layer):
            raise ValueError("prompts.depth 'shallow' enters at the first layer and flows on; "
                             "leave prompts.first_layer and prompts.last_layer at 0")

    @property
    def sides(self) -> tuple[str, ...]:
        """Of 'pre' and 'post', the text prompts there are."""
        return TEXT_SIDES[self.text_side]


def _plan(config: PromptConfig, model):
    """[(audio layers with prompts, all layers, width)] per stage, and the text tower's shape."""
    stages, (text_layers, text_width) = model.audio.layer_widths, model.text.layer_widths[0]
    total = sum(layers for layers, _ in stages)
    if config.depth == "shallow":
        if len(stages) > 1:
            raise ValueError("prompts.depth 'shallow' needs a ViT audio tower; HTSAT's windows "
                             "have no common sequence for prompts to flow along")
        return [(range(0, 1), 1, stages[0][1])], 1, text_width
    first, last = config.first_layer, config.last_layer or total
    if not 0 <= first < last <= total:
        raise ValueError(f"prompts cover layers {first} to {last}; the audio tower has {total}")
    return stage_ranges(stages, first, last), text_layers, text_width


def stage_ranges(stages, first: int, last: int) -> list[tuple[range, int, int]]:
    """[(layers of the stage within first to last, all its layers, width)] of `layer_widths`."""
    plan, start = [], 0
    for layers, width in stages:
        low, high = (min(max(i - start, 0), layers) for i in (first, last))
        plan.append((range(low, high), layers, width))
        start += layers
    return plan


def prompt_bound(tower, width: int) -> float:
    """Of the uniform distribution of prompts; 1 stands for the patch of towers without patches."""
    return (6 / (math.prod(pair(getattr(tower, "patch", 1))) + width)) ** 0.5


def init_prompts(key: jax.Array, config: PromptConfig, model) -> dict:
    """{audio: [per stage [l, n, d]], pre, post: [per stage {w, b}], ...}, float32.

    Stages without prompts (layer ranges) have an empty array and no maps.

    A ~ U(+-sqrt(6 / (p^2 + d_a))) with the patch size p (VPT's rule), W ~ N(0, 1/d_a), b = 0.
    """
    plan, text_layers, text_width = _plan(config, model)
    common = config.htsat_map == "common" and len(plan) > 1
    keys = iter(jax.random.split(key, 64))
    audio = []
    for rows, _, width in plan:
        width = text_width if common else width
        bound = prompt_bound(model.audio, width)
        shape = (len(rows), config.length, width)
        audio.append(jax.random.uniform(next(keys), shape, minval=-bound, maxval=bound))

    def linear(source, target, layers=()):
        return {"w": jax.random.normal(next(keys), (*layers, source, target)) * source**-0.5,
                "b": jnp.zeros((*layers, target))}

    p = {"audio": audio}
    if common:
        p["stage"] = {str(s): linear(text_width, width)
                      for s, (rows, _, width) in enumerate(plan) if rows and width != text_width}
    if config.coupling == "independent":
        bound = prompt_bound(model.audio, text_width)
        shape = (text_layers, len(config.sides) * config.length, text_width)
        return p | {"text": jax.random.uniform(next(keys), shape, minval=-bound, maxval=bound)}
    for side in config.sides:
        if config.coupling == "per_layer":
            p[side] = [linear(a.shape[-1], text_width, a.shape[:1]) for a in audio if len(a)]
        elif common:
            p[side] = [linear(text_width, text_width)]
        else:
            p[side] = [linear(a.shape[-1], text_width) for a in audio if len(a)]
    return p


def prompt_tuning(config: PromptConfig, model, p: dict) -> dict:
    """The tuning of both towers: {audio: {prompts, ...}, text: {prompts [L, 2n, d_t], ...}}.

    Text layer l takes its prompts from the audio layer at the same relative depth (the same layer
    where both towers are equally deep, as in every preset).
    """
    plan, text_layers, text_width = _plan(config, model)
    covered = [s for s, (rows, _, _) in enumerate(plan) if rows]
    sides = config.sides
    audio, masks, text = [], [], []
    for s, (rows, layers, width) in enumerate(plan):
        if not rows:
            audio.append(jnp.zeros((layers, config.length, width)))
            masks.append(jnp.zeros((layers, config.length), bool))
            if config.coupling != "independent":
                text.append(jnp.zeros((layers, len(sides) * config.length, text_width)))
            continue
        a = p["audio"][s]
        # Layers without prompts hold zeros, and the mask closes them.
        around = (rows.start, layers - rows.stop)
        spread = lambda x: jnp.pad(x, [around, (0, 0), (0, 0)])
        masks.append(jnp.pad(jnp.ones((len(rows), config.length), bool), [around, (0, 0)]))
        if config.coupling != "independent":
            own = min(covered.index(s), len(p[sides[0]]) - 1)  # or the one pair of all stages
            pair = [_linear(a, p[side][own]) for side in sides]
            text.append(spread(jnp.concatenate(pair, axis=1)))  # [layers, n or 2n, d_t]
        if str(s) in p.get("stage", {}):
            a = _linear(a, p["stage"][str(s)])
        audio.append(spread(a))
    tuning = {"audio": {"prompts": audio}, "text": {"prompts": p.get("text")}}
    if text:
        source = jnp.concatenate(text)
        pick = jnp.arange(text_layers) * source.shape[0] // text_layers
        tuning["text"]["prompts"] = source[pick]
    if any(len(rows) < layers for rows, layers, _ in plan):
        tuning["audio"]["prompts_mask"] = masks
        if text:
            tuning["text"]["prompts_mask"] = jnp.tile(jnp.concatenate(masks)[pick],
                                                      (1, len(sides)))
    if len(plan) == 1:  # one stage: no list
        tuning["audio"] = {name: stages[0] for name, stages in tuning["audio"].items()}
    return tuning


def _linear(x: jax.Array, p: dict) -> jax.Array:
    """x W + b with one map for all layers, or one a layer (w [l, in, out])."""
    return x @ p["w"] + (p["b"] if p["w"].ndim == 2 else p["b"][:, None])
