"""Pictures of the results of several runs, as `tables.group_by_method` groups them.

Every figure shows a rate on the test set of each task in percent: of retrieval (pool `own`, index
`fresh`) the mean of both directions, or accuracy among the classes seen. A method has the same
colour and marker in all of them; methods of one family (`tables.FAMILIES`) share the marker.
Figures are built without pyplot, so nothing here touches a display or the caller's matplotlib
state; matplotlib is imported when the first one is drawn.
"""

from collections.abc import Mapping, Sequence
import itertools
import math
import os
import pathlib

from tail_jax.evaluation import continual
from tail_jax.reporting import tables
from tail_jax.reporting.columns import RETRIEVAL, Results, layout_of, rate
from tail_jax.reporting.writers import ResultsError

Groups = Mapping[str, Sequence[Results]]

# Okabe and Ito's palette, which stays apart for colour-blind readers; its yellow is left out, too
# faint on white.
_STYLES = {
    "frozen": ("#8a8a8a", "X"),
    "sequential": ("#d55e00", "s"),
    "prompts": ("#e69f00", "^"),
    "ptat": ("#0072b2", "o"),
    "joint": ("#000000", "D"),
}
_COLORS = ("#009e73", "#cc79a7", "#56b4e9", "#6a3d9a", "#7a5230", "#b2182b", "#4d4d4d", "#a6761d")
_MARKERS = dict(zip(tables.FAMILIES, "D<vPdp^*h"))
# More methods than these do not fit into one axes, or on one page.
_MOST_CURVES = 9
_MOST_PANELS = 9

# One has nothing to forget, the other sees all tasks at once.
_LEVELS = ("frozen", "joint")

_CENTRED = {"ha": "center", "va": "center"}

_SETTINGS = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
    "savefig.dpi": 150,
    "savefig.facecolor": "white",
}


def plot_matrices(groups: Groups, metric: str, path: str | os.PathLike) -> list[pathlib.Path]:
    """A panel for each method: its result matrix, tasks across, training progress down.

    The means over seeds stand in the cells. Left of the staircase are tasks trained on, right of it
    tasks to come. More than nine methods take several pages, NAME.png, NAME-2.png, ...

    Returns:
      the files.

    Raises:
      ResultsError: if a run has no matrix of the metric.
    """
    matrices = {method: _matrix(method, runs, metric) for method, runs in groups.items()}
    values = [value for rows in matrices.values() for row in rows for value in row]
    top = 100 * max((value for value in values if value is not None), default=0.0) or 1.0
    path, count = pathlib.Path(path), -(-len(matrices) // _MOST_PANELS)
    each = -(-len(matrices) // count)
    pages = []
    for number in range(count):
        some = dict(itertools.islice(matrices.items(), number * each, (number + 1) * each))
        pages.append(path if not number else path.with_stem(f"{path.stem}-{number + 1}"))
        _matrices_page(groups, some, metric, top, pages[-1])
    for number in itertools.count(count + 1):  # of a report on more methods
        old = path.with_stem(f"{path.stem}-{number}")
        if not old.exists():
            return pages
        old.unlink()


def _matrices_page(groups: Groups, matrices, metric: str, top: float, path: pathlib.Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    tasks = _tasks(groups)
    size = len(tasks)
    columns = min(len(matrices), 2 if size > 5 or len(matrices) == 4 else 3)
    lines = -(-len(matrices) // columns)
    cell, font_size = (0.62, 9) if size <= 5 else (0.48, 7.5)
    width = 1.9 + columns * (cell * size + 0.35)
    height = 0.9 + lines * (cell * 0.8 * (size + 1) + 0.95)
    with matplotlib.rc_context(_SETTINGS | {"axes.grid": False}):
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False)
        colors = matplotlib.colormaps["YlGnBu"].with_extremes(bad="#efefef")
        for number, (panel, method) in enumerate(itertools.zip_longest(panels.flat, matrices)):
            if method is None:
                panel.set_axis_off()
                continue
            rows = [
                [math.nan if value is None else 100 * value for value in row]
                for row in matrices[method]
            ]
            image = panel.imshow(rows, cmap=colors, vmin=0, vmax=top, aspect="auto")
            for m, j in itertools.product(range(size + 1), range(size)):
                if not math.isnan(rows[m][j]):
                    color = "white" if rows[m][j] > 0.65 * top else "black"
                    text = f"{rows[m][j]:.1f}"
                    panel.text(j, m, text, color=color, fontsize=font_size, **_CENTRED)
            if any(value is not None for row in matrices[method][:-1] for value in row):
                # Along the top of the row in which each task was learned, then down to the next.
                stairs = [(x, j + 0.5) for j in range(size) for x in (j - 0.5, j + 0.5)]
                panel.plot(*zip(*stairs), color="#222222", linewidth=1.6, solid_joinstyle="miter")
            else:
                middle = (size - 1) / 2
                text = "not measured\nbefore the end"
                panel.text(middle, middle, text, color="#555555", **_CENTRED)
            panel.set_title(method, fontweight="bold")
            panel.set_xticks(range(size), tasks, rotation=35, ha="right", rotation_mode="anchor")
            leftmost = number % columns == 0
            labels = ["before", *(f"after {task}" for task in tasks)]
            panel.set_yticks(range(size + 1), labels if leftmost else [""] * (size + 1))
            panel.tick_params(length=0)
            panel.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=panels, label=f"{metric} (%)", fraction=0.03, pad=0.02)
        bar.outline.set_visible(False)
        figure.suptitle(
            f"{metric} on every task (columns) after each step of training (rows)\n"
            f"{_what(groups)}; tasks left of the line were trained on"
        )
        _save(figure, path)


def plot_curves(groups: Groups, metric: str, path: str | os.PathLike) -> None:
    """Average over the tasks seen so far after each task, with 95 % t-bands over seeds.

    Frozen and joint, and every method measured after the last task only, are horizontal lines at
    their average over all tasks. More than nine methods take a panel a family, each with frozen,
    sequential and joint in it.

    Raises:
      ResultsError: if a run has no matrix of the metric.
    """
    import matplotlib
    from matplotlib.figure import Figure

    tasks = _tasks(groups)
    styles = _styles(groups)
    panels = _panels(groups)
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(8.4 if columns == 1 else 12, 0.4 + 4 * lines),
                        layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for axes, (title, methods) in itertools.zip_longest(
            grid.flat, panels.items(), fillvalue=(None, ())
        ):
            if not methods:
                axes.set_axis_off()
                continue
            for method in methods:
                _curve(axes, method, groups[method], metric, styles[method], len(tasks))
            if len(panels) > 1:
                axes.set_title(title, loc="left", fontweight="bold")
            rotation = {} if len(tasks) <= 5 and columns == 1 else {
                "rotation": 25, "ha": "right", "rotation_mode": "anchor"
            }
            axes.set_xticks(range(1, len(tasks) + 1), tasks, **rotation)
            axes.tick_params(labelleft=True)
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        for axes in grid[:, 0]:
            axes.set_ylabel(f"{metric} (%), average over tasks seen")
        grid[0, 0].set_ylim(bottom=0)
        figure.supxlabel("after training on", fontsize=10)
        figure.suptitle(
            f"{metric} averaged over the tasks seen so far\n{_what(groups, 'bands')}",
            fontsize=11,
        )
        _save(figure, path)


def _panels(groups: Groups) -> dict[str, list[str]]:
    """Methods by panel: all in one where they fit, otherwise families, the bounds with each."""
    if len(groups) <= _MOST_CURVES:
        return {"": list(groups)}
    bounds = [method for method in groups if tables.family(method) == tables.BOUNDS]
    families: dict[str, list[str]] = {}
    for method in groups:
        if method not in bounds:
            families.setdefault(tables.family(method), []).append(method)
    return {
        name + (f" ({1 + start // _MOST_CURVES})" if start else ""): [
            *bounds,
            *methods[start : start + _MOST_CURVES],
        ]
        for name, methods in families.items()
        for start in range(0, len(methods), _MOST_CURVES)
    }


def _curve(axes, method: str, runs, metric: str, style: tuple[str, str], size: int) -> None:
    color, marker = style
    matrices = [_matrix(method, [run], metric) for run in runs]
    steps = range(1, size + 1)
    points = [
        tables.estimate([_percent(continual.seen_average(matrix, m)) for matrix in matrices])
        for m in steps
    ]
    if method in _LEVELS or None in points:
        _bound(axes, points[-1], color, f"{method} (all tasks)")
        return
    means = [point.mean for point in points]
    line = {"color": color, "marker": marker, "linewidth": 2, "markersize": 6.5}
    axes.plot(steps, means, label=method, **line)
    if len(runs) > 1:
        low = [point.mean - point.half_width for point in points]
        high = [point.mean + point.half_width for point in points]
        axes.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)


def plot_tradeoff(groups: Groups, metric: str, path: str | os.PathLike) -> None:
    """Average after the last task against forgetting (left) and trainable parameters (right).

    Bars are 95 % t-intervals over seeds. A method without a place on an axis (joint training has no
    forgetting, a frozen model no trainable parameters) is a dashed horizontal line in its colour.
    """
    import matplotlib
    from matplotlib import ticker
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    styles = _styles(groups)
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(9.6, max(4.3, 1.2 + 0.22 * len(groups))), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for method, runs in groups.items():
            color, marker = styles[method]
            average = tables.estimate([rate(metric)(run) for run in runs])
            forgetting = rate(metric, summary="forgetting")
            lost = tables.estimate([forgetting(run) for run in runs])
            trainable = runs[0]["trainable_parameters"]
            size = tables.Estimate(trainable) if trainable else None
            for axes, place in ((left, lost), (right, size)):
                if place is None:
                    _bound(axes, average, color)
                elif average is not None:
                    axes.errorbar(
                        place.mean,
                        average.mean,
                        xerr=place.half_width,
                        yerr=average.half_width,
                        color=color,
                        marker=marker,
                        markersize=9,
                        linestyle="none",
                        elinewidth=1.4,
                        capsize=3,
                    )
        left.set_xlabel(f"forgetting of {metric} (points; further left is better)")
        left.set_ylabel(f"{metric} (%), average after the last task")
        right.set_xscale("log")
        right.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        right.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        right.xaxis.set_minor_formatter(ticker.NullFormatter())
        right.set_xlabel("trainable parameters (further left is better)")
        figure.suptitle(
            f"{metric} after the last task against what it costs\n{_what(groups, 'bars')}"
        )
        handles = []
        for method in groups:
            color, marker = styles[method]
            point = {"color": color, "marker": marker, "markersize": 8, "linestyle": "none"}
            handles.append(Line2D([], [], label=method, **point))
        figure.legend(handles=handles, loc="outside right center")
        _save(figure, path)


def _styles(groups: Groups) -> dict[str, tuple[str, str]]:
    """(colour, marker) of every method: colours go round within a family."""
    styles = dict(_STYLES)
    for number, name in enumerate(tables.FAMILIES):
        members = [m for m in groups if tables.family(m) == name and m not in _STYLES]
        for place, method in enumerate(members):
            styles[method] = _COLORS[(number + place) % len(_COLORS)], _MARKERS[name]
    return styles


def _tasks(groups: Groups) -> list[str]:
    return next(iter(groups.values()))[0]["tasks"]


def _matrix(method: str, runs: Sequence[Results], metric: str) -> list[list[float | None]]:
    matrix = tables.mean_matrix(runs, metric)
    if matrix is None:
        found = sorted({key.split("/")[1] if key.count("/") == 3 else key.split("/")[0]
                        for key in runs[0]["matrices"]})
        raise ResultsError(
            f"a run of {method} has no {metric} of pool own, index fresh, in both directions; "
            f"it has {', '.join(found) or 'none'}"
        )
    return matrix


def _what(groups: Groups, intervals: str | None = None) -> str:
    counts = sorted({len(runs) for runs in groups.values()})
    count = "–".join(str(count) for count in sorted({counts[0], counts[-1]}))
    seeds = "1 seed" if counts == [1] else f"{count} seeds"
    note = f"; {intervals}: 95 % intervals" if intervals and counts[-1] > 1 else ""
    first = next(iter(groups.values()))[0]
    of = ("mean of text-to-audio and audio-to-text" if layout_of(first) is RETRIEVAL
          else "among the classes seen")
    return f"{of}, {seeds}{note}"


def _bound(axes, value: tables.Estimate | None, color: str, label: str | None = None) -> None:
    if value is not None:
        dashes = (0, (5, 3))
        axes.axhline(value.mean, color=color, linestyle=dashes, linewidth=1.6, label=label)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _save(figure, path: str | os.PathLike) -> None:
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(beside, format="png", metadata={"Software": None})
    os.replace(beside, path)
