"""Kernels for TPUs and GPUs: attention from the libraries, and what the readout remembers of a row of logits.

Shapes: B examples, L positions, M keys, H heads, E head width; N rows, D width, V vocabulary, K candidates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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


ROWS, COLUMNS = 1024, 512  # the largest tile of logits in VMEM: 2 MiB
LOWEST = -3e38  # below any logit, and finite: times zero it is zero


def readout_fits(hidden: jax.Array, kernel: jax.Array, k: int = 1) -> bool:
    """Half precision, whole lanes of width and of vocabulary."""
    whole = hidden.shape[-1] % LANES == 0 and kernel.shape[1] % LANES == 0
    return hidden.dtype == kernel.dtype == jnp.bfloat16 and whole and 2 * k + 2 <= LANES


def padded_rows(rows: int) -> int:
    """What the number of rows must be rounded up to for the two kernels below."""
    return rows + -rows % (ROWS if rows > ROWS else 16)


def statistics(
    hidden: jax.Array, kernel: jax.Array, bias: jax.Array, count: jax.Array, k: int, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(ids [N, K] i32, probs [N, K], neg_entropy [N]) of softmax(hidden @ kernel + bias) in one sweep, TPU only.

    hidden [N, D] bf16 with N from `padded_rows`, of which the first `count` are wanted (the others' results mean
    nothing); kernel [D, V] bf16, bias [V] f32. Logits exist tile by tile in VMEM alone: what crosses HBM is the kernel,
    once per 1024 rows. Ties go to the lowest id.
    """
    (out,) = _sweep(
        functools.partial(_statistics_tile, k=k),
        *(hidden, kernel, bias, count),
        results=[((hidden.shape[0], LANES), "rows")],
        interpret=interpret,
        name="readout_statistics",
    )
    values, ids, mass, moment = out[:, :k], out[:, k : 2 * k], out[:, 2 * k], out[:, 2 * k + 1]
    mass = jnp.maximum(mass, 1e-30)  # of rows that were not wanted
    neg_entropy = moment / mass - jnp.log(mass)
    return ids.astype(jnp.int32), jnp.exp(values - values[:, :1]) / mass[:, None], neg_entropy


def nll(
    hidden: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    count: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(nll [N], and the gradients of sum(weights * nll), f32: d_hidden [N, D], d_kernel [D, V], d_bias [V]), TPU only.

    Arguments as for `statistics`; targets [N] i32, weights [N] f32, 0 for rows beyond `count`. No logit reaches HBM:
    they are formed three times, for the partition function and for each gradient, which makes five products of three.
    """
    (total, width), vocab = hidden.shape, kernel.shape[1]
    sweep = functools.partial(_sweep, hidden=hidden, kernel=kernel, bias=bias, count=count, interpret=interpret)
    column = lambda x: x.reshape(-1, 1)
    (out,) = sweep(
        _partition_tile, rows=[column(targets)], results=[((total, LANES), "rows")], name="readout_partition"
    )
    top, mass, wanted = out[:, 0], jnp.maximum(out[:, 1], 1e-30), out[:, 2]
    partition = top + jnp.log(mass)
    rows = [column(targets), column(weights), column(partition)]
    (d_hidden,) = sweep(_d_hidden_tile, rows=rows, results=[((total, width), "rows")], name="readout_d_hidden")
    d_kernel, d_bias = sweep(
        _d_kernel_tile,
        rows=rows,
        results=[((width, vocab), "columns"), ((1, vocab), "columns")],
        name="readout_d_kernel",
    )
    return partition - wanted, d_hidden, d_kernel, d_bias[0]


def _sweep(
    tile: Callable[..., None],
    hidden: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    count: jax.Array,
    *,
    rows: Sequence[jax.Array] = (),
    results: Sequence[tuple[tuple[int, int], str]],
    interpret: bool,
    name: str,
) -> list[jax.Array]:
    """Calls tile(at, logits [R, C], columns [R, C] f32, hidden, kernel, *rows, *results) on every tile of the logits.

    Args:
      rows: arrays [N, 1], handed over by tiles of rows.
      results: f32 (shape, 'rows' or 'columns'). A result by rows is kept in VMEM while the vocabulary passes, one by
        columns while the rows do. `at` is 0 on the first tile of that pass, when its contents are undefined.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (total, width), vocab = hidden.shape, kernel.shape[1]
    by_rows = results[0][1] == "rows"
    row_tile = min(ROWS, total)
    column_tile = max(n for n in range(LANES, COLUMNS + 1, LANES) if vocab % n == 0)
    row_tiles, column_tiles = total // row_tile, vocab // column_tile

    # Without a wanted row in the tile nothing is computed, and nothing fetched: the blocks in VMEM stay the same.
    def block(shape: tuple[int, int], axis: str) -> pl.BlockSpec:
        def index(outer: jax.Array, inner: jax.Array, count: Any) -> tuple[Any, Any]:
            i, j = (outer, inner) if by_rows else (inner, outer)
            last = jnp.maximum(pl.cdiv(count[0], row_tile) - 1, 0)
            if axis == "rows":
                return (i if by_rows else jnp.minimum(i, last)), 0
            return 0, (jnp.where(i <= last, j, 0) if by_rows else j)

        return pl.BlockSpec(shape, index)

    def body(count, hidden, kernel, bias, *refs):
        outer, inner = pl.program_id(0), pl.program_id(1)
        i, j = (outer, inner) if by_rows else (inner, outer)

        @pl.when(inner == 0)
        def _():
            for ref in refs[len(rows) :]:
                ref[...] = jnp.zeros_like(ref)

        @pl.when(i * row_tile < count[0])
        def _():
            logits = jnp.dot(hidden[...], kernel[...], preferred_element_type=jnp.float32) + bias[...]
            columns = (j * column_tile + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)).astype(jnp.float32)
            tile(inner, logits, columns, hidden, kernel, *refs)

    sizes = {"rows": lambda shape: (row_tile, shape[1]), "columns": lambda shape: (shape[0], column_tile)}
    products = 1 if len(results) == 1 and results[0][0][1] == LANES else 2
    again = row_tiles * kernel.size if by_rows else column_tiles * hidden.size
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(row_tiles, column_tiles) if by_rows else (column_tiles, row_tiles),
            in_specs=[
                block((row_tile, width), "rows"),
                block((width, column_tile), "columns"),
                block((1, column_tile), "columns"),
                *(block((row_tile, 1), "rows") for _ in rows),
            ],
            out_specs=[block(sizes[axis](shape), axis) for shape, axis in results],
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=48 * 2**20
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * total * width * vocab,
            transcendentals=total * vocab,
            bytes_accessed=2 * (again + hidden.size + kernel.size) + 4 * sum(a * b for (a, b), _ in results),
        ),
        interpret=interpret,
        name=name,
    )(count.reshape(1), hidden, kernel, bias.reshape(1, -1), *rows)


def _statistics_tile(at, logits, columns, hidden, kernel, out, *, k: int):
    """Lanes of `out`: K largest logits, their ids, sum of e, sum of e * (x - max), where e = exp(x - max).

    max is the largest logit so far; both sums are rescaled when it grows. Ids are exact in f32.
    """
    old = out[...]
    values = [jnp.where(at == 0, LOWEST, old[:, n : n + 1]) for n in range(k)]
    ids = [old[:, k + n : k + n + 1] for n in range(k)]
    mass, moment = old[:, 2 * k : 2 * k + 1], old[:, 2 * k + 1 : 2 * k + 2]
    before, rest = values[0], logits
    for _ in range(k):
        value = rest.max(1, keepdims=True)
        index = jnp.where(rest == value, columns, 2.0**24).min(1, keepdims=True)
        rest = jnp.where(columns == index, LOWEST, rest)
        for n in range(k):  # insertion; what was there has lower ids and stays in front of its equals
            above = value > values[n]
            values[n], value = jnp.where(above, value, values[n]), jnp.where(above, values[n], value)
            ids[n], index = jnp.where(above, index, ids[n]), jnp.where(above, ids[n], index)
    shift = before - values[0]
    scale, exponent = jnp.exp(shift), logits - values[0]
    e = jnp.exp(exponent)
    moment = scale * (moment + shift * mass) + jnp.sum(e * exponent, 1, keepdims=True)
    out[...] = _lanes(old.shape, *values, *ids, scale * mass + e.sum(1, keepdims=True), moment)


def _partition_tile(at, logits, columns, hidden, kernel, targets, out):
    """Lanes of `out`: largest logit, sum of exp(x - max), the target's logit."""
    old = out[...]
    before = jnp.where(at == 0, LOWEST, old[:, :1])
    top = jnp.maximum(before, logits.max(1, keepdims=True))
    mass = jnp.exp(before - top) * old[:, 1:2] + jnp.exp(logits - top).sum(1, keepdims=True)
    wanted = jnp.sum(jnp.where(columns == targets[...].astype(jnp.float32), logits, 0.0), 1, keepdims=True)
    out[...] = _lanes(old.shape, top, mass, old[:, 2:3] + wanted)


def _lanes(shape: tuple[int, int], *columns: jax.Array) -> jax.Array:
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return functools.reduce(lambda out, n: jnp.where(lane == n, columns[n], out), range(len(columns)), jnp.zeros(shape))


def _d_logits(logits, columns, targets, weights, partition):
    """weight * (p - one-hot)."""
    one_hot = (columns == targets[...].astype(jnp.float32)).astype(jnp.float32)
    return weights[...] * (jnp.exp(logits - partition[...]) - one_hot)


def _d_hidden_tile(at, logits, columns, hidden, kernel, targets, weights, partition, out):
    d_logits = _d_logits(logits, columns, targets, weights, partition).astype(kernel.dtype)
    out[...] += jax.lax.dot_general(d_logits, kernel[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _d_kernel_tile(at, logits, columns, hidden, kernel, targets, weights, partition, d_kernel, d_bias):
    d_logits = _d_logits(logits, columns, targets, weights, partition)
    d_bias[...] += d_logits.sum(0, keepdims=True)
    d_logits = d_logits.astype(hidden.dtype)
    d_kernel[...] += jax.lax.dot_general(
        hidden[...], d_logits, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
