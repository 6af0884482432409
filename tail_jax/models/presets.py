"""Named sizes of the dual encoder, from one that trains on two cores to the published ones."""

from __future__ import annotations

from tail_jax.models.ast import ASTConfig
from tail_jax.models.bert import TextConfig
from tail_jax.models.dual_encoder import DualEncoder
from tail_jax.models.eat import EATConfig
from tail_jax.models.htsat import HTSATConfig

_MINI_TEXT = TextConfig(vocab_size=1024, width=64, layers=2, heads=4, hidden=256,
                        max_positions=66, pool="mean", epsilon=1e-5)

PRESETS = {
    # A third to half a million parameters on 128 frames of 32 mels. Shallow on purpose: in the
    # minutes that two cores give, two layers learn the base corpus further than four.
    "mini-ast": DualEncoder(
        ASTConfig(frames=128, mels=32, patch=16, stride=16, width=96, layers=2, heads=4,
                  hidden=384, epsilon=1e-5), _MINI_TEXT, embedding=64),
    "mini-htsat": DualEncoder(
        HTSATConfig(spec_size=64, mels=32, patch=8, width=48, depths=(1, 1), heads=(2, 4),
                    window=4), _MINI_TEXT, embedding=64),
    # Audio alone, for pretraining without captions. 16 patches at twice the width cost what 64 of
    # half the side did, and say more to a linear classifier: configs/pretrain_eat.py.
    "mini-eat": DualEncoder(
        EATConfig(frames=128, mels=32, width=192, layers=4, heads=4, hidden=768, pool="mean"),
        None),
    # EAT and SSLAM as PACE takes them, 5.12 s of 128 bands.
    "eat-base": DualEncoder(EATConfig(frames=512), None),
    # Specification configuration B: LAION CLAP (HTSAT-tiny, RoBERTa-base).
    "clap-htsat-tiny": DualEncoder(HTSATConfig(), TextConfig()),
    # Specification configuration A: AST-base and BERT-base, new heads.
    "ast-base": DualEncoder(
        ASTConfig(), TextConfig(vocab_size=30522, max_positions=512, type_vocab_size=2,
                                position_offset=0, pool="cls")),
}


def preset(name: str) -> DualEncoder:
    """The dual encoder called `name`.

    Raises:
        ValueError: on an unknown name, listing the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; expected one of {[*PRESETS]}")
    return PRESETS[name]
