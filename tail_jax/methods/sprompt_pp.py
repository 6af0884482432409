"""S-Prompt++: S-Prompts (Wang et al., NeurIPS 2022) with prefixes and keys, on class streams.

The form in which later work compares with S-Prompts: no text, prefixes in place of prompts, one
learned key a session in place of centroids. `sprompts.py` is the method on audio-text corpora.
"""

from __future__ import annotations

import dataclasses

from tail_jax.methods.prefixes import KeyedPrefixes


@dataclasses.dataclass(frozen=True)
class SPromptPlusPlus(KeyedPrefixes):
    """Prefixes E_m and a key kappa_m for each session, and a head that all share.

        session m trains E_m and kappa_m:   L = CE - lambda mean_x cos(q(x), kappa_m)
        a clip is classified with E_j,      j = argmax over the sessions seen of cos(q(x), kappa_j)

    with CE among the session's own classes and q(x) what the frozen tower pools.

    Attributes:
        learning_rate: 0.005, by Adam, so without weight decay (lit).
        heads_learning_rate: the same (ours).
        epochs: 50 (lit).
        expert_length: 20, in layers 1 to 5 of 12 (lit).
        pull_weight: lambda, 1 (lit).
    """

    learning_rate: float = 0.005
    weight_decay: float = 0.0
    heads_learning_rate: float = 0.005
    epochs: int = 50

    retrieves = False
