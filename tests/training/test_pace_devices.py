"""PACE on simulated devices: clips and their masked copies, split over both axes of a mesh."""

import json

import numpy as np
import pytest


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_steps_with_copies_are_the_same_on_every_mesh_and_end(run_python):
    # With clips and copies as two towers of one step, the 2 x 2 mesh never returned.
    cases = [[[4, 1], 1], [[2, 2], 1], [[1, 4], 1], [[4, 1], 2],
             [[2, 2], 2, True]]
    process = run_python("-m", "tests.training.pace_steps", json.dumps(cases), devices=4)
    assert process.returncode == 0, process.stderr[-2000:]
    first, *others = map(json.loads, process.stdout.splitlines())
    assert first["metrics"]["boundary"] > 0.1 and len(others) == 4
    for other in others:
        assert other["traces"] == 1
        assert other["metrics"] == pytest.approx(first["metrics"], rel=1e-4)
        for name, value in first["tree"].items():
            np.testing.assert_allclose(other["tree"][name], value, atol=1e-5)
