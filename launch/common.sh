#!/usr/bin/env bash
# What the launch scripts for training share; sourced, not run. Their settings are environment variables, their
# arguments are --dry_run (first) and what tail_jax.train takes.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }

# need NAME WHAT: the setting NAME is there, or the script ends.
need() { [[ -n "${!1:-}" ]] || fail "$1 is not set; expected $2 (settings are named at the top of ${0##*/})"; }

# need_number NAME WHAT: it is there, and a whole number of at least 1.
need_number() {
  need "$1" "$2"
  [[ "${!1}" =~ ^[1-9][0-9]*$ ]] || fail "$1 is '${!1}'; expected $2, a whole number of at least 1"
}

# need_command NAME WHERE: the program is here; a dry run does without.
need_command() { [[ -n "$dry_run" ]] || command -v "$1" >/dev/null || fail "$1: no such command; expected $2"; }

# run WORDS: runs them, or with --dry_run prints them as a shell takes them.
run() {
  if [[ -n "$dry_run" ]]; then printf '%s\n' "${*@Q}"; else "$@"; fi
}

dry_run=""
if [[ "${1:-}" == --dry_run ]]; then
  dry_run=yes
  shift
fi
arguments=("$@")

# need_training: the arguments name a configuration and a folder; `workdir` is that folder.
need_training() {
  local word config=""
  workdir=""
  for word in "${arguments[@]}"; do
    case "$word" in
      --config=?*) config=yes ;;
      --workdir=?*) workdir="${word#--workdir=}" ;;
      --dry_run) fail "--dry_run has to come first" ;;
    esac
  done
  [[ -n "$config" ]] || fail "--config=FILE is missing; expected the arguments of tail_jax.train"
  [[ -n "$workdir" ]] || fail "--workdir=FOLDER is missing; expected the arguments of tail_jax.train"
}

# go_on COMMAND: runs it, and again where it was killed or crashed (no exit code of its own), RETRIES times at most
# (3). A run that is started again goes on where it was. A signal for the script is one for the
# command, which is waited for; in a session of its own Ctrl-C does not reach it as well: a second
# signal ends a run unsaved.
go_on() {
  local left="${RETRIES:-3}" code pid stopped=""
  if [[ -n "$dry_run" ]]; then
    run "$@"
    return
  fi
  while true; do
    setsid "$@" &
    pid=$!
    trap 'stopped=yes; kill -TERM "$pid" 2>/dev/null || true' TERM INT HUP
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done # a signal ends a wait
    code=0
    wait "$pid" || code=$?
    # 2: a setting; 3: diverged; 4: other hosts; 143: a signal for us, the state is saved.
    if [[ -n "$stopped" ]] || ((code < 128 || code == 143 || code == 130 || left == 0)); then
      return "$code"
    fi
    left=$((left - 1))
    echo "exit code $code; goes on where it was ($left retries left)" >&2
  done
}
