"""The DiT of MDLM: a transformer with adaptive layer norm, rotary attention and an untied head.

Facts: the public MDLM code (`models/dit.py`); the causal variant is its AR baseline (no adaLN, no gates). The model
maps embeddings to hidden states and knows nothing of masks, noise or sampling.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from smdlm import kernels
from smdlm.models.layers import (
    Dropout,
    Head,
    KVCache,
    LayerNorm,
    Linear,
    attention,
    gelu,
    logical,
    rotary,
    uniform_fan_in,
)
from smdlm.shard import split_batch


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Sizes and switches. The paper's "small": width 768, depth 12, heads 12, cond 128.

    Attributes:
      vocab_size: V with the mask id (its last id).
      vocab_multiple: the tables are padded to a multiple of this, so that they can be sharded; pad ids never predicted.
      cond: width of the conditioning vector. sigma is fixed at 0 in MDLM (no time conditioning), which leaves it a
        learned constant.
      dropout: on the two residual branches.
      causal: the AR baseline.
      dtype: of the computation; parameters are f32.
      remat: what the backward pass recomputes. 'none'; 'light' keeps the results of the large matrix products and
        recomputes attention weights and elementwise work, which saves memory traffic and is faster than 'none' on a CPU
        too; 'block' recomputes whole blocks.
      attention: 'auto' takes the kernel of the platform's library where one fits, 'xla' what XLA makes of the formula.
    """

    vocab_size: int
    width: int = 768
    depth: int = 12
    heads: int = 12
    cond: int = 128
    dropout: float = 0.1
    causal: bool = False
    dtype: str = "float32"
    remat: str = "light"
    attention: str = "auto"
    vocab_multiple: int = 128

    def __post_init__(self):
        for name in ("vocab_size", "width", "depth", "heads", "cond", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}: got {getattr(self, name)}, wanted at least 1")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"model.heads: got {self.heads} for width {self.width}, wanted heads that divide it into even widths"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout: got {self.dropout}, wanted 0 <= dropout < 1")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"model.dtype: got {self.dtype!r}, wanted 'float32' or 'bfloat16'")
        if self.attention not in ("auto", "xla"):
            raise ValueError(f"model.attention: got {self.attention!r}, wanted 'auto' or 'xla'")
        if self.remat not in ("none", "light", "block"):
            raise ValueError(f"model.remat: got {self.remat!r}, wanted 'none', 'light' or 'block'")

    @property
    def padded_vocab(self) -> int:
        return self.vocab_size + -self.vocab_size % self.vocab_multiple


class Block(nn.Module):
    """One layer, in the form that `nn.scan` wants: (x, inputs that are the same for all layers, its cache slice)."""

    config: DiTConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x, cond, positions, mask, cache):
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        width, head_width = cfg.width, cfg.width // cfg.heads
        if cfg.causal:
            shift1 = scale1 = shift2 = scale2 = 0.0
            gate1 = gate2 = 1.0
        else:
            # Chunks in the reference's order. Zero at the start.
            adaln = Linear((6, width), ("cond", None, "embed"), dtype, zero=True, name="adaln")(cond)
            shift1, scale1, gate1, shift2, scale2, gate2 = (adaln[:, None, i] for i in range(6))
        drop = (lambda h: h) if self.deterministic else Dropout(cfg.dropout)

        h = LayerNorm(dtype, name="norm1")(x, shift1, scale1)
        names = ("embed", None, "heads", "head")
        qkv = Linear((3, cfg.heads, head_width), names, dtype, bias=False, name="qkv")(h)
        # `split`, not indexing: its transpose is one concatenation, that of three slices is three padded sums.
        query, key, value = (jnp.squeeze(part, 2) for part in jnp.split(qkv, 3, axis=2))
        query, key = rotary(query, positions), rotary(key, positions)
        if cache is not None:
            write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, positions[0], axis=1)
            cache = KVCache(write(cache.keys, key), write(cache.values, value))
            key, value = cache.keys, cache.values
        h = attention(query, key, value, mask, causal=cfg.causal and cache is None, kernel=cfg.attention)
        names = ("heads", "head", "embed")
        h = Linear((width,), names, dtype, bias=False, inputs=2, name="attention_out")(h)
        h = checkpoint_name(h, "branch")
        x = x + gate1 * drop(h)

        h = LayerNorm(dtype, name="norm2")(x, shift2, scale2)
        h = Linear((4 * width,), ("embed", "mlp"), dtype, name="mlp_in")(h)
        h = checkpoint_name(h, "mlp_in")
        h = Linear((width,), ("mlp", "embed"), dtype, name="mlp_out")(gelu(h))
        h = checkpoint_name(h, "branch")
        return split_batch(x + gate2 * drop(h)), cache


class DiT(nn.Module):
    """Embeddings -> hidden states ready for the head. Parameters: embed, sigma_map, blocks (stacked), final, head."""

    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        sigma: jax.Array | None = None,
        *,
        deterministic: bool = True,
        cache: KVCache | None = None,
        start: jax.Array | int = 0,
    ) -> Any:
        """[B, L, D] -> [B, L, D]; with a cache, (hidden, cache) where x are positions start .. start + L - 1.

        Args:
          x: token embeddings, any float type.
          sigma: [B] f32 total noise, or None for 0 everywhere (MDLM), which is computed once for the batch.
          deterministic: False needs an rng named 'dropout'.
          cache: causal models only.
          start: position of x[:, 0].
        """
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        # Declared here so that one tree holds the whole model; used through `table` and `head` below.
        self.param("embed", logical(uniform_fan_in(cfg.width), "vocab", "embed"), (cfg.padded_vocab, cfg.width))
        length = x.shape[1]
        positions = start + jnp.arange(length)
        cond = None
        if not cfg.causal:
            cond = jax.nn.silu(SigmaMap(cfg.cond, dtype, name="sigma_map")(jnp.zeros(1) if sigma is None else sigma))
        mask = None if cache is None else jnp.arange(cache.keys.shape[2]) <= positions[:, None]

        block = Block
        if cfg.remat == "block":
            block = nn.remat(Block, prevent_cse=False)  # inside a scan CSE is no danger
        elif cfg.remat == "light":
            saved = jax.checkpoint_policies.save_from_both_policies(
                jax.checkpoint_policies.save_only_these_names("attention", "branch", "mlp_in"), kernels.is_cudnn
            )
            block = nn.remat(Block, prevent_cse=False, policy=saved)
        scan = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=cfg.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        blocks = scan(cfg, deterministic or cfg.dropout == 0, name="blocks")
        x, cache_out = blocks(split_batch(x.astype(dtype)), cond, positions, mask, cache)
        x = Final(cfg, name="final")(x, cond)
        HeadParams(cfg, name="head")()
        return x if cache is None else (x, cache_out)

    def init_params(self, key: jax.Array) -> Any:
        """Parameters, boxed with their logical axes (flax `nn.meta`); shapes do not depend on B or L."""
        return self.init(key, jnp.zeros((1, 2, self.config.width)))["params"]

    def init_cache(self, batch: int, length: int) -> KVCache:
        cfg = self.config
        return KVCache.zeros(cfg.depth, batch, length, cfg.heads, cfg.width // cfg.heads, jnp.dtype(cfg.dtype))

    @staticmethod
    def table(params: Any) -> jax.Array:
        """The embedding table [V padded, D]; not tied to the head."""
        return params["embed"]

    def head(self, params: Any) -> Head:
        return Head(params["head"]["kernel"], params["head"]["bias"])

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.config.dtype)


class SigmaMap(nn.Module):
    """[B] -> [B, cond]: sinusoids (cos first, 256 wide, period 10000), then a two-layer MLP."""

    cond: int
    dtype: Any

    @nn.compact
    def __call__(self, sigma: jax.Array) -> jax.Array:
        frequencies = np.exp(-np.log(10000.0) * np.arange(128) / 128).astype(np.float32)
        angles = sigma.astype(jnp.float32)[:, None] * frequencies
        x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        x = jax.nn.silu(Linear((self.cond,), (None, "cond"), self.dtype, name="in")(x))
        return Linear((self.cond,), (None, "cond"), self.dtype, name="out")(x)


class Final(nn.Module):
    """Final norm and modulation; the head's matrix is applied by the readout."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x: jax.Array, cond: jax.Array | None) -> jax.Array:
        dtype = jnp.dtype(self.config.dtype)
        norm = LayerNorm(dtype, name="norm")
        if cond is None:
            return norm(x)
        adaln = Linear((2, self.config.width), ("cond", None, "embed"), dtype, zero=True, name="adaln")(cond)
        return norm(x, shift=adaln[:, None, 0], scale=adaln[:, None, 1])


class HeadParams(nn.Module):
    """Declares the head's parameters: kernel [D, V] and bias [V], zero at the start as in the reference."""

    config: DiTConfig

    @nn.compact
    def __call__(self) -> None:
        cfg = self.config
        zeros = nn.initializers.zeros
        self.param("kernel", logical(zeros, "embed", "vocab"), (cfg.width, cfg.padded_vocab))
        self.param("bias", logical(zeros, "vocab"), (cfg.padded_vocab,))
