"""Kernels for TPUs and GPUs: attention from the libraries, and what the readout remembers of a row of logits.

Shapes: B examples, L positions, M keys, H heads, E head width; N rows, D width, V vocabulary, K candidates.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

LANES = 128  # a TPU's vector width: blocks of positions are multiples of it
BLOCK = 512  # positions per block of splash attention; its scores [512, 512] f32 are 1 MiB of the 16 MiB of VMEM


def splash_fits(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> bool:
    """Self-attention over whole blocks; a head width that fills lanes, or half of them."""
    return mask is None and query.shape == key.shape and query.shape[1] % LANES == 0 and query.shape[3] % 64 == 0


def cudnn_fits(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> bool:
    """cuDNN's fused attention has no f32; the backward pass wants an even length."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    length, _, width = query.shape[1:]
    return mask is None and query.shape == key.shape and half and width % 8 == 0 and width <= 128 and length % 2 == 0


def is_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """Policy for `jax.checkpoint`: keeps the results of cuDNN's forward kernel, whose logsumexp nothing else names."""
    return primitive.name.startswith("dot_product_attention_fwd")


def splash(
    query: jax.Array, key: jax.Array, value: jax.Array, *, causal: bool = False, interpret: bool = False
) -> jax.Array:
    """Pallas's splash attention, [B, L, H, E] -> [B, L, H, E]. Output and logsumexp are saved as 'attention'."""
    _, length, heads, width = query.shape
    kernel = _splash_kernel(length, heads, causal, interpret)
    query = (query.astype(jnp.float32) * width**-0.5).astype(query.dtype)
    rows = lambda x: jnp.swapaxes(x, 1, 2)
    return rows(jax.vmap(kernel)(rows(query), rows(key), rows(value)))


def _splash_kernel(length: int, heads: int, causal: bool, interpret: bool) -> Any:
    # Half a second to import, and of no use elsewhere.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    block = next(size for size in (BLOCK, BLOCK // 2, LANES) if length % size == 0)
    mask = (splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask)((length, length))
    return splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        residual_checkpoint_name="attention",
        interpret=interpret,
    )


ROWS, COLUMNS = 1024, 512  # a tile of logits in VMEM: 2 MiB
LOWEST = -3e38  # below any logit, and finite: times zero it is zero


def statistics_fit(hidden: jax.Array, k: int) -> bool:
    """Half precision, whole lanes of width."""
    return hidden.dtype == jnp.bfloat16 and hidden.shape[-1] % LANES == 0 and 2 * k + 2 <= LANES


def statistics(
    hidden: jax.Array, kernel: jax.Array, bias: jax.Array, count: jax.Array, k: int, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(ids [N, K] i32, probs [N, K], neg_entropy [N]) of softmax(hidden @ kernel + bias) in one sweep, TPU only.

    hidden [N, D] bf16, of which the first `count` rows are wanted (the others' results mean nothing); kernel [D, V]
    bf16, bias [V] f32. Logits exist tile by tile in VMEM alone: what crosses HBM is the kernel, once per 1024 rows.
    Ties go to the lowest id.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (total, width), vocab = hidden.shape, kernel.shape[1]
    rows = min(ROWS, total + -total % 16)
    columns = min(COLUMNS, vocab + -vocab % LANES)
    grid = (pl.cdiv(total, rows), pl.cdiv(vocab, columns))
    # A tile of rows without any wanted one stays at the vocabulary's first tile: nothing is fetched for it.
    column = lambda i, j, count: jax.lax.select(i * rows < count[0], j, 0)
    out = pl.pallas_call(
        functools.partial(_statistics_tile, k=k, vocab=vocab),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                pl.BlockSpec((rows, width), lambda i, j, count: (i, 0)),
                pl.BlockSpec((width, columns), lambda i, j, count: (0, column(i, j, count))),
                pl.BlockSpec((1, columns), lambda i, j, count: (0, column(i, j, count))),
            ],
            out_specs=pl.BlockSpec((rows, LANES), lambda i, j, count: (i, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((total, LANES), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=48 * 2**20
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * total * width * vocab,
            transcendentals=total * vocab,
            bytes_accessed=grid[0] * kernel.size * 2 + hidden.size * 2 + total * LANES * 4,
        ),
        interpret=interpret,
        name="readout_statistics",
    )(count.reshape(1), hidden, kernel, bias.reshape(1, -1))
    values, ids, mass, moment = out[:, :k], out[:, k : 2 * k], out[:, 2 * k], out[:, 2 * k + 1]
    mass = jnp.maximum(mass, 1e-30)  # of rows that were not wanted
    neg_entropy = moment / mass - jnp.log(mass)
    return ids.astype(jnp.int32), jnp.exp(values - values[:, :1]) / mass[:, None], neg_entropy


def _statistics_tile(count, hidden, kernel, bias, out, *, k: int, vocab: int):
    """One tile of logits into `out`, whose lanes are: K largest logits, their ids, sum of e, sum of e * (x - max).

    e = exp(x - max) with the largest logit so far; both sums are rescaled when it grows. Ids are exact in f32.
    """
    from jax.experimental import pallas as pl

    i, j = pl.program_id(0), pl.program_id(1)
    lane = jax.lax.broadcasted_iota(jnp.int32, out.shape, 1)

    @pl.when(j == 0)
    def _():
        out[...] = jnp.where(lane < k, LOWEST, 0.0)

    @pl.when(i * out.shape[0] < count[0])
    def _():
        logits = jnp.dot(hidden[...], kernel[...], preferred_element_type=jnp.float32) + bias[...]
        column = (j * logits.shape[1] + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)).astype(jnp.float32)
        logits = jnp.where(column < vocab, logits, LOWEST)  # the last tile may reach beyond the vocabulary
        old = out[...]
        values = [old[:, n : n + 1] for n in range(k)]
        ids = [old[:, k + n : k + n + 1] for n in range(k)]
        mass, moment = old[:, 2 * k : 2 * k + 1], old[:, 2 * k + 1 : 2 * k + 2]

        before, rest = values[0], logits
        for _ in range(k):
            value = rest.max(1, keepdims=True)
            index = jnp.where(rest == value, column, float(vocab)).min(1, keepdims=True)
            rest = jnp.where(column == index, LOWEST, rest)
            for n in range(k):  # insertion; what was there has lower ids and stays in front of its equals
                above = value > values[n]
                values[n], value = jnp.where(above, value, values[n]), jnp.where(above, values[n], value)
                ids[n], index = jnp.where(above, index, ids[n]), jnp.where(above, ids[n], index)

        shift = before - values[0]
        scale = jnp.exp(shift)
        exponent = logits - values[0]
        e = jnp.exp(exponent)
        moment = scale * (moment + shift * mass) + jnp.sum(e * exponent, 1, keepdims=True)
        mass = scale * mass + e.sum(1, keepdims=True)
        new = jnp.zeros_like(old)
        for n, x in enumerate((*values, *ids, mass, moment)):
            new = jnp.where(lane == n, x, new)
        out[...] = new
