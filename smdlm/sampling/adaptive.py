"""Policies whose number of tokens per step follows the model's confidence instead of a schedule.

All measures are of the unfiltered distribution at temperature 1. Every step commits at least one position of each row
that has masks left; what the steps do not suffice for is left to the sampler's last argmax.

Shapes: B examples, L positions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from smdlm.readout import Draw
from smdlm.sampling.policy import Lasting, Revising, Times


def _check(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ValueError(f"sampling.{name}: got {value}, wanted {least:g} <= {name} <= {most:g}")


def _surest_first(cost: jax.Array, masked: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cost [B, L] of the masked positions in ascending order, 0 behind them; rank [B, L] of each position in it)."""
    order = jnp.argsort(jnp.where(masked, cost, jnp.inf), axis=1)
    ascending = jnp.take_along_axis(jnp.where(masked, cost, 0.0), order, axis=1)
    return ascending, jnp.argsort(order, axis=1)


class _Prefix:
    """Commits a prefix of the masked positions, the surest first."""

    def init(self, masked: jax.Array) -> Any:
        return ()

    def cost(self, draw: Draw) -> jax.Array:
        """How unsure each position is, [B, L]."""
        raise NotImplementedError

    def fits(self, cost: jax.Array) -> jax.Array:
        """Of costs in ascending order: whether the prefix that ends here may be committed, [B, L]."""
        raise NotImplementedError

    def __call__(
        self, u: jax.Array, canvas: jax.Array, masked: jax.Array, draw: Draw, times: Times, carry: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        cost, rank = _surest_first(self.cost(draw), masked)
        fits = self.fits(cost) | (jnp.arange(cost.shape[1]) == 0)
        prefix = jnp.cumprod(fits.astype(jnp.int32), axis=1) > 0
        return jnp.take_along_axis(prefix, rank, axis=1) & masked, jnp.zeros_like(masked), carry


@dataclasses.dataclass(frozen=True)
class EntropyBound(_Prefix):
    """EB sampler: the longest prefix by entropy with sum H - max H <= bound, in nats; 0 commits one token per step."""

    bound: float = 0.1

    def __post_init__(self):
        if not self.bound >= 0:
            raise ValueError(f"sampling.bound: got {self.bound}, wanted >= 0 (nats)")

    def cost(self, draw: Draw) -> jax.Array:
        return -draw.feedback.neg_entropy

    def fits(self, cost: jax.Array) -> jax.Array:
        return jnp.cumsum(cost, axis=1) - cost <= self.bound  # in ascending order the largest is the last


@dataclasses.dataclass(frozen=True)
class Factor(_Prefix):
    """Fast-dLLM: the longest prefix by confidence c with (n + 1) (1 - c_n) <= factor, n = 1, 2, ..."""

    factor: float = 1.0

    def __post_init__(self):
        if not self.factor >= 0:
            raise ValueError(f"sampling.factor: got {self.factor}, wanted >= 0")

    def cost(self, draw: Draw) -> jax.Array:
        return 1 - draw.feedback.probs[..., 0]

    def fits(self, cost: jax.Array) -> jax.Array:
        return (2 + jnp.arange(cost.shape[1])) * cost <= self.factor


def _sure(draw: Draw, masked: jax.Array, threshold: float | jax.Array) -> jax.Array:
    """Masked positions whose best token has at least this probability ([] or [B, 1]), and the surest of each row."""
    confidence = jnp.where(masked, draw.feedback.probs[..., 0], -1.0)
    surest = jnp.arange(masked.shape[1]) == jnp.argmax(confidence, axis=1, keepdims=True)
    return (surest | (confidence >= threshold)) & masked


@dataclasses.dataclass(frozen=True)
class Threshold(Lasting):
    """Fast-dLLM: every position whose best token has at least this probability, and always the surest.

    Attributes:
      threshold: that probability.
      start, decay: at step n = 0, 1, ... it is start - decay * n where that is more (dInfer: start 1, decay .02). n
        counts the passes of a row, also from one block to the next.
    """

    threshold: float = 0.9
    start: float = 0.0
    decay: float = 0.02

    def __post_init__(self):
        for name in ("threshold", "start", "decay"):
            _check(name, getattr(self, name), 0, 1)

    def init(self, masked: jax.Array) -> Any:
        return jnp.zeros(len(masked), jnp.int32)

    def __call__(
        self, u: jax.Array, canvas: jax.Array, masked: jax.Array, draw: Draw, times: Times, carry: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        threshold = jnp.maximum(self.threshold, self.start - self.decay * carry)
        return _sure(draw, masked, threshold[:, None]), jnp.zeros_like(masked), carry + 1


# ------------------------------------------------------------------------------------------------- second thoughts


@dataclasses.dataclass(frozen=True)
class TokenToMask(Revising):
    """T2M: commits like `Threshold`, and masks again what it has come to doubt.

    Attributes:
      threshold: of committing.
      detector: 'low_prob' doubts a token whose probability is below `doubt`; 'better' one that is no longer the best,
        where the best has at least probability `doubt` (the source's t2t_remask).
      cap: how often a position may be masked again.
      ratio: largest share of the row's positions that one step masks again, the least probable tokens first.
    """

    threshold: float = 0.9
    detector: str = "low_prob"
    doubt: float = 0.3
    cap: int = 1
    ratio: float = 0.25

    def __post_init__(self):
        for name in ("threshold", "doubt", "ratio"):
            _check(name, getattr(self, name), 0, 1)
        if self.detector not in ("low_prob", "better"):
            raise ValueError(f"sampling.detector: got {self.detector!r}, wanted 'low_prob' or 'better'")
        if self.cap < 0:
            raise ValueError(f"sampling.cap: got {self.cap}, wanted >= 0")

    def init(self, masked: jax.Array) -> Any:
        """(how often each position was masked again [B, L], positions that are not the prompt's [B, L])."""
        return jnp.zeros(masked.shape, jnp.int32), masked

    def __call__(
        self, u: jax.Array, canvas: jax.Array, masked: jax.Array, draw: Draw, times: Times, carry: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
        again, free = carry
        best, best_prob = draw.feedback.ids[..., 0], draw.feedback.probs[..., 0]
        if self.detector == "low_prob":
            doubted = draw.canvas_prob < self.doubt
        else:
            doubted = (best != canvas) & (best_prob >= self.doubt)
        doubted &= free & ~masked & (again < self.cap)
        _, rank = _surest_first(draw.canvas_prob, doubted)
        remask = doubted & (rank < jnp.floor(self.ratio * free.sum(1, keepdims=True)))
        return _sure(draw, masked, self.threshold), remask, jnp.full_like(canvas, -1), (again + remask, free)


@dataclasses.dataclass(frozen=True)
class Edit(Revising):
    """LLaDA2.1's token-to-token editing: commits like `Threshold`, and replaces a token when another one is sure.

    Attributes:
      threshold: of committing.
      edit_threshold: least probability of the best token that replaces another one; 1 never edits.
      rising: it must also be larger than that of the best token whenever this position was set before (EvoToken).
    """

    threshold: float = 0.9
    edit_threshold: float = 0.9
    rising: bool = False

    def __post_init__(self):
        for name in ("threshold", "edit_threshold"):
            _check(name, getattr(self, name), 0, 1)

    def init(self, masked: jax.Array) -> Any:
        """The probability of the best token when each position was last set, [B, L]."""
        return jnp.zeros(masked.shape)

    def __call__(
        self, u: jax.Array, canvas: jax.Array, masked: jax.Array, draw: Draw, times: Times, carry: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
        best, best_prob = draw.feedback.ids[..., 0], draw.feedback.probs[..., 0]
        commit = _sure(draw, masked, self.threshold)
        change = ~masked & (best != canvas) & (best_prob > self.edit_threshold)
        if self.rising:
            change &= best_prob > carry
        edit = jnp.where(change, best, -1)
        return commit, jnp.zeros_like(masked), edit, jnp.where(commit | change, best_prob, carry)
