"""The soft-mask operator: what a position that stays masked remembers, and how it is fed back.

For a masked position whose previous prediction was the distribution p over the vocabulary (paper, x and lambda):

    x = (1 - lam) [MASK] + lam * sum_{i in top-k(p)} pi_i v_i,   pi_i = p_i / sum_{top-k} p_j
    lam = w_s * sigmoid(w_a * (-H(p) - w_b)),                     H in nats

`Feedback` is what is remembered, a *gate* (feedback/gates.py) turns it into lam, a *mixer* (feedback/mixers.py)
combines the two embeddings. Other operators are in full_softmask.py.

Shape letters: B examples, L positions, K remembered candidates, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import chex
import flax.struct
import jax
import jax.numpy as jnp

from smdlm.feedback.gates import EntropyGate, Gate, Params, Prediction
from smdlm.feedback.mixers import Lerp, Mixer
from smdlm.mesh import traced
from smdlm.models.base import MatrixAxes
from smdlm.ops import vocab


class Feedback(flax.struct.PyTreeNode):
    """What pass one (training) or the previous step (sampling) says about each position; never logits.

    At B=64, L=1024, V=50,258 log-probabilities would be 13.2 GB; this is 1.9 MB at K=3.

    Attributes:
      ids: [B, L, K] i32, the K most probable tokens, best first.
      probs: [B, L, K] f32, their probabilities under the full softmax (not renormalised over K).
      neg_entropy: [B, L] f32, sum p log p in nats, <= 0.
      active: [B, L] bool. False means "nothing remembered": the position is embedded as it stands. A flag rather
        than an entropy of -inf, because 0 * inf in the gate's gradient is NaN.
      hidden: [B, L, D], only for operators that ask for it in `attach` (`FullSoftMask` recomputes p from it).
      forwards: [B] i32, forward passes of the row so far; 0 before the first, 1 after pass one.
      time: [B] f32, the t at which it is read: 1 at the start of sampling, near 0 at its end.
        Both are None where only a readout has spoken.
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
            forwards=jnp.zeros(batch, jnp.int32),
            time=jnp.ones(batch, jnp.float32),
        )

    def first(self, k: int) -> Feedback:
        """The k most probable candidates alone."""
        return self.replace(ids=self.ids[..., :k], probs=self.probs[..., :k])


def summarize(log_probs: jax.Array, active: jax.Array, k: int) -> Feedback:
    """Feedback of dense log-probabilities [B, L, V]: plain form of `Readout.feedback`, which needs none."""
    chex.assert_rank([log_probs, active], [3, 2])
    values, ids = vocab.top_k(log_probs, k)
    return Feedback(ids.astype(jnp.int32), jnp.exp(values), vocab.neg_entropy(log_probs), active)


@dataclasses.dataclass(frozen=True)
class SoftMask:
    """Embeds a canvas: table rows where known or without feedback, the soft mask where a masked position remembers.

    Attributes:
      k: how many candidates are remembered (paper: 3 for language, 1 for code).
      gate, mixer: see there.
      everywhere: whether positions that hold a token remember the prediction too; what is given (a prompt) never does.
      mixes: whether a masked position is shown the mix of mask and candidate, so that lambda is a share of it.
    """

    everywhere: ClassVar[bool] = False
    mixes: ClassVar[bool] = True

    k: int = 3
    gate: Gate = EntropyGate()
    mixer: Mixer = Lerp()

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"softmask.k: got {self.k}, wanted at least 1")

    def init(self, key: jax.Array | None = None, width: int | None = None) -> Params:
        """Raw f32 parameters, a flat dict: scalars, and what `matrices` lists (boxed, of the embedding's width)."""
        return self.gate.init()

    def matrices(self) -> Mapping[str, MatrixAxes | None]:
        """Parameters other than scalars, as `Model.matrices`: they train like the backbone's."""
        return {}

    def remembering(self, masked: jax.Array, given: jax.Array) -> jax.Array:
        """Which positions remember the prediction, of [B, L] masked and given ones."""
        return ~given if self.everywhere else masked

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

    def lam(self, omega: Params, table: jax.Array, feedback: Feedback, neg_entropy: jax.Array) -> jax.Array:
        """The gate's weight of the candidate, [B, L, 1]."""

        def per_row(x: jax.Array | None) -> jax.Array | None:
            return None if x is None else x[:, None]

        seen = Prediction(
            neg_entropy=neg_entropy,
            confidence=feedback.probs.sum(-1),
            forwards=per_row(feedback.forwards),
            time=per_row(feedback.time),
            vocab_size=len(table),
        )
        return self.gate(omega, seen)[..., None]

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
        rows, candidate, neg_entropy = self.look_up(omega, table, head, tokens, feedback)
        lam = self.lam(omega, table, feedback, neg_entropy)
        # Where it counts, the row of the token is the mask's.
        soft = self.mixer(rows, candidate, lam)
        return jnp.where((feedback.active & (tokens == mask_id))[..., None], soft, rows)
