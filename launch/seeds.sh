#!/usr/bin/env bash
# The quickstart's comparison over several seeds: launch/seeds.sh CONFIG DIR SEED [SEED ...]
# for example launch/seeds.sh configs/quickstart.py runs/seeds 0 1 2; CONFIG and DIR are taken from
# the root of the project, as in every script here.
set -euo pipefail
if (( $# < 3 )); then
  echo "error: expected CONFIG DIR SEED [SEED ...], found '$*'" >&2
  exit 2
fi
config=$1 directory=$2
shift 2
cd "$(dirname "$0")/.."
launch/install.sh
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}"
for seed in "$@"; do
  for method in frozen sequential prompts ptat joint; do
    .venv/bin/python -m tail_jax.train --config="$config:method=$method,seed=$seed" \
      --workdir="$directory/$method-$seed"
  done
done
.venv/bin/python -m tail_jax.compare --runs="$directory/*" --output="$directory/report"
