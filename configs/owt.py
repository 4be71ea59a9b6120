"""The paper's language setting: soft-masked MDLM, 169M parameters, OpenWebText, trained from scratch.

python -m smdlm.data.prepare --recipe=owt --source='parquet:openwebtext/*.parquet' --out=data/owt    (docs/data.md)
python -m smdlm.main --config=configs/owt.py

Every number is the reference's (its config.yaml and the overrides of its training scripts): DiT 768 x 12 x 12, L 1024,
GPT-2 BPE, batch 512, AdamW 3e-4, omega 1e-2, warm-up 2500 then constant, EMA .9999 with warm-up, dropout .1, clip 1,
p_sm .8, k 3, bf16 compute with f32 parameters, 1M updates. Not run here at full length. The paper reports, after 1M
updates, MAUVE .602 and 23.53 generative perplexity for 5000 samples of 1024 steps with top-p .9.

Loss, clipping, schedule (the first update has rate 0), AdamW and EMA follow the reference step by step
(tests/golden). What differs, and how to ask for the reference's way:

times of a batch: the same range and variance, but spread over every device and micro-batch, where the reference's
    strata give each a narrow slice of t and so an uneven load:               --config.times.kind=stratified
omega in validation and samples is averaged like all weights; the reference leaves it out of its EMA:
    --config.eval.omega=live --config.sampling.omega=live
published samples skip a forward when nothing changed (one sample at a time): --config.sampling.refresh=on_change
the coin p_sm is drawn once per update, there once per micro-batch and device; validation masks are fixed, there fresh.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.model = dict(
        width=768,
        depth=12,
        heads=12,
        cond=128,
        dropout=0.1,
        dtype="bfloat16",
        remat="light",
        unroll=True,
        vocab_multiple=128,
    )
    config.data = dict(
        source="prepared:data/owt", tokenizer="gpt2", seq_len=1024, batch_size=512, framing="bos_eos", seed=0
    )
    config.softmask = dict(p_sm=0.8, k=3, scale=1e-6, centre=-0.75, steepness=6.66)
    config.readout = dict(chunk=2048)
    config.noise = dict(eps=1e-3)
    config.times = dict(kind="weyl", t_min=1e-3, t_max=1.0)
    config.optimizer = dict(
        name="adamw", lr=3e-4, lr_softmask=1e-2, warmup=2500, decay="constant", clip=1.0, ema_decay=0.9999
    )
    config.train = dict(
        steps=1_000_000,
        log_every=100,
        save_every=5000,
        eval_every=5000,
        keep=3,
        seed=0,
        accumulate=1,
        update_budget="iso_update",
    )
    config.sampling = dict(steps=1024, top_p=0.9, top_p_rule="reference", count=16, seed=0, prompt="", policy="mdlm")
    config.generate = dict(new_tokens=256)
    config.eval = dict(blocks=1024, batch_size=64)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    return config
