"""Pallas kernels of the readout for TPUs: statistics and likelihood of rows of logits that never reach HBM.

Shapes: N rows, D width, V vocabulary, K candidates.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

LANES = 128  # the vector width of a TPU
ROWS, COLUMNS = 1024, 512  # the largest tile of logits in VMEM: 2 MiB
LOWEST = -3e38  # below any logit, and finite: times zero it is zero


def readout_fits(hidden: jax.Array, matrix: jax.Array, k: int = 1) -> bool:
    """Half precision, whole lanes of width and of vocabulary."""
    whole = hidden.shape[-1] % LANES == 0 and matrix.shape[1] % LANES == 0
    return hidden.dtype == matrix.dtype == jnp.bfloat16 and whole and 2 * k + 2 <= LANES


def padded_rows(rows: int) -> int:
    """What the number of rows must be rounded up to for the two kernels below."""
    return rows + -rows % (ROWS if rows > ROWS else 16)


def statistics(
    hidden: jax.Array, matrix: jax.Array, bias: jax.Array, count: jax.Array, k: int, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(ids [N, K] i32, probs [N, K], neg_entropy [N]) of softmax(hidden @ matrix + bias) in one sweep, TPU only.

    hidden [N, D] bf16 with N from `padded_rows`, of which the first `count` are wanted (the others' results mean
    nothing); matrix [D, V] bf16, bias [V] f32. Logits exist tile by tile in VMEM alone: what crosses HBM is the matrix,
    once per 1024 rows. Ties go to the lowest id.
    """
    (out,) = _sweep(
        functools.partial(_statistics_tile, k=k),
        hidden,
        matrix,
        bias,
        count,
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
    matrix: jax.Array,
    bias: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    count: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(nll [N], and the gradients of sum(weights * nll), f32: d_hidden [N, D], d_matrix [D, V], d_bias [V]), TPU only.

    Arguments as for `statistics`; targets [N] i32, weights [N] f32, 0 for rows beyond `count`. No logit reaches HBM:
    they are formed three times, for the partition function and for each gradient, which makes five products of three.
    """
    (total, width), vocab = hidden.shape, matrix.shape[1]
    sweep = functools.partial(_sweep, hidden=hidden, matrix=matrix, bias=bias, count=count, interpret=interpret)
    targets, weights = targets[:, None], weights[:, None]
    (out,) = sweep(_partition_tile, per_row=[targets], results=[((total, LANES), "rows")], name="readout_partition")
    top, mass, wanted = out[:, 0], jnp.maximum(out[:, 1], 1e-30), out[:, 2]
    partition = top + jnp.log(mass)
    per_row = [targets, weights, partition[:, None]]
    (d_hidden,) = sweep(_d_hidden_tile, per_row=per_row, results=[((total, width), "rows")], name="readout_d_hidden")
    by_columns = [((width, vocab), "columns"), ((1, vocab), "columns")]
    d_matrix, d_bias = sweep(_d_matrix_tile, per_row=per_row, results=by_columns, name="readout_d_matrix")
    return partition - wanted, d_hidden, d_matrix, d_bias[0]


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The logits [N, V] in tiles of [rows, columns], and the order in which a kernel visits them.

    Attributes:
      row_tiles, column_tiles: their numbers.
      by_rows: the outer loop goes over the rows, else over the columns.
    """

    rows: int
    columns: int
    row_tiles: int
    column_tiles: int
    by_rows: bool

    @classmethod
    def of(cls, total: int, vocab: int, by_rows: bool) -> _Tiles:
        rows = min(ROWS, total)
        columns = max(n for n in range(LANES, COLUMNS + 1, LANES) if vocab % n == 0)
        return cls(rows, columns, total // rows, vocab // columns, by_rows)

    @property
    def grid(self) -> tuple[int, int]:
        return (self.row_tiles, self.column_tiles) if self.by_rows else (self.column_tiles, self.row_tiles)

    def at(self, outer: Any, inner: Any) -> tuple[Any, Any]:
        """Which tile of rows, and which of columns, at a step of the two loops."""
        return (outer, inner) if self.by_rows else (inner, outer)

    def block(self, shape: tuple[int, int], axis: str) -> Any:
        """The part of an array that a step sees: whole along one axis, a tile along the named one, 'rows' or 'columns'.

        Without a wanted row in the tile nothing is computed, and nothing fetched: the blocks in VMEM stay the same.
        """
        from jax.experimental import pallas as pl

        def index(outer: jax.Array, inner: jax.Array, count: Any) -> tuple[Any, Any]:
            i, j = self.at(outer, inner)
            last = jnp.maximum(pl.cdiv(count[0], self.rows) - 1, 0)
            if axis == "rows":
                return (i if self.by_rows else jnp.minimum(i, last)), 0
            return 0, (jnp.where(i <= last, j, 0) if self.by_rows else j)

        return pl.BlockSpec((self.rows, shape[1]) if axis == "rows" else (shape[0], self.columns), index)


def _sweep(
    tile: Callable[..., None],
    hidden: jax.Array,
    matrix: jax.Array,
    bias: jax.Array,
    count: jax.Array,
    *,
    per_row: Sequence[jax.Array] = (),
    results: Sequence[tuple[tuple[int, int], str]],
    interpret: bool,
    name: str,
) -> list[jax.Array]:
    """Calls tile(at, logits [R, C], columns [R, C] f32, hidden, matrix, *per_row, *results) on every tile.

    Args:
      per_row: arrays [N, 1], handed over by tiles of rows.
      results: f32 (shape, 'rows' or 'columns'). A result by rows is kept in VMEM while the vocabulary passes, one by
        columns while the rows do. `at` is 0 on the first tile of that pass, when its contents are undefined.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    tiles = _Tiles.of(len(hidden), matrix.shape[1], by_rows=results[0][1] == "rows")

    def body(count, hidden, matrix, bias, *refs):
        inner = pl.program_id(1)
        i, j = tiles.at(pl.program_id(0), inner)

        @pl.when(inner == 0)
        def _():
            for ref in refs[len(per_row) :]:
                ref[...] = jnp.zeros_like(ref)

        @pl.when(i * tiles.rows < count[0])
        def _():
            logits = jnp.dot(hidden[...], matrix[...], preferred_element_type=jnp.float32) + bias[...]
            column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
            tile(inner, logits, (j * tiles.columns + column).astype(jnp.float32), hidden, matrix, *refs)

    bias = bias.reshape(1, -1)
    by_columns = [tiles.block(x.shape, "columns") for x in (matrix, bias)]
    by_rows = [tiles.block(x.shape, "rows") for x in per_row]
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=tiles.grid,
            in_specs=[tiles.block(hidden.shape, "rows"), *by_columns, *by_rows],
            out_specs=[tiles.block(shape, axis) for shape, axis in results],
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape, _ in results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=48 * 2**20
        ),
        cost_estimate=_cost(tiles, hidden, matrix, [shape for shape, _ in results]),
        interpret=interpret,
        name=name,
    )(count.reshape(1), hidden, matrix, bias, *per_row)


def _cost(tiles: _Tiles, hidden: jax.Array, matrix: jax.Array, results: Sequence[tuple[int, int]]) -> Any:
    """For the scheduler: the logits and, but for statistics of LANES per row, one more product for the result."""
    from jax.experimental import pallas as pl

    products = 1 if len(results) == 1 and results[0][1] == LANES else 2
    again = tiles.row_tiles * matrix.size if tiles.by_rows else tiles.column_tiles * hidden.size
    return pl.CostEstimate(
        flops=2 * products * len(hidden) * matrix.size,
        transcendentals=len(hidden) * matrix.shape[1],
        bytes_accessed=2 * (again + hidden.size + matrix.size) + 4 * sum(a * b for a, b in results),
    )


def _statistics_tile(at, logits, columns, hidden, matrix, out, *, k: int):
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


def _partition_tile(at, logits, columns, hidden, matrix, targets, out):
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


def _d_hidden_tile(at, logits, columns, hidden, matrix, targets, weights, partition, out):
    d_logits = _d_logits(logits, columns, targets, weights, partition).astype(matrix.dtype)
    out[...] += jax.lax.dot_general(d_logits, matrix[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _d_matrix_tile(at, logits, columns, hidden, matrix, targets, weights, partition, d_matrix, d_bias):
    d_logits = _d_logits(logits, columns, targets, weights, partition)
    d_bias[...] += d_logits.sum(0, keepdims=True)
    d_logits = d_logits.astype(hidden.dtype)
    d_matrix[...] += jax.lax.dot_general(
        hidden[...], d_logits, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
