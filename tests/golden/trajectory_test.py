"""Whole runs of the samplers, token for token with the stored noise."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden.arrays import NOISE, TRAJECTORY_FACTOR, Arrays, Group, compare, largest
from golden.forms import chances, draw_of, mixture, sampler
from golden.models import MDLM, Reference, denoise
from smdlm.denoiser import Denoiser
from smdlm.ops.filters import Filters
from smdlm.sampling.loop import Carry, Sampler
from smdlm.sampling.policies import linear_times

TOKENS = Group("trajectory tokens", 0)
LOG_PROBS = Group("trajectory log-probs", TRAJECTORY_FACTOR)


def trajectories() -> list[tuple[str, str]]:
    """(file, tag) of every stored run."""
    names = [name for name in MDLM.names(".npz") if name.startswith("trajectory")]
    return [(name, m[1]) for name in names for m in MDLM.arrays(name).matches("(.*)__x_in")]


@functools.partial(jax.jit, static_argnums=(0, 1))
def filtered(denoiser: Denoiser, filters: Filters, params: Any, hidden: jax.Array) -> jax.Array:
    """What is drawn from, not normalised: hidden states [B, L, D] -> [B, L, V padded]."""
    logits = denoiser.head(params).logits(hidden)
    return filters.probs(logits.reshape(-1, logits.shape[-1])).reshape(logits.shape)


def hidden_states(run: Sampler, params: Any, carry: Carry) -> jax.Array:
    """[B, L, D] that the next step will use."""
    hidden = denoise(run.denoiser, params, carry.canvas, carry.feedback)
    return hidden if carry.hidden is None else jnp.where(carry.changed[:, None, None], hidden, carry.hidden)


step = jax.jit(Sampler.step, static_argnums=0)
finish = jax.jit(Sampler.finish, static_argnums=0)


def stored_sampler(stored: Arrays, tag: str, reference: Reference) -> tuple[Sampler, Any, float]:
    """(sampler of a stored run, the parameters that it runs on, its final time)."""
    names = ("sampler", "p_nucleus", "eta", "t_on", "t_off", "alpha_on", "eps", "cache", "sm")
    value = {name: stored[f"{tag}__{name}"].item() for name in names}
    run = Sampler(
        reference.denoiser,
        reference.readout,
        sampler(value["sampler"]).policy(value),
        Filters(top_p=value["p_nucleus"], top_p_rule="reference"),
        use_feedback=bool(value["sm"]),
        refresh="on_batch_change" if value["cache"] else "always",
    )
    # The reference averages the backbone alone and samples with the live omega.
    averaged = {"backbone": reference.ema["backbone"], "softmask": reference.params["softmask"]}
    return run, averaged if stored[f"{tag}__ema_weights"] else reference.params, value["eps"]


def race_of(run: Sampler, carry: Carry, now: Any, probs: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The reference's exponential race [B, L, V] f64, on our chances and probabilities: the largest entry wins."""
    canvas, mask_id = np.asarray(carry.canvas), run.denoiser.mask_id
    masked = jnp.asarray(canvas == mask_id)
    draw = draw_of(probs, np.argmax(probs, -1).astype(np.int32), canvas, mask_id)
    commit, remask = chances(run.policy, carry.canvas, masked, draw, now, carry.policy)
    return mixture(commit, remask, probs, canvas, mask_id) / (1e-10 - np.log(noise + 1e-10))


def smallest_gap(race: np.ndarray) -> float:
    """Between the best and the second in log space, over the positions where two can win; 1e9 if there is none."""
    second, best = np.moveaxis(np.sort(race, -1)[..., -2:], -1, 0)
    return np.min(np.log(best[second > 0] / second[second > 0]), initial=1e9)


def winning_uniforms(
    winner: np.ndarray, canvas: np.ndarray, probs: np.ndarray, mask_id: int
) -> tuple[jax.Array, jax.Array]:
    """(u_token, u_move) [B, L] with which our step does what the race decided."""
    # The middle of the winner's interval of the CDF, and a uniform that does or does not move.
    middles = np.cumsum(probs, -1) - probs / 2
    token = np.where(winner == mask_id, 0, winner)[..., None]
    moves = np.where(canvas == mask_id, winner != mask_id, winner == mask_id)
    u_token = np.take_along_axis(middles, token, -1)[..., 0]
    return jnp.asarray(u_token, jnp.float32), jnp.asarray(np.where(moves, 0.0, 1 - 2.0**-24), jnp.float32)


@pytest.mark.parametrize("name, tag", trajectories())
def test_trajectory(diffusion, name, tag):
    """The reference's race decides, our step is handed uniforms that do so."""
    stored, mask_id = MDLM.arrays(name), diffusion.denoiser.mask_id
    if "mask_index" in stored:
        assert int(stored["mask_index"]) == mask_id
    u = stored["U"] if "U" in stored else MDLM.arrays("trajectory.npz")["U"]
    run, params, end = stored_sampler(stored, tag, diffusion)
    steps = int(stored[f"{tag}__num_steps"])
    times = linear_times(steps, end)
    stored.check(NOISE, f"{tag}__t", times.t)
    compare(NOISE, f"{name} {tag}__dt", times.t - times.s, np.broadcast_to(stored[f"{tag}__dt"], (steps,)))

    x_in, x_out, log_p, gaps, forwards, size = [], [], [], [], [], 0.0
    carry = run.init(jnp.asarray(stored[f"{tag}__x_in"][0]))
    prompt = jnp.zeros(carry.canvas.shape, bool)
    for i in range(steps):
        canvas, now = np.asarray(carry.canvas), jax.tree.map(lambda x, i=i: x[i], times)
        forwards.append(bool(carry.changed.any()) or run.refresh == "always")
        hidden = hidden_states(run, params, carry)
        probs = np.asarray(filtered(run.denoiser, run.filters, params, hidden), np.float64)
        probs = probs[..., : diffusion.vocab]
        probs /= probs.sum(-1, keepdims=True)
        race = race_of(run, carry, now, probs, u[i])
        gaps.append(smallest_gap(race))
        x_in.append(canvas)
        log_p.append(diffusion.log_probs(params, hidden, canvas))
        size = max(size, largest(diffusion.logits(hidden, params)))
        uniforms = winning_uniforms(np.argmax(race, -1), canvas, probs, mask_id)
        carry = step(run, params, carry, now, prompt, *uniforms)
        x_out.append(np.asarray(carry.canvas))
    stored.check(TOKENS, f"{tag}__x_in", np.stack(x_in))
    stored.check(TOKENS, f"{tag}__x_out", np.stack(x_out))
    stored.check(TOKENS, f"{tag}__forward_called", np.asarray(forwards))
    assert int(carry.forwards) == sum(forwards)
    if f"{tag}__log_p_x0" in stored:
        stored.check(LOG_PROBS, f"{tag}__log_p_x0", np.stack(log_p), where=diffusion.not_mask, size=size)
    # A gap is the difference of two log-probabilities.
    stored.check(LOG_PROBS, f"{tag}__min_log_gap_per_step", np.asarray(gaps), size=2 * size)
    check_end(stored, tag, run, params, carry, sum(forwards), diffusion)


def check_end(
    stored: Arrays, tag: str, run: Sampler, params: Any, carry: Carry, forwards: int, reference: Reference
) -> None:
    """Noise removal: the final tokens, and the prediction that they are taken from."""
    stored.check(TOKENS, f"{tag}__x_final", finish(run, params, carry).tokens)
    # The reference always runs the last forward, we only if a mask is left.
    stored.check(TOKENS, f"{tag}__num_forward_total", forwards + 1)
    last = denoise(reference.denoiser, params, carry.canvas, carry.feedback)
    final, size = reference.log_probs(params, last, np.asarray(carry.canvas)), largest(reference.logits(last, params))
    if f"{tag}__final_log_p" in stored:
        stored.check(LOG_PROBS, f"{tag}__final_log_p", final, where=reference.not_mask, size=size)
    best = np.sort(final[..., reference.not_mask], -1)
    gap = np.min(best[..., -1] - best[..., -2])
    stored.check(LOG_PROBS, f"{tag}__final_argmax_min_gap", gap, size=2 * size)
