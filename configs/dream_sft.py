"""The paper's large models: soft-masking added to Dream-7B by DoRA on the responses of conversations.

python -m smdlm.convert import decoder Dream-v0-Instruct-7B runs/dream
python -m smdlm.main --config=configs/dream_sft.py --config.data.source='chat:tulu-3-sft-mixture/data/*.parquet'

Dream-v0-Instruct-7B is the released folder, the tokenizer's files among it; the data are folders of Parquet or Arrow
files, or JSON lines, whose rows have `messages` (the paper: tulu-3-sft-mixture and smoltalk, at most 300,000 of them).

The settings are the reference's: DoRA of rank 16 on q, k, v and the output, AdamW at 1e-5 and omega at 1e-2 with cosine
decay and a warm-up of 3 %, clipping at 7, eight conversations of at most 2048 tokens per update, t in [.2, .8], one
epoch, p_sm .5, k 1. No EMA. 37,500 updates are one epoch of 300,000. What differs, and how to ask for its way:

gradients are of the mean over the eight, there of the sum of eight means:  --config.train.accumulation=sum
rows are padded to the lengths of `buckets`, there to the longest of a batch and up to 49 tokens more
the coin p_sm is drawn once per update, there once per conversation:        --config.softmask.coin=example

The frozen base is 15.2 GB in bfloat16, on every chip unless --config.mesh.fsdp splits it, or 8.7 GB if it is imported
with --dtype=int8 and the run says --config.model.param_dtype=int8. Other budgets of training: omega alone, with
--config.adapter.kind=softmask; the binary control, with --config.softmask.p_sm=0.0. Not run here at full length.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.model = dict(
        name="decoder",
        vocab_size=151_667,
        table_rows=152_064,
        width=3584,
        depth=28,
        heads=28,
        key_heads=4,
        hidden=18_944,
        rope_base=1e6,
        eps=1e-6,
        qkv_bias=True,
        tied=False,
        shift=True,
        dtype="bfloat16",
        param_dtype="bfloat16",
        remat="block",
    )
    config.adapter = dict(kind="dora", targets="q,k,v,attention_out", rank=16, alpha=16.0)
    config.data = dict(
        source="chat:conversations/*.parquet",
        tokenizer="hf:Dream-v0-Instruct-7B",
        seq_len=2048,
        buckets="512,1024,2048",
        batch_size=8,
        val_documents=500,
        seed=1231,
    )
    config.softmask = dict(p_sm=0.5, k=1, scale=1e-6, centre=-0.75, steepness=6.66)
    config.readout = dict(chunk=1024)
    config.noise = dict(eps=1e-3)
    config.times = dict(kind="iid", t_min=0.2, t_max=0.8)
    config.optimizer = dict(
        name="adamw", lr=1e-5, lr_softmask=1e-2, warmup=1125, decay="cosine", clip=7.0, ema_decay=0.0
    )
    config.train = dict(
        steps=37_500, accumulate=8, log_every=25, save_every=500, eval_every=2500, init_from="runs/dream", seed=1231
    )
    config.sampling = dict(policy="entropy", steps=256, temperature=0.1, top_p=0.9, count=1, seed=0)
    config.generate = dict(new_tokens=512, batch_size=8, bucket=64)
    config.eval = dict(blocks=500, batch_size=8, chain=0)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    return config
