"""The laboratory with models that have converged, at equal updates and at equal compute.

python -m smdlm.main --mode=study --config=configs/lab_budgets.py

Three times the updates of configs/lab.py, so that the loss is flat before budgets are compared. About two hours on one
CPU core for three seeds, minutes on a GPU; docs/lab.md has what was measured.
"""

import ml_collections

from configs import lab


def get_config() -> ml_collections.ConfigDict:
    config = lab.get_config()
    config.train.update(steps=2400, log_every=200, save_every=400)
    config.study.runs.softmask_iso_compute = dict(train=dict(update_budget="iso_compute"))
    config.study.seeds = 3
    return config
