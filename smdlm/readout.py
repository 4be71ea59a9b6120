"""All that is ever computed from logits, in chunks of tokens, so that [B, L, V] never exists.

Only the positions that are asked for reach the head: their row numbers are gathered to the front and a loop runs over
ceil(count / chunk) chunks. The trip count is a run-time value, so the work follows the number of masked tokens exactly:
no capacity to choose, no token ever dropped, one compiled program for every count.

On a mesh every shard of the batch gathers its own rows: no hidden state leaves its shard. The head's matrix is gathered
once per sweep, its gradient is summed over the shards once per sweep.

Shapes: B examples, L positions, N = B * L of a shard, C rows of a chunk, D width, V vocabulary, K candidates.
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

from smdlm import kernels, shard
from smdlm.models.layers import Head
from smdlm.sampling.filters import Filters, inverse_cdf
from smdlm.softmask import Feedback, top_k

CACHED = {"cpu": 2**18, "tpu": 2**21}  # logits of `_in_cache`: 1 MiB of a core's cache, 8 MiB of VMEM
DRAWN = 256  # rows of a chunk of draws: enough for its product with the head to outweigh reading the head
EXCLUDED = -1e30  # logit of ids that are never predicted; finite, so that 0 * logit stays 0 in the entropy


class Draw(flax.struct.PyTreeNode):
    """A candidate for every masked position.

    Attributes:
      ids: [B, L] i32 sampled tokens (0 where nothing was asked for).
      log_prob: [B, L] f32 their log-probability under the filtered, renormalised distribution.
      feedback: statistics of the unfiltered distribution at temperature 1: the next step's feedback, and with at least
        two candidates the confidence measures (most probable, margin, entropy).
    """

    ids: jax.Array
    log_prob: jax.Array
    feedback: Feedback


def exclude(head: Head, vocab_size: int, *ids: int) -> Head:
    """The head with padding columns and the given ids (the mask: SUBS) made impossible through the bias alone."""
    columns = jnp.arange(head.bias.shape[0])
    impossible = columns >= vocab_size
    for i in ids:
        impossible |= columns == i
    return head.replace(bias=jnp.where(impossible, EXCLUDED, head.bias.astype(jnp.float32)))


Axes = tuple[str, ...]  # mesh axes over which the batch is split by hand


def _for_rows(selected: jax.Array, chunk: int, axes: Axes, body: Callable[[jax.Array, Any], Any], init: Any) -> Any:
    """Folds body(rows [C] i32, carry) over the selected rows of [N], C at a time.

    Rows beyond the last selected one are N: out of range, so gathers must clip and scatters drop them. All shards run
    as many chunks as the fullest: the compiler may put collectives of a split vocabulary into the loop. With Weyl times
    the shards' counts differ by a few per cent.
    """
    order, count = _rows(selected, selected.shape[0] + -selected.shape[0] % chunk)
    if axes:
        count = jax.lax.pmax(count, axes)

    def step(i: jax.Array, carry: Any) -> Any:
        return body(jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk), carry)

    return jax.lax.fori_loop(0, (count + chunk - 1) // chunk, step, init)


def _rows(selected: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """(numbers of the selected rows of [N], filled up with N to the given size, i32; their count)."""
    order = jnp.nonzero(selected, size=size, fill_value=selected.shape[0])[0].astype(jnp.int32)
    return order, jnp.sum(selected, dtype=jnp.int32)


def _by_kernel(axes: Axes, hidden: jax.Array, kernel: jax.Array, k: int = 1) -> bool:
    """Whether a Pallas kernel sweeps the vocabulary: on TPUs, with every axis of the mesh in use split by hand."""
    return shard.platform() == "tpu" and axes == shard.used() and kernels.readout_fits(hidden, kernel, k)


def _in_cache(fn: Callable[..., Any], logits: jax.Array, *arrays: jax.Array) -> Any:
    """fn(logits [C, V], arrays [C, ..]), for a few rows at a time, whose logits stay in a CPU's cache or a TPU's VMEM.

    A draw makes some thirty passes over its logits. Measured on a CPU for about 512 rows of 50,304: 390 -> 300 ms with
    the head. The TPU compiler then keeps them on the chip: by `smdlm.aot`, a sampler's step of configs/owt.py on v5e
    takes at least 1.4 instead of 10.4 ms.
    """
    rows, vocab = logits.shape
    most = CACHED.get(shard.platform(), logits.size) // vocab
    few = max(n for n in range(1, max(1, most) + 1) if rows % n == 0)
    if few == rows:
        return fn(logits, *arrays)
    fold = lambda x: x.reshape(-1, few, *x.shape[1:])
    out = jax.lax.map(lambda xs: fn(*xs), tuple(fold(x) for x in (logits, *arrays)))
    return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), out)


def _put(target: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    return target.at[rows].set(values.astype(target.dtype), mode="drop", unique_indices=False)


def _statistics(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """logits [C, V] -> (ids [C, K], probs [C, K], neg_entropy [C]) in one exponential per logit."""
    values, ids = top_k(logits, k)
    shifted = logits - values[:, :1]
    exp = jnp.exp(shifted)
    total = exp.sum(-1)
    entropy = jnp.sum(exp * shifted, -1) / total - jnp.log(total)
    return ids, jnp.exp(values - values[:, :1]) / total[:, None], entropy


@dataclasses.dataclass(frozen=True)
class Readout:
    """Sizes of the sweep.

    Attributes:
      k: candidates kept in a Feedback.
      chunk: tokens per step of the loop; a chunk's logits (chunk * V * 4 bytes) are the only ones in memory.
    """

    k: int = 3
    chunk: int = 512

    def __post_init__(self):
        if self.k < 1 or self.chunk < 1:
            raise ValueError(f"readout: got k {self.k}, chunk {self.chunk}, wanted both at least 1")

    def feedback(self, head: Head, hidden: jax.Array, masked: jax.Array) -> Feedback:
        """Top-k and entropy of the prediction at masked positions: hidden [B, L, D], masked [B, L] -> Feedback."""
        chex.assert_rank([hidden, masked], [3, 2])
        return self._sweep(self._feedback_rows, head, hidden, masked)

    def draw(self, head: Head, hidden: jax.Array, masked: jax.Array, u: jax.Array, filters: Filters) -> Draw:
        """Samples every masked position: hidden [B, L, D], masked [B, L], u [B, L] uniforms in [0, 1) -> Draw."""
        chex.assert_rank([hidden, masked, u], [3, 2, 2])
        return self._sweep(functools.partial(self._draw_rows, filters), head, hidden, masked, u)

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

    def _sweep(self, local: Callable[..., Any], head: Head, *arrays: jax.Array, out_specs: Any = None) -> Any:
        """local(axes, head, *arrays) on each shard of the batch; outputs are split like the arrays unless out_specs."""
        axes = shard.splits(len(arrays[0]), *shard.BATCH_AXES)
        head = head.replace(kernel=head.kernel.astype(arrays[0].dtype))  # before it is gathered over fsdp
        rows = PartitionSpec(axes)
        specs = (PartitionSpec(), *(rows for _ in arrays))
        return shard.per_shard(functools.partial(local, axes), axes, specs, out_specs(axes) if out_specs else rows)(
            head, *arrays
        )

    def _chunk(self, rows: int) -> int:
        return min(self.chunk, rows)

    def _feedback_rows(self, axes: Axes, head: Head, hidden: jax.Array, masked: jax.Array) -> Feedback:
        flat = hidden.reshape(masked.size, -1)
        if _by_kernel(axes, hidden, head.kernel, self.k):
            rows, count = _rows(masked.reshape(-1), kernels.padded_rows(masked.size))
            out = kernels.statistics(flat.at[rows].get(mode="clip"), head.kernel, head.bias, count, self.k)
            return self._feedback(jax.tree.map(lambda t, v: _put(t, rows, v), self._empty(masked.size), out), masked)

        def body(rows, carry):
            logits = head.logits(flat.at[rows].get(mode="clip"))
            return jax.tree.map(lambda t, v: _put(t, rows, v), carry, _statistics(logits, self.k))

        out = _for_rows(masked.reshape(-1), self._chunk(masked.size), axes, body, self._empty(masked.size))
        return self._feedback(out, masked)

    def _draw_rows(
        self, filters: Filters, axes: Axes, head: Head, hidden: jax.Array, masked: jax.Array, u: jax.Array
    ) -> Draw:
        flat, flat_u = hidden.reshape(masked.size, -1), u.reshape(-1)

        def candidates(logits, u):
            statistics = _statistics(logits, self.k)
            if filters.temperature == 0:
                return statistics[0][:, 0], jnp.zeros(u.shape), statistics
            probs = filters.probs(logits)
            ids, total = inverse_cdf(probs, u)
            return ids, jnp.log(jnp.take_along_axis(probs, ids[:, None], 1)[:, 0] / total), statistics

        def body(rows, carry):
            logits = head.logits(flat.at[rows].get(mode="clip"))
            found = _in_cache(candidates, logits, flat_u.at[rows].get(mode="clip"))
            return jax.tree.map(lambda t, v: _put(t, rows, v), carry, found)

        init = (jnp.zeros(masked.size, jnp.int32), jnp.zeros(masked.size), self._empty(masked.size))
        chunk = min(self._chunk(masked.size), DRAWN)
        ids, log_prob, statistics = _for_rows(masked.reshape(-1), chunk, axes, body, init)
        return Draw(ids.reshape(masked.shape), log_prob.reshape(masked.shape), self._feedback(statistics, masked))

    def _nll_rows(
        self, axes: Axes, head: Head, hidden: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(total over all shards, nll [B, L])."""
        flat, flat_targets, flat_weights = hidden.reshape(targets.size, -1), targets.reshape(-1), weights.reshape(-1)

        def body(rows, carry):
            total, out = carry
            logits = head.logits(flat.at[rows].get(mode="clip"))
            nll, _ = _chunk_nll(logits, flat_targets.at[rows].get(mode="clip"))
            weight = flat_weights.at[rows].get(mode="fill", fill_value=0)
            return total + jnp.sum(weight * nll), _put(out, rows, nll)

        init = (jnp.zeros(()), jnp.zeros(targets.size))
        total, nll = _for_rows(flat_weights != 0, self._chunk(targets.size), axes, body, init)
        return _sum(total, axes), nll.reshape(targets.shape)

    def _nll_and_gradients_rows(
        self, axes: Axes, head: Head, hidden: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, Head]:
        """(total over all shards, nll [B, L], d_hidden [B, L, D], gradient of the head summed over all shards, f32)."""
        flat, flat_targets, flat_weights = hidden.reshape(targets.size, -1), targets.reshape(-1), weights.reshape(-1)
        if _by_kernel(axes, hidden, head.kernel):
            rows, count = _rows(flat_weights != 0, kernels.padded_rows(targets.size))
            weight = flat_weights.at[rows].get(mode="fill", fill_value=0)
            nll, d_rows, d_kernel, d_bias = kernels.nll(
                *(flat.at[rows].get(mode="clip"), head.kernel, head.bias),
                *(flat_targets.at[rows].get(mode="clip"), weight, count),
            )
            total = jnp.sum(jnp.where(weight != 0, weight * nll, 0))
            put = lambda like, values: _put(jnp.zeros_like(like), rows, values)
            return self._over_shards(axes, total, put(flat_weights, nll), put(flat, d_rows), d_kernel, d_bias, hidden)

        def body(rows, carry):
            total, out, d_hidden, d_kernel, d_bias = carry
            h = flat.at[rows].get(mode="clip")
            target = flat_targets.at[rows].get(mode="clip")
            weight = flat_weights.at[rows].get(mode="fill", fill_value=0)  # padding rows of the last chunk do not count
            logits = head.logits(h)
            nll, partition_log = _chunk_nll(logits, target)
            one_hot = jnp.arange(logits.shape[1]) == target[:, None]
            d_logits = weight[:, None] * (jnp.exp(logits - partition_log[:, None]) - one_hot)
            d_bias += d_logits.sum(0)
            d_logits = d_logits.astype(h.dtype)
            d_kernel += jnp.dot(h.T, d_logits, preferred_element_type=jnp.float32)
            d_hidden = _put(d_hidden, rows, jnp.dot(d_logits, head.kernel.T, preferred_element_type=jnp.float32))
            return total + jnp.sum(weight * nll), _put(out, rows, nll), d_hidden, d_kernel, d_bias

        init = (
            jnp.zeros(()),
            jnp.zeros(targets.size),
            jnp.zeros_like(flat),
            jnp.zeros(head.kernel.shape),
            jnp.zeros(head.bias.shape),
        )
        carry = _for_rows(flat_weights != 0, self._chunk(targets.size), axes, body, init)
        return self._over_shards(axes, *carry, hidden)

    def _over_shards(
        self,
        axes: Axes,
        total: jax.Array,
        nll: jax.Array,
        d_hidden: jax.Array,
        d_kernel: jax.Array,
        d_bias: jax.Array,
        hidden: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, Head]:
        if "fsdp" in axes:  # the kernel's rows are split over it: each shard keeps the sum of its own
            d_kernel = jax.lax.psum_scatter(d_kernel, "fsdp", scatter_dimension=0, tiled=True)
        d_kernel = _sum(d_kernel, tuple(axis for axis in axes if axis != "fsdp"))
        d_head = Head(d_kernel, _sum(d_bias, axes))
        return _sum(total, axes), nll.reshape(hidden.shape[:2]), d_hidden.reshape(hidden.shape), d_head

    def _empty(self, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        return jnp.zeros((rows, self.k), jnp.int32), jnp.zeros((rows, self.k)), jnp.zeros(rows)

    def _feedback(self, statistics: tuple[jax.Array, jax.Array, jax.Array], masked: jax.Array) -> Feedback:
        ids, probs, entropy = statistics
        grid = (*masked.shape, self.k)
        return Feedback(ids.reshape(grid), probs.reshape(grid), entropy.reshape(masked.shape), masked)


def _sum(x: jax.Array, axes: Axes) -> jax.Array:
    return jax.lax.psum(x, axes) if axes else x


def _chunk_nll(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """logits [C, V], targets [C] -> (nll [C], log of the partition function [C])."""
    top = logits.max(-1)
    partition = top + jnp.log(jnp.exp(logits - top[:, None]).sum(-1))
    return partition - jnp.take_along_axis(logits, targets[:, None], 1)[:, 0], partition


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(readout: Readout, head: Head, hidden: jax.Array, targets: jax.Array, weights: jax.Array):
    specs = lambda axes: (PartitionSpec(), PartitionSpec(axes))
    return readout._sweep(readout._nll_rows, head, hidden, targets, weights, out_specs=specs)


def _nll_forward(readout: Readout, head: Head, hidden: jax.Array, targets: jax.Array, weights: jax.Array):
    def specs(axes: Axes) -> Any:
        rows, d_kernel = PartitionSpec(axes), PartitionSpec("fsdp" if "fsdp" in axes else None)
        return PartitionSpec(), rows, rows, Head(d_kernel, PartitionSpec())

    total, nll, d_hidden, d_head = readout._sweep(
        readout._nll_and_gradients_rows, head, hidden, targets, weights, out_specs=specs
    )
    return (total, nll), (d_hidden, d_head.replace(kernel=d_head.kernel.astype(head.kernel.dtype)))


def _nll_backward(readout: Readout, residuals, cotangents):
    d_hidden, d_head = residuals
    scale = cotangents[0]
    d_head = jax.tree.map(lambda x: (scale * x).astype(x.dtype), d_head)
    return d_head, (scale * d_hidden).astype(d_hidden.dtype), None, None


_nll.defvjp(_nll_forward, _nll_backward)
