"""Towers on rows, layers and parameters split at once (2 x 2 x 2), blocks computed again: the
loss and the gradients of one device."""

import json

import pytest

from tests.models.towers_on_devices import TOWERS

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def found(run_python):
    """What the program prints on eight devices."""
    process = run_python("-m", "tests.models.towers_on_devices", devices=8)
    assert process.returncode == 0, process.stderr
    return dict(zip(TOWERS, map(json.loads, process.stdout.splitlines())))


@pytest.mark.parametrize("name", [*TOWERS])
def test_eight_devices_compute_what_one_does(found, name):
    case = found[name]
    assert case["loss"][1] == pytest.approx(case["loss"][0], abs=1e-5) != 0
    assert case["largest"] > 1e-3
    assert case["apart"] < 1e-4 * case["largest"]
    assert case["share"] < 0.45  # kernels of blocks lie in quarters, those of stems in halves
