#!/usr/bin/env bash
# Runs one experiment once, as the process of a container or of a cluster's job that is started again when it fails.
#
#   launch/job.sh [--dry-run] --config=configs/owt.py --workdir=gs://bucket/owt [FLAGS OF smdlm.main...]
#
# Exit status: 0 the run is finished; 75 it was stopped by a signal with everything saved, start the same command again;
# 2 a mistake in the command or its data, which no restart mends; else that of smdlm.main.
# DISTRIBUTED=1: one of several processes, where the cluster tells the rest (TPU slices). Where it does not:
#   COORDINATOR=HOST:PORT NUM_PROCESSES=N PROCESS_ID=0..N-1
# PYTHON: the interpreter, python by default.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"
workdir=$(workdir_of "${ARGS[@]}")
command=("${PYTHON:-python}" -m smdlm.main "${ARGS[@]}")
[[ -z ${DISTRIBUTED:-} || -n ${COORDINATOR:-} ]] || command+=(--distributed)
several
cd "$ROOT"
do_ "${command[@]}"
if [[ -z $DRY_RUN ]] && trains "${ARGS[@]}" && ! finished "$workdir"; then
  echo "stopped before the end, everything is saved: start the same command again" >&2
  exit 75
fi
