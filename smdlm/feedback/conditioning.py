"""Operators that add a learned function of the last forward to every row of the canvas: self-conditioning.

All are zero at the start, so that training begins at the binary model, and all let the gate weigh what they add: gate
'constant' with scale 1 is the published form. Their matrices train like the backbone's.

Shapes: B examples, L positions, D width, F inner width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from smdlm.feedback.gates import Params
from smdlm.feedback.mixers import Lerp
from smdlm.full_softmask import FullSoftMask
from smdlm.mesh import traced
from smdlm.models.base import MatrixAxes
from smdlm.softmask import Feedback, SoftMask

ZEROS = nn.initializers.zeros
logical = nn.with_logical_partitioning  # names the axes, for mesh/rules.py


def _refuse_mixer(operator: SoftMask) -> None:
    if operator.mixer != Lerp():
        raise ValueError(
            f"softmask.mixer: got {operator.mixer} for {type(operator).__name__}, wanted 'lerp': it adds to the rows, "
            "whatever the mixer"
        )


def _normalised(x: jax.Array) -> jax.Array:
    """x [..., D] with a mean square of 1."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)


@dataclasses.dataclass(frozen=True)
class Projection(FullSoftMask):
    """Chen et al. 2023 in additive form: row + lam * (expected embedding @ W), W [D, D] zero at the start."""

    everywhere = True
    mixes = False

    learn: bool = False

    def __post_init__(self):
        super().__post_init__()
        _refuse_mixer(self)

    def init(self, key: jax.Array | None = None, width: int | None = None) -> Params:
        matrix = logical(ZEROS, ("embed", None))(key, (width, width))
        return {**super().init(), "project": matrix}

    def matrices(self) -> Mapping[str, MatrixAxes | None]:
        return {"project": MatrixAxes((0,), (1,))}

    def added(self, omega: Params, candidate: jax.Array) -> jax.Array:
        """What is added to the rows, of the expected embeddings [B, L, D]."""
        return candidate @ omega["project"]

    def __call__(
        self, omega: Params, table: jax.Array, head: Any, tokens: jax.Array, feedback: Feedback, mask_id: int
    ) -> jax.Array:
        rows, candidate, neg_entropy = self.look_up(omega, table, head, tokens, feedback)
        added = self.lam(omega, table, feedback, neg_entropy) * self.added(omega, candidate)
        return jnp.where(feedback.active[..., None], rows + added, rows)


@dataclasses.dataclass(frozen=True)
class GatedFeedForward(Projection):
    """DiffusionGemma: a gated GeLU of the normalised expected embedding, 3 D F + D parameters.

    Its norm of the sum is left out: it would also change every row that remembers nothing.

    Attributes:
      inner: F.
    """

    inner: int = 256

    def __post_init__(self):
        super().__post_init__()
        if self.inner < 1:
            raise ValueError(f"softmask.inner: got {self.inner}, wanted at least 1")

    def init(self, key: jax.Array | None = None, width: int | None = None) -> Params:
        key_gate, key_up = jax.random.split(key)
        normal = nn.initializers.normal(1 / math.sqrt(width))
        return {
            **FullSoftMask.init(self),
            "norm": logical(nn.initializers.ones, ("embed",))(key, (width,)),
            "gate": logical(normal, ("embed", "mlp"))(key_gate, (width, self.inner)),
            "up": logical(normal, ("embed", "mlp"))(key_up, (width, self.inner)),
            "down": logical(ZEROS, ("mlp", "embed"))(key, (self.inner, width)),
        }

    def matrices(self) -> Mapping[str, MatrixAxes | None]:
        return {"norm": None, **dict.fromkeys(("gate", "up", "down"), MatrixAxes((0,), (1,)))}

    def added(self, omega: Params, candidate: jax.Array) -> jax.Array:
        x = omega["norm"] * _normalised(candidate)
        return (jax.nn.gelu(x @ omega["gate"]) * (x @ omega["up"])) @ omega["down"]


@dataclasses.dataclass(frozen=True)
class CarriedHidden(SoftMask):
    """Loopholing: row + lam * LayerNorm(last hidden state of the forward before), 2 D parameters.

    Its scale and shift are zero at the start.
    """

    everywhere = True
    mixes = False

    def __post_init__(self):
        super().__post_init__()
        _refuse_mixer(self)

    def init(self, key: jax.Array | None = None, width: int | None = None) -> Params:
        return {**super().init(), **{name: logical(ZEROS, ("embed",))(key, (width,)) for name in ("norm", "shift")}}

    def matrices(self) -> Mapping[str, MatrixAxes | None]:
        return {"norm": None, "shift": None}

    def attach(self, feedback: Feedback, hidden: jax.Array) -> Feedback:
        return feedback.replace(hidden=hidden)

    def __call__(
        self, omega: Params, table: jax.Array, head: Any, tokens: jax.Array, feedback: Feedback, mask_id: int
    ) -> jax.Array:
        rows = traced.lookup(table, tokens).astype(jnp.float32)
        hidden = feedback.hidden.astype(jnp.float32)
        hidden = _normalised(hidden - hidden.mean(-1, keepdims=True))
        lam = self.lam(omega, table, feedback, feedback.neg_entropy)
        added = lam * (omega["norm"] * hidden + omega["shift"])
        return jnp.where(feedback.active[..., None], rows + added, rows)
