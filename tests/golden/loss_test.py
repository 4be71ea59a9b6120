"""The noise, the two passes, the loss and its gradients."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from golden.arrays import LOSS, NOISE, TRAJECTORY_FACTOR, Group, largest
from golden.forms import sparse_form
from golden.models import MDLM, denoise
from golden.replay import example
from smdlm.convert import mdlm
from smdlm.denoiser import Denoiser
from smdlm.diffusion import LogLinear, TimeSampler
from smdlm.feedback.gates import Prediction
from smdlm.readout import Readout
from smdlm.softmask import Feedback

BOTH_PASSES = Group("log-probs of both passes", TRAJECTORY_FACTOR)
GRADIENTS = Group("gradients", 1e-5, relative=True)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(objective: Any, params: Any, batch: Any, feedback: bool) -> Any:
    return jax.value_and_grad(objective, has_aux=True)(params, batch, feedback, None)


@functools.partial(jax.jit, static_argnums=(0, 1))
def remember(denoiser: Denoiser, readout: Readout, params: Any, hidden: jax.Array, masked: jax.Array) -> Feedback:
    return denoiser.softmask.attach(readout.feedback(denoiser.head(params), hidden, masked), hidden)


def cases() -> list[str]:
    """Their names say what they are: binary or sm, with _pad for padded rows, _temp for the learned temperature."""
    return [m[1] for m in MDLM.arrays("loss.npz").matches("(.*)_num_tokens")] if MDLM.has("loss.npz") else []


@pytest.mark.parametrize("case", cases())
def test_loss(diffusion, full, case):
    stored = MDLM.arrays("loss.npz")
    reference = full if "temp" in case else diffusion
    valid = stored["valid_pad" if "pad" in case else "valid"]
    objective, batch = example(reference, valid > 0)
    stored.check(NOISE, "xt", batch.canvas)
    (loss, nll), grads = loss_and_gradients(objective, reference.params, batch, not case.startswith("binary"))
    stored.check(LOSS, f"{case}_loss", loss)
    stored.check(LOSS, f"{case}_nlls_sum", loss * valid.sum(), size=float(valid.sum()))
    stored.check(LOSS, f"{case}_num_tokens", 1 / np.max(batch.weights * stored["t"][:, None]))
    if f"{case}_nll_tok" in stored:
        per_token = nll * objective.schedule.weight(stored["t"])[:, None]
        # The tolerance is that of a token in nats: beyond 16 of them, which 1/t makes of a few, rounding grows along.
        stored.check(LOSS, f"{case}_nll_tok", per_token, size=max(1.0, largest(per_token) / 16))
    named = mdlm.from_tree(grads["backbone"], reference.model)
    named |= {name: grads["softmask"].get(ours, jnp.zeros(())) for name, ours in mdlm.OMEGA.items()}
    for match in stored.matches(f"{case}_grad_((backbone|tran_head)[.].*)"):
        # omega's gradients are sums of terms of one size, so they share a size.
        peers = stored.matches(f"{case}_grad_tran_head.*") if match[2] == "tran_head" else [match]
        stored.check(GRADIENTS, match[0], named[match[1]], size=largest(*(stored[m[0]] for m in peers)))
    stored.check(GRADIENTS, f"{case}_grad_global_norm", optax.global_norm(grads))


def test_both_passes(diffusion, full):
    stored = MDLM.arrays("loss.npz")
    canvas = stored["xt"]
    tokens, masked = jnp.asarray(canvas), jnp.asarray(canvas == diffusion.denoiser.mask_id)
    for reference, name in ((diffusion, "pass2_log_p"), (full, "sm_temp_pass2_log_p")):
        denoiser, params = reference.denoiser, reference.params
        first = denoise(denoiser, params, tokens)
        feedback = remember(denoiser, reference.readout, params, first, masked)
        second = denoise(denoiser, params, tokens, feedback)
        for key, hidden in (("pass1_log_p", first), (name, second)):
            got, size = reference.log_probs(params, hidden, canvas), largest(reference.logits(hidden))
            stored.check(BOTH_PASSES, key, got, where=reference.not_mask, size=size)
        if reference is diffusion:
            lam = denoiser.softmask.gate(params["softmask"], Prediction(feedback.neg_entropy))
            indices, probs = sparse_form(feedback, lam, canvas, denoiser.mask_id)
            stored.check(BOTH_PASSES, "pass2_indices", indices)
            stored.check(BOTH_PASSES, "pass2_probs", probs)


def test_noise(diffusion):
    stored = MDLM.arrays("loss.npz")
    assert int(stored["mask_index"]) == diffusion.denoiser.mask_id
    schedule = LogLinear()
    with mock.patch("jax.random.uniform", lambda *args, **kwargs: jnp.asarray(stored["antithetic_u"])):
        t = TimeSampler("stratified")(jax.random.key(0), len(stored["antithetic_u"]))
    stored.check(NOISE, "antithetic_t", t)
    stored.check(NOISE, "noise_alpha_grid", schedule.alpha(stored["noise_t_grid"]))
    stored.check(NOISE, "alpha_t", schedule.alpha(stored["t"]))
    stored.check(NOISE, "dalpha_t", schedule.alpha(1.0) - schedule.alpha(0.0))
    # MDLM computes sigma = -log alpha and then zeroes it (no time conditioning).
    stored.check(NOISE, "sigma", -jnp.log(schedule.alpha(stored["t"])), size=largest(stored["sigma"]))
