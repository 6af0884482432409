#!/usr/bin/env bash
# Trains on a TPU slice of Google Cloud, one process a host: creates it, installs, runs, collects the results.
#   NAME=tail ZONE=us-west4-a ACCELERATOR=v5litepod-16 VERSION=v2-alpha-tpuv5-lite SHARE=10.0.0.2:/tail \
#     launch/tpu_vm.sh [--dry_run] --config=FILE --workdir=FOLDER ...
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
#   DELETE       1: the TPU VM is deleted at the end; otherwise it stays, and costs
#   ATTEMPTS     how often it is created at most (10)
# A TPU VM that was taken away is created again, and the run goes on where it was; so does the same command later.
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
state() {
  if [[ -n "$dry_run" ]]; then
    echo none
  else # a TPU VM that does not exist is no error here
    gcloud compute tpus tpu-vm describe "$NAME" --format='value(state)' --zone="$ZONE" \
      ${PROJECT:+--project="$PROJECT"} 2>/dev/null || echo none
  fi
}

prepare() {
  on all "$setup && sudo mkdir -p $mount && (mountpoint -q $mount || sudo mount -t nfs $SHARE $mount)" &&
    tpu scp "$archive" "$NAME:tail_jax.tar.gz" --worker=0 &&
    on 0 "sudo mkdir -p $mount/code && sudo chown \"\$(id -u)\" $mount/code && tar -xzf tail_jax.tar.gz -C $mount/code && cd $mount/code && launch/install.sh tpu"
}
# A lock on each host: where the connection broke, the run may still be there, and this waits for its end.
train() {
  on all "cd $mount/code && TAIL_JAX_COORDINATOR=auto TF_CPP_MIN_LOG_LEVEL=3 flock \$HOME/tail_jax.lock .venv/bin/python -m tail_jax.train ${arguments[*]@Q}"
}
collect() {
  on 0 "tar -czf run.tar.gz --exclude=checkpoints -C $mount/code ${workdir@Q}" &&
    tpu scp "$NAME:run.tar.gz" "$archive" --worker=0 && run mkdir -p "$output" &&
    run tar -xzf "$archive" -C "$output" --strip-components="$(awk -F/ '{print NF}' <<<"${workdir%/}")"
}

if [[ -n "$dry_run" ]]; then
  archive="ARCHIVE.tar.gz"
else
  archive="$(mktemp --suffix=.tar.gz)"
  trap 'rm -f "$archive"' EXIT
fi

for ((attempt = 1; attempt <= ATTEMPTS; )); do
  run git archive --format=tar.gz --output="$archive" HEAD
  found="$(state)"
  case "$found" in
    READY) ;;
    none)
      tpu create "$NAME" --accelerator-type="$ACCELERATOR" --version="$VERSION" ${SPOT:+--spot} || {
        attempt=$((attempt + 1))
        echo "could not be created; tries again in a minute" >&2
        sleep 60
        continue
      }
      ;;
    PREEMPTED | TERMINATED | STOPPED)
      echo "$NAME is $found; created again" >&2
      tpu delete "$NAME" --quiet
      attempt=$((attempt + 1))
      continue
      ;;
    *) # on its way
      sleep 30
      continue
      ;;
  esac
  code=0
  { prepare && train; } || code=$?
  if ((code == 0)); then
    collect
    [[ "${DELETE:-}" != 1 ]] || tpu delete "$NAME" --quiet
    exit
  fi
  # 255: the connection broke, 143: a signal reached the run.
  [[ "$(state)" != READY || "$code" == 255 || "$code" == 143 ]] ||
    fail "exit code $code on $NAME, which is there still and costs; mend it and start again, or delete it"
  attempt=$((attempt + 1))
done
fail "$NAME: gave up after $ATTEMPTS attempts; the same command goes on"
