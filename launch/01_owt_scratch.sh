#!/usr/bin/env bash
# The paper's main table: 169M parameters on OpenWebText from scratch, 1M updates; binary masks, soft-masking with as many
# forward passes (iso-compute: half the updates) and with as many updates (iso-update). Then samples of 1024 steps of
# each by the MDLM and the ReMDM sampler.
#
#   LAUNCHER=gpu|slurm|tpu_pod launch/01_owt_scratch.sh [--dry-run]
#
# RUNS: the folder of the runs (runs). DATA: the prepared corpus (data/owt, see configs/owt.py). COUNT: samples (64).

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"
no_flags
runs=${RUNS:-runs}
binary=(--config=configs/owt.py "--workdir=$runs/owt_binary" --config.softmask.p_sm=0.0)
iso_compute=(--config=configs/owt.py "--workdir=$runs/owt_sm_iso_compute" --config.train.update_budget=iso_compute)
iso_update=(--config=configs/owt.py "--workdir=$runs/owt_sm_iso_update")
data=("--config.data.source=prepared:${DATA:-data/owt}")
sampling=(--mode=sample "--config.sampling.count=${COUNT:-64}" --config.sampling.steps=1024)

experiment "${binary[@]}" "${data[@]}"
experiment "${iso_compute[@]}" "${data[@]}"
experiment "${iso_update[@]}" "${data[@]}"
for policy in mdlm remdm_loop; do
  experiment "${binary[@]}" "${data[@]}" "${sampling[@]}" "--config.sampling.policy=$policy"
  experiment "${iso_compute[@]}" "${data[@]}" "${sampling[@]}" "--config.sampling.policy=$policy"
  experiment "${iso_update[@]}" "${data[@]}" "${sampling[@]}" "--config.sampling.policy=$policy"
done
