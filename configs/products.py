"""Does rounding the operands of large products to bfloat16 cost loss? A check of model.products on a CPU.

python -m smdlm.main --mode=study --config=configs/products.py

Both runs are configs/tiny.py to its end, with the same five seeds, data and masks; `float32` has products='dtype'.
The page (runs/products/study.md) compares nats per token on the same blocks with the same masks, so that the difference
has the interval of the pairs. The same command continues a killed study. Ten runs of a few minutes each.
"""

import ml_collections

from configs import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.train.save_every = config.train.steps
    config.eval = dict(blocks=512, batch_size=128)
    config.sampling = dict(policy="mdlm", steps=16, temperature=1.0, top_p=0.9, count=16, seed=0)
    config.study = dict(
        runs=dict(float32=dict(model=dict(products="dtype")), bfloat16=dict()),
        baseline="float32",
        grids=dict(samples=dict(steps=16)),
        metrics="likelihood",
        scores=("nats_per_token_two_pass",),
        show=("nats_per_token_two_pass", "nats_per_token_one_pass"),
        seeds=5,
    )
    return config
