"""Our results in the reference's form: sparse soft masks, samplers, and the masses that one step draws from.

A new sampler is one entry of SAMPLERS.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smdlm.readout import Draw
from smdlm.sampling.policies import Ancestral, Cap, Confidence, ForwardBackward, Loop, Policy, Rescale, Times
from smdlm.softmask import Feedback, summarize


@dataclasses.dataclass(frozen=True)
class Replay:
    """How a sampler of the golden set runs here.

    policy: makes it from the stored eta, t_on, t_off, alpha_on.
    total: what the reference's masses of a masked position add up to, from the same and the stored t.
    confident: the policy carries a confidence [B, L], which the set stores before and after a step.
    """

    policy: Callable[[dict[str, float]], Policy]
    total: Callable[[dict[str, float]], float] = lambda p: 1.0
    confident: bool = False


def _loop_total(p: dict[str, float]) -> float:
    """The share of masks at t, as in MDLM, but for the middle phase."""
    t = float(np.float32(p["t"]))  # the reference compares its f32 times with doubles
    if t > p["t_on"]:
        return 1 - (1 - t) * p["alpha_on"] / (1 - p["t_on"])
    return 1.0 if t > p["t_off"] else t * (1 - p["alpha_on"]) / p["t_off"]


SAMPLERS: dict[str, Replay] = {
    "mdlm": Replay(lambda p: Ancestral(), total=lambda p: p["t"]),
    "remdm-cap": Replay(lambda p: Cap(p["eta"])),
    "remdm-loop": Replay(lambda p: Loop(p["eta"], p["t_on"], p["t_off"], p["alpha_on"]), total=_loop_total),
    "remdm-rescale": Replay(lambda p: Rescale(p["eta"])),
    "remdm-conf": Replay(lambda p: Confidence(), confident=True),
    "forward-backward": Replay(lambda p: ForwardBackward()),
}


def sampler(name: str) -> Replay:
    if name not in SAMPLERS:
        pytest.fail(
            f"got golden arrays of {name!r}, wanted a policy for them: add it to SAMPLERS in golden/forms.py",
            pytrace=False,
        )
    return SAMPLERS[name]


def sparse_form(feedback: Feedback, lam: Any, canvas: np.ndarray, mask_id: int) -> tuple[np.ndarray, np.ndarray]:
    """The reference's (indices, probs) [B, L, K + 1] of our feedback: the token itself first."""
    masked = (canvas == mask_id)[..., None]
    pi = feedback.probs / feedback.probs.sum(-1, keepdims=True)
    indices = np.concatenate([canvas[..., None], np.where(masked, feedback.ids, 0)], -1)
    lam = np.asarray(lam)[..., None]
    return indices, np.concatenate([np.where(masked, 1 - lam, 1.0), np.where(masked, lam * pi, 0.0)], -1)


@functools.partial(jax.jit, static_argnums=0)
def chances(policy: Policy, canvas, masked, draw: Draw, times: Times, carry) -> tuple[jax.Array, jax.Array]:
    """(chance to commit, chance to re-mask) [B, L], found by bisection on the uniform that is handed to the policy.

    A uniform u commits, or re-masks, where it is below the policy's chance.
    """

    def bisect(which: int) -> jax.Array:
        def hit(u: jax.Array) -> jax.Array:
            return policy(u, canvas, masked, draw, times, carry)[which]

        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) / 2
            return jnp.where(hit(middle), middle, low), jnp.where(hit(middle), high, middle)

        zeros = jnp.zeros(canvas.shape)
        _, high = jax.lax.fori_loop(0, 60, halve, (zeros, zeros + 1))
        return jnp.where(hit(zeros), high, 0.0)

    return jnp.where(masked, bisect(0), 0.0), jnp.where(masked, 0.0, bisect(1))


def mixture(commit: Any, remask: Any, probs: np.ndarray, canvas: np.ndarray, mask_id: int) -> np.ndarray:
    """q(x_s) [B, L, V] f64 of the chances [B, L] and p(x_0) [B, L, V]: what one step draws from."""
    commit, remask = np.float64(commit)[..., None], np.float64(remask)[..., None]
    ids = np.arange(probs.shape[-1])
    to_mask, to_token = ids == mask_id, ids == canvas[..., None]
    masked = np.where(to_mask, 1 - commit, commit * probs)
    return np.where((canvas == mask_id)[..., None], masked, np.where(to_mask, remask, (1 - remask) * to_token))


_summarized = jax.jit(summarize, static_argnums=2)


def draw_of(probs: np.ndarray, tokens: np.ndarray, canvas: np.ndarray, mask_id: int) -> Draw:
    """A draw of the given tokens [B, L] from p(x_0) [B, L, V]."""
    log_p = jnp.log(jnp.maximum(probs, 1e-30))
    chosen = jnp.take_along_axis(log_p, tokens[..., None], -1)[..., 0]
    masked = jnp.asarray(canvas == mask_id)
    return Draw(jnp.asarray(tokens), jnp.where(masked, chosen, 0.0), _summarized(log_p, masked, 2))
