"""Which positions are committed or masked again at a step of sampling. A new sampler is one class here.

A policy is a frozen dataclass behind the protocol `Policy`; its randomness is one uniform per position, handed in, so
that a run can be replayed and a row does not depend on its neighbours.

Shapes: B examples, L positions, T steps.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from smdlm.readout import Draw


class Times(flax.struct.PyTreeNode):
    """One step of the schedule: from t to s < t, both f32; stacked [T] it is the `xs` of the sampler's scan."""

    t: jax.Array
    s: jax.Array


def linear_times(steps: int, end: float = 1e-5) -> Times:
    """t from 1 down to `end` in equal steps, [T]; the reference's grid (float32 linspace, float64 step)."""
    if steps < 1:
        raise ValueError(f"sampling steps: got {steps}, wanted at least 1")
    t = np.linspace(1.0, end, steps + 1).astype(np.float32)[:-1]
    return Times(t=jnp.asarray(t), s=jnp.asarray(t - np.float32((1 - end) / steps)))


class Policy(Protocol):
    """init(canvas) -> carry (a pytree of [B, ...] arrays, or ()); one step as below."""

    def init(self, canvas: jax.Array) -> Any: ...

    def __call__(
        self, u: jax.Array, canvas: jax.Array, masked: jax.Array, draw: Draw, times: Times, carry: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        """(commit [B, L] bool, remask [B, L] bool, carry).

        u: [B, L] uniforms in [0, 1). canvas: [B, L] i32. masked: [B, L] bool. draw: candidates for masked positions.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Ancestral:
    """MDLM: a masked position is committed with probability (t - s) / t, a committed one stays."""

    def init(self, canvas: jax.Array) -> Any:
        return ()

    def __call__(
        self, u: jax.Array, canvas: jax.Array, masked: jax.Array, draw: Draw, times: Times, carry: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        return u * times.t < times.t - times.s, jnp.zeros_like(masked), carry


@dataclasses.dataclass(frozen=True)
class _ReMDM:
    """ReMDM: a committed token is masked again with chance sigma, a masked one committed with the rest of the mass.

    With a = 1 - t, the chance to be visible: commit (a_s - (1 - sigma) a_t) / (1 - a_t), so that the share of visible
    tokens follows the schedule whatever sigma. sigma_max = min(1, (1 - a_s) / a_t) keeps that mass non-negative.

    Attributes:
      eta: how much is re-masked; its meaning is the subclass's.
    """

    eta: float = 0.04

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise ValueError(f"sampling.eta: got {self.eta}, wanted 0 <= eta <= 1")

    def init(self, canvas: jax.Array) -> Any:
        return ()

    def sigma(self, sigma_max: jax.Array, carry: Any) -> jax.Array:
        raise NotImplementedError

    def __call__(
        self, u: jax.Array, canvas: jax.Array, masked: jax.Array, draw: Draw, times: Times, carry: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        visible_t, visible_s = 1 - times.t, 1 - times.s
        sigma_max = jnp.where(visible_t > 0, jnp.minimum(1.0, times.s / jnp.maximum(visible_t, 1e-30)), 1.0)
        sigma = self.sigma(sigma_max, carry)
        return _move(u, visible_t, visible_s, sigma, masked) + (carry,)


def _move(
    u: jax.Array, visible_t: jax.Array, visible_s: jax.Array, sigma: jax.Array, masked: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(commit, remask) at the given shares of visible tokens and re-masking chance sigma ([] or [B, L])."""
    commit = (visible_s - (1 - sigma) * visible_t) / (1 - visible_t)
    return jnp.broadcast_to(u < commit, masked.shape), jnp.broadcast_to(u < sigma, masked.shape)


@dataclasses.dataclass(frozen=True)
class Cap(_ReMDM):
    """sigma = min(eta, sigma_max); the paper's eta is .04 at NFE 128, 256 and 512."""

    def sigma(self, sigma_max: jax.Array, carry: Any) -> jax.Array:
        return jnp.minimum(self.eta, sigma_max)


@dataclasses.dataclass(frozen=True)
class Rescale(_ReMDM):
    """sigma = eta * sigma_max."""

    eta: float = 0.015

    def sigma(self, sigma_max: jax.Array, carry: Any) -> jax.Array:
        return self.eta * sigma_max


@dataclasses.dataclass(frozen=True)
class Confidence(_ReMDM):
    """ReMDM-conf: sigma_max is shared out over the visible positions by how unsure their tokens were when drawn.

    The carry [B, L] is minus the probability a token was drawn with; -inf where masked, whose share is 0.
    """

    def init(self, canvas: jax.Array) -> Any:
        return jnp.full(canvas.shape, -jnp.inf)

    def __call__(
        self, u: jax.Array, canvas: jax.Array, masked: jax.Array, draw: Draw, times: Times, carry: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        # A prompt has no drawn probability and is never re-masked: its share stays 0 too.
        share = jnp.where(jnp.isfinite(carry) & ~masked, jax.nn.softmax(carry, axis=-1), 0.0)
        commit, remask, _ = super().__call__(u, canvas, masked, draw, times, share)
        commit, remask = commit & masked, remask & ~masked
        after = jnp.where(commit, -jnp.exp(draw.log_prob), jnp.where(remask, -jnp.inf, carry))
        return commit, remask, after

    def sigma(self, sigma_max: jax.Array, carry: Any) -> jax.Array:
        return carry * sigma_max


@dataclasses.dataclass(frozen=True)
class Loop:
    """ReMDM-loop: unmask to a share alpha_on, keep it there while re-masking eta per step, then finish.

    The three phases are t > t_on, t_on >= t > t_off and t <= t_off, decided by t alone. Paper: NFE 1024.
    """

    eta: float = 0.02
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9

    def __post_init__(self):
        if not 0 < self.t_off < self.t_on < 1:
            raise ValueError(f"sampling.t_on, t_off: got {self.t_on}, {self.t_off}, wanted 0 < t_off < t_on < 1")
        # Otherwise the commit mass of the middle phase, eta alpha_on / (1 - alpha_on), exceeds 1.
        if not 0 < self.alpha_on < 1 or not 0 <= self.eta <= (1 - self.alpha_on) / self.alpha_on:
            raise ValueError(
                f"sampling.eta, alpha_on: got {self.eta}, {self.alpha_on}, wanted 0 < alpha_on < 1 and "
                "0 <= eta <= (1 - alpha_on) / alpha_on"
            )

    def init(self, canvas: jax.Array) -> Any:
        return ()

    def __call__(
        self, u: jax.Array, canvas: jax.Array, masked: jax.Array, draw: Draw, times: Times, carry: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        def hidden_share(t: jax.Array) -> jax.Array:
            early = 1 - (1 - t) * self.alpha_on / (1 - self.t_on)
            late = t * (1 - self.alpha_on) / self.t_off
            return jnp.where(times.t > _below(self.t_on), early, late)

        middle = (times.t <= _below(self.t_on)) & (times.t > _below(self.t_off))
        visible = lambda t: jnp.where(middle, self.alpha_on, 1 - hidden_share(t))
        sigma = jnp.where(middle, self.eta, 0.0)
        return _move(u, visible(times.t), visible(times.s), sigma, masked) + (carry,)


def _below(x: float) -> np.float32:
    """The largest f32 <= x: comparing an f32 with it is comparing it with the double x, as the reference does."""
    rounded = np.float32(x)
    return rounded if float(rounded) <= x else np.nextafter(rounded, np.float32(-np.inf))


@dataclasses.dataclass(frozen=True)
class ForwardBackward:
    """FB: a step of the backward process, then one of the forward process: sigma = (a_s - a_t) / a_t, at most 1."""

    def init(self, canvas: jax.Array) -> Any:
        return ()

    def __call__(
        self, u: jax.Array, canvas: jax.Array, masked: jax.Array, draw: Draw, times: Times, carry: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        visible_t, visible_s = 1 - times.t, 1 - times.s
        sigma = jnp.minimum(1.0, (visible_s - visible_t) / jnp.maximum(visible_t, 1e-30))
        return _move(u, visible_t, visible_s, sigma, masked) + (carry,)
