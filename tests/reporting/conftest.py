"""Synthetic runs: results.json as a training job would leave them."""

import json

import pytest

from tail_jax.evaluation import continual
from tail_jax.evaluation.classification import summarize_pooled


def _make_results(method="ptat", seed=0, *, shift=0.0, joint=False, **changes):
    """R@k of three tasks; forgetting of R@1 is 0.1 T->A and 0.2 A->T, so 15 points on average.

    T->A R@1 after the last task: 0.3, 0.5, 0.7, average 0.5; A->T: 0.2, 0.4, 0.9, average 0.5.
    """
    forward = [[0.1, 0.1, 0.1], [0.4, 0.2, 0.1], [0.4, 0.6, 0.3], [0.3, 0.5, 0.7]]
    backward = [[0.1, 0.1, 0.1], [0.4, 0.2, 0.1], [0.4, 0.6, 0.3], [0.2, 0.4, 0.9]]
    matrices = {}
    for direction, matrix in (("text_to_audio", forward), ("audio_to_text", backward)):
        for metric, gain in (("R@1", 0.0), ("R@5", 0.02), ("R@10", 0.04), ("mAP@10", 0.01)):
            moved = [[value + gain + shift for value in row] for row in matrix]
            if joint:
                moved = [[None] * 3] * 3 + moved[-1:]
            matrices[f"{direction}/{metric}/own/fresh"] = moved
            if metric == "R@1":
                matrices[f"{direction}/{metric}/all/fresh"] = moved
    results = {
        "schema": 1,
        "method": method,
        "stream": "three scenes",
        "tasks": ["rain", "machines", "animals"],
        "seed": seed,
        "order": [0, 1, 2],
        "backbone": {"name": "tiny", "sha256": "ab" * 32, "parameters": 1000},
        "trainable_parameters": 50,
        "total_parameters": 1050,
        "matrices": matrices,
        "summary": continual.summarize(matrices),
        "wall_seconds": {"train": {"birds": 60.0, "rain": 40.0}, "evaluate": 20.0, "total": 120.0},
        "peak_memory_bytes": 3 * 2**30,
        "versions": {"jax": "0.10.2"},
        "device": "cpu",
    }
    return results | changes


@pytest.fixture
def make_results():
    return _make_results


@pytest.fixture
def make_class_results():
    """Accuracies of three sessions of 10, 10 and 20 test clips after each; by hand below."""

    def make(method="pace", seed=0, shift=0.0):
        own = [[None] * 3, [1.0, None, None], [0.8, 0.9, None], [0.7, 0.6, 0.95]]
        matrix = [[value and value - shift for value in row] for row in own]
        matrices = {"accuracy/seen": matrix}
        return _make_results(method, seed, matrices=matrices, summary=continual.summarize(
            matrices) | {"accuracy/pooled": summarize_pooled(matrix, [10, 10, 20])})

    return make


@pytest.fixture
def run_folders(tmp_path, make_results):
    """Ten finished runs and a folder that holds none."""
    runs = [
        make_results(method, seed, shift=0.01 * seed)
        for method in ("zeta", "ptat", "alpha")
        for seed in (0, 1)
    ]
    runs += [make_results("frozen", seed, trainable_parameters=0) for seed in (0, 1)]
    runs += [make_results("joint", seed, joint=True, trainable_parameters=1000) for seed in (0, 1)]
    for results in runs:
        folder = tmp_path / "runs" / f"{results['method']}-{results['seed']}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results))
    (tmp_path / "runs" / "report").mkdir()
    return tmp_path / "runs"
