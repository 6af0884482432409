"""Random weights of transformers' models in our towers: what the parity tests share."""

import numpy as np
import torch

from tail_jax.pretrained.clap import BUFFERS
from tail_jax.pretrained.files import Tensors
from tail_jax.pretrained.names import NameTable, fill

TOLERANCE = 1e-4


def randomise(model, seed):
    """Every weight and statistic random: nothing is 0 or 1 that could hide a missing term."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            new = rng.normal(0, 0.2, value.shape)
            if name.endswith("running_var"):
                new = rng.uniform(0.3, 3, value.shape)
            elif name.endswith("weight") and value.ndim == 1:
                new += 1
            value.copy_(torch.tensor(new))
    return model.eval()


def converted(shapes, model, rules, **constants):
    """`shapes` filled from `model`; fails on a leaf of either side that the other does not have."""
    state = model.state_dict()
    tensors = Tensors("state dict", {key: tuple(value.shape) for key, value in state.items()},
                      lambda key: state[key].numpy().copy())
    return fill(NameTable(type(model).__name__, rules, (), BUFFERS, constants), shapes, tensors)


def recorded(modules):
    """A list that their forward pass will fill with the output of each of `modules`, in order."""
    outputs = []
    for module in modules:
        module.register_forward_hook(lambda module, inputs, output: outputs.append(
            output if isinstance(output, torch.Tensor) else output[0]))
    return outputs


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), atol=TOLERANCE, rtol=0)


def tokens(seed, vocab, length=11, padding="right", pad=1):
    """(ids, mask) of three texts, two of them padded on one side; no other token is `pad`."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, vocab, (3, length))
    mask = np.arange(length) < np.array([length, 5, 1])[:, None]
    mask = mask if padding == "right" else mask[:, ::-1].copy()
    return np.where(mask, ids, pad).astype(np.int32), mask
