#!/usr/bin/env bash
# Runs one experiment on a TPU pod slice: creates it, installs this commit, runs on all workers, and when the slice is
# preempted creates it anew and runs the same command again, which continues from the last checkpoint.
#
#   TPU_NAME=smdlm TPU_ZONE=... TPU_TYPE=v5litepod-16 TPU_VERSION=v2-alpha-tpuv5-lite \
#     launch/tpu_pod.sh [--dry-run] --config=configs/owt.py --workdir=gs://bucket/owt \
#     --config.data.source=prepared:gs://bucket/data/owt [FLAGS OF smdlm.main...]
#   launch/tpu_pod.sh down      deletes the slice
#
# TPU_NAME, TPU_ZONE, TPU_TYPE (accelerator type), TPU_VERSION (runtime image): of `gcloud compute tpus tpu-vm create`.
# MOUNT: for a workdir that is no bucket: a line of shell, run on every worker after the installation, that makes its
#   folder (and that of the data) appear on all of them, e.g. 'sudo mkdir -p /mnt/shared && sudo mount ADDRESS:/share
#   /mnt/shared'. Renaming a folder must be atomic there, checkpoints rely on it: NFS.
# TPU_PROJECT (gcloud's default), SPOT=1 (cheap, can be preempted), KEEP=1 (do not delete the slice at the end),
# RETRIES (3): failures of the command on a healthy slice before giving up; POLL (60): seconds between looks.
# Keep this script running (tmux, a small VM): it is what watches the slice.

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"
need TPU_NAME 'a name for the slice'
need TPU_ZONE 'a zone that has this type'
tpu=(gcloud compute tpus tpu-vm)
where=("--zone=$TPU_ZONE")
[[ -z ${TPU_PROJECT:-} ]] || where+=("--project=$TPU_PROJECT")

down() {
  do_ "${tpu[@]}" delete "$TPU_NAME" "${where[@]}" --quiet
}

if [[ ${ARGS[0]:-} == down ]]; then
  down
  exit
fi

need TPU_TYPE 'an accelerator type, e.g. v5litepod-16'
need TPU_VERSION 'a runtime image, e.g. v2-alpha-tpuv5-lite'
workdir=$(workdir_of "${ARGS[@]}")
if [[ $workdir == gs://* ]]; then
  summary="cd smdlm && ../venv/bin/python -m smdlm.tools.finished $(printf '%q' "$workdir")"
else
  need MOUNT 'a line of shell that mounts the folder that all workers share, or a --workdir in gs://'
  [[ $workdir == /* ]] || fail "--workdir: got $workdir, wanted gs://BUCKET/.. or an absolute path that all workers share"
  summary="test -e $(printf '%q' "$workdir")/summary.json"
fi

# on WORKER COMMAND: runs a line of shell on one worker or on 'all'.
on() {
  do_ "${tpu[@]}" ssh "$TPU_NAME" "${where[@]}" "--worker=$1" "--command=$2"
}

state() {
  if [[ -n $DRY_RUN ]]; then
    do_ "${tpu[@]}" describe "$TPU_NAME" "${where[@]}" '--format=value(state)'
    echo "$1"
  else
    local found
    found=$("${tpu[@]}" describe "$TPU_NAME" "${where[@]}" '--format=value(state)' 2>/dev/null) || found=NONE
    echo "${found:-NONE}"
  fi
}

pause() {
  [[ -n $DRY_RUN ]] || sleep "${POLL:-60}"
}

create() {
  local options=("--accelerator-type=$TPU_TYPE" "--version=$TPU_VERSION")
  [[ -z ${SPOT:-} ]] || options+=(--spot)
  do_ "${tpu[@]}" create "$TPU_NAME" "${where[@]}" "${options[@]}"
}

install() {
  local archive
  archive=$(mktemp -u --suffix=.tar.gz)
  do_ git -C "$ROOT" archive --format=tar.gz "--output=$archive" HEAD &&
    do_ "${tpu[@]}" scp "$archive" "$TPU_NAME:smdlm.tar.gz" "${where[@]}" --worker=all &&
    do_ rm -f "$archive" &&
    on all "set -e
      sudo apt-get update -q && sudo apt-get install -yq python3.11 python3.11-venv
      mkdir -p smdlm && tar -xzf smdlm.tar.gz -C smdlm
      python3.11 -m venv venv && venv/bin/pip install -q -e 'smdlm[tpu,gcs]'
      ${MOUNT:-}"
}

printf -v flags '%q ' "${ARGS[@]}"
# A worker that outlived the last attempt would hold the chips. (The brackets keep pkill from finding itself.)
line="pkill -f '[s]mdlm.main'; cd smdlm && ../venv/bin/python -m smdlm.main --distributed ${flags% }"
retries=${RETRIES:-3} created='' installed=''
now=$(state NONE)
while :; do
  case $now in
    READY) ;;
    NONE)
      installed=''
      if ! create; then
        # After a preemption there may be no chips for a while; at the start it is more likely a wrong parameter.
        [[ -n $created ]] || fail "$TPU_NAME: could not be created, see above"
        pause
        now=$(state READY)
        continue
      fi
      ;;
    CREATING | STARTING | REPAIRING | RESTARTING | STOPPING | DELETING)
      pause
      now=$(state READY)
      continue
      ;;
    *) # PREEMPTED, TERMINATED, STOPPED, ...
      echo "$TPU_NAME is $now: creating it anew" >&2
      down || pause
      now=$(state READY)
      continue
      ;;
  esac
  created=1 status=0
  if [[ -z $installed ]] && install; then
    installed=1
  fi
  if [[ -n $installed ]]; then
    on all "$line" || status=$?
    if ((status == 0)) && { ! trains "${ARGS[@]}" || on 0 "$summary"; }; then
      break
    fi
  fi
  pause
  now=$(state READY)
  if [[ $now == READY ]] && ((retries-- <= 0)); then
    fail "$TPU_NAME: the command fails on a healthy slice (last status $status); the slice is still up, 'down' ends it"
  fi
done
[[ -n ${KEEP:-} ]] || down
