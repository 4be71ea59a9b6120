"""The soft-mask operator: what a position that stays masked remembers, and how it is fed back.

For a masked position whose previous prediction was the distribution p over the vocabulary (paper, x and lambda):

    x = (1 - lam) [MASK] + lam * sum_{i in top-k(p)} pi_i v_i,   pi_i = p_i / sum_{top-k} p_j
    lam = w_s * sigmoid(w_a * (-H(p) - w_b)),                     H in nats

`Feedback` is what is remembered, a *gate* turns its entropy into lam, a *mixer* combines the two embeddings. A new gate
or mixer is a class here with the same methods, and an entry in GATES or MIXERS.

Shape letters: B examples, L positions, K remembered candidates, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import chex
import flax.struct
import jax
import jax.numpy as jnp

from smdlm.mesh import traced
from smdlm.ops import vocab

Params = Mapping[str, Any]


class Feedback(flax.struct.PyTreeNode):
    """What pass one (training) or the previous step (sampling) says about each position; never logits.

    At B=64, L=1024, V=50,258 log-probabilities would be 13.2 GB; this is 1.9 MB at K=3.

    Attributes:
      ids: [B, L, K] i32, the K most probable tokens, best first.
      probs: [B, L, K] f32, their probabilities under the full softmax (not renormalised over K).
      neg_entropy: [B, L] f32, sum p log p in nats, <= 0.
      active: [B, L] bool. False means "nothing remembered": the position is embedded as it stands. A flag rather
        than an entropy of -inf, because 0 * inf in the gate's gradient is NaN.
      hidden: [B, L, D], only for the full-distribution operator (`FullSoftMask`), which recomputes p from it.
      forwards: [B] i32, forward passes of the row so far. time: [B] f32, the share of the masks that are left when it
        is read. Both are None where only a readout has spoken.
    """

    ids: jax.Array
    probs: jax.Array
    neg_entropy: jax.Array
    active: jax.Array
    hidden: jax.Array | None = None
    forwards: jax.Array | None = None
    time: jax.Array | None = None

    @classmethod
    def none(cls, batch: int, length: int, k: int) -> Feedback:
        """No feedback: what the first step of sampling and a binary training step see."""
        return cls(
            ids=jnp.zeros((batch, length, k), jnp.int32),
            probs=jnp.zeros((batch, length, k), jnp.float32),
            neg_entropy=jnp.zeros((batch, length), jnp.float32),
            active=jnp.zeros((batch, length), bool),
        )

    def first(self, k: int) -> Feedback:
        """The k most probable candidates alone."""
        return self.replace(ids=self.ids[..., :k], probs=self.probs[..., :k])


def summarize(log_probs: jax.Array, active: jax.Array, k: int) -> Feedback:
    """Feedback of dense log-probabilities [B, L, V]: plain form of `Readout.feedback`, which needs none."""
    chex.assert_rank([log_probs, active], [3, 2])
    values, ids = vocab.top_k(log_probs, k)
    return Feedback(ids.astype(jnp.int32), jnp.exp(values), vocab.neg_entropy(log_probs), active)


# ----------------------------------------------------------------------------------------------------------- gates


def inverse_softplus(x: float) -> float:
    """The raw value whose softplus is x > 0."""
    return math.log(math.expm1(x))


class Gate(Protocol):
    """lam in [0, 1] from the feedback's negative entropy. A frozen dataclass whose fields stand in config.softmask.

    Attributes:
      labels: {name: word for a person} of what `values` returns.
    """

    labels: ClassVar[Mapping[str, str]]

    def init(self) -> Params:
        """Raw parameters omega, a flat dict of f32 scalars."""
        ...

    def __call__(self, omega: Params, neg_entropy: jax.Array) -> jax.Array:
        """lam of neg_entropy [B, L] f32 (nats, <= 0): [B, L] f32."""
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

    def __call__(self, omega: Params, neg_entropy: jax.Array) -> jax.Array:
        w = self.values(omega)
        return w["omega_s"] * jax.nn.sigmoid(w["omega_a"] * (neg_entropy - w["omega_b"]))

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

    def __call__(self, omega: Params, neg_entropy: jax.Array) -> jax.Array:
        return jnp.full(neg_entropy.shape, self.scale, jnp.float32)

    def values(self, omega: Params) -> dict[str, jax.Array]:
        return {"omega_s": jnp.float32(self.scale)}


GATES: dict[str, type[Gate]] = {"entropy": EntropyGate, "constant": ConstantGate}


# ---------------------------------------------------------------------------------------------------------- mixers


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
class NormLerp:
    """Lerp rescaled to the interpolated norm: the two are far from parallel, so lerp alone shrinks."""

    def __call__(self, mask: jax.Array, candidate: jax.Array, lam: jax.Array) -> jax.Array:
        mixed = Lerp()(mask, candidate, lam)
        return mixed * (Lerp()(_norm(mask), _norm(candidate), lam) / _norm(mixed))


@dataclasses.dataclass(frozen=True)
class Slerp:
    """Rotation from mask to candidate by lam of the angle between them, norm interpolated linearly."""

    def __call__(self, mask: jax.Array, candidate: jax.Array, lam: jax.Array) -> jax.Array:
        mask_norm, candidate_norm = _norm(mask), _norm(candidate)
        a, b = mask / mask_norm, candidate / candidate_norm
        cos = jnp.clip(jnp.sum(a * b, -1, keepdims=True), -1 + 1e-6, 1 - 1e-6)
        angle = jnp.arccos(cos)
        # Clipping cos keeps sin(angle) >= 1.4e-3, so (anti)parallel vectors fall back to lerp without a branch.
        direction = (jnp.sin((1 - lam) * angle) * a + jnp.sin(lam * angle) * b) / jnp.sin(angle)
        return direction * Lerp()(mask_norm, candidate_norm, lam)


MIXERS: dict[str, type[Mixer]] = {"lerp": Lerp, "norm_lerp": NormLerp, "slerp": Slerp}


# --------------------------------------------------------------------------------------------------------- operator


@dataclasses.dataclass(frozen=True)
class SoftMask:
    """Embeds a canvas: table rows where known or without feedback, the soft mask where a masked position remembers.

    Attributes:
      k: how many candidates are remembered (paper: 3 for language, 1 for code).
      gate, mixer: see above.
    """

    k: int = 3
    gate: Gate = EntropyGate()
    mixer: Mixer = Lerp()

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"softmask k: got {self.k}, wanted at least 1")

    def init(self) -> Params:
        """Raw f32 parameters, a flat dict of scalars."""
        return self.gate.init()

    def attach(self, feedback: Feedback, hidden: jax.Array) -> Feedback:
        """The feedback with whatever else this operator remembers of the hidden states [B, L, D]: nothing here."""
        return feedback

    def look_up(
        self, omega: Params, table: jax.Array, head: Any, tokens: jax.Array, feedback: Feedback
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(rows of the tokens, candidate embeddings, both [B, L, D] f32, neg_entropy [B, L]).

        The candidate is the renormalised top-k average of table rows. One lookup for all: the gradient of each is an
        array of the table's size.
        """
        weights = feedback.probs / jnp.maximum(feedback.probs.sum(-1, keepdims=True), 1e-30)
        ids = jnp.concatenate([tokens[..., None], feedback.ids], axis=-1)
        rows = traced.lookup(table, ids).astype(jnp.float32)
        return rows[:, :, 0], jnp.einsum("blk,blkd->bld", weights, rows[:, :, 1:]), feedback.neg_entropy

    def __call__(
        self, omega: Params, table: jax.Array, head: Any, tokens: jax.Array, feedback: Feedback, mask_id: int
    ) -> jax.Array:
        """Soft-masked embeddings, [B, L, D] f32; gradients reach omega and the table.

        Args:
          omega: parameters as from `init`.
          table: [V, D] embedding table.
          head: the model's output head, used by the full-distribution variant only.
          tokens: [B, L] i32 canvas; positions other than mask_id are embedded as they are.
          feedback: what masked positions remember.
        """
        chex.assert_equal_shape([tokens, feedback.active])
        rows, candidate, entropy = self.look_up(omega, table, head, tokens, feedback)
        lam = self.gate(omega, entropy)[..., None]
        # Where it counts, the row of the token is the mask's.
        soft = self.mixer(rows, candidate, lam)
        return jnp.where((feedback.active & (tokens == mask_id))[..., None], soft, rows)
