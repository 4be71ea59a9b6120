"""The feedback family on text: the main rows of docs/family.md with the text, model and judge of configs/miniature.py.

python -m smdlm.convert import gguf SMOLLM2.gguf runs/smollm2
python -m smdlm.main --mode=study --config=configs/miniature_family.py

One seed, 512 samples of 64 tokens at 32 steps. Runs that need no training sample the weights of another one.
docs/family.md has what came out. `binary` and `softmask` are those of configs/miniature.py: with a copy of their
folders of seed 0 in the workdir they are not trained again.
"""

import ml_collections

from configs import family, miniature
from configs.family import OPEN, trained

RUNS = dict(
    binary=trained(p_sm=0.0),
    softmask=trained(),
    **{name: family.WITHOUT_TRAINING[name] for name in ("free_lerp", "lrd", "dinfer", "entropy_bound")},
    remdm_subs=dict(softmask=OPEN, sampling=dict(policy="remdm_cap")),
    remdm_raw=dict(softmask=OPEN, sampling=dict(policy="remdm_cap", feedback_source="raw")),
    **{name: family.TRAINING[name] for name in ("k_1", "k_all", "lam_03", "p_sm_1", "slerp", "add")},
)


def get_config() -> ml_collections.ConfigDict:
    config = miniature.get_config()
    config.softmask = dict(p_sm=0.8, k=3)
    given = config.study
    config.study = dict(
        runs=RUNS,
        baseline="binary",
        reuse={name: weights for name, weights in family.WEIGHTS.items() if name in RUNS},
        grids=dict(nfe=dict(count=512, steps=32)),
        **{name: given[name] for name in ("metrics", "scorer", "scores", "show", "front")},
    )
    return config
