"""Continued pretraining: soft-masking added to a trained binary MDLM, 100k updates on OpenWebText. Data, model and
optimizer are those of owt.py.

python -m smdlm.convert import mdlm mdlm.ckpt runs/mdlm    # the released checkpoint, raw weights (as the reference)
python -m smdlm.main --config=configs/owt_continue.py

runs/mdlm lacks omega, which starts anew (a checkpoint with a soft-mask head keeps its own); another start is
--config.train.init_from=DIR. Two other budgets, one flag each and a --workdir of their own:

iso-compute, half of the updates for two forwards each:  --config.train.update_budget=iso_compute
the binary control:                                      --config.softmask.p_sm=0.0

For an accelerator: 100k updates of 512 x 1024 tokens, 1.8 forwards each on average. The paper reports a validation
perplexity of 23.14 before, 21.63 after, and 22.88 for the binary control. Not run here at full length.
"""

import ml_collections

from configs import owt


def get_config() -> ml_collections.ConfigDict:
    config = owt.get_config()
    config.train.steps = 100_000
    config.train.init_from = "runs/mdlm"
    return config
