"""Exact parameter counts of the published sizes and of what PTAT trains of them."""

import jax
import pytest

from tail_jax import methods
from tail_jax.models.dual_encoder import BUFFERS
from tail_jax.models.presets import preset
from tail_jax.tuning.masks import count

CAP = 0.0242  # PTAT: at most this share of what full fine-tuning trains
NAMES = ("clap-htsat-tiny", "ast-base")


@pytest.fixture(scope="module")
def sizes():
    """|P| for a preset and settings, from shapes alone."""
    shapes = {name: jax.eval_shape(preset(name).init, jax.random.key(0)) for name in NAMES}

    def size(name, n, heads=True, **prompts):
        method = methods.build({"name": "ptat", "train_heads": heads, "train_scale": heads,
                                "prompts": {"length": n} | prompts})
        init = lambda p: method.init(jax.random.key(0), preset(name), p)["trainable"]
        return count(jax.eval_shape(init, shapes[name]))

    return size


@pytest.mark.parametrize("name, expected", [
    # transformers counts one more: it has two temperatures.
    ("clap-htsat-tiny", 153_492_889), ("ast-base", 196_391_681)])
def test_parameter_counts_of_published_sizes(name, expected):
    params = jax.eval_shape(preset(name).init, jax.random.key(0))
    assert count(params, BUFFERS) == expected
    buffers = count(params) - expected
    assert buffers == (2 * 64 if name == "clap-htsat-tiny" else 2)


@pytest.mark.parametrize("name, options, per_prompt, rest", [
    ("ast-base", {}, 9_216, 1_181_184),
    ("clap-htsat-tiny", {"htsat_map": "per_stage"}, 4_416, 2_217_984),
    ("clap-htsat-tiny", {"htsat_map": "common"}, 9_216, 1_697_952)])
@pytest.mark.parametrize("heads", [True, False])
def test_prompt_counts_follow_the_formulas_of_the_specification(
        sizes, name, options, per_prompt, rest, heads):
    for n in (4, 8, 16):
        expected = per_prompt * n + rest + (1_312_768 + 1) * heads
        assert sizes(name, n, heads, **options) == expected


def test_headline_counts(sizes):
    assert sizes("clap-htsat-tiny", 4) == 3_548_417
    assert sizes("ast-base", 4) == 2_530_817


def test_per_layer_coupling_breaks_the_budget(sizes):
    got = sizes("ast-base", 4, heads=False, coupling="per_layer")
    assert got == 9_216 * 4 + 24 * (768 * 768 + 768)
    assert got / 196_391_681 == pytest.approx(0.07236, abs=5e-6)


@pytest.mark.parametrize("name, total, heads, options, largest", [
    ("clap-htsat-tiny", 153_492_889, True, {"htsat_map": "per_stage"}, 41),
    ("clap-htsat-tiny", 153_492_889, True, {"htsat_map": "common"}, 76),
    ("clap-htsat-tiny", 153_492_889, False, {"htsat_map": "per_stage"}, 338),
    ("ast-base", 196_391_681, True, {}, 245), ("ast-base", 196_391_681, False, {}, 387)])
def test_largest_prompt_length_under_the_cap(sizes, name, total, heads, options, largest):
    assert sizes(name, largest, heads, **options) <= CAP * total
    assert sizes(name, largest + 1, heads, **options) > CAP * total
