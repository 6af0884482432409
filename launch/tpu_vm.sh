#!/usr/bin/env bash
# Trains on a TPU slice of Google Cloud, one process a host: creates it, installs, runs, collects the results.
#   NAME=tail ZONE=us-west4-a ACCELERATOR=v5litepod-16 VERSION=v2-alpha-tpuv5-lite SHARE=10.0.0.2:/tail \
#     launch/tpu_vm.sh [--dry_run] --config=FILE --workdir=FOLDER ...
# Its hosts mount SHARE as /mnt/tail_jax; the code goes to /mnt/tail_jax/code, runs below it. Corpora
# and checkpoint have to be on SHARE before, for --config.data.root=/mnt/tail_jax/corpora, say.
#
# Settings, environment variables:
#   NAME         of the TPU VM
#   ZONE         where it is
#   ACCELERATOR  its type
#   VERSION      of its software
#   SHARE        an NFS share (HOST:/FOLDER, of Filestore, say) that its hosts can mount. Code, runs and data.cache_dir
#                lie there: what is on the disks of the hosts ends with them
#   SPOT         1: one that may be taken away at any time, and costs less
#   PROJECT      of Google Cloud; that of gcloud if unset
#   SETUP        what each host needs first, a shell command; packages for NFS and Python 3.11 if unset
#   OUTPUT       folder here that gets the run but for its checkpoints (--workdir, which is relative)
#   DELETE       1: the TPU VM is deleted when its results are here; otherwise it stays, and costs
#   ATTEMPTS     how often it is created, or goes on where it is there, at most (10)
# A TPU VM that was taken away is created again, and the run goes on where it was; so does the same command later.
# Ctrl-C here, as a broken connection, leaves the run going there; the same command goes back to it.
# What runs is the last commit (git archive HEAD).
cd "$(dirname "$0")/.." || exit
# shellcheck source=launch/common.sh
source launch/common.sh
need NAME "a name for the TPU VM"
need ZONE "a zone, as us-west4-a"
need ACCELERATOR "a type of TPU, as v5litepod-16"
need VERSION "its software version, as v2-alpha-tpuv5-lite"
need SHARE "an NFS share, as 10.0.0.2:/tail"
[[ "$SHARE" == ?*:/* ]] || fail "SHARE is '$SHARE'; expected HOST:/FOLDER"
ATTEMPTS="${ATTEMPTS:-10}"
need_number ATTEMPTS "how often the TPU VM is created at most"
need_training
[[ "$workdir" != /* ]] || fail "--workdir is '$workdir'; expected a folder below the repository, as runs/tail"
need_command gcloud "the Google Cloud command line"
output="${OUTPUT:-$workdir}"
setup="${SETUP:-sudo apt-get update -q && sudo apt-get install -y -q nfs-common python3.11 python3.11-venv}"
mount=/mnt/tail_jax

tpu() { # tpu VERB WORDS: gcloud on our TPU VM's zone
  local verb="$1"
  shift
  run gcloud compute tpus tpu-vm "$verb" "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}
}
on() { tpu ssh "$NAME" --worker="$1" --command="$2"; } # on WORKER COMMAND
state() { # what the TPU VM is; none: there is no such TPU VM
  if [[ -n "$dry_run" ]]; then
    echo none
  elif ! tpu describe "$NAME" --format='value(state)' 2>"$scratch/error"; then
    [[ "$(<"$scratch/error")" == *NOT_FOUND* ]] || fail "$(<"$scratch/error")"
    echo none
  fi
}
look() { # sets `found`, once the TPU VM is not on its way from one state to another
  for _ in {1..30}; do
    found="$(state)"
    case "$found" in READY | none | PREEMPTED | TERMINATED | STOPPED) return ;; esac
    echo "$NAME is $found; looks again in a minute" >&2
    sleep 60
  done
  fail "$NAME is $found, for half an hour"
}

prepare() {
  on all "$setup && sudo mkdir -p $mount && (mountpoint -q $mount || sudo mount -t nfs $SHARE $mount)" &&
    tpu scp "$archive" "$NAME:tail_jax.tar.gz" --worker=0 &&
    on 0 "sudo mkdir -p $mount/code && sudo chown \"\$(id -u)\" $mount/code && tar -xzf tail_jax.tar.gz -C $mount/code && cd $mount/code && launch/install.sh tpu"
}
# Where a connection breaks, the run goes on, and gcloud gives that host the same command again: it
# waits for the run's end (the lock) and takes its exit code, as alone it could not run. Output goes
# to a file, which is followed: written to a connection that is gone, it would end the run.
train() {
  local log="\$HOME/tail_jax.log" code command
  code="\$HOME/tail_jax.$(date +%s)" # of this attempt
  command="JAX_PLATFORMS=tpu TAIL_JAX_COORDINATOR=auto TF_CPP_MIN_LOG_LEVEL=3"
  command+=" .venv/bin/python -m tail_jax.train ${arguments[*]@Q}"
  command="[ -f $code ] || { $command; echo \$? >$code; }; exit \$(cat $code)"
  command="{ flock 9; $command; } 9>\$HOME/tail_jax.lock >>$log </dev/null 2>&1 &"
  on all "cd $mount/code && touch $log && { $command tail -f --pid=\$! $log; wait \$!; }"
}
collect() {
  on 0 "tar -czf run.tar.gz --exclude=checkpoints -C $mount/code ${workdir@Q}" &&
    tpu scp "$NAME:run.tar.gz" "$archive" --worker=0 && run mkdir -p "$output" &&
    run tar -xzf "$archive" -C "$output" --strip-components="$(awk -F/ '{print NF}' <<<"${workdir%/}")"
}

if [[ -n "$dry_run" ]]; then
  archive="ARCHIVE.tar.gz"
else
  scratch="$(mktemp -d)"
  archive="$scratch/archive.tar.gz"
  trap '(($? == 0)) || echo "$NAME, if it exists, stays and costs; the same command goes on" >&2
    rm -r "$scratch"' EXIT
fi

run git archive --format=tar.gz --output="$archive" HEAD
for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
  look
  if [[ "$found" != READY ]]; then
    [[ "$found" == none ]] || {
      echo "$NAME is $found; created again" >&2
      tpu delete "$NAME" --quiet
    }
    tpu create "$NAME" --accelerator-type="$ACCELERATOR" --version="$VERSION" ${SPOT:+--spot} || {
      echo "could not be created; tries again in a minute" >&2
      sleep 60
      continue
    }
  fi
  code=0
  { prepare && train; } || code=$?
  if ((code == 0)); then
    collect || { sleep 60 && collect; } || { sleep 60 && collect; } ||
      fail "the results could not be collected; they are on $SHARE, in code/$workdir"
    [[ "${DELETE:-}" != 1 ]] || tpu delete "$NAME" --quiet
    exit
  fi
  found="$(state)"
  case "$found $code" in
    # A setting, a run that diverged, a command that cannot be run, or is not there.
    "READY 2" | "READY 3" | "READY 126" | "READY 127") fail "exit code $code on $NAME" ;;
  esac
  echo "exit code $code, and $NAME is $found; goes on in a minute" >&2
  sleep 60
done
fail "gave up after $ATTEMPTS attempts"
