"""The number of tokens per step of Dream's public code, for any order of `policies`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from smdlm.readout import Draw
from smdlm.sampling.policies import Entropy, Margin, MaxProbability, Times


@dataclasses.dataclass(frozen=True)
class Transfer:
    """The public code's number of positions per step, in the order of a policy: the floor of masks * (1 - s / t).

    Because its times end at 1e-3, as many steps as masks unmask none in the first step and two in the last. `policies`
    follow the schedule exactly.

    Attributes:
      order: whose confidence decides. sampled: that of `MaxProbability` is of the drawn token, not of the best one.
    """

    order: MaxProbability | Margin | Entropy
    sampled: bool = False

    def init(self, masked: jax.Array) -> Any:
        return ()

    def __call__(
        self, u: jax.Array, canvas: jax.Array, masked: jax.Array, draw: Draw, times: Times, carry: Any
    ) -> tuple[jax.Array, jax.Array, Any]:
        if self.sampled and isinstance(self.order, MaxProbability):
            probs = draw.feedback.probs.at[..., 0].set(jnp.exp(draw.log_prob))
            draw = draw.replace(feedback=draw.feedback.replace(probs=probs))
        count = self.count(masked.sum(1), times)
        best = jnp.argsort(jnp.where(masked, self.order.score(u, draw), -jnp.inf), axis=1, descending=True)
        return jnp.argsort(best, axis=1) < count[:, None], jnp.zeros_like(masked), carry

    def count(self, left: jax.Array, times: Times) -> jax.Array:
        """How many of `left` masks [B] are unmasked from t to s."""
        return (left.astype(jnp.float32) * (1 - times.s / times.t)).astype(jnp.int32)
