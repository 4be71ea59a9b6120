"""Sweeps over the selected rows of a flat array, a chunk of static size at a time; they know nothing of models.

Shapes: N rows, C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from smdlm.mesh import traced

CACHED = {"cpu": 2**18, "tpu": 2**21}  # logits of `in_cache`: 1 MiB of a core's cache, 8 MiB of VMEM

Axes = tuple[str, ...]  # mesh axes over which the rows are split by hand


class Chunk(NamedTuple):
    """Numbers [C] i32 of some rows of an [N, ...] array; N itself fills up what no row is left for."""

    index: jax.Array

    def of(self, x: jax.Array, fill: float | None = None) -> jax.Array:
        """Those rows of x: [N, ...] -> [C, ...]; where no row is left, `fill`, or any row."""
        rows = x.at[self.index]
        return rows.get(mode="clip") if fill is None else rows.get(mode="fill", fill_value=fill)

    def into(self, targets: Any, values: Any) -> Any:
        """A pytree of arrays [N, ...] with these rows replaced by values [C, ...] of the same structure."""

        def put(target: jax.Array, value: jax.Array) -> jax.Array:
            return target.at[self.index].set(value.astype(target.dtype), mode="drop")

        return jax.tree.map(put, targets, values)


def selected_rows(selected: jax.Array, size: int) -> tuple[Chunk, jax.Array]:
    """(all selected rows of [N] bool as one chunk of the given size, the selected first; their count [] i32)."""
    index = jnp.nonzero(selected, size=size, fill_value=selected.shape[0])[0].astype(jnp.int32)
    return Chunk(index), jnp.sum(selected, dtype=jnp.int32)


def fold_chunks(selected: jax.Array, size: int, axes: Axes, body: Callable[[Chunk, Any], Any], init: Any) -> Any:
    """Folds body(chunk, carry) over the selected rows of [N], `size` of them at a time.

    The number of trips is a run-time value, so the work follows the count exactly, with one compiled program. All
    shards make as many trips as the fullest, because the compiler may put collectives of a split vocabulary into the
    loop; with Weyl times the shards' counts differ by a few per cent.
    """
    every, count = selected_rows(selected, selected.shape[0] + -selected.shape[0] % size)
    if axes:
        count = jax.lax.pmax(count, axes)

    def step(i: jax.Array, carry: Any) -> Any:
        return body(Chunk(jax.lax.dynamic_slice_in_dim(every.index, i * size, size)), carry)

    return jax.lax.fori_loop(0, (count + size - 1) // size, step, init)


def in_cache(fn: Callable[..., Any], logits: jax.Array, *arrays: jax.Array) -> Any:
    """fn(logits [C, V], arrays [C, ..]), for a few rows at a time, whose logits stay in a CPU's cache or a TPU's VMEM.

    A draw makes some thirty passes over its logits. Measured on a CPU for about 512 rows of 50,304: 390 -> 300 ms with
    the head. The TPU compiler then keeps them on the chip: by `smdlm.tools.aot`, a sampler's step of configs/owt.py on
    v5e takes at least 1.4 instead of 10.4 ms.
    """
    rows, vocab = logits.shape
    most = CACHED.get(traced.platform(), logits.size) // vocab
    few = max(n for n in range(1, max(1, most) + 1) if rows % n == 0)
    if few == rows:
        return fn(logits, *arrays)
    folded = jax.tree.map(lambda x: x.reshape(-1, few, *x.shape[1:]), (logits, *arrays))
    out = jax.lax.map(lambda xs: fn(*xs), folded)
    return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), out)


def sum_over(x: jax.Array, axes: Axes) -> jax.Array:
    """The sum over all shards of these mesh axes."""
    return jax.lax.psum(x, axes) if axes else x
