"""Softmax attention, and the one place where its form is chosen: a library's kernel where one fits, else XLA's or a
CPU's.

Shapes: B examples, L positions, M keys, H query heads, G key heads, E head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from smdlm.mesh import traced
from smdlm.ops import cpu
from smdlm.ops.pallas import LANES

BLOCK = 512  # positions per block of splash attention; its scores [512, 512] f32 are 1 MiB of the 16 MiB of VMEM


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    causal: bool = False,
    implementation: str = "auto",
    products: str = "dtype",
) -> jax.Array:
    """Softmax attention with an f32 softmax: query [B, L, H, E], key and value [B, M, G, E] -> [B, L, H, E].

    H is a multiple of G: query head h reads key head h // (H / G). What the backward pass needs is named 'attention'
    (`checkpoint_name`), so that rematerialisation which saves this name repeats nothing of it.

    Args:
      mask: bool [B or 1, L or 1, M], True where a position may attend; [B, 1, M] hides padding. None is everywhere. The
        result at a position that is left no key is finite and means nothing.
      causal: position l sees keys <= l, where L = M.
      implementation: 'xla', or with 'auto' by the platform that the program is compiled for.
      products: `Model.products`.
    """
    where = traced.platform() if implementation == "auto" else implementation
    if where == "cpu":
        return cpu.attention(query, key, value, mask, causal, products)
    query, key, value = checkpoint_name((query, key, value), "attention")
    if where == "tpu" and splash_fits(query, key, mask):
        return _on_each_shard(functools.partial(splash, causal=causal), query, key, value, mask)
    if where == "gpu" and cudnn_fits(query, key):
        return _on_each_shard(functools.partial(cudnn, causal=causal), query, key, value, mask)
    out = jax.nn.dot_product_attention(query, key, value, mask=_for_every_head(mask), is_causal=causal)
    return checkpoint_name(out, "attention")


def not_after(slots: jax.Array, keys: int, mask: jax.Array | None) -> jax.Array:
    """The mask of a causal model with a cache: [B or 1, L, M] from the slots [L] of its positions, for M keys."""
    order = (jnp.arange(keys) <= slots[:, None])[None]
    return order if mask is None else mask & order


def _on_each_shard(
    library: Callable[..., jax.Array], query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """library(query, key, value, mask), whose kernels keep no [B, H, L, M].

    The compiler can not split them, so each shard of the batch and of the heads runs its own. Heads are split where the
    mesh divides the key heads: then a shard has the keys of all its queries.
    """
    batch, heads = traced.splits(len(query), *traced.BATCH_AXES), traced.splits(key.shape[2], "tensor")
    spec, mask_spec = PartitionSpec(batch or None, None, heads or None), PartitionSpec(batch or None)
    if mask is None:
        return traced.per_shard(library, traced.used(), (spec, spec, spec), spec)(query, key, value)
    mask = jnp.broadcast_to(mask, (len(query), *mask.shape[1:]))
    return traced.per_shard(library, traced.used(), (spec, spec, spec, mask_spec), spec)(query, key, value, mask)


def _for_every_head(mask: jax.Array | None) -> jax.Array | None:
    """[B or 1, L or 1, M] -> [B or 1, 1, L or 1, M], as jax.nn wants it."""
    return None if mask is None else mask[:, None]


def _self_attention(query: jax.Array, key: jax.Array) -> bool:
    return query.shape[:2] == key.shape[:2]


# ------------------------------------------------------------------------------------------------------------- GPUs


def cudnn_fits(query: jax.Array, key: jax.Array) -> bool:
    """cuDNN's fused attention has no f32; the backward pass wants an even length."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    _, length, _, width = query.shape
    return _self_attention(query, key) and half and width % 8 == 0 and width <= 128 and length % 2 == 0


def cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None, *, causal: bool = False
) -> jax.Array:
    """cuDNN's, for shapes as in `attention`."""
    if mask is not None:  # it becomes a bias, of which cuDNN wants a row for every query
        mask = jnp.broadcast_to(mask, (len(mask), query.shape[1], mask.shape[2]))
    return jax.nn.dot_product_attention(
        query, key, value, mask=_for_every_head(mask), is_causal=causal, implementation="cudnn"
    )


def is_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """Policy for `jax.checkpoint`: keeps the results of cuDNN's forward kernel, whose logsumexp nothing else names."""
    return primitive.name.startswith("dot_product_attention_fwd")


# ------------------------------------------------------------------------------------------------------------- TPUs


def splash_fits(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> bool:
    """Self-attention over whole blocks, at most with padding; a head width that fills lanes, or half of them."""
    padding = mask is None or mask.shape[1] == 1
    return _self_attention(query, key) and padding and query.shape[1] % LANES == 0 and query.shape[3] % 64 == 0


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    causal: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Pallas's, for shapes as in `attention` and mask [B, 1, M]. Output and logsumexp are saved as 'attention'."""
    # Half a second to import, and of no use elsewhere.
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    _, length, heads, width = query.shape
    query = (query.astype(jnp.float32) * width**-0.5).astype(query.dtype)
    segments = None
    if mask is not None:  # a query sees the keys of its own segment: all queries are in that of the keys that count
        counts = mask[:, 0].astype(jnp.int32)
        segments = SegmentIds(q=jnp.ones_like(counts), kv=counts)
    # It takes one example at a time, heads before positions.
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    out = jax.vmap(_splash_kernel(length, heads, causal, interpret))(query, key, value, segments)
    return jnp.swapaxes(out, 1, 2)


def _splash_kernel(length: int, heads: int, causal: bool, interpret: bool) -> Callable[..., jax.Array]:
    """query [H, L, E], key and value [G, L, E], segments [L] or None -> [H, L, E]."""
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
