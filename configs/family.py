"""The feedback family: the ideas of docs/family.md, one run each, on a text whose true distribution is known.

python -m smdlm.main --mode=study --config=configs/family.py

A Markov chain of 16 symbols, 32 tokens, width 64, two layers, 400 updates: 40 minutes for all on one core. Runs that
need no training sample the weights of another one; docs/family.md has what was measured. Expect one line per idea in
runs/family/study.md: excess nats per token over the true entropy rate at 4, 8 and 32 steps for 32 tokens, and the
difference to the binary model's with the interval of the pairs.
"""

import ml_collections

from configs import lab

OPEN = dict(scale=0.12, centre=-2.0, steepness=2.0)  # the entropy gate, open enough for a small model
FREE = dict(p_sm=0.0, soften=True)  # feedback that the model was not trained with
WHOLE = dict(variant="full", learn=False)  # the expected embedding over the whole vocabulary


def trained(**softmask):
    """A run with the entropy gate, or with another one that is named."""
    return dict(softmask=softmask if "gate" in softmask else OPEN | softmask)


def constant(scale, **softmask):
    return trained(gate="constant", scale=scale, **softmask)


def sampled(policy, softmask=OPEN, **fields):
    """A run that is sampled by another policy; the model runs only where a canvas changed, so that forwards count."""
    return dict(softmask=dict(softmask), sampling=dict(policy=policy, refresh="on_change", **fields))


TRAINING = dict(
    softmask=trained(),
    p_sm_02=trained(p_sm=0.2),
    p_sm_05=trained(p_sm=0.5),
    p_sm_1=trained(p_sm=1.0),
    coin_example=trained(coin="example"),
    through=trained(through=True),
    k_1=trained(k=1),
    k_10=trained(k=10),
    k_all=trained(variant="full"),
    lam_0=constant(0.0),
    lam_03=constant(0.3),
    lam_1=constant(1.0),
    uniform_05=constant(0.5, k=1),
    uniform_1=constant(1.0, k=1),
    norm_lerp=trained(mixer="norm_lerp", norm="mask"),
    slerp=trained(mixer="slerp"),
    slerp_mask=trained(mixer="slerp", norm="mask"),
    add=trained(mixer="add"),
    band_first=trained(gate="band", **OPEN, t_from=0.8),
    band_last=trained(gate="band", **OPEN, t_to=0.2),
    schedule_line=trained(gate="schedule"),
    schedule_stairs=trained(gate="schedule", levels=4),
    rcd=trained(gate="normalised_entropy", p_sm=1.0, **WHOLE),
    project=constant(1.0, variant="project", coin="example", p_sm=0.5),
    gated=constant(1.0, variant="gated", inner=128, coin="example", p_sm=0.5),
    hidden=constant(1.0, variant="hidden"),
    edits=dict(softmask=OPEN, noise=dict(replace=0.1)),
    stages=dict(**constant(0.3, variant="stages"), noise=dict(replace=0.1)),
    doubt=dict(
        softmask=dict(variant="doubt", gate="confidence", mixer="norm_lerp", k=1),
        noise=dict(replace=0.1),
        sampling=dict(policy="edit", threshold=0.8, edit_threshold=0.0, refresh="on_change"),
    ),
    scmdm=trained(p_sm=1.0),
    binary_on=dict(softmask=dict(p_sm=0.0)),
    ar=dict(model=dict(causal=True), softmask=dict(p_sm=0.0), eval=dict(metrics="likelihood")),
)
WITHOUT_TRAINING = dict(
    free_lerp=constant(0.3, **FREE),
    free_slerp=constant(0.3, **FREE, mixer="slerp", norm="mask"),
    free_norm_lerp=constant(0.3, **FREE, mixer="norm_lerp", norm="mask"),
    dinfer=sampled("threshold", dict(**FREE, **WHOLE, gate="ramp", mixer="add"), threshold=0.8, start=1.0),
    lrd=trained(**FREE, **WHOLE, gate="normalised_entropy", most_if="sure", scale=0.15, nucleus=0.9),
    entropy_bound=sampled("entropy_bound"),
    threshold=sampled("threshold"),
    factor=sampled("factor"),
    remdm_subs=sampled("remdm_cap"),
    remdm_raw=sampled("remdm_cap", feedback_source="raw"),
    remask=dict(**sampled("remask", feedback_source="raw"), noise=dict(replace=0.1)),
    edit=dict(**sampled("edit"), noise=dict(replace=0.1)),
    evotoken=dict(
        softmask=dict(variant="stages", gate="constant", scale=0.3),
        noise=dict(replace=0.1),
        sampling=dict(policy="edit", threshold=0.9, edit_threshold=0.0, rising=True, refresh="on_change"),
    ),
    soft_thinking=dict(
        model=dict(causal=True),
        softmask=dict(**FREE, variant="stages", gate="constant", scale=1.0, k=10),
        eval=dict(metrics="likelihood"),
    ),
)
WEIGHTS = dict.fromkeys(("free_lerp", "free_slerp", "free_norm_lerp", "dinfer", "lrd"), "binary") | dict(
    **dict.fromkeys(("entropy_bound", "threshold", "factor", "remdm_subs", "remdm_raw"), "softmask"),
    **dict(remask="edits", edit="edits", evotoken="stages", soft_thinking="ar"),
)


def get_config() -> ml_collections.ConfigDict:
    config = lab.get_config()
    config.model.update(width=64, depth=2, heads=2)
    config.data.update(source="lab:markov:16:1:0", seq_len=32)
    config.softmask = dict(p_sm=0.8, k=3)
    config.train.update(steps=400, log_every=100, save_every=400)
    config.eval.update(blocks=128, batch_size=64)
    config.study.runs = dict(binary=dict(softmask=dict(p_sm=0.0)), **TRAINING, **WITHOUT_TRAINING)
    config.study.reuse = WEIGHTS
    config.study.begin = dict(scmdm="binary", binary_on="binary")
    config.study.grids = dict(nfe=dict(count=512, steps=(4, 8, 32)))
    return config
