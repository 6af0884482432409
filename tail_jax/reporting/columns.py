"""Columns of the tables, for streams of audio-text corpora and for class-incremental ones."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any

DIRECTIONS = ("text_to_audio", "audio_to_text")
# The metric of class-incremental streams: of clips, so without directions, among classes seen.
ACCURACY = "accuracy"
# What others are compared with, at the same seed and so on the same backbone.
REFERENCE = "sequential"
Results = Mapping[str, Any]  # what results.json holds


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
      title: with the unit.
      value: of one run; None where it has none.
      decimals: shown.
      interval: False for what is a fact of a setting and not of a seed.
      against: makes the cell of the value and that of REFERENCE at the same seed, seed by seed.
      optional: the column is not shown where no run has a value.
    """

    title: str
    value: Callable[[Results], float | None]
    decimals: int = 1
    interval: bool = True
    against: Callable[[float, float], float | None] | None = None
    optional: bool = False


def keys(
    metric: str, pool: str = "own/fresh", directions: Sequence[str] = DIRECTIONS
) -> list[str]:
    """The matrices that a metric is averaged over: of both directions, or the one of accuracy."""
    if metric == ACCURACY:
        return [f"{ACCURACY}/seen"]
    return [f"{direction}/{metric}/{pool}" for direction in directions]


def rate(
    metric: str,
    pool: str = "own/fresh",
    summary: str = "average",
    directions: Sequence[str] = DIRECTIONS,
) -> Callable[[Results], float | None]:
    """A summary of one run in percent, averaged over directions; None if it lacks one of them."""
    wanted = keys(metric, pool, directions)

    def value(results: Results) -> float | None:
        values = [results["summary"].get(key, {}).get(summary) for key in wanted]
        return None if None in values else 100 * sum(values) / len(values)

    return value


def _share(results: Results) -> float | None:
    total = results["total_parameters"]
    return 100 * results["trainable_parameters"] / total if total else None


def _minutes(results: Results) -> float | None:
    """The entry "total" of wall_seconds; None where a run did not record it."""
    seconds = results.get("wall_seconds") or {}
    return seconds["total"] / 60 if "total" in seconds else None


def _training_minutes(results: Results) -> float | None:
    """Minutes of all tasks' steps and hooks; None where a run did not record its steps."""
    seconds = results.get("wall_seconds") or {}
    if "train" not in seconds:
        return None
    return math.fsum([*seconds["train"].values(), *seconds.get("hooks", {}).values()]) / 60


def _gibibytes(results: Results) -> float | None:
    peak = results.get("peak_memory_bytes")
    return peak / 2**30 if peak else None


def _kept(results: Results) -> float | None:
    """Bytes kept of earlier tasks' data; None for nothing, or where a run did not record it."""
    found = results.get("memory_bytes")
    return found / 2**20 if found else None


def _state(results: Results) -> float | None:
    """Bytes carried on after the last task; None where a run did not record them by task."""
    found = results.get("state_bytes")
    return list(found.values())[-1] / 2**20 if found else None


def _difference(value: float, reference: float) -> float:
    return value - reference


def _ratio(value: float, reference: float) -> float | None:
    return value / reference if reference else None


def _pooled(summary: str) -> Callable[[Results], float | None]:
    """A summary of the pooled accuracy in percent."""

    def value(results: Results) -> float | None:
        found = results["summary"].get(f"{ACCURACY}/pooled", {}).get(summary)
        return None if found is None else 100 * found

    return value


def _first_minus_last(results: Results) -> float | None:
    found = rate(ACCURACY, summary="backward_transfer")(results)
    return None if found is None else -found


@dataclasses.dataclass(frozen=True)
class Layout:
    """The table of one kind of stream.

    Attributes:
      metric: what matrices and curves show unless another is asked for.
      columns: all of them.
      headline: titles of those that a README has room for.
      legend: everything a reader needs to know what a column is.
    """

    metric: str
    columns: tuple[Column, ...]
    headline: tuple[str, ...]
    legend: str


_SIZE = (
    Column("trainable parameters", lambda run: run["trainable_parameters"], 0, interval=False),
    Column("trainable %", _share, 2, interval=False),
)
_COSTS = (
    Column("training min", _training_minutes),
    Column(f"time / {REFERENCE}", _training_minutes, 2, against=_ratio),
    Column("wall time min", _minutes),
    Column("peak memory GiB", _gibibytes, 2),
    Column(f"memory / {REFERENCE}", _gibibytes, 2, against=_ratio),
    Column("data kept MiB", _kept, 2, interval=False, optional=True),
    Column("state MiB", _state, 2, interval=False, optional=True),
)
_COSTS_LEGEND = f"""\
- **time, memory / {REFERENCE}**: ratio seed by seed of the seconds of training (compilation, and
  what a method computes of a task's data before and after its steps, included) and of the peak
  memory of the run. They mean something where runs had the machine for themselves.
- **data kept**: of earlier tasks; **state**: all that a method carries on after the last task, its
  trainable tree, teachers and kept data, without the backbone.
- **±**: half the width of the 95 % t-interval over seeds; absent for a single seed.
- **–**: not defined for the method, or not measured.
"""

_RETRIEVAL_COLUMNS = (
    *_SIZE,
    Column("R@1 T→A", rate("R@1", directions=DIRECTIONS[:1])),
    Column("R@1 A→T", rate("R@1", directions=DIRECTIONS[1:])),
    Column("R@1", rate("R@1")),
    Column("R@5", rate("R@5")),
    Column("R@10", rate("R@10")),
    Column("mAP@10", rate("mAP@10")),
    Column("R@1 incremental", rate("R@1", summary="incremental_average")),
    Column("R@1 union", rate("R@1", "all/fresh")),
    Column("R@1 stale", rate("R@1", "own/stale")),
    Column("forgetting", rate("R@1", summary="forgetting")),
    Column("BWT", rate("R@1", summary="backward_transfer")),
    Column("FWT", rate("R@1", summary="forward_transfer")),
    Column(f"R@1 − {REFERENCE}", rate("R@1"), against=_difference),
    *_COSTS,
)
_RETRIEVAL_HEADLINE = (
    "trainable %",
    "R@1",
    "R@10",
    "mAP@10",
    "forgetting",
    f"R@1 − {REFERENCE}",
    "R@1 union",
    f"time / {REFERENCE}",
    f"memory / {REFERENCE}",
)
_RETRIEVAL_LEGEND = f"""\
Rates are percent. Each is the average over all tasks after the last one, on the test set of each
task alone (pool *own*), with galleries embedded by the final model (*fresh*); where no direction is
named, it is the mean of text-to-audio (T→A) and audio-to-text (A→T). Items with equal scores are
ranked against the query.

- **R@1 incremental**: mean over steps of the average over the tasks trained on so far.
- **R@1 union**: the gallery holds the test sets of all tasks.
- **R@1 stale**: the gallery of a task keeps the embeddings made when that task ended.
- **forgetting** (R@1): best value of a task from its own step to the last but one, minus the value
  after the last step, averaged over all tasks but the last; negative if the last step helped. Lower
  is better.
- **BWT** (R@1): value after the last step minus the value just after learning the task.
- **FWT** (R@1): value just before learning the task minus the value before the first.
- **R@1 − {REFERENCE}**: difference to `{REFERENCE}` seed by seed, which is on the same backbone,
  with the interval of these differences: narrower than the intervals of the two.
{_COSTS_LEGEND}"""

_CLASS_COLUMNS = (
    *_SIZE,
    Column("accuracy", _pooled("average")),
    Column("session mean", rate(ACCURACY)),
    Column("incremental", _pooled("incremental_average")),
    Column("forgetting", rate(ACCURACY, summary="forgetting")),
    Column("first − last", _first_minus_last),
    Column(f"accuracy − {REFERENCE}", _pooled("average"), against=_difference),
    *_COSTS,
)
_CLASS_HEADLINE = (
    "trainable %",
    "accuracy",
    "session mean",
    "incremental",
    "forgetting",
    f"accuracy − {REFERENCE}",
    f"time / {REFERENCE}",
    "data kept MiB",
)
_CLASS_LEGEND = f"""\
Accuracies are percent, on test clips, among all classes seen so far, with no task given.

- **accuracy**: of the test clips of all sessions together after the last one; **session mean**: the
  mean of the sessions' own accuracies then.
- **incremental**: mean over sessions of the accuracy on all clips seen so far after each.
- **forgetting**: best accuracy of a session from its own to the last but one, minus that after the
  last, averaged over all sessions but the last. Lower is better.
- **first − last**: accuracy of a session just after learning it, minus that after the last session.
- **accuracy − {REFERENCE}**: difference to `{REFERENCE}` seed by seed, with its own interval.
{_COSTS_LEGEND}"""

RETRIEVAL = Layout("R@1", _RETRIEVAL_COLUMNS, _RETRIEVAL_HEADLINE, _RETRIEVAL_LEGEND)
CLASSES = Layout(ACCURACY, _CLASS_COLUMNS, _CLASS_HEADLINE, _CLASS_LEGEND)


def layout_of(results: Results) -> Layout:
    """The table that a run belongs into."""
    return CLASSES if f"{ACCURACY}/seen" in results["matrices"] else RETRIEVAL
