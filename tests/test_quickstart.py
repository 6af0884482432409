"""The quickstart's comparison says what the README says it does (minutes; behind `slow`)."""

import pytest

from configs import quickstart
from tail_jax import cli
from tail_jax.evaluation import continual
from tail_jax.reporting import tables
from tail_jax.train import train


@pytest.mark.slow
def test_ptat_forgets_half_of_sequential_and_stays_above_frozen_and_prompts(tmp_path):
    average, forgetting, trainable = {}, {}, {}
    for method in ("frozen", "sequential", "prompts", "ptat", "joint"):
        config = quickstart.get_config(f"method={method},seed=11")
        config.data.cache_dir = str(tmp_path / "cache")
        results = train(cli.plain(config), tmp_path / method)
        matrix = tables.mean_matrix([results], "R@1")
        average[method] = continual.average_after_last(matrix)
        forgetting[method] = continual.forgetting(matrix)
        trainable[method] = results["trainable_parameters"]
    assert max(average, key=average.get) == "joint"
    assert forgetting["ptat"] <= forgetting["sequential"] / 2
    assert trainable["ptat"] <= trainable["sequential"] / 10
    assert average["ptat"] > average["frozen"] and average["ptat"] > average["prompts"]
    assert 0.45 <= average["frozen"] / average["joint"] <= 0.75
