"""The mesh as a program being traced sees it: that of `jax.set_mesh`, whose devices need not be attached."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp")  # mesh axes over which the examples are split


def platform() -> str:
    """What the program is compiled for, 'cpu', 'tpu' or 'gpu': the devices of the mesh, else the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.config.jax_default_device
    name = getattr(device, "platform", device) or jax.default_backend()
    return "gpu" if name == "cuda" else name


def used() -> tuple[str, ...]:
    """Mesh axes with several devices."""
    return tuple(name for name, size in jax.sharding.get_abstract_mesh().shape.items() if size > 1)


def splits(size: int, *axes: str) -> tuple[str, ...]:
    """Those of the axes that have several devices; none if together they do not divide size."""
    axes = tuple(axis for axis in axes if axis in used())
    shape = jax.sharding.get_abstract_mesh().shape
    return axes if size % math.prod(shape[axis] for axis in axes) == 0 else ()


def split_batch(x: jax.Array) -> jax.Array:
    """x [B, ...], kept split by examples, and whole otherwise.

    Parameters sharded over fsdp would else spread their sharding to the activations, and every chip hold all examples.
    """
    axes = splits(len(x), *BATCH_AXES)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def gather(weights: jax.Array, axis: int | None) -> jax.Array:
    """weights, whole along the axis that fsdp splits (None: no axis is); other axes stay as they are.

    Said here, because the compiler would rather pass the parts around and add up partial products, and round and write
    the sum once for each part: by `smdlm.tools.aot`, a step of configs/owt_medium.py on v5e:4x4 takes at least 180
    instead of 256 ms.
    """
    if axis is None or "fsdp" not in used():
        return weights
    spec = [PartitionSpec.UNCONSTRAINED] * weights.ndim
    spec[axis] = None
    return jax.lax.with_sharding_constraint(weights, PartitionSpec(*spec))


def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """table[ids], where table [V, D] is split as [tensor, fsdp] and ids [B, ...] by examples: [B, ..., D].

    By hand, because the compiler gathers the vocabulary and the looked-up rows of a table that is split both ways: each
    chip looks up what its part of the vocabulary holds, and the parts are summed. The gradient is a scatter-add.
    """
    vocab, width, batch = splits(len(table), "tensor"), splits(table.shape[1], "fsdp"), splits(len(ids), *BATCH_AXES)
    whole = not batch and any(axis in used() for axis in BATCH_AXES)  # a few examples, which every chip holds
    if whole or not vocab and not width:
        return table[ids]

    def rows(table: jax.Array, ids: jax.Array) -> jax.Array:
        if width:
            table = jax.lax.all_gather(table, "fsdp", axis=1, tiled=True)
        if not vocab:
            return table[ids]
        ids = ids - jax.lax.axis_index("tensor") * len(table)
        held = (ids >= 0) & (ids < len(table))
        return jax.lax.psum(jnp.where(held[..., None], table.at[ids].get(mode="clip"), 0), "tensor")

    rows_of = PartitionSpec(batch or None)
    specs = (PartitionSpec(vocab or None, width or None), rows_of)
    return jax.shard_map(rows, in_specs=specs, out_specs=rows_of, axis_names=set(used()))(table, ids)


def per_shard(fn: Callable[..., Any], axes: tuple[str, ...], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """fn on each shard, split by hand over `axes`; fn itself where there are none.

    For what the compiler would split badly (gathers of rows) or not at all (Pallas kernels, which therefore want every
    axis of the mesh to be by hand: axes of one device always are).
    """
    if not axes:
        return fn
    names = {name for name in jax.sharding.get_abstract_mesh().axis_names if name in axes or name not in used()}
    return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)
