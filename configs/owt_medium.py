"""owt.py at 424,477,013 parameters (MDLM's "medium": 1024 x 24 x 16, 50,258 ids untied), sharded over all chips.

python -m smdlm.main --config=configs/owt_medium.py

Not in the paper, which trains the small model only; not run here. What it needs per chip: `python -m smdlm.tools.aot`.
"""

import ml_collections

from configs import owt


def get_config() -> ml_collections.ConfigDict:
    config = owt.get_config()
    config.model.update(width=1024, depth=24, heads=16)
    config.mesh = dict(data=1, fsdp=-1, tensor=1)
    return config
