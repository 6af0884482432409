#!/usr/bin/env bash
# Runs a command in several processes on this machine, each with simulated devices, joined as hosts are:
#   PROCESSES=2 DEVICES=4 launch/multiprocess_cpu.sh [--dry_run] --config=FILE --workdir=FOLDER ...
#
# Settings, environment variables:
#   PROCESSES        how many
#   DEVICES          simulated devices of each
#   MODULE           what runs (tail_jax.train); tail_jax.evaluate, say, with its own arguments
#   PORT             of the first process; a free one if unset
#   TAIL_JAX_PYTHON  an interpreter that has the project; if unset, .venv is made and taken
# SIGTERM or Ctrl-C stops all processes with their state saved; the same command, or one with other
# numbers, goes on. If one ends with an error, the others are stopped.
cd "$(dirname "$0")/.." || exit
# shellcheck source=launch/common.sh
source launch/common.sh
need_number PROCESSES "the number of processes"
need_number DEVICES "the number of simulated devices of each process"
module="${MODULE:-tail_jax.train}"
[[ "$module" != tail_jax.train ]] || need_training
[[ -z "${PORT:-}" ]] || need_number PORT "a port number"
python="${TAIL_JAX_PYTHON:-.venv/bin/python}"
[[ -n "${TAIL_JAX_PYTHON:-}" ]] || run launch/install.sh
port="${PORT:-}"
if [[ -z "$port" ]]; then
  if [[ -n "$dry_run" ]]; then
    port="FREE_PORT"
  else
    port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
  fi
fi
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}"
flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES"

pids=()
# shellcheck disable=SC2317,SC2329  # called by the traps
stop() { ((${#pids[@]} == 0)) || kill -TERM "${pids[@]}" 2>/dev/null || true; }
trap stop TERM INT HUP
for ((number = 0; number < PROCESSES; number++)); do
  words=(env JAX_PLATFORMS=cpu "XLA_FLAGS=$flags" "TAIL_JAX_COORDINATOR=127.0.0.1:$port"
    "TAIL_JAX_PROCESSES=$PROCESSES" "TAIL_JAX_PROCESS=$number"
    "$python" -m "$module" "${arguments[@]}")
  if [[ -n "$dry_run" ]]; then
    run "${words[@]}"
  else
    # In a session of its own Ctrl-C does not reach it: after `stop` it would be the second signal,
    # which ends a run unsaved.
    setsid "${words[@]}" &
    pids+=("$!")
  fi
done

status=0
while ((${#pids[@]})); do
  alive=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      alive+=("$pid")
      continue
    fi
    code=0
    wait "$pid" || code=$?
    ((status)) || status=$code
  done
  pids=("${alive[@]}")
  ((${#pids[@]})) || break
  # Without one of them the others wait for it; after a signal (143) all end by themselves.
  if ((status != 0 && status != 143)); then
    sleep 5 || true
    kill -KILL "${pids[@]}" 2>/dev/null || true
  fi
  sleep 0.3 || true # which Ctrl-C ends, too
done
exit "$status"
