"""The autoregressive baseline at the size of tiny.py: the same data, optimizer and number of updates.

python -m smdlm.main --config=configs/ar_tiny.py
"""

import ml_collections

from configs import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.model.causal = True
    config.softmask = dict(p_sm=0.0)
    config.sampling = dict(temperature=0.8, top_p=0.9, count=8, seed=0, prompt="")
    return config
