"""Mixers: how the mask and the candidate become one embedding. A new mixer is a class here and an entry in MIXERS.

Shapes: B examples, L positions, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class Mixer(Protocol):
    """(mask embedding and candidate embedding [B, L, D] f32, lam [B, L, 1] f32) -> [B, L, D].

    A frozen dataclass whose fields stand in config.softmask.
    """

    def __call__(self, mask: jax.Array, candidate: jax.Array, lam: jax.Array) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Lerp:
    """(1 - lam) mask + lam candidate: the paper's mix."""

    def __call__(self, mask: jax.Array, candidate: jax.Array, lam: jax.Array) -> jax.Array:
        return (1 - lam) * mask + lam * candidate


def _norm(x: jax.Array) -> jax.Array:
    # The floor keeps the gradient at a zero vector finite (a fresh or padded embedding row).
    return jnp.sqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-12)


@dataclasses.dataclass(frozen=True)
class _NormKeeping:
    """What fixes the length of the mix and leaves its direction to a subclass.

    Attributes:
      norm: 'interpolated' from the mask's to the candidate's, or 'mask': always the mask's.
    """

    norm: str = "interpolated"

    def __post_init__(self):
        if self.norm not in ("interpolated", "mask"):
            raise ValueError(f"softmask.norm: got {self.norm!r}, wanted 'interpolated' or 'mask'")

    def length(self, mask_norm: jax.Array, candidate_norm: jax.Array, lam: jax.Array) -> jax.Array:
        return mask_norm if self.norm == "mask" else Lerp()(mask_norm, candidate_norm, lam)


@dataclasses.dataclass(frozen=True)
class NormLerp(_NormKeeping):
    """Lerp rescaled to a norm of its own: the two are far from parallel, so lerp alone shrinks."""

    def __call__(self, mask: jax.Array, candidate: jax.Array, lam: jax.Array) -> jax.Array:
        mixed = Lerp()(mask, candidate, lam)
        return mixed * (self.length(_norm(mask), _norm(candidate), lam) / _norm(mixed))


@dataclasses.dataclass(frozen=True)
class Slerp(_NormKeeping):
    """Rotation from mask to candidate by lam of the angle between them."""

    def __call__(self, mask: jax.Array, candidate: jax.Array, lam: jax.Array) -> jax.Array:
        mask_norm, candidate_norm = _norm(mask), _norm(candidate)
        a, b = mask / mask_norm, candidate / candidate_norm
        cos = jnp.clip(jnp.sum(a * b, -1, keepdims=True), -1 + 1e-6, 1 - 1e-6)
        angle = jnp.arccos(cos)
        # Clipping cos keeps sin(angle) >= 1.4e-3, so (anti)parallel vectors fall back to lerp without a branch.
        direction = (jnp.sin((1 - lam) * angle) * a + jnp.sin(lam * angle) * b) / jnp.sin(angle)
        return direction * self.length(mask_norm, candidate_norm, lam)


@dataclasses.dataclass(frozen=True)
class Add:
    """mask + lam candidate: the mask keeps its full weight (dInfer), so the norm grows."""

    def __call__(self, mask: jax.Array, candidate: jax.Array, lam: jax.Array) -> jax.Array:
        return mask + lam * candidate


MIXERS: dict[str, type[Mixer]] = {"lerp": Lerp, "norm_lerp": NormLerp, "slerp": Slerp, "add": Add}
