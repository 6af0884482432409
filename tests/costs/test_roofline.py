"""The roofline's arithmetic, names of slices, and the table."""

import importlib.util
import re

import pytest

from tail_jax.costs.roofline import CHIPS, Roofline, roofline
from tail_jax.costs.slices import Slice, check_compiler, parse_slices
from tail_jax.costs.table import slices_table


def test_least_time_is_that_of_what_takes_longest():
    v5e = CHIPS["v5e"]
    # 197 TFLOP in a second, 819 GB in a second, 200 GB sent in a second over four links.
    assert roofline(v5e, (4, 4), 19.7e12, 81.9e9, 2e9) == Roofline(0.1, 0.1, 0.01)
    assert roofline(v5e, (4, 4), 19.7e12, 8.19e9, 30e9).bound == "network"
    assert roofline(v5e, (4, 4), 19.7e12, 8.19e9, 30e9).seconds == pytest.approx(0.15)
    assert roofline(v5e, (4, 4), 1.97e12, 8.19e10, 0).bound == "memory"
    assert roofline(v5e, (16, 16), 19.7e12, 8.19e9, 2e9).bound == "compute"


@pytest.mark.parametrize("kind, shape, links, of", [
    ("v5e", (2, 2), 2, 4), ("v5e", (1, 2), 1, 4), ("v5e", (2, 4), 3, 4), ("v6e", (4, 4), 4, 4),
    ("v5p", (2, 2, 1), 2, 6), ("v5p", (4, 4, 8), 6, 6)])
def test_small_slices_have_fewer_links(kind, shape, links, of):
    chip = CHIPS[kind]
    assert roofline(chip, shape, 0, 0, chip.network_bandwidth).network == pytest.approx(of / links)


def test_one_chip_has_nobody_to_send_to():
    assert roofline(CHIPS["v5e"], (1, 1), 0, 0, 0).network == 0
    with pytest.raises(ValueError, match="a slice of one chip sends 8 bytes"):
        roofline(CHIPS["v5e"], (1, 1), 0, 0, 8)


def test_names_of_slices():
    assert parse_slices("v5e:1x1, v5p:2x2x4") == (Slice("v5e", (1, 1)), Slice("v5p", (2, 2, 4)))
    assert [each.name for each in parse_slices("v5e:16x16")] == ["v5e:16x16"]
    assert parse_slices("v6e:4x8")[0].chips == 32


@pytest.mark.parametrize("text, message", [
    ("v5e", "topology 'v5e'; expected a chip and its slice, as v5e:4x4"),
    ("v5e:0x4", "topology 'v5e:0x4'; expected a chip"),
    ("v5e:4x4,", "topology ''; expected a chip"),
    ("v9:4x4", "topology 'v9:4x4': chip 'v9' is not known; expected one of v5e, v5p, v6e"),
    ("v5e:4", "topology 'v5e:4' has 1 dimensions; slices of v5e have 2")])
def test_names_that_are_none(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_slices(text)


def test_without_the_compiler_one_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"libtpu, which is not installed; pip install "
                                         r"'tail_jax\[tpu\]' \(no TPU is needed\)"):
        check_compiler()


def program(**changes):
    return {"flops": 5e12, "accessed_bytes": 2e10, "memory": {"total": 3.21e9}, "fits": True,
            "collectives": {"all-reduce": {"count": 3, "bytes": 14.2e6, "sent_bytes": 21.3e6}},
            "sent_bytes": 21.3e6, "loops": 0, "bound": "compute",
            "seconds": {"compute": 0.0254, "memory": 0.0244, "network": 0.0002,
                        "roofline": 0.0254}} | changes


def test_the_table_has_a_row_a_slice_and_marks_what_bounds():
    refused = {"fits": False, "refused": "Used 45.12G of 15.75G hbm"}
    report = {"commit": "abc", "versions": {"jax": "0.10.2"}, "slices": [
        {"topology": "v5e:2x2", "batch_size": {"train_step": 256},
         "programs": {"train_step": program()}},
        {"topology": "v5e:1x1", "batch_size": {"train_step": 4096},
         "programs": {"train_step": refused}},
        {"topology": "v5e:4x4", "batch_size": {"train_step": 64},
         "programs": {"train_step": program(fits=False, loops=2)}}]}
    lines = slices_table(report).splitlines()
    rows = [line for line in lines if line.startswith("| v5e")]
    assert rows[0] == ("| v5e:2x2 | 256 | 3.21 | 5 | 20 | 3 all-reduce (14.2) | 21.3 | **25.4** | "
                       "24.4 | 0.2 | 25.4 |")
    assert "does not fit: Used 45.12G of 15.75G hbm" in rows[1]
    assert "3.21 (does not fit)" in rows[2]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert any(line.startswith("2 loops: what one pass") for line in lines)
    assert lines[-1] == "commit abc, jax 0.10.2"
