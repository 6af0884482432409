#!/usr/bin/env bash
# Makes .venv (once) and installs the project with the extras given: launch/install.sh [EXTRA,EXTRA]
# PYTHON names the interpreter; without it the first of python3, 3.13, 3.12, 3.11 that fits is taken.
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:-}"
candidates="${PYTHON:-python3 python3.13 python3.12 python3.11}"

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; }
if [[ ! -x .venv/bin/python ]]; then
  for python in $candidates; do
    fits "$python" && break
    python=""
  done
  if [[ -z "$python" ]]; then
    echo "error: found no Python 3.11 to 3.13 (tried $candidates); install one, or set PYTHON" >&2
    exit 1
  fi
  echo "making .venv with $("$python" --version)" >&2
  "$python" -m venv .venv || { rm -rf .venv; exit 1; }
fi

# Installed already with these extras, and setup.cfg has not changed since: nothing to do.
stamp=".venv/installed-${extras:-base}"
if ! cmp -s setup.cfg "$stamp"; then
  echo "installing tail_jax${extras:+ with extras $extras} (a few minutes the first time)" >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
  cp setup.cfg "$stamp"
fi
