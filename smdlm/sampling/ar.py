"""Left-to-right sampling of causal models with a KV cache. Shapes: B examples, L positions."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from smdlm.denoiser import Denoiser
from smdlm.ops.filters import Filters
from smdlm.readout import Readout
from smdlm.sampling.loop import Samples


@dataclasses.dataclass(frozen=True)
class ARSampler:
    """The sampler of the AR baseline: L - 1 forwards of one position."""

    denoiser: Denoiser
    readout: Readout
    bos_id: int
    filters: Filters = Filters()

    @functools.partial(jax.jit, static_argnums=0)
    def __call__(self, params: Any, key: jax.Array, canvas: jax.Array) -> Samples:
        """Fills every mask of the canvas [B, L] (a masked first position becomes BOS); other positions are forced."""
        batch, length = canvas.shape
        row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
        head, mask_id = self.denoiser.head(params), self.denoiser.mask_id
        first = jnp.where(canvas[:, 0] == mask_id, self.bos_id, canvas[:, 0])

        def body(carry, xs):
            token, cache = carry
            index, given = xs
            hidden, cache = self.denoiser(params, token[:, None], cache=cache, start=index)
            u = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, index)))(row_keys)
            draw = self.readout.draw(head, hidden, jnp.ones((batch, 1), bool), u[:, None], self.filters)
            token = jnp.where(given == mask_id, draw.ids[:, 0], given)
            return (token, cache), token

        cache = self.denoiser.model.cache(batch, length)
        _, rest = jax.lax.scan(body, (first, cache), (jnp.arange(length - 1), canvas[:, 1:].T))
        return Samples(jnp.concatenate([first[:, None], rest.T], axis=1), jnp.int32(length - 1))
