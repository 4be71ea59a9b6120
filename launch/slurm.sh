#!/usr/bin/env bash
# Runs one experiment on a Slurm cluster: one process for each GPU; requeued after preemption or the time limit.
#
#   NODES=2 GPUS=8 launch/slurm.sh [--dry-run] --config=configs/owt.py --workdir=/shared/owt [FLAGS OF smdlm.main...]
#
# NODES (1), GPUS for each node (8), TIME (24:00:00), PARTITION and ACCOUNT (the cluster's defaults), CPUS for each
# process (8). PYTHON: the interpreter on the nodes, python by default. The workdir must be on a file system that all
# nodes see, or in gs:// (its log then stands in this folder). Returns when the job has ended.

# shellcheck source-path=SCRIPTDIR
source "${SMDLM_LAUNCH:-$(dirname "$0")}/common.sh"
workdir=$(workdir_of "${ARGS[@]}")
if [[ -z ${SMDLM_LAUNCH:-} ]]; then # on the login node: submit this script
  : "${NODES:=1}" "${GPUS:=8}" "${CPUS:=8}"
  count NODES
  count GPUS
  count CPUS
  [[ -n $DRY_RUN ]] || have sbatch
  name=$(basename "$workdir")
  log=$workdir.slurm.log
  [[ $workdir != *://* ]] || log=$name.slurm.log
  options=(--wait --requeue --open-mode=append "--job-name=$name" "--output=$log")
  options+=("--nodes=$NODES" "--ntasks-per-node=$GPUS" "--gpus-per-node=$GPUS")
  # SIGTERM two minutes before the limit: the run saves and ends.
  options+=("--cpus-per-task=$CPUS" "--time=${TIME:-24:00:00}" --signal=TERM@120)
  [[ -z ${PARTITION:-} ]] || options+=("--partition=$PARTITION")
  [[ -z ${ACCOUNT:-} ]] || options+=("--account=$ACCOUNT")
  do_ mkdir -p "$(dirname "$log")"
  do_ sbatch "${options[@]}" "--export=ALL,SMDLM_LAUNCH=$HERE" "$HERE/slurm.sh" "${ARGS[@]}"
  [[ -n $DRY_RUN ]] || exit 0 # a dry run also prints what the job will do
fi
cd "$ROOT"
do_ srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m smdlm.main --distributed "${ARGS[@]}"
if trains "${ARGS[@]}" && { [[ -n $DRY_RUN ]] || ! finished "$workdir"; }; then
  do_ scontrol requeue "${SLURM_JOB_ID:-JOB}"
fi
