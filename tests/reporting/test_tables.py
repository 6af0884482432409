"""Cells against hand-worked numbers (those of `conftest.py`) and SciPy's t distribution."""

import csv
import io

import numpy as np
import pytest
from scipy import stats

from tail_jax.reporting import tables
from tail_jax.reporting.writers import ResultsError


def table_of(*runs):
    return tables.make_rows(tables.group_by_method({f"run{i}": run for i, run in enumerate(runs)}))


def cells_of(row):
    return dict(zip((column.title for column in tables.COLUMNS), row.cells, strict=True))


def test_cells_equal_the_hand_worked_numbers(make_results):
    (row,) = table_of(make_results())
    expected = {
        "trainable parameters": 50,
        "share of total %": 100 * 50 / 1050,
        "R@1 T→A": 50.0,
        "R@1 A→T": 50.0,
        "R@1": 50.0,
        "R@5": 52.0,
        "R@10": 54.0,
        "mAP@10": 51.0,
        "R@1 union": 50.0,
        "R@1 stale": None,
        "forgetting": 15.0,
        "BWT": -15.0,
        "FWT": 15.0,
        "wall time min": 2.0,
        "peak memory GiB": 3.0,
    }
    cells = cells_of(row)
    assert cells.keys() == expected.keys()
    for title, value in expected.items():
        found = cells[title]
        assert found == value if value is None else found.mean == pytest.approx(value), title
        assert found is None or found.half_width is None, title


@pytest.mark.parametrize("count", [2, 3, 7])
def test_interval_equals_scipys(count):
    values = np.random.default_rng(count).normal(size=count)
    low, high = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
    found = tables.estimate(list(values))
    assert found.mean == pytest.approx((low + high) / 2)
    assert found.half_width == pytest.approx((high - low) / 2)


def test_a_value_missing_in_one_seed_is_missing_in_the_row():
    """An average over fewer seeds would stand beside averages over all of them."""
    assert tables.estimate([0.1, None, 0.3]) is None


def test_methods_go_from_floor_to_ceiling_then_by_alphabet(make_results):
    names = ["zeta", "joint", "alpha", "ptat", "frozen", "prompts", "sequential"]
    rows = table_of(*(make_results(name) for name in names))
    assert [row.method for row in rows] == [
        "frozen",
        "sequential",
        "prompts",
        "ptat",
        "joint",
        "alpha",
        "zeta",
    ]


def test_markdown_shows_percent_with_one_decimal_and_intervals(make_results):
    """Seeds at 50 % and 51 %: s = 0.707, half width 12.706 * 0.707 / sqrt(2) = 6.353."""
    text = tables.markdown_table(table_of(make_results(seed=0), make_results(seed=1, shift=0.01)))
    header, rule, row = text.splitlines()
    cells = dict(zip([c.strip() for c in header.split("|")], [c.strip() for c in row.split("|")]))
    assert cells["R@1"] == "50.5 ± 6.4"
    assert (cells["method"], cells["seeds"], cells["trainable parameters"]) == ("ptat", "2", "50")
    assert (cells["share of total %"], cells["R@1 stale"]) == ("4.76", "–")
    assert len(header) == len(rule) == len(row)


def test_markdown_has_no_negative_zero(make_results):
    text = tables.markdown_table(
        table_of(
            make_results(
                summary={f"{way}/R@1/own/fresh": {"average": -1e-9} for way in tables.DIRECTIONS}
            )
        )
    )
    assert "-0.0" not in text


def test_csv_is_not_rounded(make_results):
    rows = table_of(*(make_results(seed=seed, shift=seed / 300) for seed in range(3)))
    (row,) = csv.DictReader(io.StringIO(tables.csv_table(rows)))
    assert (
        float(row["R@1"]) == rows[0].cells[4].mean
        and float(row["R@1 ±"]) == rows[0].cells[4].half_width
    )
    assert (row["seeds"], row["R@1 stale"], row["trainable parameters ±"]) == ("0 1 2", "", "")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"stream": "other"},
            "run0 and run1 cannot share a table: stream is 'three scenes' in the one and 'other'",
        ),
        ({"order": [2, 1, 0]}, r"order is \[0, 1, 2\] in the one and \[2, 1, 0\]"),
        ({"tasks": ["a", "b", "c"]}, "tasks is"),
        ({"backbone": {"sha256": "cd" * 32}}, "backbone is 'abab.* in the one and 'cdcd"),
        ({"trainable_parameters": 60}, "both ptat, with 50 and 60 trainable parameters"),
        ({"seed": 0}, "run0 and run1 are both ptat with seed 0"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused_in_one_line(change, message, make_results):
    runs = {"run0": make_results(seed=0), "run1": make_results(**({"seed": 1} | change))}
    with pytest.raises(ResultsError, match=message) as error:
        tables.group_by_method(runs)
    assert "\n" not in str(error.value)


def test_matrix_text_aligns_tasks_and_marks_what_was_not_measured():
    text = tables.matrix_text([[0.05, None], [1.0, 0.25], [0.5, 0.125]], ["rain", "machines"])
    assert text.splitlines() == [
        "                    rain  machines",
        "before               5.0         –",
        "after rain         100.0      25.0",
        "after machines      50.0      12.5",
    ]


def test_mean_matrix_averages_seeds_and_directions(make_results):
    matrix = tables.mean_matrix([make_results(seed=0), make_results(seed=1, shift=0.1)], "R@1")
    assert matrix[3] == pytest.approx([0.3, 0.5, 0.85])
    joint = tables.mean_matrix([make_results(joint=True)], "R@1")
    assert joint[2] == [None] * 3 and joint[3] == pytest.approx([0.25, 0.45, 0.8])
    assert tables.mean_matrix([make_results()], "MedR") is None
