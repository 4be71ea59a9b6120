"""The laboratory's second text, lines like "3+8=11": which share of the lines that a model writes is true?

python -m smdlm.main --mode=study --config=configs/lab_sums.py

Operands of one digit, eight lines of seven signs a block. docs/lab.md has what was measured (one seed, 20 minutes on
one CPU core).
"""

import ml_collections

from configs import lab


def get_config() -> ml_collections.ConfigDict:
    config = lab.get_config()
    config.model.products = "bfloat16"
    config.data.update(source="lab:sums:1:0", seq_len=56)
    config.train.update(steps=3000, log_every=200, save_every=3000)
    config.study.grids = dict(nfe=dict(count=512, steps=(7, 14, 28, 56)))
    config.study.scores = ("lab_untrue",)
    config.study.show = ("lab_untrue", "lab_well_formed", "lab_operand_entropy", "lab_held_out")
    config.study.seeds = 3
    return config
