"""One device or eight, in parts or whole: the same step."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tail_jax import describe, losses, methods, settings
from tail_jax.methods.ablations import VARIANTS
from tail_jax.models.presets import PRESETS, preset
from tail_jax.training import sharding
from tail_jax.train import train
from tail_jax.training.step import cast_frozen
from tail_jax.tuning.masks import apply_rules
from tests.training import stepping

pytestmark = pytest.mark.usefixtures("quick_compilation")
CASES = [{"method": method, "mesh": mesh, "accumulation": parts} for method, mesh, parts in (
    ("ptat", [8, 1], 4), ("ptat", [4, 2], 1), ("sequential", [8, 1], 1), ("sequential", [4, 2], 1),
    ("l2p", [8, 1], 1), ("ptat_plus", [4, 2], 4), ("modx", [4, 2], 1), ("ptat", [2, 1], 1),
    ("ptat", [4, 1], 1), ("sequential", [1, 1, 8], 1))]
NAMES = [f"{c['method']} {'x'.join(map(str, c['mesh']))} in {c['accumulation']}" for c in CASES]


@pytest.fixture(scope="module")
def eight(run_python):
    """The cases on eight devices, in one process."""
    process = run_python("-m", "tests.training.stepping", json.dumps(CASES), devices=8)
    assert process.returncode == 0, process.stderr
    return dict(zip(NAMES, map(json.loads, process.stdout.split("\n"))))


@pytest.fixture(scope="module")
def one():
    """The same on one device, and for two methods in four parts as well."""
    cases = {(case["method"], 1) for case in CASES} | {("ptat", 4), ("sequential", 4)}
    return {case: stepping.run(case[0], [1, 1], case[1]) for case in sorted(cases)}


def compare(a, b, tolerance):
    # Relative, too: 1e-6 is four float32 steps at a loss of 4.
    np.testing.assert_allclose(a["losses"], b["losses"], rtol=tolerance, atol=tolerance)
    for x, y in zip(a["embeddings"], b["embeddings"]):
        np.testing.assert_allclose(x, y, atol=tolerance)
    for name, x in a["parameters"].items():
        np.testing.assert_allclose(x, b["parameters"][name], atol=tolerance, err_msg=name)


@pytest.mark.parametrize("case", range(len(CASES)), ids=NAMES)
def test_eight_devices_train_as_one(eight, one, case):
    found, expected = eight[NAMES[case]], one[CASES[case]["method"], 1]
    assert expected["losses"][0] != expected["losses"][2]  # something is trained
    compare(found, expected, 1e-5)
    assert found["traces"] == 1


@pytest.mark.parametrize("method", ["ptat", "sequential"])
def test_accumulation_changes_nothing(one, method):
    compare(one[method, 4], one[method, 1], 1e-6)


def test_wide_layers_and_their_moments_are_split_over_the_model_axis(eight):
    width, hidden = 16, 32
    split, whole = eight["sequential 4x2 in 1"], eight["sequential 8x1 in 1"]
    assert whole["up"] == [[width, hidden], [width, hidden]]
    assert split["up"] == [[width, hidden], [width, hidden // 2]]
    assert split["down"] == [hidden // 2, width] and split["query"] == [width, width // 2]
    assert eight["ptat 4x2 in 1"]["up"] == split["up"]
    assert [width, hidden // 2] in split["moments"] and [width, hidden] not in split["moments"]


def test_full_sharding_leaves_each_device_its_part_of_kernels_and_moments(eight):
    width, hidden = 16, 32
    split = eight["sequential 1x1x8 in 1"]
    # Along the axis that `model` would not split.
    assert split["up"] == [[width, hidden], [width // 8, hidden]]
    assert split["down"] == [hidden, width // 8] and split["query"] == [width // 8, width]
    assert [width // 8, hidden] in split["moments"] and [width, hidden] not in split["moments"]


def test_every_row_is_compared_with_the_whole_batch(eight):
    model, method, _, _, state, _, frozen = stepping.setup("sequential", [1, 1])
    batch = {k: jnp.asarray(v) for k, v in stepping.make_batch(model).items()}
    out = method.forward(model, state["trainable"], frozen, {}, batch, None)

    def loss(rows):
        return float(losses.retrieval_loss(
            out["audio"][rows], out["text"][rows], state["trainable"]["logit_scale"],
            {k: v[rows] for k, v in batch.items()}))

    whole = loss(slice(None))
    parts = [loss(slice(i, i + 4)) for i in range(0, 28, 4)]  # what each device alone would see
    assert abs(np.mean(parts) - whole) > 0.5
    for mesh in ("8x1", "4x2"):
        assert eight[f"sequential {mesh} in 1"]["losses"][0] == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("fields, message", [
    ({"train.batch_size": 6, "train.accumulation": 4}, "expected a multiple of 4"),
    ({"train.batch_size": 0}, "train.batch_size is 0; expected 1 or more"),
    ({"train.accumulation": 0}, "train.accumulation is 0"),
    ({"train.log_every": 0}, "train.log_every is 0"),
    ({"train.keep_disk_bytes": -1}, "train.keep_disk_bytes is -1; expected 0 or more"),
    ({"eval.batch_size": 0}, "eval.batch_size is 0"),
    ({"eval.split": "tset"}, "eval.split is 'tset'; expected one of train, valid, test"),
    ({"mesh.data": 3}, "mesh is 3 x 1 but there are 1 devices"),
    ({"mesh.model": 0}, "mesh is -1 x 0"),
    ({"mesh.fsdp": 2}, "mesh is 0 x 2 x 1 but there are 1 devices; set mesh.data, mesh.fsdp"),
    ({"mesh.fsdp": 0}, "mesh is -1 x 0 x 1; expected positive numbers"),
    ({"train.remat": "all"}, "train.remat is 'all'; expected one of none, blocks"),
    ({"seed": -1}, "seed is -1"),
    ({"optimizer.warmup": 1.0}, "optimizer.warmup is 1.0"),
    ({"train.duration": "3 weeks"}, "train.duration is '3 weeks'"),
    ({"backbone.kind": "none"}, "backbone.kind is 'none'"),
])
def test_values_out_of_range_are_named(tiny_config, tmp_path, fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train(tiny_config("sequential", **fields), tmp_path)


def test_batch_that_devices_cannot_share_is_one_clear_error(run_python, tiny_root, tmp_path):
    process = run_python(
        "-m", "tail_jax.train", f"--config=tests/tiny.py:root={tiny_root}",
        f"--workdir={tmp_path}", "--config.train.batch_size=12", devices=8)
    assert process.returncode == 2
    assert process.stderr.splitlines() == [
        "error: train.batch_size is 12, which 8 devices of the data axis cannot share equally; "
        "expected a multiple of 8"]


def pairs():
    """Every preset with every method that is for such a model, by name."""
    for name, model in sorted(PRESETS.items()):
        for method, kind in sorted(methods.METHODS.items()):
            fits = kind.retrieves if model.text else kind.classifies or method == "eat"
            if fits and method not in VARIANTS:
                yield name, method


@pytest.mark.parametrize("name, method", pairs())
def test_rules_cover_every_leaf_of_every_preset_and_method_once(name, method):
    model, method = preset(name), methods.build(methods.defaults(method))
    if method.classifies and model.text is None:
        model = dataclasses.replace(model, classes=7)
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(lambda p: method.init(jax.random.key(0), model, p), params)
    mesh = sharding.make_mesh()
    for tree in (params, method.frozen(params), state["trainable"]):
        placed = sharding.parameter_shardings(tree, mesh)
        assert jax.tree.structure(placed) == jax.tree.structure(tree)
    apply_rules(state["trainable"], method.learning_rates())
    apply_rules(state["trainable"], method.weight_decays())


def test_leaf_without_a_rule_and_leaf_with_two_are_named():
    mesh = sharding.make_mesh()
    with pytest.raises(ValueError, match="audio/new_thing: matched by no rule"):
        sharding.parameter_shardings({"audio": {"new_thing": np.zeros(3)}}, mesh)
    with pytest.raises(ValueError, match="a: matched by"):
        apply_rules({"a": 1}, [("a", 0), (".", 1)])


@pytest.mark.parametrize("name", ["ptat", "sequential"])
def test_bfloat16_is_for_what_towers_compute_and_float32_for_what_is_trained(tiny_config, name):
    config = tiny_config(name, **{"model.dtype": "bfloat16"})
    model, method = settings.described_model(config), methods.build(config["method"])
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(lambda p: method.init(jax.random.key(0), model, p), params)
    frozen = jax.eval_shape(lambda p: cast_frozen(method.frozen(p), model.dtype), params)

    def loss(trainable, frozen, aux, batch):
        outputs = method.forward(model, trainable, frozen, aux, batch, None)
        return method.objective(model, trainable, frozen, aux, outputs, batch)[0]

    batch = stepping.make_batch(model)
    value, gradients = jax.eval_shape(jax.value_and_grad(loss), state["trainable"], frozen,
                                      state["aux"], batch)
    tokens = jax.eval_shape(
        lambda *args: model.encode("audio", *method.resolve(model, *args[:2]), args[2])["tokens"],
        state["trainable"], frozen, batch)
    assert tokens.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves((value, gradients))} == {jnp.dtype("float32")}
    types = {x.dtype.name for x in jax.tree.leaves(frozen.get("text", {}))}
    assert types == ({"bfloat16"} if name == "ptat" else set())


# --- The compiled program ---------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ptat", "sequential"])
def test_step_donates_what_it_trains_and_keeps_the_backbone(method):
    model, method, mesh, step, state, opt_state, frozen = stepping.setup(method, [1, 1])
    old = jax.tree.leaves((state["trainable"], opt_state))
    step(state["trainable"], opt_state, frozen, state["aux"], method.update_mask(state),
         sharding.put_batch(stepping.make_batch(model), mesh), jax.random.key(0),
         jnp.asarray([0, 1], jnp.int32))
    assert all(leaf.is_deleted() for leaf in old)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((frozen, state["aux"])))


def test_backbone_is_an_argument_and_not_a_constant_of_the_program():
    model, method, mesh, step, state, opt_state, frozen = stepping.setup("ptat", [1, 1])
    text = step.function.lower(
        state["trainable"], opt_state, frozen, state["aux"], method.update_mask(state),
        sharding.put_batch(stepping.make_batch(model), mesh), jax.random.key(0),
        jnp.asarray([0, 1], jnp.int32)).as_text()
    sizes = [np.prod([int(n) for n in shape.split("x")[:-1]] or [1], dtype=int) for shape in
             re.findall(r"stablehlo.constant dense<(?:\"|\[).*?: tensor<([^>]*)>", text)]
    # The word embedding alone has 300 x 16 values, a layer 16 x 32.
    assert max(sizes, default=0) < 256
    leaves = len(jax.tree.leaves(frozen))
    assert len(re.findall(r"%arg\d+: ", text.split("{", 2)[2].split("->")[0])) >= leaves


def test_ptat_computes_no_gradient_of_the_backbone(tiny_config):
    fields = {"model.audio.width": 64, "model.audio.hidden": 256, "model.text.width": 64,
              "model.text.hidden": 256}
    flops = {method: describe.describe(tiny_config(method, **fields))["flops_per_step"]
             for method in ("ptat", "sequential")}
    # With F one forward pass, training everything is 3 F and training inputs of layers 2 F.
    assert flops["ptat"] < 0.8 * flops["sequential"]
    live = tiny_config("ptat", **fields, **{"train.keep_features": False})
    assert describe.describe(live)["flops_per_step"] > 1.2 * flops["ptat"]
