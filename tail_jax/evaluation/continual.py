"""Summaries of a result matrix.

A matrix A has a row for m = 0..M, the number of tasks trained on, and a column for each of the M
tasks; None stands for "not measured". The formulas count tasks from 1 as the papers do, so task j
is column j - 1 of a row here and was just learned in row j. A summary whose values are not all
measured is None.

Forgetting has several definitions; ours is Chaudhry et al. (ECCV 2018): the best value before the
last step minus the last, which is negative where the last step helped.
"""

from collections.abc import Mapping, Sequence

Matrix = Sequence[Sequence[float | None]]

SMALLER_IS_BETTER = ("MedR", "ties")


def average_after_last(matrix: Matrix) -> float | None:
    """1/M sum_j A[M][j], the headline."""
    return _mean(matrix[_num_tasks(matrix)])


def incremental_average(matrix: Matrix) -> float | None:
    """1/M sum_m 1/m sum_{j<=m} A[m][j]."""
    num_tasks = _num_tasks(matrix)
    return _mean([seen_average(matrix, m) for m in range(1, num_tasks + 1)])


def seen_average(matrix: Matrix, m: int) -> float | None:
    """1/m sum_{j<=m} A[m][j], over the tasks trained on so far."""
    return _mean(matrix[m][:m])


def forgetting(matrix: Matrix) -> float | None:
    """1/(M-1) sum_{j<M} (max_{j<=l<=M-1} A[l][j] - A[M][j]); may be negative."""
    num_tasks = _num_tasks(matrix)
    drops = []
    for j in range(1, num_tasks):
        before = [matrix[row][j - 1] for row in range(j, num_tasks)]
        best = None if None in before else max(before)
        drops.append(_difference(best, matrix[num_tasks][j - 1]))
    return _mean(drops)


def backward_transfer(matrix: Matrix) -> float | None:
    """1/(M-1) sum_{j<M} (A[M][j] - A[j][j])."""
    num_tasks = _num_tasks(matrix)
    return _mean(
        [_difference(matrix[num_tasks][j - 1], matrix[j][j - 1]) for j in range(1, num_tasks)]
    )


def forward_transfer(matrix: Matrix) -> float | None:
    """1/(M-1) sum_{j>=2} (A[j-1][j] - A[0][j])."""
    num_tasks = _num_tasks(matrix)
    return _mean(
        [_difference(matrix[j - 1][j - 1], matrix[0][j - 1]) for j in range(2, num_tasks + 1)]
    )


def zero_shot(matrix: Matrix) -> list[float | None]:
    """A[0][j] for every task j; means something for jointly pretrained towers only."""
    _num_tasks(matrix)
    return list(matrix[0])


def summarize(matrices: Mapping[str, Matrix]) -> dict[str, dict[str, float | None]]:
    """All summaries of all matrices, as `results.json` holds them.

    Args:
      matrices: by key, direction/metric/pool/index; classification streams have accuracy/seen.

    Returns:
      For each key "average", "incremental_average", "forgetting", "backward_transfer" and
      "forward_transfer". None where not defined: where a value is missing (joint training has the
      last row only; one task forgets nothing); forgetting and backward transfer of the retrieval
      pool `seen`, whose growth would look like forgetting; and all but the average where smaller is
      better (MedR).
    """
    result = {}
    for key, matrix in matrices.items():
        names = key.split("/")
        metric, pool = (names[1], names[2]) if len(names) == 4 else (names[0], None)
        compares_rows = metric not in SMALLER_IS_BETTER
        pool_is_fixed = compares_rows and pool != "seen"
        result[key] = {
            "average": average_after_last(matrix),
            "incremental_average": incremental_average(matrix) if compares_rows else None,
            "forgetting": forgetting(matrix) if pool_is_fixed else None,
            "backward_transfer": backward_transfer(matrix) if pool_is_fixed else None,
            "forward_transfer": forward_transfer(matrix) if compares_rows else None,
        }
    return result


def _num_tasks(matrix: Matrix) -> int:
    num_tasks = len(matrix) - 1
    widths = sorted({len(row) for row in matrix})
    if num_tasks < 1 or widths != [num_tasks]:
        raise ValueError(
            f"a result matrix of {len(matrix)} rows has rows of {widths} values; expected M + 1 "
            "rows of M values, None where not measured"
        )
    return num_tasks


def _mean(values: Sequence[float | None]) -> float | None:
    if not values or None in values:
        return None
    return sum(values) / len(values)


def _difference(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right
