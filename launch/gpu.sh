#!/usr/bin/env bash
# Runs one experiment on the accelerators of this machine, again after a stop (SIGTERM), until it is finished.
#
#   launch/gpu.sh [--dry-run] --config=configs/owt.py --workdir=runs/owt [FLAGS OF smdlm.main...]
#
# Several machines without a scheduler: start it on each, with a workdir that all of them see, and
#   COORDINATOR=HOST:PORT NUM_PROCESSES=N PROCESS_ID=0..N-1
# PYTHON: the interpreter, python by default.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"
workdir=$(workdir_of "${ARGS[@]}")
command=("${PYTHON:-python}" -m smdlm.main "${ARGS[@]}")
if [[ -n ${COORDINATOR:-}${NUM_PROCESSES:-}${PROCESS_ID:-} ]]; then
  need COORDINATOR 'HOST:PORT of process 0'
  need NUM_PROCESSES 'the number of machines'
  need PROCESS_ID 'the number of this machine, from 0'
  command+=(--distributed "--coordinator=$COORDINATOR" "--num_processes=$NUM_PROCESSES" "--process_id=$PROCESS_ID")
fi
cd "$ROOT"
while :; do
  do_ "${command[@]}"
  # A run that was stopped by a signal has saved and ended with status 0, but there is no summary yet.
  if [[ -n $DRY_RUN || -e $workdir/summary.json ]] || ! trains "${ARGS[@]}"; then
    break
  fi
  echo "stopped before the end: starting the same command again" >&2
done
