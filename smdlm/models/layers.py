"""Building blocks shared by the models. Shapes: B examples, L positions, M keys, H heads, E head width, D width."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


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


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Softmax attention, f32 softmax: query [B, L, H, E], key and value [B, M, H, E], mask [L, M] bool or None.

    The one place where a kernel is chosen.
    """
    if mask is not None:
        mask = mask[None, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask)


class LayerNorm(nn.Module):
    """LayerNorm without bias, computed in f32, eps 1e-5 (torch's default; Linen's 1e-6 is another function)."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", logical(nn.initializers.ones, "embed"), (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        return (x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale).astype(self.dtype)


@jax.custom_vjp
def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


def _matmul_backward(residuals, g):
    x, w = residuals
    g = jax.lax.optimization_barrier(g)
    return g @ w.T, x.T @ g


_matmul.defvjp(lambda x, w: (x @ w, (x, w)), _matmul_backward)


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
        rows, columns = x.astype(self.dtype).reshape(-1, fan_in), kernel.astype(self.dtype).reshape(fan_in, -1)
        out = _matmul(rows, columns).reshape(*x.shape[: -self.inputs], *self.features)
        if self.bias:
            bias = self.param("bias", logical(init, *self.names[self.inputs :]), self.features)
            out = out + bias.astype(self.dtype)
        return out
