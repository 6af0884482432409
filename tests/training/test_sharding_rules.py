"""Every parameter of every tower has its place on the mesh."""

import jax
import pytest

from tail_jax.models.bert import TextConfig
from tail_jax.models.dual_encoder import AUDIO_TOWERS, DualEncoder
from tail_jax.models.htsat import HTSATConfig
from tail_jax.training.sharding import PARAMETER_RULES
from tail_jax.tuning.masks import apply_rules

MODELS = {kind: DualEncoder(config(), None) for kind, (config, _) in AUDIO_TOWERS.items()} | {
    "fused": DualEncoder(HTSATConfig(fusion=True), None),
    "residual heads": DualEncoder(HTSATConfig(), TextConfig(), head="residual")}


@pytest.mark.parametrize("name", [*MODELS])
def test_every_parameter_matches_one_rule(name):
    # apply_rules raises on a parameter that no rule or two rules match.
    apply_rules(jax.eval_shape(MODELS[name].init, jax.random.key(0)), PARAMETER_RULES, "rules")
