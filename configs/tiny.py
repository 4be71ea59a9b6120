"""A small soft-masked MDLM on the prose of the installed Python's docstrings, in under four minutes on two CPU cores.

python -m smdlm.main --config=configs/tiny.py

The gate starts wide open (the paper's start stays shut while a model's entropy is several nats), and Muon replaces
AdamW for the matrices: with AdamW most of the time passes on a plateau at the unigram level. Expect about 2.15
bits/byte; `real_words` is the share of the samples' words of four letters and more that stand in the training text.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.model = dict(width=128, depth=4, heads=4, cond=32, dropout=0.0, remat="light", vocab_multiple=1)
    # Costs no loss at this size (configs/products.py) and a third of the time, on a CPU with bfloat16 instructions.
    config.model.products = "bfloat16"
    config.data = dict(source="stdlib:prose", tokenizer="bpe:1024", seq_len=64, batch_size=32)
    config.softmask = dict(p_sm=0.8, k=3, scale=0.12, centre=-2.0, steepness=2.0)
    config.readout = dict(chunk=512)
    config.noise = dict(eps=1e-3)
    config.times = dict(kind="weyl")
    config.optimizer = dict(
        name="muon", lr=4e-3, muon_lr=0.02, lr_softmask=0.02, warmup=50, decay="linear", final_lr=0.05, ema_decay=0.99
    )
    config.train = dict(steps=1000, log_every=50, save_every=200, seed=0, accumulate=1, update_budget="iso_update")
    # Re-masking for four steps per token: a model this small needs second thoughts for its words.
    config.sampling = dict(
        policy="remdm_cap", eta=0.02, steps=256, temperature=0.5, top_p=0.9, count=16, seed=0, prompt=""
    )
    config.generate = dict(new_tokens=32, bucket=16)
    config.eval = dict(blocks=512, batch_size=128, samples="blank,real_words")
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    return config
