"""Building blocks shared by the models. Shapes: B examples, L positions, H heads, E head width, D width."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from smdlm.mesh import traced
from smdlm.ops import cpu


def uniform_fan_in(fan_in: int) -> nn.initializers.Initializer:
    """U(+-1/sqrt(fan_in)): PyTorch's default for linear layers, weights and biases."""
    limit = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


def logical(init: nn.initializers.Initializer, *names: str | None) -> nn.initializers.Initializer:
    """Names the axes of a parameter; mesh/rules.py maps names to mesh axes."""
    return nn.with_logical_partitioning(init, names)


def rotary(x: jax.Array, positions: jax.Array, base: float = 10000.0) -> jax.Array:
    """Rotary embedding, half-split (i with i + E/2), full head width: [B, L, H, E] at positions [L] or [B, L].

    Angles in f32 whatever the type of x: at position 1000 a bf16 angle is off by several radians.
    """
    half = x.shape[-1] // 2
    frequencies = jnp.asarray(base ** (-np.arange(half, dtype=np.float64) / half), jnp.float32)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]  # [(B,) L, 1, E/2]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


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
        if self.rate == 0:
            return x
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


class Linear(nn.Module):
    """x [..., *inputs] -> [..., *features]; kernel stored as [*inputs, *features] in f32, multiplied in dtype.

    Attributes:
      names: logical axes of the kernel; the bias takes those of the features.
      inputs: how many trailing axes of x are contracted.
      zero: zero at the start, else torch's default.
    """

    features: tuple[int, ...]
    names: tuple[str | None, ...]
    dtype: Any
    bias: bool = True
    zero: bool = False
    inputs: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-self.inputs :]
        init = nn.initializers.zeros if self.zero else uniform_fan_in(int(np.prod(shape)))
        kernel = self.param("kernel", logical(init, *self.names), (*shape, *self.features))
        # Cast before it is gathered: half of the bytes in half precision.
        split = self.names.index("embed") if "embed" in self.names else None
        kernel = traced.gather(kernel.astype(self.dtype), split)
        out = cpu.tensordot(x.astype(self.dtype), kernel, self.inputs)
        if self.bias:
            # Vectors are not split over fsdp: gathering one costs more than it saves.
            names = (None if name == "embed" else name for name in self.names[self.inputs :])
            bias = self.param("bias", logical(init, *names), self.features)
            out = out + bias.astype(self.dtype)
        return out
