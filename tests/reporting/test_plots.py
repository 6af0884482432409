import matplotlib.image
from matplotlib import colors, figure
import pytest

from tail_jax.evaluation import continual
from tail_jax.reporting import plots
from tail_jax.reporting import tables
from tail_jax.reporting.columns import DIRECTIONS, RETRIEVAL
from tail_jax.reporting.writers import ResultsError


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    saved = []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))
    )
    return saved


@pytest.fixture
def groups(make_results):
    runs = [
        make_results(name, seed, shift=0.02 * seed)
        for name in ("ptat", "other")
        for seed in (0, 1, 2)
    ]
    runs += [
        make_results("frozen", 0, trainable_parameters=0),
        make_results("joint", 0, joint=True),
    ]
    return tables.group_by_method({f"{run['method']}{run['seed']}": run for run in runs})


def test_heat_maps_show_every_mean_in_percent(drawn, groups, tmp_path):
    plots.plot_matrices(groups, "R@1", tmp_path / "matrices.png")
    panels = {panel.get_title(): panel for panel in drawn[0].axes}
    for method, runs in groups.items():
        expected = [
            f"{100 * value:.1f}"
            for row in tables.mean_matrix(runs, "R@1")
            for value in row
            if value is not None
        ]
        found = [text.get_text() for text in panels[method].texts]
        assert found[: len(expected)] == expected
    assert [label.get_text() for label in panels["frozen"].get_yticklabels()] == [
        "before",
        *(f"after {task}" for task in groups["ptat"][0]["tasks"]),
    ]
    assert matplotlib.image.imread(tmp_path / "matrices.png").shape[1] > 800


def test_curves_are_averages_over_tasks_seen(drawn, groups, tmp_path):
    """ptat, mean of seeds 0, 0.02, 0.04 and of both directions; bounds are horizontal."""
    plots.plot_curves(groups, "R@1", tmp_path / "curves.png")
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    matrix = tables.mean_matrix(groups["ptat"], "R@1")
    expected = [100 * continual.seen_average(matrix, m) for m in (1, 2, 3)]
    assert list(lines["ptat"].get_ydata()) == pytest.approx(expected)
    assert expected[0] == pytest.approx(42.0) and expected[2] == pytest.approx(52.0)
    for bound in ("frozen", "joint"):
        assert list(lines[f"{bound} (all tasks)"].get_ydata()) == pytest.approx([50.0, 50.0])


def test_tradeoff_shows_the_numbers_of_the_table(drawn, groups, tmp_path):
    plots.plot_tradeoff(groups, "R@1", tmp_path / "tradeoff.png")
    left, right = drawn[0].axes
    (row,) = [row for row in tables.make_rows(groups) if row.method == "ptat"]
    cells = dict(zip((column.title for column in RETRIEVAL.columns), row.cells, strict=True))
    points = {bar.lines[0].get_color(): bar.lines[0].get_xydata()[0] for bar in left.containers}
    assert points["#0072b2"] == pytest.approx([cells["forgetting"].mean, cells["R@1"].mean])
    points = {bar.lines[0].get_color(): bar.lines[0].get_xydata()[0] for bar in right.containers}
    assert points["#0072b2"] == pytest.approx([50, cells["R@1"].mean])
    assert (
        plots._STYLES["frozen"][0] not in points
    )  # no place on a logarithmic axis: a line instead


def test_a_method_keeps_its_colour_in_all_figures(drawn, groups, tmp_path):
    plots.plot_curves(groups, "R@1", tmp_path / "curves.png")
    plots.plot_tradeoff(groups, "R@1", tmp_path / "tradeoff.png")
    legends = [drawn[0].axes[0].get_legend(), drawn[1].legends[0]]
    looks = [
        {
            text.get_text().split()[0]: colors.to_hex(handle.get_color())
            for text, handle in zip(legend.texts, legend.legend_handles)
        }
        for legend in legends
    ]
    assert looks[0] == looks[1] and len(set(looks[0].values())) == len(groups)


def test_one_task_one_seed_can_be_drawn(tmp_path, make_results):
    matrices = {f"{way}/R@1/own/fresh": [[0.1], [0.4]] for way in DIRECTIONS}
    run = make_results(tasks=["only"], matrices=matrices, summary=continual.summarize(matrices))
    groups = tables.group_by_method({"run": run})
    for plot in (plots.plot_matrices, plots.plot_curves, plots.plot_tradeoff):
        plot(groups, "R@1", tmp_path / "picture.png")


def test_a_metric_that_was_not_measured_is_named(groups, tmp_path):
    with pytest.raises(
        ResultsError, match="a run of frozen has no MedR .*it has R@1, R@10, R@5, mAP@10"
    ):
        plots.plot_curves(groups, "MedR", tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def names_of(count):
    families = ("lwf", "ewc", "er", "l2p", "lora", "ranpac", "zeta", "ptat", "pace")
    return ["frozen", "sequential", "joint", *(f"{families[i % 9]}_{i}" for i in range(count - 3))]


def test_many_methods_take_pages_and_fewer_leave_none_behind(drawn, make_results, tmp_path):
    for count, files in ((25, 3), (10, 2), (9, 1)):
        groups = tables.group_by_method({name: make_results(name) for name in names_of(count)})
        pages = plots.plot_matrices(groups, "R@1", tmp_path / "matrices.png")
        assert len(pages) == files and sorted(tmp_path.iterdir()) == sorted(pages)
        shown = [
            panel.get_title() for page in drawn[-files:] for panel in page.axes if panel.get_title()
        ]
        assert shown == list(groups)
        tops = {panel.images[0].norm.vmax for page in drawn[-files:] for panel in page.axes
                if panel.images}
        assert len(tops) == 1  # one scale of colours on all pages


def test_many_curves_are_drawn_by_family_beside_the_bounds(drawn, make_results, tmp_path):
    groups = tables.group_by_method({name: make_results(name) for name in names_of(25)})
    plots.plot_curves(groups, "R@1", tmp_path / "curves.png")
    panels = [panel for panel in drawn[0].axes if panel.get_title(loc="left")]
    shown = [[text.get_text().split()[0] for text in panel.get_legend().texts] for panel in panels]
    assert [panel.get_title(loc="left") for panel in panels] == [*tables.FAMILIES][1:]
    for panel, names in zip(panels, shown):
        assert names[:3] == ["frozen", "sequential", "joint"] and len(names) <= 12
        assert {tables.family(name) for name in names[3:]} == {panel.get_title(loc="left")}
    assert sorted(name for names in shown for name in names[3:]) == sorted(
        set(groups) - set(tables.FAMILIES[tables.BOUNDS])
    )


def test_no_two_of_25_methods_look_alike(make_results):
    groups = tables.group_by_method({name: make_results(name) for name in names_of(25)})
    styles = plots._styles(groups)
    assert len({styles[method] for method in groups}) == 25
