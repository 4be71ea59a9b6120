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
