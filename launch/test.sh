#!/usr/bin/env bash
# Installs what the tests need, then runs them: launch/test.sh [--slow] [PYTEST ARGUMENTS]
# --slow runs the long checks instead of the others.
set -euo pipefail
cd "$(dirname "$0")/.."
launch/install.sh test
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}"
if [[ "${1:-}" == --slow ]]; then
  shift
  export XLA_FLAGS="${XLA_FLAGS:-}"  # not the quicker compilation of the others
  exec .venv/bin/python -m pytest -q -m slow "$@"
fi
# Files at a time: one a core, four at most (each takes up to 3 GB). Most of a test is compilation,
# which keeps one core busy.
exec .venv/bin/python -m pytest -q -m "not slow" -n auto --maxprocesses=4 --dist=loadgroup "$@"
