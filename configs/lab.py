"""The laboratory: binary against soft-masked training on a text whose true distribution is known.

python -m smdlm.main --mode=study --config=configs/lab.py

The text is a sparse random Markov chain of 64 symbols (smdlm/data/lab.py), the model that of configs/tiny.py; both
runs see the same data in the same order and sample with the same noise. A run trains in 4 to 8 minutes on two shared
cores. Expect a table of excess nats per token at each number of steps, with the paired difference; docs/lab.md has what
was measured over three seeds.
"""

import ml_collections

from configs import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.model.products = "dtype"  # what docs/lab.md has was measured in float32
    config.data.update(source="lab:markov:64:1:0", tokenizer="bytes")
    config.train.steps = 800
    config.sampling = dict(policy="mdlm", steps=64, temperature=1.0, top_p=1.0, count=8, seed=0)
    config.eval = dict(metrics="likelihood,lab_likelihood", blocks=256, batch_size=128, chain=0)
    config.study = dict(
        runs=dict(binary=dict(softmask=dict(p_sm=0.0)), softmask=dict()),
        baseline="binary",
        grids=dict(
            nfe=dict(count=512, steps=(8, 16, 32, 64)),
            temperature=dict(count=512, steps=64, temperature=0.9),
        ),
        metrics="lab",
        scores=("lab_excess_nats",),
        show=(
            "lab_excess_nats",
            "lab_divergence",
            "lab_impossible",
            "lab_entropy_rate",
            "lab_entropy_unigram",
            "lab_tv_2",
        ),
        seeds=1,
    )
    return config
