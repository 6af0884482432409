#!/usr/bin/env bash
# The whole comparison in miniature: pretrains a backbone on embedded sound scenes, runs five methods
# over four corpora, writes runs/quickstart/<method>/results.json and runs/quickstart/report/.
# Started again, it goes on where it was; finished methods are not run twice.
set -euo pipefail
cd "$(dirname "$0")/.."
launch/install.sh
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}"

start=$SECONDS
for method in frozen sequential prompts ptat joint; do
  echo "== $method" >&2
  .venv/bin/python -m tail_jax.train --config="configs/quickstart.py:method=$method,seed=0" \
    --workdir="runs/quickstart/$method" "$@"
done
.venv/bin/python -m tail_jax.compare --runs='runs/quickstart/*' --output=runs/quickstart/report
echo "finished in $((SECONDS - start)) s after installation" >&2
