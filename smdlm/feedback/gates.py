"""Gates: how much of the prediction is mixed in. A new gate is a class here and an entry in GATES.

Shapes: B examples, L positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import flax.struct
import jax
import jax.numpy as jnp

Params = Mapping[str, Any]


class Prediction(flax.struct.PyTreeNode):
    """What a gate may know of the prediction that is fed back.

    Attributes:
      neg_entropy: [B, L] f32, sum p log p in nats, <= 0.
      confidence: [B, L] f32, what the remembered candidates weigh together, at most 1; with k = 1 the largest
        probability.
      forwards: [B, 1] i32, forward passes of the row so far, the one that made the prediction included; 1 in training.
      time: [B, 1] f32, the share of the schedule that is still ahead when it is read: near 0 at the last step; in
        training the t of the example.
      vocab_size: rows of the embedding table.
    """

    neg_entropy: jax.Array
    confidence: jax.Array | None = None
    forwards: jax.Array | None = None
    time: jax.Array | None = None
    vocab_size: int | None = flax.struct.field(pytree_node=False, default=None)


def inverse_softplus(x: float) -> float:
    """The raw value whose softplus is x > 0."""
    return math.log(math.expm1(x))


class Gate(Protocol):
    """lam in [0, 1] from the prediction that is fed back. A frozen dataclass whose fields stand in config.softmask.

    Attributes:
      labels: {name: word for a person} of what `values` returns.
    """

    labels: ClassVar[Mapping[str, str]]

    def init(self) -> Params:
        """Raw parameters omega, a flat dict of f32 scalars."""
        ...

    def __call__(self, omega: Params, seen: Prediction) -> jax.Array:
        """lam at each position: [B, L] f32."""
        ...

    def values(self, omega: Params) -> dict[str, jax.Array]:
        """Readable values of the parameters, [] each, by the names under which they are logged: omega_..."""
        ...


@dataclasses.dataclass(frozen=True)
class EntropyGate:
    """lam = scale * sigmoid(steepness * (-H - centre)); paper eq. for lambda, parametrised as in the reference.

    scale = sigmoid(raw) in (0, 1), centre = -softplus(raw) - 1e-6 < 0, steepness = softplus(raw) + 1e-6 > 0.
    The defaults are the paper's; a scale of 1e-6 is what the reference's `init_scale 0` becomes (`logit(eps=1e-6)`).
    Raw values stay f32: bf16 spacing at the raw scale -13.8 is 0.06, more than its learning rate.

    Raises:
      ValueError: a start value outside its range.
    """

    labels = {"omega_s": "scale", "omega_a": "steepness", "omega_b": "centre"}

    scale: float = 1e-6
    centre: float = -0.75
    steepness: float = 6.66

    def __post_init__(self):
        if not 0 <= self.scale <= 1:
            raise ValueError(f"softmask scale: got {self.scale}, wanted 0 <= scale <= 1")
        if not self.centre < 0:
            raise ValueError(f"softmask centre: got {self.centre}, wanted < 0 (it is compared with -entropy, in nats)")
        if not self.steepness > 0:
            raise ValueError(f"softmask steepness: got {self.steepness}, wanted > 0")

    def init(self) -> Params:
        scale = min(max(self.scale, 1e-6), 1 - 1e-6)
        return {
            "raw_scale": jnp.float32(math.log(scale / (1 - scale))),
            # Without the 1e-6 that `values` adds, as in the reference: its start is -0.750001, not -0.75.
            "raw_centre": jnp.float32(inverse_softplus(-self.centre)),
            "raw_steepness": jnp.float32(inverse_softplus(self.steepness)),
        }

    def __call__(self, omega: Params, seen: Prediction) -> jax.Array:
        w = self.values(omega)
        return w["omega_s"] * jax.nn.sigmoid(w["omega_a"] * (seen.neg_entropy - w["omega_b"]))

    def values(self, omega: Params) -> dict[str, jax.Array]:
        """omega_s (scale), omega_a (steepness), omega_b (centre, in nats)."""
        return {
            "omega_s": jax.nn.sigmoid(omega["raw_scale"]),
            "omega_a": jax.nn.softplus(omega["raw_steepness"]) + 1e-6,
            "omega_b": -jax.nn.softplus(omega["raw_centre"]) - 1e-6,
        }


@dataclasses.dataclass(frozen=True)
class ConstantGate:
    """lam the same everywhere and not learned: the "fixed lambda" baseline; scale 0 is plain MDLM."""

    labels = {"omega_s": "scale"}

    scale: float = 0.5

    def __post_init__(self):
        if not 0 <= self.scale <= 1:
            raise ValueError(f"softmask scale: got {self.scale}, wanted 0 <= scale <= 1")

    def init(self) -> Params:
        return {}

    def __call__(self, omega: Params, seen: Prediction) -> jax.Array:
        return jnp.full(seen.neg_entropy.shape, self.scale, jnp.float32)

    def values(self, omega: Params) -> dict[str, jax.Array]:
        return {"omega_s": jnp.float32(self.scale)}


GATES: dict[str, type[Gate]] = {"entropy": EntropyGate, "constant": ConstantGate}
