#!/usr/bin/env bash
# Runs one experiment on the accelerators of this machine, again after a stop (SIGTERM), until it is finished.
#
#   launch/gpu.sh [--dry-run] --config=configs/owt.py --workdir=runs/owt [FLAGS OF smdlm.main...]
#
# Several machines without a scheduler: start it on each, with a workdir that all of them see (or gs://..), and
#   COORDINATOR=HOST:PORT NUM_PROCESSES=N PROCESS_ID=0..N-1
# PYTHON: the interpreter, python by default.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"
workdir=$(workdir_of "${ARGS[@]}")
command=("${PYTHON:-python}" -m smdlm.main "${ARGS[@]}")
several
cd "$ROOT"
while :; do
  do_ "${command[@]}"
  # A run that was stopped by a signal has saved and ended with status 0, but there is no summary yet.
  if [[ -n $DRY_RUN ]] || ! trains "${ARGS[@]}" || finished "$workdir"; then
    break
  fi
  echo "stopped before the end: starting the same command again" >&2
done
