"""owt.py at 1,660,558,677 parameters: 2048 x 28, 16 heads of width 128, 50,258 ids untied; blocks recomputed.

python -m smdlm.main --config=configs/owt_1b7.py

Not in the paper; not run here. What it needs per chip: `python -m smdlm.tools.aot`. State alone (parameters, EMA, two
moments in f32) is 26.6 GB, so it is sharded over all chips.
"""

import ml_collections

from configs import owt


def get_config() -> ml_collections.ConfigDict:
    config = owt.get_config()
    config.model.update(width=2048, depth=28, heads=16, remat="block")
    config.optimizer.lr = 2e-4
    config.mesh = dict(data=1, fsdp=-1, tensor=1)
    return config
