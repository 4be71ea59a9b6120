"""Which positions are committed or masked again at a step of sampling. A new sampler is one class here.

A policy is a frozen dataclass behind the protocol `Policy` (policy.py); its fields are config fields
(config.sampling.eta, ...). Its randomness is one uniform per position, handed in, so that a run can be replayed and a
row does not depend on its neighbours.

Shapes: B examples, L positions, T steps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smdlm.readout import Draw
from smdlm.sampling.adaptive import Edit, EntropyBound, Factor, Threshold, TokenToMask
from smdlm.sampling.policy import Drawing, Policy, Times


def linear_times(steps: int, end: float = 1e-5) -> Times:
    """t from 1 down to `end` in equal steps, [T]; the reference's grid (float32 linspace, float64 step)."""
    if steps < 1:
        raise ValueError(f"sampling.steps: got {steps}, wanted at least 1")
    t = np.linspace(1.0, end, steps + 1).astype(np.float32)[:-1]
    return Times(t=jnp.asarray(t), s=jnp.asarray(t - np.float32((1 - end) / steps)))


@dataclasses.dataclass(frozen=True)
class Ancestral:
    """MDLM: a masked position is committed with probability (t - s) / t, a committed one stays."""

    def init(self, masked: jax.Array) -> Any:
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
    """

    def init(self, masked: jax.Array) -> Any:
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


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"sampling.{name}: got {value}, wanted 0 <= {name} <= 1")


@dataclasses.dataclass(frozen=True)
class Cap(_ReMDM):
    """sigma = min(eta, sigma_max); the paper's eta is .04 at NFE 128, 256 and 512."""

    eta: float = 0.04

    def __post_init__(self):
        _check_share("eta", self.eta)

    def sigma(self, sigma_max: jax.Array, carry: Any) -> jax.Array:
        return jnp.minimum(self.eta, sigma_max)


@dataclasses.dataclass(frozen=True)
class Rescale(_ReMDM):
    """sigma = eta * sigma_max."""

    eta: float = 0.015

    def __post_init__(self):
        _check_share("eta", self.eta)

    def sigma(self, sigma_max: jax.Array, carry: Any) -> jax.Array:
        return self.eta * sigma_max


@dataclasses.dataclass(frozen=True)
class Confidence(_ReMDM, Drawing):
    """ReMDM-conf: sigma_max is shared out over the visible positions by how unsure their tokens were when drawn.

    The carry [B, L] is minus the probability a token was drawn with; -inf where masked, whose share is 0.
    """

    def init(self, masked: jax.Array) -> Any:
        return jnp.full(masked.shape, -jnp.inf)

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

    def init(self, masked: jax.Array) -> Any:
        return ()

    def __call__(
        self, u: jax.Array, canvas: jax.Array, masked: jax.Array, draw: Draw, times: Times, carry: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        def hidden_share(t: jax.Array) -> jax.Array:
            early = 1 - (1 - t) * self.alpha_on / (1 - self.t_on)
            late = t * (1 - self.alpha_on) / self.t_off
            return jnp.where(times.t > _below(self.t_on), early, late)

        middle = (times.t <= _below(self.t_on)) & (times.t > _below(self.t_off))

        def visible(t: jax.Array) -> jax.Array:
            return jnp.where(middle, self.alpha_on, 1 - hidden_share(t))

        sigma = jnp.where(middle, self.eta, 0.0)
        return _move(u, visible(times.t), visible(times.s), sigma, masked) + (carry,)


def _below(x: float) -> np.float32:
    """The largest f32 <= x: comparing an f32 with it is comparing it with the double x, as the reference does."""
    rounded = np.float32(x)
    return rounded if float(rounded) <= x else np.nextafter(rounded, np.float32(-np.inf))


@dataclasses.dataclass(frozen=True)
class ForwardBackward:
    """FB: a step of the backward process, then one of the forward process: sigma = (a_s - a_t) / a_t, at most 1."""

    def init(self, masked: jax.Array) -> Any:
        return ()

    def __call__(
        self, u: jax.Array, canvas: jax.Array, masked: jax.Array, draw: Draw, times: Times, carry: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        visible_t, visible_s = 1 - times.t, 1 - times.s
        sigma = jnp.minimum(1.0, (visible_s - visible_t) / jnp.maximum(visible_t, 1e-30))
        return _move(u, visible_t, visible_s, sigma, masked) + (carry,)


# ------------------------------------------------------------------------------------------ a number of tokens per step


class _Counted:
    """Unmasks a set number of positions per step and row, those of the highest score; nothing is masked again.

    The carry [B] is how many masks each row began with. After a step to s, round(that * s) of them remain: the count
    follows the schedule exactly, row by row (Dream's public code takes the mean over the batch instead).
    """

    def init(self, masked: jax.Array) -> Any:
        return masked.sum(1)

    def score(self, u: jax.Array, draw: Draw) -> jax.Array:
        raise NotImplementedError

    def count(self, left: jax.Array, wanted: jax.Array) -> jax.Array:
        """Positions to unmask [B], when `left` are masked and `wanted` should be after this step."""
        return left - wanted

    def __call__(
        self, u: jax.Array, canvas: jax.Array, masked: jax.Array, draw: Draw, times: Times, carry: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        count = self.count(masked.sum(1), jnp.round(carry * times.s).astype(jnp.int32))
        best = jnp.argsort(jnp.where(masked, self.score(u, draw), -jnp.inf), axis=1, descending=True)
        rank = jnp.argsort(best, axis=1)  # ranks, not a threshold: ties must not change the count
        return rank < count[:, None], jnp.zeros_like(masked), carry


@dataclasses.dataclass(frozen=True)
class _Confident(_Counted):
    """The positions the model is surest of; the measures are of the unfiltered distribution at temperature 1.

    Attributes:
      order_temperature: 0 takes the largest confidences. T > 0 draws positions one after another without replacement,
        with probabilities softmax(confidence / T) over those still masked: the largest of confidence / T + Gumbel.
    """

    order_temperature: float = 0.0

    def __post_init__(self):
        if not self.order_temperature >= 0:
            raise ValueError(f"sampling.order_temperature: got {self.order_temperature}, wanted >= 0 (0: no noise)")

    def confidence(self, draw: Draw) -> jax.Array:
        raise NotImplementedError

    def score(self, u: jax.Array, draw: Draw) -> jax.Array:
        if self.order_temperature == 0:
            return self.confidence(draw)
        # The exponential -log(1 - u) is accurate where it counts, near 0; log(-log(u)) would cut the winners' tail.
        return self.confidence(draw) / self.order_temperature - jnp.log(-jnp.log1p(-u))


@dataclasses.dataclass(frozen=True)
class MaxProbability(_Confident):
    """Confidence is the largest probability (MaskGIT)."""

    def confidence(self, draw: Draw) -> jax.Array:
        return draw.feedback.probs[..., 0]


@dataclasses.dataclass(frozen=True)
class Margin(_Confident):
    """Confidence is the largest probability minus the second largest."""

    def confidence(self, draw: Draw) -> jax.Array:
        return draw.feedback.probs[..., 0] - draw.feedback.probs[..., 1]


@dataclasses.dataclass(frozen=True)
class Entropy(_Confident):
    """Confidence is minus the entropy, in nats."""

    def confidence(self, draw: Draw) -> jax.Array:
        return draw.feedback.neg_entropy


@dataclasses.dataclass(frozen=True)
class FirstHitting(_Counted):
    """First-hitting sampler (Zheng et al. 2024): one uniformly chosen position per event, one event per forward.

    Of n masks each is the next to be hit with chance 1 / n, at t u^(1/n); a model without time conditioning does not
    see when, so the times need not be drawn. A row with n masks is done after n steps; with fewer steps than masks the
    events that the schedule puts into one step share its forward.
    """

    def score(self, u: jax.Array, draw: Draw) -> jax.Array:
        return u

    def count(self, left: jax.Array, wanted: jax.Array) -> jax.Array:
        return jnp.maximum(left - wanted, jnp.minimum(left, 1))


POLICIES: dict[str, type[Policy]] = {
    "mdlm": Ancestral,
    "remdm_cap": Cap,
    "remdm_rescale": Rescale,
    "remdm_conf": Confidence,
    "remdm_loop": Loop,
    "forward_backward": ForwardBackward,
    "max_prob": MaxProbability,
    "margin": Margin,
    "entropy": Entropy,
    "first_hitting": FirstHitting,
    "entropy_bound": EntropyBound,
    "factor": Factor,
    "threshold": Threshold,
    "remask": TokenToMask,
    "edit": Edit,
}
