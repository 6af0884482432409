"""PTAT and full fine-tuning of transformers' CLAP in PyTorch: the peer of `step` and `memory`.

Written as one would who knows PyTorch well and PTAT exactly. The backbone is transformers' own
model, in evaluation mode (no dropout, BatchNorm's running statistics), and full fine-tuning leaves
it as it is. For PTAT every parameter of the towers is frozen, so that no weight gradients are
computed, and the attention modules are replaced by ones that know prompts:

    K = [key(A); key(X)],  V = [value(A); value(X)],  softmax(query(X) K^T / sqrt(d) + mask) V

with A [n, d] of the layer (in HTSAT past the norm before the attention), projected once for all
windows. What a layer makes of deep prompts is thrown away, so this equals inserting them as tokens,
and takes less time (`tests/commands/test_step_benchmark.py` compares). PyTorch's fused attention
computes it in both towers; transformers' HTSAT has none, but the constant bias of frozen towers
can be given to it as a mask.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class Settings:
    """What both sides train with; the values of the methods and the optimizer of a configuration.

    Attributes:
        rates: peak learning rate of prompts, heads and temperature, or of everything.
        weight_decay: of matrices.
        betas, epsilon, clip: of AdamW, and the largest norm of the gradient.
        factor: step -> factor of the rates.
        dtype: of the towers, "float32" or "bfloat16".
        similarity, feature: (weight, temperature) of the distillation.
    """

    rates: Mapping[str, float]
    weight_decay: float
    betas: tuple[float, float]
    epsilon: float
    clip: float
    factor: Callable[[int], float]
    dtype: str = "float32"
    similarity: tuple[float, float] = (1.0, 2.0)
    feature: tuple[float, float] = (1.0, 2.0)


class Prompts(nn.Module):
    """Deep audio prompts for every stage of HTSAT, and the linear maps that make those of the text.

    T_pre^l = A^l W_pre + b_pre,  T_post^l = A^l W_post + b_post, one pair of maps a stage.
    """

    def __init__(self, tree: Mapping):
        super().__init__()
        self.audio = nn.ParameterList([nn.Parameter(_tensor(a)) for a in tree["audio"]])
        self.pre, self.post = (nn.ModuleList([_linear(p) for p in tree[side]])
                               for side in ("pre", "post"))

    def forward(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Prompts of every layer: audio [n, d_s] and text [2 n, d_t]."""
        text = torch.cat([torch.cat([pre(a), post(a)], 1)
                          for a, pre, post in zip(self.audio, self.pre, self.post)])
        return [prompts for stage in self.audio for prompts in stage], list(text)

    def tree(self) -> dict:
        """In the form of the argument of `__init__`."""
        return {"audio": [_array(a) for a in self.audio],
                **{side: [{"w": _array(p.weight).T, "b": _array(p.bias)} for p in maps]
                   for side, maps in (("pre", self.pre), ("post", self.post))}}


class WindowAttention(nn.Module):
    """HTSAT's attention within windows, with prompts as further keys and values.

    `norm` is that before the attention. Prompts have the relative position bias 0, and are seen by
    all tokens of shifted windows.
    """

    def __init__(self, theirs, norm: nn.LayerNorm):
        super().__init__()
        self.theirs, self.norm, self.prompts, self._masks = theirs, norm, None, {}

    def forward(self, x, attention_mask=None, output_attentions=False):
        theirs = self.theirs
        return (_attend(theirs, x, self.norm(self.prompts), theirs.num_attention_heads,
                        self._mask(x, attention_mask)),)

    def _mask(self, x, shifted):
        """[rows or 1, heads, tokens, prompts + tokens]: a constant, made once."""
        name = (len(x), x.dtype, x.device)
        if name not in self._masks:
            tokens, theirs = x.shape[1], self.theirs
            index = theirs.relative_position_index.view(-1)
            bias = theirs.relative_position_bias_table[index].view(tokens, tokens, -1)
            bias = bias.permute(2, 0, 1)[None]
            if shifted is not None:
                bias = (bias + shifted[:, None]).repeat(len(x) // len(shifted), 1, 1, 1)
            bias = F.pad(bias, (len(self.prompts), 0)).to(x.dtype)
            self._masks[name] = bias.detach().contiguous()
        return self._masks[name]


class TextAttention(nn.Module):
    """RoBERTa's attention, with prompts as further keys and values that no padding hides."""

    def __init__(self, theirs):
        super().__init__()
        self.theirs, self.prompts = theirs, None

    def forward(self, x, attention_mask=None, **_):
        theirs = self.theirs
        if attention_mask is not None:
            # True, or 0 where it is added, on what is seen.
            seen = attention_mask.dtype == torch.bool
            attention_mask = F.pad(attention_mask, (len(self.prompts), 0), value=seen)
        return _attend(theirs, x, self.prompts, theirs.num_attention_heads, attention_mask), None


def _attend(theirs, x, prompts, heads: int, mask):
    """Attention of x [rows, tokens, d] to prompts [n, d] and itself."""
    rows, tokens, width = x.shape
    split = lambda y: y.view(len(y), -1, heads, width // heads).transpose(1, 2)
    key, value = (torch.cat([split(layer(prompts)[None]).expand(rows, -1, -1, -1),
                             split(layer(x))], 2) for layer in (theirs.key, theirs.value))
    out = F.scaled_dot_product_attention(split(theirs.query(x)), key, value, attn_mask=mask)
    return out.transpose(1, 2).reshape(rows, tokens, width)


class Trainer:
    """One method on one model: its trainables, its teacher and its optimizer.

    Args:
        folder: checkpoint of a CLAP.
        prompts: of PTAT at the start, as `Prompts` takes them; None fine-tunes everything.
        device: "cpu", or "cuda", where it is compiled.
    """

    def __init__(self, folder, settings: Settings, prompts: Mapping | None, device: str = "cpu"):
        clap = transformers.ClapModel.from_pretrained(folder).eval()
        self.model, self.settings, self.device = clap, settings, device
        self.prompts, self.teacher = None, None
        self.heads = nn.ModuleDict({"audio": clap.audio_projection, "text": clap.text_projection})
        clap.logit_scale_t.requires_grad_(False)  # one temperature, for both directions
        if prompts is not None:
            self.prompts = Prompts(prompts)
            for parameter in (*clap.audio_model.parameters(), *clap.text_model.parameters()):
                parameter.requires_grad_(False)
            if settings.dtype == "bfloat16":  # once; autocast would cast them in each step
                for module in (*clap.audio_model.modules(), *clap.text_model.modules()):
                    if isinstance(module, (nn.Linear, nn.Conv2d)):
                        module.to(torch.bfloat16)
            self._audio, self._text = _insert(clap)
            self.prompts.to(device)
        clap.to(device)
        self.optimizer = torch.optim.AdamW(self._groups(), betas=settings.betas,
                                           eps=settings.epsilon, fused=device != "cpu")
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, settings.factor)
        self.trainables = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._losses = self._loss if device == "cpu" else torch.compile(self._loss)

    def _groups(self) -> list[dict]:
        """Parameters by rate and decay."""
        rates, groups = self.settings.rates, {}
        scale = ("logit_scale", self.model.logit_scale_a)
        named = [*self.model.named_parameters()] if self.prompts is None else [
            *((f"prompts.{name}", p) for name, p in self.prompts.named_parameters()),
            *((f"heads.{name}", p) for name, p in self.heads.named_parameters()), scale]
        for name, parameter in named:
            if not parameter.requires_grad:
                continue
            rate = rates.get("all") or rates[name.partition(".")[0]]
            # As of Swin: norms, biases and tables of biases are not decayed, nor are prompts.
            decayed = parameter.ndim > 1 and not (
                name.endswith("relative_position_bias_table") or name.startswith("prompts.audio"))
            groups.setdefault((rate, decayed), []).append(parameter)
        return [{"params": parameters, "lr": rate,
                 "weight_decay": self.settings.weight_decay * decayed}
                for (rate, decayed), parameters in groups.items()]

    def put(self, arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """A batch of the other side, of distinct clips and captions, on the device."""
        return {
            "input_features": torch.from_numpy(arrays["audio"])[:, None].to(self.device),
            "input_ids": torch.from_numpy(arrays["token_ids"]).long().to(self.device),
            "attention_mask": torch.from_numpy(arrays["token_mask"]).long().to(self.device)}

    def begin_task(self) -> None:
        """Makes what was learned so far the teacher."""
        self.teacher = tuple(copy.deepcopy(part).requires_grad_(False) for part in (
            self.prompts, self.heads, self.model.logit_scale_a))

    def step(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Takes a step and waits for it; returns the loss.

        A teacher's embeddings are taken from the batch, if it has them (`with_kept`).
        """
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, self.settings.dtype == "bfloat16"):
            loss = self._losses(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trainables, self.settings.clip)
        self.optimizer.step()
        self.schedule.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    def with_kept(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch with the teacher's embeddings of it, computed as in a step."""
        with torch.autocast(self.device, torch.bfloat16, self.settings.dtype == "bfloat16"):
            return {**batch, "kept": self._taught(batch)}

    @torch.no_grad()
    def _taught(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self._embed(batch, *self.teacher[:2])

    def _embed(self, batch, prompts, heads):
        """Unit embeddings [B, d] of the audio and of the text."""
        if prompts is not None:
            for modules, values in zip((self._audio, self._text), prompts()):
                for module, value in zip(modules, values):
                    module.prompts = value
        audio = self.model.audio_model(input_features=batch["input_features"]).pooler_output
        text = self.model.text_model(input_ids=batch["input_ids"],
                                     attention_mask=batch["attention_mask"]).pooler_output
        return tuple(F.normalize(heads[side](x).float(), dim=-1)
                     for side, x in (("audio", audio), ("text", text)))

    def _loss(self, batch):
        # The backward pass reads the tensors of the forward pass, not the modules' attributes.
        kept = batch.get("kept")
        if self.teacher is not None and kept is None:
            kept = self._taught(batch)
        a, t = self._embed(batch, self.prompts, self.heads)
        with torch.autocast(self.device, enabled=False):
            return self._objective(a, t, kept)

    def _objective(self, a, t, kept):
        """InfoNCE in both directions, and distillation of similarities and features."""
        pairs = torch.arange(len(a), device=a.device)
        s = _similarity(a, t, self.model.logit_scale_a)
        loss = (F.cross_entropy(s, pairs) + F.cross_entropy(s.T, pairs)) / 2
        if self.teacher is None:
            return loss
        weight, temperature = self.settings.similarity
        s_old = _similarity(*kept, self.teacher[2])
        loss = loss + weight * temperature**2 / 2 * (
            _kl(s_old, s, temperature) + _kl(s_old.T, s.T, temperature))
        weight, temperature = self.settings.feature
        root = math.sqrt(a.shape[-1])
        return loss + weight * temperature**2 * sum(
            _kl(old * root, new * root, temperature) for old, new in zip(kept, (a, t)))

    def learned(self) -> dict:
        """Of PTAT: the prompts in the form of `Prompts`, heads and temperature."""
        heads = {side: {name: {"kernel": _array(layer.weight).T, "bias": _array(layer.bias)}
                        for name, layer in head.named_children() if isinstance(layer, nn.Linear)}
                 for side, head in self.heads.items()}
        return {"prompts": self.prompts.tree(), "heads": heads,
                "logit_scale": _array(self.model.logit_scale_a)}

    def state_bytes(self) -> int:
        """Bytes of what is trained and of the optimizer's state."""
        tensors = [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(x.numel() * x.element_size() for x in (*self.trainables, *tensors))


def _insert(clap) -> tuple[list[nn.Module], list[nn.Module]]:
    """Replaces the attentions of both towers; returns the new ones, a layer each."""
    audio, text = [], []
    for stage in clap.audio_model.audio_encoder.layers:
        for block in stage.blocks:
            block.attention.self = WindowAttention(block.attention.self, block.layernorm_before)
            audio.append(block.attention.self)
    for layer in clap.text_model.encoder.layer:
        layer.attention.self = TextAttention(layer.attention.self)
        text.append(layer.attention.self)
    return audio, text


def _similarity(a, t, logit_scale):
    return logit_scale.exp().clamp(max=100) * a @ t.T


def _kl(teacher, student, temperature: float):
    """Mean over rows of KL(softmax(teacher / T) || softmax(student / T))."""
    return F.kl_div(F.log_softmax(student / temperature, -1),
                    F.log_softmax(teacher / temperature, -1), log_target=True,
                    reduction="batchmean")


def _tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float32))


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _linear(p: Mapping) -> nn.Linear:
    layer = nn.Linear(*p["w"].shape)
    with torch.no_grad():
        layer.weight.copy_(_tensor(p["w"]).T)
        layer.bias.copy_(_tensor(p["b"]))
    return layer
