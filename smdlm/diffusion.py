"""The masking process: noise schedule, sampling of t, masking. Shapes: B examples, L positions."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

GOLDEN = 0.6180339887498949  # (sqrt(5) - 1) / 2: i * GOLDEN mod 1 is evenly spread for every run of consecutive i


@dataclasses.dataclass(frozen=True)
class LogLinear:
    """alpha(t) = 1 - (1 - eps) t, the chance that a token is still visible at time t in [0, 1]; MDLM's schedule.

    The NELBO weight is -alpha'(t) / (1 - alpha(t)) = 1 / t exactly, whatever eps.

    Attributes:
      eps: see above.
      replace: chance that a token which stays visible becomes another one, drawn uniformly; then every visible token
        counts in the training loss too, with weight 1. For samplers that look at what they committed.
    """

    eps: float = 1e-3
    replace: float = 0.0

    def __post_init__(self):
        if not 0 <= self.eps < 1:
            raise ValueError(f"noise eps: got {self.eps}, wanted 0 <= eps < 1")
        if not 0 <= self.replace < 1:
            raise ValueError(f"noise.replace: got {self.replace}, wanted 0 <= replace < 1")

    def alpha(self, t: jax.Array) -> jax.Array:
        return 1 - (1 - self.eps) * t

    def weight(self, t: jax.Array) -> jax.Array:
        return 1 / t


@dataclasses.dataclass(frozen=True)
class TimeSampler:
    """t in [t_min, t_max] for each example of the *global* batch, so that the values do not depend on the mesh.

    kind:
      'iid': independent uniforms.
      'stratified': one uniform in each of B strata, in order (the reference's antithetic sampling).
      'weyl': frac(u + i * golden ratio) with one shared u. Unbiased like the others, and every contiguous part of the
        batch (a shard, a micro-batch) is spread over the whole range: masked shares stay near their mean.
    """

    kind: str = "weyl"
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self):
        if self.kind not in ("iid", "stratified", "weyl"):
            raise ValueError(f"time sampling: got {self.kind!r}, wanted 'iid', 'stratified' or 'weyl'")
        if not 0 < self.t_min < self.t_max <= 1:
            raise ValueError(
                f"t range: got [{self.t_min}, {self.t_max}], wanted 0 < t_min < t_max <= 1 (weight is 1/t)"
            )

    def __call__(self, key: jax.Array, batch: int) -> jax.Array:
        """[B] f32."""
        index = jnp.arange(batch)
        if self.kind == "weyl":
            # Reduced before it meets f32: at index 1e6 the product's ulp would be 0.06.
            turns = jnp.asarray([(i * GOLDEN) % 1.0 for i in range(batch)], jnp.float32)
            u = (jax.random.uniform(key) + turns) % 1.0
        else:
            u = jax.random.uniform(key, (batch,))
            if self.kind == "stratified":
                u = (u / batch + index / batch) % 1.0
        return self.t_min + (self.t_max - self.t_min) * u

    def by_number(self, key: jax.Array, numbers: jax.Array) -> jax.Array:
        """[B] f32 for examples with these numbers [B] i32, which depend on (key, number) alone: for evaluation.

        Weyl's, whatever the kind: any run of consecutive numbers is spread over the whole range.
        """
        # number * GOLDEN mod 1 in whole numbers, exact to 2^-32: an f32 product would be off by 0.06 at number 1e6.
        turns = numbers.astype(jnp.uint32) * np.uint32(round(GOLDEN * 2**32))
        u = (jax.random.uniform(key) + turns.astype(jnp.float32) * np.float32(2**-32)) % 1.0
        return self.t_min + (self.t_max - self.t_min) * u


def uniforms_by_number(key: jax.Array, numbers: jax.Array, length: int) -> jax.Array:
    """Uniforms [B, L] in [0, 1) of examples with these numbers [B]; each row depends on (key, number) alone."""

    def draw(number: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, number), (length,))

    return jax.vmap(draw)(numbers)


def mask_tokens(
    key: jax.Array, tokens: jax.Array, mask_chance: jax.Array, mask_id: int, frozen: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """x_t and where it is masked: tokens [B, L], mask_chance [B] -> ([B, L] i32, [B, L] bool).

    frozen: [B, L] bool, positions that are never masked (prompts). One uniform per position decides, so canvases at
    a smaller chance with the same key are nested.
    """
    chex.assert_rank([tokens, mask_chance], [2, 1])
    return mask_where(jax.random.uniform(key, tokens.shape), tokens, mask_chance, mask_id, frozen)


def mask_where(
    u: jax.Array, tokens: jax.Array, mask_chance: jax.Array, mask_id: int, frozen: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The same with the uniforms [B, L] handed in."""
    masked = u < mask_chance[:, None]
    if frozen is not None:
        masked &= ~frozen
    return jnp.where(masked, mask_id, tokens), masked
