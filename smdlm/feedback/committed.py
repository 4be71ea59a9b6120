"""Operators that feed the prediction back at committed positions too, where the canvas already holds a token.

The canvas counts as one block. A model that was trained by the loss of masked tokens alone predicts nothing useful at
visible ones: noise.replace trains that.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from smdlm.mesh import traced
from smdlm.softmask import Feedback, SoftMask


@dataclasses.dataclass(frozen=True)
class Stages(SoftMask):
    """EvoToken: a masked position is the mix of mask and candidate, a committed one the candidate alone.

    The token's own row has no weight of its own: a committed position stays soft, and follows the model's mind.
    """

    everywhere = True

    def __call__(
        self, omega: Any, table: jax.Array, head: Any, tokens: jax.Array, feedback: Feedback, mask_id: int
    ) -> jax.Array:
        rows, candidate, neg_entropy = self.look_up(omega, table, head, tokens, feedback)
        soft = self.mixer(rows, candidate, self.lam(omega, table, feedback, neg_entropy))
        soft = jnp.where((tokens == mask_id)[..., None], soft, candidate)
        return jnp.where(feedback.active[..., None], soft, rows)


@dataclasses.dataclass(frozen=True)
class Doubt(SoftMask):
    """DMax: a masked position is the plain mask, a committed one a mix of the mask and the candidate.

    With gate 'confidence', mixer 'norm_lerp' and k = 1 as published: what the model is not sure of looks half masked.
    """

    everywhere = True
    mixes = False

    def __call__(
        self, omega: Any, table: jax.Array, head: Any, tokens: jax.Array, feedback: Feedback, mask_id: int
    ) -> jax.Array:
        rows, candidate, neg_entropy = self.look_up(omega, table, head, tokens, feedback)
        mask = traced.lookup(table, jnp.full((1, 1), mask_id)).astype(jnp.float32)
        soft = self.mixer(mask, candidate, self.lam(omega, table, feedback, neg_entropy))
        return jnp.where((feedback.active & (tokens != mask_id))[..., None], soft, rows)
