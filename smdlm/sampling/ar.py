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
from smdlm.softmask import Feedback


@dataclasses.dataclass(frozen=True)
class ARSampler:
    """The sampler of the AR baseline: L - 1 forwards of one position.

    With an operator (softmask.soften) the next input is not the row of the drawn token but the mean of the remembered
    candidates: soft thinking (2505.15778) from the first token to the last, without a way back to hard tokens. Its
    candidates are those of the unfiltered distribution.
    """

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

        soft = self.denoiser.softmask is not None

        def body(carry, xs):
            token, feedback, cache = carry
            index, given = xs
            hidden, cache = self.denoiser(params, token[:, None], feedback, cache=cache, start=index)
            u = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, index)))(row_keys)
            draw = self.readout.draw(head, hidden, jnp.ones((batch, 1), bool), u[:, None], self.filters)
            token = jnp.where(given == mask_id, draw.ids[:, 0], given)
            if soft:
                feedback = draw.feedback.replace(
                    active=(given == mask_id)[:, None],
                    forwards=feedback.forwards + 1,
                    time=jnp.broadcast_to(1 - (index + 1) / (length - 1), batch),
                )
            return (token, feedback, cache), token

        none = Feedback.none(batch, 1, self.readout.k) if soft else None
        cache = self.denoiser.model.cache(batch, length)
        _, rest = jax.lax.scan(body, (first, none, cache), (jnp.arange(length - 1), canvas[:, 1:].T))
        return Samples(jnp.concatenate([first[:, None], rest.T], axis=1), jnp.int32(length - 1))
