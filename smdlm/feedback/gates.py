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


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"softmask.{name}: got {value}, wanted 0 <= {name} <= 1")


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
            raise ValueError(f"softmask.scale: got {self.scale}, wanted 0 <= scale <= 1")
        if not self.centre < 0:
            raise ValueError(f"softmask.centre: got {self.centre}, wanted < 0 (it is compared with -entropy, in nats)")
        if not self.steepness > 0:
            raise ValueError(f"softmask.steepness: got {self.steepness}, wanted > 0")

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
            raise ValueError(f"softmask.scale: got {self.scale}, wanted 0 <= scale <= 1")

    def init(self) -> Params:
        return {}

    def __call__(self, omega: Params, seen: Prediction) -> jax.Array:
        return jnp.full(seen.neg_entropy.shape, self.scale, jnp.float32)

    def values(self, omega: Params) -> dict[str, jax.Array]:
        return {"omega_s": jnp.float32(self.scale)}


@dataclasses.dataclass(frozen=True)
class Band(EntropyGate):
    """The entropy gate while t_from <= time <= t_to, and 0 outside: feedback in a part of the steps only.

    Sampling runs from time 1 to 0: t_from .8 is the first fifth of the steps, t_to .2 the last.
    """

    t_from: float = 0.0
    t_to: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.t_from < self.t_to <= 1:
            raise ValueError(f"softmask.t_from, t_to: got {self.t_from}, {self.t_to}, wanted 0 <= t_from < t_to <= 1")

    def __call__(self, omega: Params, seen: Prediction) -> jax.Array:
        inside = (seen.time >= self.t_from) & (seen.time <= self.t_to)
        return jnp.where(inside, super().__call__(omega, seen), 0.0)


class _Fixed:
    """A gate without parameters, so that it also suits a model that was trained without soft-masking."""

    labels: ClassVar[Mapping[str, str]] = {}

    def init(self) -> Params:
        return {}

    def values(self, omega: Params) -> dict[str, jax.Array]:
        return {}


@dataclasses.dataclass(frozen=True)
class StepRamp(_Fixed):
    """lam = min(start + growth * n, most), n forwards before the one that made the prediction (dInfer)."""

    start: float = 0.15
    growth: float = 0.02
    most: float = 0.3

    def __post_init__(self):
        for name in ("start", "growth", "most"):
            _check_share(name, getattr(self, name))

    def __call__(self, omega: Params, seen: Prediction) -> jax.Array:
        lam = jnp.minimum(self.start + self.growth * (seen.forwards - 1), self.most)
        return jnp.broadcast_to(lam, seen.neg_entropy.shape)


@dataclasses.dataclass(frozen=True)
class NormalisedEntropy(_Fixed):
    """lam = scale * H / log V: the unsure are fed back most (RCD); or scale * (1 - H / log V): the sure are (LRD).

    Attributes:
      most_if: 'unsure' or 'sure'.
    """

    scale: float = 1.0
    most_if: str = "unsure"

    def __post_init__(self):
        _check_share("scale", self.scale)
        if self.most_if not in ("unsure", "sure"):
            raise ValueError(f"softmask.most_if: got {self.most_if!r}, wanted 'unsure' or 'sure'")

    def __call__(self, omega: Params, seen: Prediction) -> jax.Array:
        unsure = jnp.clip(-seen.neg_entropy / math.log(seen.vocab_size), 0.0, 1.0)
        return self.scale * (unsure if self.most_if == "unsure" else 1 - unsure)


@dataclasses.dataclass(frozen=True)
class ConfidenceGate(_Fixed):
    """lam = scale * what the candidates weigh together, with k = 1 the largest probability (DMax)."""

    scale: float = 1.0

    def __post_init__(self):
        _check_share("scale", self.scale)

    def __call__(self, omega: Params, seen: Prediction) -> jax.Array:
        return self.scale * jnp.minimum(seen.confidence, 1.0)


@dataclasses.dataclass(frozen=True)
class Schedule(_Fixed):
    """lam goes from `first` to `last` over the schedule, in a line or in `levels` equal stairs.

    Attributes:
      levels: 0 for a line.
    """

    first: float = 0.0
    last: float = 1.0
    levels: int = 0

    def __post_init__(self):
        for name in ("first", "last"):
            _check_share(name, getattr(self, name))
        if self.levels < 0 or self.levels == 1:
            raise ValueError(f"softmask.levels: got {self.levels}, wanted 0 (a line) or at least 2")

    def __call__(self, omega: Params, seen: Prediction) -> jax.Array:
        done = 1 - seen.time
        if self.levels:
            done = jnp.minimum(jnp.floor(done * self.levels), self.levels - 1) / (self.levels - 1)
        return jnp.broadcast_to(self.first + (self.last - self.first) * done, seen.neg_entropy.shape)


GATES: dict[str, type[Gate]] = {
    "entropy": EntropyGate,
    "band": Band,
    "constant": ConstantGate,
    "ramp": StepRamp,
    "normalised_entropy": NormalisedEntropy,
    "confidence": ConfidenceGate,
    "schedule": Schedule,
}
