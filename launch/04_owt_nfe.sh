#!/usr/bin/env bash
# Quality against the number of forward passes: samples of 128 .. 1024 steps of the runs of 01_owt_scratch.sh, by the MDLM
# and the ReMDM sampler (cap below 1024 steps, loop at 1024, as in the paper).
#
#   LAUNCHER=gpu|slurm|tpu_pod launch/04_owt_nfe.sh [--dry-run]
#
# RUNS: the folder of the runs (runs). DATA: the prepared corpus (data/owt, see configs/owt.py). COUNT: samples (64).

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"
no_flags
for name in owt_binary owt_sm_iso_compute owt_sm_iso_update; do
  run=(--config=configs/owt.py "--workdir=${RUNS:-runs}/$name" "--config.data.source=prepared:${DATA:-data/owt}")
  [[ $name != owt_binary ]] || run+=(--config.softmask.p_sm=0.0)
  for steps in 128 256 512 1024; do
    remdm=remdm_cap
    ((steps < 1024)) || remdm=remdm_loop
    for policy in mdlm "$remdm"; do
      experiment "${run[@]}" --mode=sample "--config.sampling.count=${COUNT:-64}" "--config.sampling.steps=$steps" \
        "--config.sampling.policy=$policy"
    done
  done
done
