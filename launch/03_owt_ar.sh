#!/usr/bin/env bash
# The autoregressive row of the main table: the same sizes, data and updates as 01_owt_scratch.sh.
#
#   LAUNCHER=gpu|slurm|tpu_pod launch/03_owt_ar.sh [--dry-run]
#
# RUNS: the folder of the runs (runs). DATA: the prepared corpus (data/owt, see configs/owt.py). COUNT: samples (64).

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"
no_flags
run=(--config=configs/owt.py "--workdir=${RUNS:-runs}/owt_ar" --config.model.causal=True --config.softmask.p_sm=0.0)
run+=("--config.data.source=prepared:${DATA:-data/owt}")
experiment "${run[@]}"
experiment "${run[@]}" --mode=sample "--config.sampling.count=${COUNT:-64}"
