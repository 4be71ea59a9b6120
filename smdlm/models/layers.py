"""Building blocks shared by the models. Shapes: B examples, L positions, M keys, H heads, E head width, D width."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from smdlm import kernels, shard


class Head(flax.struct.PyTreeNode):
    """The output head as plain arrays, which the readout sweeps in chunks: kernel [D, V], bias [V] f32."""

    kernel: jax.Array
    bias: jax.Array

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V] f32: multiplied in the type of hidden, accumulated in f32."""
        product = jnp.dot(hidden, self.kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return product + self.bias


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of all layers: [N layers, B, M, H, E]; position i of M holds what was written there."""

    keys: jax.Array
    values: jax.Array

    @classmethod
    def zeros(cls, layers: int, batch: int, length: int, heads: int, width: int, dtype: Any) -> KVCache:
        shape = (layers, batch, length, heads, width)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def uniform_fan_in(fan_in: int) -> nn.initializers.Initializer:
    """U(+-1/sqrt(fan_in)): PyTorch's default for linear layers, weights and biases."""
    limit = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


def logical(init: nn.initializers.Initializer, *names: str | None) -> nn.initializers.Initializer:
    """Names the axes of a parameter; partition.py maps names to mesh axes."""
    return nn.with_logical_partitioning(init, names)


def rotary(x: jax.Array, positions: jax.Array, base: float = 10000.0) -> jax.Array:
    """Rotary embedding, half-split (i with i + E/2), full head width: [B, L, H, E] at integer positions [L].

    Angles in f32 whatever the type of x: at position 1000 a bf16 angle is off by several radians.
    """
    half = x.shape[-1] // 2
    frequencies = jnp.asarray(base ** (-np.arange(half, dtype=np.float64) / half), jnp.float32)
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    causal: bool = False,
    kernel: str = "auto",
) -> jax.Array:
    """Softmax attention, f32 softmax: query [B, L, H, E], key and value [B, M, H, E], mask [L, M] bool or None.

    The one place where a kernel is chosen: 'xla', or with 'auto' by the platform that the program is compiled for. What
    its backward pass needs is named 'attention' (`checkpoint_name`): rematerialisation that saves this name repeats
    nothing of it. Libraries' kernels keep no [B, H, L, M]; the compiler can not split them, so each shard of the batch
    and of the heads runs its own.
    """
    where = shard.platform() if kernel == "auto" else kernel
    if where == "tpu" and kernels.splash_fits(query, key, mask):
        library = functools.partial(kernels.splash, causal=causal)
    elif where == "gpu" and kernels.cudnn_fits(query, key, mask):
        library = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    else:
        if causal:
            mask = jnp.tri(query.shape[1], dtype=bool)
        if where == "cpu":
            swap = lambda x: jnp.swapaxes(x, 1, 2)
            return swap(_cpu_attention(swap(query), swap(key), swap(value), mask))
        query, key, value = checkpoint_name((query, key, value), "attention")
        out = jax.nn.dot_product_attention(query, key, value, mask=None if mask is None else mask[None, None])
        return checkpoint_name(out, "attention")
    query, key, value = checkpoint_name((query, key, value), "attention")
    batch, heads = shard.splits(len(query), *shard.BATCH_AXES), shard.splits(query.shape[2], "tensor")
    spec = PartitionSpec(batch or None, None, heads or None)
    return shard.per_shard(library, shard.used(), (spec,) * 3, spec)(query, key, value)


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _cpu_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Attention in the forms of matrix product that a CPU is good at: [B, H, L, E], key and value [B, H, M, E].

    Scores are scaled through the query, normalised after the product with the values, and formed again from the
    logsumexp in the backward pass, so that few arrays of the size of the scores pass through memory.
    """
    return _cpu_attention_forward(query, key, value, mask)[0]


def _cpu_attention_forward(query, key, value, mask):
    query, key, value = checkpoint_name((query * query.shape[-1] ** -0.5, key, value), "attention")
    scores = _dot("bhle,bhme->bhlm", query, key)
    if mask is not None:
        scores = jnp.where(mask, scores, -1e30)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = (_dot("bhlm,bhme->bhle", weights.astype(value.dtype), value) / total).astype(value.dtype)
    out, partition = checkpoint_name((out, (top + jnp.log(total))[..., 0]), "attention")
    return out, (query, key, value, mask, out, partition)


def _cpu_attention_backward(residuals, d_out):
    query, key, value, mask, out, partition = residuals
    # Weights [M, L], transposed: then no product below contracts the first axis of a large left operand, which is
    # several times slower on a CPU. The barriers keep XLA from turning the one with key.T back into that form.
    scores = _dot("bhme,bhle->bhml", key, query)
    if mask is not None:
        scores = jnp.where(mask.T, scores, -1e30)
    weights = jnp.exp(scores - partition[:, :, None])
    mean = jnp.sum(d_out.astype(jnp.float32) * out, -1)[:, :, None]
    d_scores = weights * (_dot("bhme,bhle->bhml", value, d_out) - mean)
    weights, d_scores = weights.astype(value.dtype), d_scores.astype(value.dtype)
    barrier = jax.lax.optimization_barrier
    d_query_t = barrier(_dot("bhem,bhml->bhel", barrier(jnp.swapaxes(key, 2, 3)), d_scores))
    d_query = jnp.swapaxes(d_query_t, 2, 3) * query.shape[-1] ** -0.5
    d_key, d_value = _dot("bhml,bhle->bhme", d_scores, query), _dot("bhml,bhle->bhme", weights, d_out)
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype), None


_cpu_attention.defvjp(_cpu_attention_forward, _cpu_attention_backward)


class Dropout(nn.Module):
    """Zeroes each entry with chance `rate` and scales the rest by 1 / (1 - rate).

    The noise is a hash of (key, row, column), murmur3's finaliser once per row and once per entry: eight integer
    operations that fuse into their neighbours, so the backward pass forms it again for nothing. Linen's draws Threefry
    words, over a hundred operations per entry, which were a fifth of a training step on a CPU. A hash is no generator
    for sampling, but dropout asks only for bits without visible correlation (tested), the same on every mesh.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        words = jax.random.key_data(self.make_rng("dropout")).astype(jnp.uint32)
        row_count, width = x.size // x.shape[-1], x.shape[-1]
        rows = _mix(jax.lax.iota(jnp.uint32, row_count) * np.uint32(0x9E3779B9) + words[0]).reshape(*x.shape[:-1], 1)
        bits = _mix((rows ^ words[1]) + jax.lax.iota(jnp.uint32, width) * np.uint32(0x85EBCA77))
        return jnp.where(bits >= np.uint32(round(self.rate * 2**32)), x / (1 - self.rate), 0)


def _mix(x: jax.Array) -> jax.Array:
    """murmur3's 32-bit finaliser: every bit of x changes every bit of the result with chance near one half."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


# Elementwise work that the backward pass forms again from its input. Saving its steps would take more memory than the
# results of all matrix products, and forming them again needs none of those.
_formed_again = functools.partial(jax.checkpoint, prevent_cse=False)


@_formed_again
def gelu(x: jax.Array) -> jax.Array:
    """With tanh, as in the reference."""
    return jax.nn.gelu(x, approximate=True)


@functools.partial(_formed_again, static_argnums=3)
def _layer_norm(x: jax.Array, weight: jax.Array, shift: jax.Array | float, dtype: Any) -> jax.Array:
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return (x * (jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * weight) + shift).astype(dtype)


class LayerNorm(nn.Module):
    """LayerNorm without bias, computed in f32, eps 1e-5 (torch's default; Linen's 1e-6 is another function)."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, shift: jax.Array | float = 0.0, scale: jax.Array | float = 0.0) -> jax.Array:
        """norm(x) (1 + scale) + shift: [B, L, D], shift and scale [B or 1, 1, D] (adaLN) or 0.

        The two scales are multiplied first: one product per entry, and one sum over all entries in the backward pass.
        """
        weight = self.param("scale", logical(nn.initializers.ones, None), (x.shape[-1],)) * (1 + scale)
        return _layer_norm(x, weight, shift, self.dtype)


@jax.custom_vjp
def _cpu_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w for CPUs: what is before a product is not fused into it, and the backward pass multiplies by a transposed
    copy of w; both up to three times as fast as what XLA would do."""
    return jax.lax.optimization_barrier(x) @ w


def _cpu_matmul_backward(residuals, g):
    x, w = residuals
    g, w_t = jax.lax.optimization_barrier((g, w.T))
    return g @ w_t, x.T @ g


_cpu_matmul.defvjp(lambda x, w: (_cpu_matmul(x, w), (x, w)), _cpu_matmul_backward)


class Linear(nn.Module):
    """x [..., inputs] -> [..., *features]; kernel stored as [*inputs, *features] in f32, multiplied in dtype.

    inputs: how many trailing axes of x are contracted.
    """

    features: tuple[int, ...]
    names: tuple[str | None, ...]  # logical axes of the kernel
    dtype: Any
    bias: bool = True
    zero: bool = False
    inputs: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-self.inputs :]
        fan_in = int(np.prod(shape))
        init = nn.initializers.zeros if self.zero else uniform_fan_in(fan_in)
        kernel = self.param("kernel", logical(init, *self.names), (*shape, *self.features))
        x = x.astype(self.dtype)
        weights = shard.gather(kernel.astype(self.dtype), self.names.index("embed") if "embed" in self.names else None)
        if shard.platform() == "cpu" and "tensor" not in shard.used():
            out = _cpu_matmul(x.reshape(-1, fan_in), weights.reshape(fan_in, -1))
            out = out.reshape(*x.shape[: -self.inputs], *self.features)
        else:  # not flattened: merged with other axes, heads would no longer be split over a mesh
            out = jnp.tensordot(x, weights, self.inputs)
        if self.bias:
            # Vectors are not split over fsdp: gathering one costs more than it saves.
            names = (None if name == "embed" else name for name in self.names[self.inputs :])
            bias = self.param("bias", logical(init, *names), self.features)
            out = out + bias.astype(self.dtype)
        return out
