"""Kernels for TPUs and GPUs: attention from the libraries.

Shapes: B examples, L positions, M keys, H heads, E head width.
"""

from __future__ import annotations

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
