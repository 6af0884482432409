"""Name tables on a file written by hand."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy

from tail_jax.pretrained.files import open_tensors
from tail_jax.pretrained.names import NameTable, fill, under, unfill

SQUARE = (lambda x: x * x, np.sqrt)
TABLE = NameTable("toy", (
    *under("encoder", "model.", (
        (r"layer_(\d+)/(query|key|value)", "blocks.<1>.<2:s>"),
        (r"layer_(\d+)/out", "blocks.<1+1>.proj"),
        (r"layer_(\d+)/conv", "blocks.<1>.conv"))),
    (r"fused_(\d)", "qkv[<1>/2]"), (r"norm", "ln"), (r"cls", "token"), (r"squared", "root", SQUARE),
    (r"product", ("g", "v"), (lambda g, v: g * v, lambda x: (x * 0 + 2, x / 2)))),
    aliases=((r"^old\.", "model."),), ignored=(r"position_ids", r"head\..*"))


@pytest.fixture
def theirs():
    random = np.random.default_rng(0)
    new = lambda *shape: random.uniform(1, 2, shape).astype(np.float32)
    return {"old.blocks.0.query.weight": new(3, 4), "old.blocks.0.query.bias": new(3),
            "model.blocks.2.proj.weight": new(2, 5), "model.blocks.11.conv.weight": new(6, 2, 3, 4),
            "qkv.weight": new(6, 5), "ln.weight": new(4), "token": new(1, 1, 4), "root": new(3),
            "g": new(2), "v": new(2), "position_ids": np.arange(3), "head.weight": new(2, 2)}


SHAPES = {"encoder": {"layer_00": {"query": {"kernel": (4, 3), "bias": (3,)}},
                      "layer_01": {"out": {"kernel": (5, 2)}},
                      "layer_11": {"conv": {"kernel": (3, 4, 2, 6)}}},
          "fused_0": {"kernel": (5, 3)}, "fused_1": {"kernel": (5, 3)},
          "norm": {"scale": (4,)}, "cls": (4,), "squared": (3,), "product": (2,)}


@pytest.fixture
def shapes():
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, np.float32), SHAPES,
                        is_leaf=lambda x: isinstance(x, tuple))


def opened(arrays, folder):
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    return open_tensors(folder)


def test_every_rule_puts_its_array_where_it_belongs(theirs, shapes, tmp_path):
    params = fill(TABLE, shapes, opened(theirs, tmp_path))
    first = params["encoder"]["layer_00"]["query"]
    np.testing.assert_array_equal(first["kernel"], theirs["old.blocks.0.query.weight"].T)
    np.testing.assert_array_equal(first["bias"], theirs["old.blocks.0.query.bias"])
    np.testing.assert_array_equal(params["encoder"]["layer_01"]["out"]["kernel"],
                                  theirs["model.blocks.2.proj.weight"].T)
    conv = params["encoder"]["layer_11"]["conv"]["kernel"]
    assert conv[1, 2, 0, 5] == theirs["model.blocks.11.conv.weight"][5, 0, 1, 2]
    np.testing.assert_array_equal(params["fused_0"]["kernel"], theirs["qkv.weight"][:3].T)
    np.testing.assert_array_equal(params["fused_1"]["kernel"], theirs["qkv.weight"][3:].T)
    np.testing.assert_array_equal(params["cls"], theirs["token"][0, 0])
    np.testing.assert_array_equal(params["squared"], theirs["root"] ** 2)
    np.testing.assert_array_equal(params["product"], theirs["g"] * theirs["v"])
    assert all(leaf.flags.owndata or leaf.base is not None for leaf in jax.tree.leaves(params))


def test_unfill_is_the_reverse(theirs, shapes, tmp_path):
    params = fill(TABLE, shapes, opened(theirs, tmp_path))
    (tmp_path / "again").mkdir()
    again = fill(TABLE, shapes, opened(unfill(TABLE, params), tmp_path / "again"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, again)


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("ln.weight"), "no ln.weight"),
    (lambda t: t.update(extra=np.zeros(2)), "unknown extra"),
    (lambda t: t.update({"token": np.zeros(5)}),
     r"wrong shape: token is \[5\], the configuration asks for \[4\]"),
    (lambda t: t.update({"qkv.weight": np.zeros((9, 5))}),
     r"qkv.weight is \[9, 5\], the configuration asks for \[6, 5\]"),
    (lambda t: t.update({"v": np.zeros(5), "g": np.zeros(5)}),
     r"g \[5\] and v \[5\] make an array \[5\]; the configuration asks for \[2\]"),
    (lambda t: t.update({"v": np.zeros(5)}), r"g \[2\] and v \[5\] do not go together"),
    (lambda t: t.update({"model.blocks.0.query.bias": np.zeros(3)}),
     "twice under two spellings model.blocks.0.query.bias and old.blocks.0.query.bias"),
    (lambda t: [t.pop(k) for k in [*t][:8]], "and 3 more"),
    (lambda t: t.update({"ln.weight": np.array([1, np.nan, 2, 3])}), "ln.weight has values that"),
])
def test_what_does_not_fit_is_listed(theirs, shapes, tmp_path, change, message):
    change(theirs)
    with pytest.raises(ValueError, match=message) as error:
        fill(TABLE, shapes, opened(theirs, tmp_path))
    assert str(tmp_path / "model.safetensors") in str(error.value)


def test_a_parameter_without_a_rule_is_our_mistake(shapes, tmp_path, theirs):
    with pytest.raises(LookupError, match="no rule for parameter 'novel'"):
        fill(TABLE, shapes | {"novel": shapes["cls"]}, opened(theirs, tmp_path))


def test_what_no_file_has_is_a_constant_of_the_table(theirs, shapes, tmp_path):
    table = dataclasses.replace(TABLE, constants={"input/mean": -4.5})
    shapes |= {"input": {"mean": jax.ShapeDtypeStruct((2,), np.float32)}}
    params = fill(table, shapes, opened(theirs, tmp_path))
    assert params["input"]["mean"].tolist() == [-4.5, -4.5]
    assert not any("mean" in key for key in unfill(table, params))
