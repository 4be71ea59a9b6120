#!/usr/bin/env bash
# Continued pretraining: 100k more updates of the released MDLM with soft-masking (iso-update and iso-compute) and, as the
# control, without. Every run ends with its validation likelihood. The released checkpoint is converted once:
#
#   python -m smdlm.convert import mdlm mdlm.ckpt runs/mdlm
#   LAUNCHER=gpu|slurm|tpu_pod launch/02_owt_continue.sh [--dry-run]
#
# RUNS: the folder of the runs (runs). MDLM: the converted checkpoint's workdir ($RUNS/mdlm). DATA: the prepared corpus
# (data/owt, see configs/owt.py).

# shellcheck source-path=SCRIPTDIR
source "$(dirname "$0")/common.sh"
no_flags
runs=${RUNS:-runs}
from=(--config=configs/owt_continue.py "--config.train.init_from=${MDLM:-$runs/mdlm}")
from+=("--config.data.source=prepared:${DATA:-data/owt}")
experiment "${from[@]}" "--workdir=$runs/owt_continue_binary" --config.softmask.p_sm=0.0
experiment "${from[@]}" "--workdir=$runs/owt_continue_iso_compute" --config.train.update_budget=iso_compute
experiment "${from[@]}" "--workdir=$runs/owt_continue_iso_update"
