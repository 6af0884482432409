"""Ridge regression on one device and on eight: float32, no waiting for each other at a batch."""

import json

import numpy as np
import pytest

from tail_jax import analytic
from tests.analytic.ridge_data import CLASSES, FEATURES, UNSEEN, embeddings, sessions

STREAM = sessions()
ALL = tuple(np.concatenate(parts) for parts in zip(*STREAM))


@pytest.fixture(scope="module", params=[1, 8])
def devices(request, run_python, tmp_path_factory):
    """(what the program of ridge_devices.py printed, the arrays it wrote)."""
    path = tmp_path_factory.mktemp("ridge") / "weights.npz"
    process = run_python("-m", "tests.analytic.ridge_devices", path, devices=request.param)
    assert process.returncode == 0, process.stderr
    told = json.loads(process.stdout)
    assert told["devices"] == request.param
    return told, dict(np.load(path))


@pytest.fixture(scope="module")
def exact():
    """The sums of the stream, in float64."""
    return analytic.accumulate(analytic.empty_moments(CLASSES, FEATURES), *ALL)


def error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_batch_needs_no_collective_and_the_solve_sums_over_devices(devices):
    told, _ = devices
    assert told["collectives"]["accumulate"] == []
    assert bool(told["collectives"]["solve"]) == (told["devices"] > 1)


def test_each_device_holds_its_own_part_of_the_sums(devices):
    told, _ = devices
    n = told["devices"]
    assert told["shapes"] == {"gram": [n, FEATURES, FEATURES], "sums": [n, CLASSES, FEATURES],
                              "counts": [n, CLASSES]}
    assert told["shards"]["gram"] == [1, FEATURES, FEATURES]
    assert told["replicated"] and told["donated"] and told["precision"] == "highest"


def test_weights_are_near_those_of_float64_at_a_relative_gamma_of_a_hundredth(devices, exact):
    told, arrays = devices
    expected = analytic.solve_ridge(exact, told["gamma"])
    assert told["used"] == pytest.approx(told["gamma"], rel=1e-5)
    assert error(arrays["weights"], expected) <= 5e-3


def test_predictions_are_those_of_float64(devices, exact):
    told, arrays = devices
    random = np.random.default_rng(8)
    seen = np.setdiff1d(np.arange(CLASSES), UNSEEN)
    z = embeddings(random, random.choice(seen, 10_007))
    w_p = analytic.projection(4, z.shape[1], FEATURES)
    found, expected = (
        analytic.ridge_scores(weights, z, w_p, exact["counts"] > 0).argmax(1)
        for weights in (arrays["weights"], analytic.solve_ridge(exact, told["gamma"])))
    assert (found == expected).mean() >= 0.999
    assert not np.isin(found, UNSEEN).any()


def test_small_gamma_is_raised_and_the_raise_is_told(devices, exact):
    told, arrays = devices
    least = 1e-2 * np.trace(exact["gram"]) / FEATURES
    assert told["raised"] == pytest.approx(least, rel=1e-4) and told["gamma"] / 1000 < least
    assert error(arrays["raised_weights"], analytic.solve_ridge(exact, least)) <= 5e-3


def test_sums_come_to_the_host_for_float64(devices, exact):
    told, arrays = devices
    state = {name: arrays[name] for name in exact}
    np.testing.assert_array_equal(state["counts"], exact["counts"])
    upper = np.triu_indices(FEATURES)
    np.testing.assert_allclose(state["gram"][upper], exact["gram"][upper], rtol=1e-4, atol=1e-2)
    expected = analytic.solve_ridge(exact, told["gamma"])
    assert error(analytic.solve_ridge(state, told["gamma"]), expected) <= 5e-3


def test_random_features_on_devices_are_those_of_the_host(devices):
    _, arrays = devices
    mask = np.arange(len(arrays["z"])) < len(arrays["z"]) - 3
    w_p = analytic.projection(4, arrays["z"].shape[1], FEATURES)
    np.testing.assert_allclose(arrays["features"], analytic.random_features(arrays["z"], w_p, mask),
                               atol=1e-4)
    assert not arrays["features"][~mask].any()
