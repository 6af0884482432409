"""Cells against hand-worked numbers (those of `conftest.py`) and SciPy's t distribution."""

import csv
import io

import numpy as np
import pytest
from scipy import stats

from tail_jax.reporting import report, tables
from tail_jax.reporting.columns import CLASSES, DIRECTIONS, RETRIEVAL
from tail_jax.reporting.writers import ResultsError


def table_of(*runs):
    return tables.make_rows(tables.group_by_method({f"run{i}": run for i, run in enumerate(runs)}))


def cells_of(row):
    return dict(zip((column.title for column in RETRIEVAL.columns), row.cells, strict=True))


def test_cells_equal_the_hand_worked_numbers(make_results):
    (row,) = table_of(make_results())
    expected = {
        "trainable parameters": 50,
        "trainable %": 100 * 50 / 1050,
        "R@1 T→A": 50.0,
        "R@1 A→T": 50.0,
        "R@1": 50.0,
        "R@5": 52.0,
        "R@10": 54.0,
        "mAP@10": 51.0,
        # T->A 0.4, 0.5, 0.5; A->T 0.4, 0.5, 0.5: the averages over the tasks seen so far.
        "R@1 incremental": 100 * (0.4 + 0.5 + 0.5) / 3,
        "R@1 union": 50.0,
        "R@1 stale": None,
        "forgetting": 15.0,
        "BWT": -15.0,
        "FWT": 15.0,
        "R@1 − sequential": None,
        "training min": 100 / 60,
        "time / sequential": None,
        "wall time min": 2.0,
        "peak memory GiB": 3.0,
        "memory / sequential": None,
        "data kept MiB": None,
        "state MiB": None,
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


def test_methods_go_from_floor_to_ceiling_by_family(make_results):
    expected = ["frozen", "sequential", "lwf_a", "lwf_b", "ewc", "er", "l2p", "lora", "alpha"]
    expected += ["zeta", "prompts", "ptat", "ptat_plus", "joint"]
    rows = table_of(*(make_results(name) for name in sorted(expected)))
    assert [row.method for row in rows] == expected


def test_paired_difference_is_over_seeds_and_its_interval_scipys(make_results):
    """Backbones scatter by 5 points, the two methods move together: the pairs scatter by 0.6."""
    base, gain = (0.0, 0.05, -0.04), (0.020, 0.030, 0.025)
    runs = [
        make_results("sequential", s, shift=base[s], backbone={"sha256": f"{s}"}) for s in range(3)
    ]
    runs += [
        make_results("ptat", s, shift=base[s] + gain[s], backbone={"sha256": f"{s}"})
        for s in range(3)
    ]
    sequential, ptat = table_of(*runs)
    found = cells_of(ptat)["R@1 − sequential"]
    difference = stats.ttest_rel(
        [50 + 100 * (a + b) for a, b in zip(base, gain)], [50 + 100 * a for a in base]
    )
    low, high = difference.confidence_interval(0.95)
    assert found.mean == pytest.approx(2.5) == pytest.approx((low + high) / 2)
    assert found.half_width == pytest.approx((high - low) / 2)
    assert found.half_width < cells_of(ptat)["R@1"].half_width / 5
    assert cells_of(sequential)["R@1 − sequential"] == tables.Estimate(0.0)


def test_pairs_are_formed_over_the_seeds_that_both_have(make_results):
    runs = [make_results("sequential", s, shift=0.1 * s) for s in (0, 1)]
    runs += [make_results("ptat", s, shift=0.1 * s + 0.02) for s in (1, 2)]
    _, ptat = table_of(*runs)
    assert ptat.seeds == (1, 2)
    cell = cells_of(ptat)["R@1 − sequential"]
    assert cell.mean == pytest.approx(2.0) and cell.half_width is None


def test_time_and_memory_are_ratios_at_the_same_seed(make_results):
    """100 s of training against 200 and 50 s, half of them in hooks: ratios 0.5 and 2."""
    runs = [
        make_results("sequential", s, wall_seconds={
            "train": {"a": t, "b": t / 2}, "hooks": {"b": t / 2}, "total": 3 * t})
        for s, t in enumerate((100.0, 25.0))
    ]
    runs += [make_results("ptat", s, peak_memory_bytes=6 * 2**30) for s in (0, 1)]
    sequential, ptat = (cells_of(row) for row in table_of(*runs))
    assert ptat["time / sequential"].mean == pytest.approx(1.25)
    assert ptat["time / sequential"].half_width == pytest.approx(12.7062 * 1.06066 / 2**0.5, 1e-4)
    assert ptat["memory / sequential"] == tables.Estimate(2.0, 0.0)
    assert sequential["time / sequential"] == sequential["memory / sequential"]
    assert sequential["time / sequential"] == tables.Estimate(1.0)


def test_what_is_kept_is_shown_where_a_method_keeps_something(make_results):
    plain = table_of(make_results("ptat"))
    assert "kept" not in tables.markdown_table(plain)
    rows = table_of(
        make_results("ptat"),
        make_results("er", memory_bytes=3 * 2**19, state_bytes={"rain": 2**20, "animals": 2**21}),
    )
    header, _, er, ptat = tables.markdown_table(rows).splitlines()
    names = [cell.strip() for cell in header.split("|")]
    for line, expected in ((er, ["1.50", "2.00"]), (ptat, ["–"] * 2)):
        cells = dict(zip(names, [cell.strip() for cell in line.split("|")]))
        assert [cells[name] for name in ("data kept MiB", "state MiB")] == expected


def test_headline_fits_a_readme(make_results):
    rows = table_of(make_results("sequential"), make_results("ptat", shift=0.01))
    header, _, _, ptat = tables.markdown_table(rows, RETRIEVAL.headline).splitlines()
    names = [cell.strip() for cell in header.split("|")[1:-1]]
    assert set(names) == {"method", *RETRIEVAL.headline} and len(names) == 10
    cells = dict(zip(names, [cell.strip() for cell in ptat.split("|")[1:-1]]))
    assert (cells["R@1"], cells["R@1 − sequential"]) == ("51.0", "1.0")


def test_every_seed_may_have_a_backbone_of_its_own(make_results):
    runs = {
        f"{method}{seed}": make_results(method, seed, backbone={"sha256": f"{seed}"})
        for method in ("frozen", "ptat")
        for seed in (0, 1)
    }
    assert [len(runs) for runs in tables.group_by_method(runs).values()] == [2, 2]
    runs["ptat1"] = make_results("ptat", 1, backbone={"sha256": "0"})
    with pytest.raises(
        ResultsError, match="frozen1 and ptat1 have seed 1 and different backbones, 1 and 0"
    ):
        tables.group_by_method(runs)


def test_markdown_shows_percent_with_one_decimal_and_intervals(make_results):
    """Seeds at 50 % and 51 %: s = 0.707, half width 12.706 * 0.707 / sqrt(2) = 6.353."""
    text = tables.markdown_table(table_of(make_results(seed=0), make_results(seed=1, shift=0.01)))
    header, rule, row = text.splitlines()
    cells = dict(zip([c.strip() for c in header.split("|")], [c.strip() for c in row.split("|")]))
    assert cells["R@1"] == "50.5 ± 6.4"
    assert (cells["method"], cells["seeds"], cells["trainable parameters"]) == ("ptat", "2", "50")
    assert (cells["trainable %"], cells["R@1 stale"]) == ("4.76", "–")
    assert len(header) == len(rule) == len(row)


def test_markdown_has_no_negative_zero(make_results):
    text = tables.markdown_table(
        table_of(
            make_results(
                summary={f"{way}/R@1/own/fresh": {"average": -1e-9} for way in DIRECTIONS}
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
        (
            {"method": "frozen", "seed": 0, "backbone": {"sha256": "cd" * 32}},
            "run0 and run1 have seed 0 and different backbones, abab.* and cdcd",
        ),
        ({"evaluation_split": "valid"}, "split that was measured is None in the one and 'valid'"),
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


def test_class_incremental_runs_have_a_table_of_their_own(make_class_results):
    runs = {f"run{i}": run for i, run in enumerate((
        make_class_results("sequential", shift=0.25), make_class_results()))}
    rows = tables.make_rows(tables.group_by_method(runs))
    sequential, pace = (
        dict(zip((column.title for column in CLASSES.columns), row.cells, strict=True))
        for row in rows)
    expected = {
        "accuracy": (10 * 70 + 10 * 60 + 20 * 95) / 40, "session mean": 75.0,
        "incremental": (100 + 85 + 80) / 3, "forgetting": 30.0, "first − last": 30.0,
        "accuracy − sequential": 25.0}
    assert {name: pace[name].mean for name in expected} == pytest.approx(expected)
    assert sequential["accuracy − sequential"].mean == 0
    assert "R@1" not in tables.markdown_table(rows) and "R@1" not in CLASSES.legend


def test_report_of_class_incremental_runs_is_on_accuracy(make_class_results, tmp_path):
    runs = {"runs/a": make_class_results("sequential", shift=0.25), "runs/b": make_class_results()}
    headline = report.write_report(runs, tmp_path)
    assert "| pace" in headline and "80.0" in headline
    text = (tmp_path / "report.md").read_text()
    assert "among all classes seen" in text and "R@1" not in text
    assert {path.name for path in tmp_path.iterdir()} >= {
        "matrices.png", "curves.png", "tradeoff.png"}
