#!/usr/bin/env bash
# Trains on the GPUs of this machine, in one process: launch/local_gpu.sh [--dry_run] --config=FILE --workdir=FOLDER ...
#
# Settings, environment variables:
#   GPUS      which, as 0,1,2; all of them if unset
#   RETRIES   how often it starts again where it was, if it was killed or crashed (3)
# SIGTERM or Ctrl-C stops it with its state saved. Started again after anything, it goes on where it
# was.
cd "$(dirname "$0")/.." || exit
# shellcheck source=launch/common.sh
source launch/common.sh
need_training
if [[ -n "${GPUS:-}" ]]; then
  [[ "$GPUS" =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "GPUS is '$GPUS'; expected numbers of GPUs, as 0,1,2"
  export CUDA_VISIBLE_DEVICES="$GPUS"
fi
need_command nvidia-smi "a machine with an NVIDIA GPU and its driver"
run launch/install.sh cuda
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}"
go_on env ${GPUS:+"CUDA_VISIBLE_DEVICES=$GPUS"} JAX_PLATFORMS=cuda .venv/bin/python -m tail_jax.train "${arguments[@]}"
