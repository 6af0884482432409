"""What a data-parallel step sends from device to device, read from the compiled program."""

import json

import pytest

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_ptat_reduces_its_trainable_tree_and_nothing_of_the_backbone(run_python):
    process = run_python("-m", "tests.training.collectives", "ptat", 32, 128, devices=8)
    assert process.returncode == 0, process.stderr
    small, large = map(json.loads, process.stdout.splitlines())
    assert large["frozen"] > 1.5 * small["frozen"] and large["trainable"] == small["trainable"]
    assert large["collectives"] == small["collectives"]
    # Gradients, and a few scalars; those of prompts before what makes them from others.
    reduced = sum(small["collectives"]["all-reduce"])
    assert 2 * small["trainable"] < reduced <= 4 * small["trainable"] + 200
    # Embeddings of all rows and their teacher's, ids and the mask, and the gradients coming back.
    others = sum(sum(sizes) for kind, sizes in small["collectives"].items() if kind != "all-reduce")
    assert others <= 4 * 8 * small["embeddings"]
