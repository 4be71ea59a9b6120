"""The autoregressive baseline: logits, loss, and sampling over the KV cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from golden.arrays import Group, largest
from golden.models import MDLM, check_blocks, denoise
from smdlm.convert import mdlm
from smdlm.denoiser import Denoiser
from smdlm.models.base import KVCache
from smdlm.objective import NextToken
from smdlm.ops.filters import Filters

AR = Group("AR", 3e-6, relative=True)
TOKENS = Group("AR tokens", 0)


def test_ar(autoregressive):
    reference, stored = autoregressive, MDLM.arrays("ar.npz")
    denoiser, params, tokens = reference.denoiser, reference.params, stored["x0"]
    inputs = jnp.asarray(stored["input_ids"])
    raw = reference.run(reference.table[inputs])
    # The reference overwrites the mask's logit; any value this low leaves the softmax of the others alone.
    stored.check(AR, "logits_raw", raw, where=reference.not_mask | (stored["neg_infinity"] == 0))
    log_p = reference.readout.log_probs(denoiser.head(params), denoise(denoiser, params, inputs))
    size = largest(raw, stored["log_probs"])
    stored.check(AR, "log_probs", log_p[..., : reference.vocab], where=reference.not_mask, size=size)
    check_blocks(stored, AR, "act_block", reference, reference.table[inputs], None)
    objective = NextToken(denoiser, reference.readout)
    for name, valid in (("loss", np.ones(tokens.shape, bool)), ("loss_pad", stored["attention_mask_pad"] > 0)):
        batch = objective.corrupt(jax.random.key(0), {"tokens": jnp.asarray(tokens), "valid": jnp.asarray(valid)})
        loss, nll = jax.jit(objective)(params, batch, False, None)
        stored.check(AR, name, loss, size=size)
        if name == "loss":
            stored.check(AR, "nll_tok", nll, size=size)
            stored.check(TOKENS, "input_ids", batch.canvas)
            stored.check(TOKENS, "target_ids", batch.targets)
    listed = [f"{leaf.source} {leaf.shape}" for leaf in mdlm.table(reference.model)]
    rotary = f"{mdlm.ROTARY} {(reference.model.head_width // 2,)}"
    assert sorted(stored["names"].tolist()) == sorted([*listed, rotary])


@functools.partial(jax.jit, static_argnums=0)
def decode(denoiser: Denoiser, params: Any, tokens: jax.Array, cache: KVCache, start: jax.Array) -> Any:
    return denoiser(params, tokens, cache=cache, start=start)


def test_sampling(autoregressive):
    """Gumbel races with the stored noise, each handed to our draw as a uniform, over the KV cache."""
    reference, stored = autoregressive, MDLM.arrays("ar.npz")
    denoiser, params, gumbel = reference.denoiser, reference.params, stored["sample_gumbel"]
    batch, steps = gumbel.shape[:2]
    cache, head = denoiser.model.cache(batch, steps + 1), denoiser.head(params)
    pick = jax.jit(reference.readout.draw, static_argnums=4)
    tokens, gaps, size = [np.full(batch, int(stored["sample_bos"]), np.int32)], [], 0.0
    for i in range(steps):
        hidden, cache = decode(denoiser, params, jnp.asarray(tokens[-1])[:, None], cache, jnp.int32(i))
        log_p = np.asarray(reference.readout.log_probs(head, hidden)[:, 0, : reference.vocab], np.float64)
        race = log_p + gumbel[:, i]
        winner, best = np.argmax(race, -1), np.sort(race, -1)
        gaps.append((best[:, -1] - best[:, -2]).min())
        size = max(size, largest(reference.logits(hidden)))
        probs = np.exp(log_p)
        u = np.take_along_axis(np.cumsum(probs, -1) - probs / 2, winner[:, None], -1).astype(np.float32)
        draw = pick(head, hidden, jnp.ones((batch, 1), bool), jnp.asarray(u), Filters())
        tokens.append(np.asarray(draw.ids[:, 0]))
    stored.check(TOKENS, "sample_x", np.stack(tokens, 1))
    stored.check(AR, "sample_min_gap", np.min(gaps), size=2 * size)  # a difference of two log-probabilities
