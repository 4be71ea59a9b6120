"""Building blocks shared by the models. Shapes: B examples, L positions, H heads, E head width, D width."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from smdlm.mesh import traced
from smdlm.models.attention import attention, is_cudnn
from smdlm.models.base import KVCache
from smdlm.ops import cpu

CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16", "int8"),
    "products": cpu.PRODUCTS,
    "remat": ("none", "light", "block"),
    "attention": ("auto", "xla"),
}


def check_choices(model: Any) -> None:
    """ValueError for a field of choices that models share; those that a model lacks are passed over."""
    for name, known in CHOICES.items():
        if hasattr(model, name) and getattr(model, name) not in known:
            wanted = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
            raise ValueError(f"model.{name}: got {getattr(model, name)!r}, wanted {wanted}")
    if getattr(model, "products", "dtype") == "bfloat16" and model.attention == "xla":
        raise ValueError(
            "model.products: got 'bfloat16' with attention 'xla', which multiplies in dtype, wanted attention 'auto'"
        )


def check_sizes(model: Any, *names: str) -> None:
    """ValueError unless the fields are at least 1."""
    for name in names:
        if getattr(model, name) < 1:
            raise ValueError(f"model.{name}: got {getattr(model, name)}, wanted at least 1")


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
    """LayerNorm computed in f32, eps 1e-5 (torch's default; Linen's 1e-6 is another function).

    Attributes:
      bias: a learned shift, added to the one that is handed in.
    """

    dtype: Any
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, shift: jax.Array | float = 0.0, scale: jax.Array | float = 0.0) -> jax.Array:
        """norm(x) (1 + scale) + shift: [B, L, D], shift and scale [B or 1, 1, D] (adaLN) or 0.

        The two scales are multiplied first: one product per entry, and one sum over all entries in the backward pass.
        """
        weight = self.param("scale", logical(nn.initializers.ones, None), (x.shape[-1],)) * (1 + scale)
        if self.bias:
            shift = shift + self.param("bias", logical(nn.initializers.zeros, None), (x.shape[-1],))
        return _layer_norm(x, weight, shift, self.dtype)


@functools.partial(_formed_again, static_argnums=(2, 3))
def _rms_norm(x: jax.Array, weight: jax.Array, eps: float, dtype: Any) -> jax.Array:
    x = x.astype(jnp.float32)
    return (x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)).astype(dtype) * weight.astype(dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) in f32, rounded to dtype before it is multiplied by the weight, as Llama does."""

    eps: float
    dtype: Any
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.param("scale", logical(nn.initializers.ones, None), (x.shape[-1],), self.param_dtype)
        return _rms_norm(x, weight, self.eps, self.dtype)


class Linear(nn.Module):
    """x [..., *inputs] -> [..., *features]; kernel stored as [*inputs, *features], multiplied in dtype.

    A parameter 'adapter' beside the kernel (models/lora.py puts it there) adds a product of low rank to it.

    Attributes:
      names: logical axes of the kernel; the bias takes those of the features.
      inputs: how many trailing axes of x are contracted.
      zero: zero at the start, else `init`, by default torch's.
      param_dtype: of the stored kernel and bias; an int8 kernel has a parameter 'scale' [*features] beside it, f32, and
        a bias in bfloat16.
      products: `Model.products`, for the large ones.
    """

    features: tuple[int, ...]
    names: tuple[str | None, ...]
    dtype: Any
    bias: bool = True
    zero: bool = False
    inputs: int = 1
    init: nn.initializers.Initializer | None = None
    param_dtype: Any = jnp.float32
    products: str = "dtype"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-self.inputs :]
        quantised = jnp.dtype(self.param_dtype) == jnp.int8
        init = nn.initializers.zeros if self.zero or quantised else self.init or uniform_fan_in(int(np.prod(shape)))
        kernel = self.param("kernel", logical(init, *self.names), (*shape, *self.features), self.param_dtype)
        # Cast before it is gathered: half of the bytes in half precision.
        split = self.names.index("embed") if "embed" in self.names else None
        kernel = traced.gather(kernel.astype(self.dtype), split)
        x = x.astype(self.dtype)
        out = cpu.tensordot(x, kernel, self.inputs, self.products)
        # Vectors are not split over fsdp: gathering one costs more than it saves.
        names = [None if name == "embed" else name for name in self.names[self.inputs :]]
        if quantised:
            scale = self.param("scale", logical(nn.initializers.ones, *names), self.features)
            out, kernel = (out * scale).astype(self.dtype), kernel.astype(jnp.float32) * scale
        if self.has_variable("params", "adapter"):
            out = _adapted(out, x, kernel, self.get_variable("params", "adapter"), self.inputs)
        if self.bias:
            init = nn.initializers.zeros if self.init else init
            stored = jnp.bfloat16 if quantised else self.param_dtype
            bias = self.param("bias", logical(init, *names), self.features, stored)
            out = out + bias.astype(self.dtype)
        return out


def _adapted(out: jax.Array, x: jax.Array, kernel: jax.Array, adapter: Any, inputs: int) -> jax.Array:
    """x kernel' from out = x kernel, for kernel' = kernel + a b (LoRA), or magnitude kernel' / |kernel'| (DoRA).

    a [*inputs, r], b [r, *features] with LoRA's scaling in it, magnitude [*features]. The norm of a column is that of
    all weights of one output; no gradient flows through it, as in the reference.
    """
    a, b = adapter["a"].astype(x.dtype), adapter["b"].astype(x.dtype)
    out = out + jnp.tensordot(jnp.tensordot(x, a, inputs), b, 1)
    if "magnitude" in adapter:
        frozen = jax.lax.stop_gradient((kernel.astype(jnp.float32), adapter["a"], adapter["b"]))
        out = out * (adapter["magnitude"] / column_norms(frozen[0], *frozen[1:], inputs)).astype(out.dtype)
    return out


def column_norms(kernel: jax.Array, a: jax.Array, b: jax.Array, inputs: int) -> jax.Array:
    """|kernel + a b| of each output over its inputs: [*features]."""
    total = kernel + jnp.tensordot(a, b, 1)
    return jnp.sqrt(jnp.square(total).sum(tuple(range(inputs))))


def scanned(block: type[nn.Module], model: Any, shared: int) -> Callable[..., nn.Module]:
    """A class like `block`, whose `model.depth` layers run in a scan over stacked parameters and slices of the cache.

    A block is called with x, `shared` arguments that are the same for all layers, and its slice of the cache; it
    returns (x, that slice, filled). What the backward pass computes again is `Model.remat`: 'light' keeps the results
    that the block names 'attention', 'branch' and 'mlp_in'.

    `model.unroll` False compiles one layer and runs it in a loop. True compiles every layer, and what the backward pass
    needs is not copied into and out of arrays of all layers: on an H100 a training step of 169M parameters takes 12 %
    less time, three quarters more memory for temporaries and 2.5 times as long to compile (docs/gpu.md). On CPUs it is
    slower. It changes no result.
    """
    if model.remat == "block":
        block = nn.remat(block, prevent_cse=False)  # inside a scan CSE is no danger
    elif model.remat == "light":
        names = jax.checkpoint_policies.save_only_these_names("attention", "branch", "mlp_in")
        saved = jax.checkpoint_policies.save_from_both_policies(names, is_cudnn)
        block = nn.remat(block, prevent_cse=False, policy=saved)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast,) * shared + (0,),
        length=model.depth,
        unroll=model.depth if model.unroll else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def attend(
    model: Any,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    start: jax.Array | int,
    cache: KVCache | None,
) -> tuple[jax.Array, KVCache | None]:
    """A layer's attention, as the fields of its model say: (values [B, L, H, E], cache).

    With a cache the queries see its slots, of which those from `start` are replaced by key and value, and the mask says
    which, also in a causal model. Other arguments as in `attention`.
    """
    if cache is not None:
        cache = cache.write(key, value, start)
        key, value = cache.keys, cache.values
    causal = model.causal and cache is None
    kinds = {"implementation": model.attention, "products": model.products}
    return attention(query, key, value, mask, causal=causal, **kinds), cache


def causal_slots(cache: KVCache, slots: jax.Array) -> jax.Array:
    """What the positions that fill `slots` [L] of a cache [N, B, M, G, E] may see: [1, L, M]."""
    return (jnp.arange(cache.keys.shape[2]) <= slots[:, None])[None]
