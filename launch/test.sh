#!/usr/bin/env bash
# Installs what the tests need, then runs them: launch/test.sh [--slow] [PYTEST ARGUMENTS]
# --slow runs the long checks instead of the others.
set -euo pipefail
cd "$(dirname "$0")/.."
launch/install.sh test
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}"
marker="not slow"
if [[ "${1:-}" == --slow ]]; then
  marker="slow"
  shift
fi
exec .venv/bin/python -m pytest -q -m "$marker" "$@"
