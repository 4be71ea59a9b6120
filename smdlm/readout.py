"""All that is ever computed from logits, in chunks of tokens, so that [B, L, V] never exists.

Only the positions that are asked for reach the head: they are gathered to the front, and a loop runs over
ceil(count / chunk) chunks of them (ops/chunks.py). No capacity to choose, no token ever dropped.

On a mesh every shard of the batch gathers its own positions: no hidden state leaves its shard. The head's matrix is
gathered once per sweep, its gradient is summed over the shards once per sweep.

Shapes: B examples, L positions, N = B * L of a shard, C positions of a chunk, D width, V vocabulary, K candidates.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from smdlm.mesh import traced
from smdlm.models.base import Head
from smdlm.ops import cpu, pallas, vocab
from smdlm.ops.chunks import Axes, Chunk, fold_chunks, in_cache, selected_rows, sum_over
from smdlm.ops.filters import Filters, inverse_cdf
from smdlm.softmask import Feedback

# Positions of a chunk of draws: enough for its product with the head to outweigh reading the head; on a GPU for a pass
# over its logits to outweigh starting a kernel.
DRAWN = {"cpu": 256, "tpu": 256, "gpu": 512}
EXCLUDED = -1e30  # logit of ids that are never predicted; finite, so that 0 * logit stays 0 in the entropy


class Draw(flax.struct.PyTreeNode):
    """A candidate for every masked position.

    Attributes:
      ids: [B, L] i32 sampled tokens (0 where nothing was asked for); None where only statistics were read.
      log_prob: [B, L] f32 their log-probability under the filtered, renormalised distribution; None likewise.
      feedback: statistics of the unfiltered distribution at temperature 1: the next step's feedback, and with at least
        two candidates the confidence measures (most probable, margin, entropy).
      canvas_prob: [B, L] f32, the probability of the token on the canvas where one was committed, else 0; only for a
        policy that revises (sampling/policies.py).
    """

    ids: jax.Array | None
    log_prob: jax.Array | None
    feedback: Feedback
    canvas_prob: jax.Array | None = None


def exclude(head: Head, vocab_size: int, *ids: int) -> Head:
    """The head with padding columns and the given ids (the mask: SUBS) made impossible through the bias alone."""
    columns = jnp.arange(head.bias.shape[0])
    impossible = columns >= vocab_size
    for i in ids:
        impossible |= columns == i
    return head.replace(bias=jnp.where(impossible, EXCLUDED, head.bias.astype(jnp.float32)))


@dataclasses.dataclass(frozen=True)
class Readout:
    """Sizes of the sweep.

    Attributes:
      k: candidates kept in a Feedback.
      chunk: positions per step of the loop; a chunk's logits (chunk * V * 4 bytes) are the only ones in memory.
    """

    k: int = 3
    chunk: int = 512

    def __post_init__(self):
        if self.k < 1 or self.chunk < 1:
            raise ValueError(f"readout: got k {self.k}, chunk {self.chunk}, wanted both at least 1")

    def feedback(self, head: Head, hidden: jax.Array, masked: jax.Array, filters: Filters = Filters()) -> Feedback:
        """Top-k and entropy of the prediction at masked positions: hidden [B, L, D], masked [B, L] -> Feedback.

        filters: of what is drawn from, for who goes by that distribution; temperature 0 counts as 1.
        """
        chex.assert_rank([hidden, masked], [3, 2])
        return _per_shard(functools.partial(self._feedback, filters), head, hidden, masked)

    def feedback_with_gradient(self, head: Head, hidden: jax.Array, masked: jax.Array) -> Feedback:
        """`feedback` of all positions, differentiable in head and hidden: its logits are formed again on the way back.

        A chunk is the same positions of all examples, so that no example leaves its shard.
        """
        batch, length, width = hidden.shape
        size = max(n for n in range(1, max(1, self.chunk // batch) + 1) if length % n == 0)

        @jax.checkpoint
        def chunk(hidden_BxCxD: jax.Array) -> Any:
            logits = head.logits(hidden_BxCxD.reshape(-1, width))
            values, ids = vocab.top_k(logits, self.k)
            found = (ids, *vocab.statistics(logits, values))
            return jax.tree.map(lambda x: x.reshape(batch, size, *x.shape[1:]), found)

        statistics = jax.lax.map(chunk, jnp.swapaxes(hidden.reshape(batch, -1, size, width), 0, 1))
        whole = [jnp.swapaxes(x, 0, 1).reshape(batch, length, *x.shape[3:]) for x in statistics]
        return Feedback(*whole, active=masked)

    def draw(self, head: Head, hidden: jax.Array, masked: jax.Array, u: jax.Array, filters: Filters) -> Draw:
        """Samples every masked position: hidden [B, L, D], masked [B, L], u [B, L] uniforms in [0, 1) -> Draw."""
        chex.assert_rank([hidden, masked, u], [3, 2, 2])
        return _per_shard(functools.partial(self._draw, filters), head, hidden, masked, u)

    def nll(self, head: Head, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weighted negative log-likelihood in nats: (sum of weights * nll, nll [B, L], 0 where the weight is 0).

        hidden [B, L, D], targets [B, L] i32, weights [B, L] f32. Differentiable in hidden and head through the sum;
        the per-token values are for reading only. The gradients are formed in the forward sweep, while a chunk's
        logits are at hand: nothing of size V per token is stored, and nothing is computed twice.
        """
        chex.assert_rank([hidden, targets, weights], [3, 2, 2])
        total, nll = _nll(self, head, hidden, targets, weights.astype(jnp.float32))
        return total, jax.lax.stop_gradient(nll)

    def log_probs(self, head: Head, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V] f32, dense. For tests and inspection; nothing else may call it."""
        return jax.nn.log_softmax(head.logits(hidden))

    # What follows runs on each shard of the batch by itself (axes: the mesh axes that split it).

    def _feedback(
        self, filters: Filters, axes: Axes, head: Head, hidden_BxLxD: jax.Array, masked_BxL: jax.Array
    ) -> Feedback:
        hidden_NxD, masked_N = hidden_BxLxD.reshape(masked_BxL.size, -1), masked_BxL.reshape(-1)
        nothing = self._no_statistics(masked_N.size)
        if filters.plain and _by_pallas(axes, hidden_NxD, head.matrix, self.k):
            chunk, count = selected_rows(masked_N, pallas.padded_rows(masked_N.size))
            found = pallas.statistics(chunk.of(hidden_NxD), head.matrix, head.bias, count, self.k)
            return _as_feedback(chunk.into(nothing, found), masked_BxL)

        def body(chunk: Chunk, carry: Any) -> Any:
            logits_CxV = head.logits(chunk.of(hidden_NxD))
            if not filters.plain:
                logits_CxV = filters.log_probs(logits_CxV, EXCLUDED)
            values_CxK, ids_CxK = vocab.top_k(logits_CxV, self.k)
            return chunk.into(carry, (ids_CxK, *vocab.statistics(logits_CxV, values_CxK)))

        size = min(self.chunk, masked_N.size)
        return _as_feedback(fold_chunks(masked_N, size, axes, body, nothing), masked_BxL)

    def _draw(
        self,
        filters: Filters,
        axes: Axes,
        head: Head,
        hidden_BxLxD: jax.Array,
        masked_BxL: jax.Array,
        u_BxL: jax.Array,
    ) -> Draw:
        hidden_NxD, masked_N, u_N = hidden_BxLxD.reshape(masked_BxL.size, -1), masked_BxL.reshape(-1), u_BxL.reshape(-1)

        def candidates(logits_CxV: jax.Array, u_C: jax.Array) -> Any:
            values_CxK, ids_CxK = vocab.top_k(logits_CxV, self.k)
            statistics = (ids_CxK, *vocab.statistics(logits_CxV, values_CxK))
            if filters.temperature == 0:
                return ids_CxK[:, 0], jnp.zeros(u_C.shape), statistics
            probs_CxV = filters.probs(logits_CxV, values_CxK[:, :1])
            ids_C, total_C = inverse_cdf(probs_CxV, u_C)
            return ids_C, jnp.log(jnp.take_along_axis(probs_CxV, ids_C[:, None], 1)[:, 0] / total_C), statistics

        def body(chunk: Chunk, carry: Any) -> Any:
            logits_CxV = head.logits(chunk.of(hidden_NxD))
            return chunk.into(carry, in_cache(candidates, logits_CxV, chunk.of(u_N)))

        nothing = jnp.zeros(masked_N.size, jnp.int32), jnp.zeros(masked_N.size), self._no_statistics(masked_N.size)
        size = min(self.chunk, masked_N.size, DRAWN[traced.platform()])
        ids, log_prob, statistics = fold_chunks(masked_N, size, axes, body, nothing)
        shape = masked_BxL.shape
        return Draw(ids.reshape(shape), log_prob.reshape(shape), _as_feedback(statistics, masked_BxL))

    def _nll(
        self, axes: Axes, head: Head, hidden_BxLxD: jax.Array, targets_BxL: jax.Array, weights_BxL: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(total over all shards, nll [B, L])."""
        hidden_NxD, targets_N = hidden_BxLxD.reshape(targets_BxL.size, -1), targets_BxL.reshape(-1)
        weights_N = weights_BxL.reshape(-1)

        def body(chunk: Chunk, carry: Any) -> Any:
            total, nll_N = carry
            logits_CxV = head.logits(chunk.of(hidden_NxD))
            nll_C, _ = vocab.cross_entropy(logits_CxV, chunk.of(targets_N))
            return total + jnp.sum(chunk.of(weights_N, fill=0) * nll_C), chunk.into(nll_N, nll_C)

        nothing = jnp.zeros(()), jnp.zeros(targets_N.size)
        total, nll_N = fold_chunks(weights_N != 0, min(self.chunk, targets_N.size), axes, body, nothing)
        return sum_over(total, axes), nll_N.reshape(targets_BxL.shape)

    def _nll_and_gradients(
        self, axes: Axes, head: Head, hidden_BxLxD: jax.Array, targets_BxL: jax.Array, weights_BxL: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, Head]:
        """(total over all shards, nll [B, L], d_hidden [B, L, D], gradient of the head summed over all shards, f32)."""
        hidden_NxD, targets_N = hidden_BxLxD.reshape(targets_BxL.size, -1), targets_BxL.reshape(-1)
        weights_N = weights_BxL.reshape(-1)
        if _by_pallas(axes, hidden_NxD, head.matrix):
            chunk, count = selected_rows(weights_N != 0, pallas.padded_rows(targets_N.size))
            weights_C = chunk.of(weights_N, fill=0)
            nll_C, d_hidden_CxD, d_matrix, d_bias = pallas.nll(
                chunk.of(hidden_NxD), head.matrix, head.bias, chunk.of(targets_N), weights_C, count
            )
            total = jnp.sum(jnp.where(weights_C != 0, weights_C * nll_C, 0))
            found = chunk.into((jnp.zeros_like(weights_N), jnp.zeros_like(hidden_NxD)), (nll_C, d_hidden_CxD))
            nll_N, d_hidden_NxD = found
        else:
            of = head.operands(hidden_NxD)

            def body(chunk: Chunk, carry: Any) -> Any:
                total, nll_N, d_hidden_NxD, d_matrix, d_bias = carry
                hidden_CxD, targets_C = chunk.of(hidden_NxD), chunk.of(targets_N)
                weights_C = chunk.of(weights_N, fill=0)  # what fills up the last chunk does not count
                logits_CxV = head.logits(hidden_CxD)
                nll_C, partition_C = vocab.cross_entropy(logits_CxV, targets_C)
                one_hot = jnp.arange(logits_CxV.shape[1]) == targets_C[:, None]
                d_logits_CxV = weights_C[:, None] * (jnp.exp(logits_CxV - partition_C[:, None]) - one_hot)
                d_bias += d_logits_CxV.sum(0)
                d_logits_CxV = d_logits_CxV.astype(of)
                d_matrix += cpu.product_to_weights(hidden_CxD.astype(of), d_logits_CxV)
                d_hidden_CxD = cpu.product_to_inputs(d_logits_CxV, head.matrix)
                nll_N, d_hidden_NxD = chunk.into((nll_N, d_hidden_NxD), (nll_C, d_hidden_CxD))
                return total + jnp.sum(weights_C * nll_C), nll_N, d_hidden_NxD, d_matrix, d_bias

            like_head = jnp.zeros(head.matrix.shape), jnp.zeros(head.bias.shape)
            nothing = jnp.zeros(()), jnp.zeros(targets_N.size), jnp.zeros_like(hidden_NxD), *like_head
            size = min(self.chunk, targets_N.size)
            total, nll_N, d_hidden_NxD, d_matrix, d_bias = fold_chunks(weights_N != 0, size, axes, body, nothing)
        d_head = _over_shards(axes, head.replace(matrix=d_matrix, bias=d_bias))
        return (
            sum_over(total, axes),
            nll_N.reshape(targets_BxL.shape),
            d_hidden_NxD.reshape(hidden_BxLxD.shape),
            d_head,
        )

    def _no_statistics(self, positions: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(ids [N, K], probs [N, K], neg_entropy [N]) of positions that nothing was asked for."""
        return jnp.zeros((positions, self.k), jnp.int32), jnp.zeros((positions, self.k)), jnp.zeros(positions)


def _as_feedback(statistics: tuple[jax.Array, jax.Array, jax.Array], masked_BxL: jax.Array) -> Feedback:
    ids_NxK, probs_NxK, neg_entropy_N = statistics
    grid = (*masked_BxL.shape, ids_NxK.shape[1])
    return Feedback(ids_NxK.reshape(grid), probs_NxK.reshape(grid), neg_entropy_N.reshape(masked_BxL.shape), masked_BxL)


def _per_shard(local: Callable[..., Any], head: Head, *arrays: jax.Array, out_specs: Any = None) -> Any:
    """local(axes, head, *arrays) on each shard of the batch; outputs are split like the arrays unless out_specs."""
    axes = traced.splits(len(arrays[0]), *traced.BATCH_AXES)
    head = head.replace(matrix=head.matrix.astype(head.operands(arrays[0])))  # before it is gathered over fsdp
    split = PartitionSpec(axes)
    in_specs = (PartitionSpec(), *(split for _ in arrays))
    out_specs = split if out_specs is None else out_specs(axes)
    return traced.per_shard(functools.partial(local, axes), axes, in_specs, out_specs)(head, *arrays)


def _by_pallas(axes: Axes, hidden: jax.Array, matrix: jax.Array, k: int = 1) -> bool:
    """Whether a Pallas kernel sweeps the vocabulary: on TPUs, with every axis of the mesh in use split by hand."""
    return traced.platform() == "tpu" and axes == traced.used() and pallas.readout_fits(hidden, matrix, k)


def _over_shards(axes: Axes, d_head: Head) -> Head:
    """The head's gradient summed over the shards; where fsdp splits the matrix, each keeps the sum of its own part."""
    d_matrix = d_head.matrix
    if "fsdp" in axes:
        d_matrix = jax.lax.psum_scatter(d_matrix, "fsdp", scatter_dimension=0, tiled=True)
    d_matrix = sum_over(d_matrix, tuple(axis for axis in axes if axis != "fsdp"))
    return d_head.replace(matrix=d_matrix, bias=sum_over(d_head.bias, axes))


# The derivative of the likelihood, told to JAX: the forward sweep keeps the gradients instead of logits.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(readout: Readout, head: Head, hidden: jax.Array, targets: jax.Array, weights: jax.Array):
    def specs(axes: Axes) -> Any:
        return (PartitionSpec(), PartitionSpec(axes))

    return _per_shard(readout._nll, head, hidden, targets, weights, out_specs=specs)


def _nll_forward(readout: Readout, head: Head, hidden: jax.Array, targets: jax.Array, weights: jax.Array):
    def specs(axes: Axes) -> Any:
        split, d_matrix = PartitionSpec(axes), PartitionSpec("fsdp" if "fsdp" in axes else None)
        return PartitionSpec(), split, split, head.replace(matrix=d_matrix, bias=PartitionSpec())

    total, nll, d_hidden, d_head = _per_shard(
        readout._nll_and_gradients, head, hidden, targets, weights, out_specs=specs
    )
    return (total, nll), (d_hidden, d_head.replace(matrix=d_head.matrix.astype(head.matrix.dtype)))


def _nll_backward(readout: Readout, residuals, cotangents):
    d_hidden, d_head = residuals
    scale = cotangents[0]
    d_head = jax.tree.map(lambda x: (scale * x).astype(x.dtype), d_head)
    return d_head, (scale * d_hidden).astype(d_hidden.dtype), None, None


_nll.defvjp(_nll_forward, _nll_backward)
