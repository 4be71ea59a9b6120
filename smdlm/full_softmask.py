"""The soft mask of the whole vocabulary, k = |V| with a learned temperature; the paper finds it worse than top-k.

Shape letters: B examples, L positions, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from smdlm.feedback.gates import Params, inverse_softplus
from smdlm.mesh import traced
from smdlm.ops.filters import nucleus_threshold
from smdlm.ops.vocab import neg_entropy
from smdlm.softmask import Feedback, SoftMask


@dataclasses.dataclass(frozen=True)
class FullSoftMask(SoftMask):
    """The reference's `mixinputs_with_temp`: candidate = softmax(log p / T) @ table.

    The gate sees the entropy at the same temperature. Needs `feedback.hidden`; the distribution is recomputed from it
    and the (gradient-stopped) head in chunks of positions under remat, so [B, L, V] never exists here either.
    The paper finds it worse than top-k; it is kept for that comparison, and for the neighbours that use it.

    Attributes:
      temperature: T at the start. learn: whether it is a parameter, or stays there.
      nucleus: the candidate is the mean of the most probable tokens that weigh this much together (1: of all); the
        entropy is that of the whole distribution.
    """

    temperature: float = 1.0
    learn: bool = True
    nucleus: float = 1.0
    chunk: int = 256

    def __post_init__(self):
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"softmask.temperature: got {self.temperature}, wanted > 0")
        if not 0 < self.nucleus <= 1:
            raise ValueError(f"softmask.nucleus: got {self.nucleus}, wanted 0 < nucleus <= 1")

    def init(self, key: jax.Array | None = None, width: int | None = None) -> Params:
        learned = {"raw_temperature": jnp.float32(inverse_softplus(self.temperature))} if self.learn else {}
        return {**self.gate.init(), **learned}

    def attach(self, feedback: Feedback, hidden: jax.Array) -> Feedback:
        return feedback.replace(hidden=hidden)

    def mix(self, omega: Params, table: jax.Array, log_probs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """log p [C, V] -> (candidate [C, D], neg_entropy [C]) at the temperature."""
        temperature = jax.nn.softplus(omega["raw_temperature"]) + 1e-6 if self.learn else self.temperature
        log_q = jax.nn.log_softmax(log_probs / temperature)
        q = jnp.exp(log_q)
        if self.nucleus < 1:
            least = nucleus_threshold(jax.lax.stop_gradient(q), self.nucleus)
            kept = jnp.where(q >= least[:, None], q, 0.0)
            q = kept / kept.sum(-1, keepdims=True)
        return q @ table, neg_entropy(log_q)

    def look_up(
        self, omega: Params, table: jax.Array, head: Any, tokens: jax.Array, feedback: Feedback
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        axes = traced.splits(len(tokens), *traced.BATCH_AXES)
        split, whole = PartitionSpec(axes), PartitionSpec()
        local = traced.per_shard(self._mix_all, axes, (whole, whole, whole, split), split)
        rows = traced.lookup(table, tokens).astype(jnp.float32)
        scalars = {name: value for name, value in omega.items() if value.ndim == 0}  # no shard needs a matrix here
        candidate, entropy = local(scalars, table.astype(jnp.float32), jax.lax.stop_gradient(head), feedback.hidden)
        return rows, candidate, entropy

    def _mix_all(self, omega: Params, table: jax.Array, head: Any, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`mix` of the predictions of hidden [B, L, D], a chunk at a time."""

        @jax.checkpoint
        def chunk(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
            return self.mix(omega, table, jax.nn.log_softmax(head.logits(hidden)))

        batch, length, width = hidden.shape
        flat = hidden.reshape(-1, width)
        flat = jnp.pad(flat, ((0, -len(flat) % self.chunk), (0, 0)))
        mixed, entropy = jax.lax.map(chunk, flat.reshape(-1, self.chunk, width))
        count = batch * length
        mixed = mixed.reshape(-1, mixed.shape[-1])[:count].reshape(batch, length, -1)
        return mixed, entropy.reshape(-1)[:count].reshape(batch, length)
