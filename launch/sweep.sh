#!/usr/bin/env bash
# The learning-rate sweep behind configs/quickstart.py: launch/sweep.sh DIR
# Three rates a method, on validation sets, at a seed (100) that no reported result uses. Prints the
# mean R@1 (%) on the first two tasks after the second, and on all four after the last, which the
# choice is made by (the other would favour whatever learns fastest and forgets). DIR is taken from
# the root of the project.
set -euo pipefail
directory="${1:?error: expected a folder for the runs}"
cd "$(dirname "$0")/.."
launch/install.sh
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}"

try() {  # METHOD RATE
  .venv/bin/python -m tail_jax.train --config="configs/quickstart.py:method=$1,seed=100" \
    --workdir="$directory/$1-$2" --config.method.learning_rate="$2" --config.eval.split=valid \
    >/dev/null
  .venv/bin/python - "$directory/$1-$2" "$1" "$2" <<'PYTHON'
import sys
from tail_jax.reporting import tables, writers
matrix = tables.mean_matrix([writers.read_results(sys.argv[1])], "R@1")
mean = lambda row: "    –" if None in row else f"{100 * sum(row) / len(row):5.1f}"
print(f"{sys.argv[2]:<12}{sys.argv[3]:<8}first two {mean(matrix[2][:2])}   all {mean(matrix[-1])}")
PYTHON
}
for rate in 2e-4 5e-4 1e-3; do try sequential $rate; done
for rate in 5e-4 1e-3 2e-3; do try joint $rate; done
for rate in 5e-3 1e-2 2e-2; do try prompts $rate; try ptat $rate; done
