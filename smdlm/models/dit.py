"""The DiT of MDLM: a transformer with adaptive layer norm, rotary attention and an untied head.

Facts: the public MDLM code (`models/dit.py`); the causal variant is its AR baseline (no adaLN, no gates). The model
maps embeddings to hidden states and knows nothing of masks, noise or sampling.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from smdlm.mesh.traced import split_batch
from smdlm.models.attention import not_after
from smdlm.models.base import Head, KVCache, MatrixAxes, Model, Params
from smdlm.models.layers import (
    Dropout,
    LayerNorm,
    Linear,
    attend,
    check_choices,
    check_sizes,
    gelu,
    logical,
    rotary,
    scanned,
    uniform_fan_in,
)


@dataclasses.dataclass(frozen=True)
class DiT(Model):
    """The model behind the protocol, and its config. The paper's "small": width 768, depth 12, heads 12, cond 128.

    Attributes:
      vocab_size: V with the mask id (its last id).
      vocab_multiple: the tables are padded to a multiple of this, so that they can be sharded; pad ids never predicted.
      cond: width of the conditioning vector. sigma is fixed at 0 in MDLM (no time conditioning), which leaves it a
        learned constant.
      dropout: on the two residual branches.
      causal: the AR baseline.
      dtype: of the computation; parameters are f32. products: see `Model`.
      remat: what the backward pass recomputes. 'none'; 'light' keeps the results of the large matrix products and
        recomputes attention weights and elementwise work, which saves memory traffic and is faster than 'none' on a CPU
        too; 'block' recomputes whole blocks.
      unroll: see `layers.scanned`.
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
    products: str = "dtype"
    remat: str = "light"
    unroll: bool = False
    attention: str = "auto"
    vocab_multiple: int = 128

    def __post_init__(self):
        check_sizes(self, "vocab_size", "width", "depth", "heads", "cond", "vocab_multiple")
        check_choices(self)
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"model.heads: got {self.heads} for width {self.width}, wanted heads that divide it into even widths"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout: got {self.dropout}, wanted 0 <= dropout < 1")

    @property
    def padded_vocab(self) -> int:
        return self.vocab_size + -self.vocab_size % self.vocab_multiple

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    tied = False

    def init(self, key: jax.Array) -> Params:
        # Shapes of parameters do not depend on B or L.
        return Network(self).init(key, jnp.zeros((1, 2, self.width)))["params"]

    def apply(
        self,
        params: Params,
        x: jax.Array,
        *,
        cond: jax.Array | None = None,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        cache: KVCache | None = None,
        start: jax.Array | int = 0,
        dropout_key: jax.Array | None = None,
    ) -> Any:
        network = Network(self, deterministic=dropout_key is None or self.dropout == 0)
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        hidden, cache_out = network.apply({"params": params}, x, cond, positions, mask, cache, start, rngs=rngs)
        return hidden if cache is None else (hidden, cache_out)

    def table(self, params: Params) -> jax.Array:
        return params["embed"]

    def head(self, params: Params) -> Head:
        return Head(params["head"]["kernel"], params["head"]["bias"], self.products)

    def cache(self, batch: int, length: int) -> KVCache:
        return KVCache.zeros(self.depth, batch, length, self.heads, self.head_width, self.dtype)

    def matrices(self) -> dict[str, MatrixAxes | None]:
        """The products of the blocks; layers, and q, k and v among themselves, are separate matrices.

        adaLN is not among them: its input is one vector, so its gradient has rank one, which orthogonalisation would
        blow up.
        """
        block: dict[str, MatrixAxes | None] = {
            "qkv/kernel": MatrixAxes((1,), (3, 4)),  # [N, D, 3, H, E]
            "attention_out/kernel": MatrixAxes((1, 2), (3,)),  # [N, H, E, D]
            "mlp_in/kernel": MatrixAxes((1,), (2,)),  # [N, D, 4 D]
            "mlp_out/kernel": MatrixAxes((1,), (2,)),
            **dict.fromkeys(("norm1/scale", "norm2/scale", "mlp_in/bias", "mlp_out/bias")),
        }
        other = ["embed", "final/norm/scale", "head/kernel", "head/bias"]
        if not self.causal:
            block |= dict.fromkeys(("adaln/kernel", "adaln/bias"))
            linear = ("sigma_map/in", "sigma_map/out", "final/adaln")
            other += [f"{name}/{part}" for name in linear for part in ("kernel", "bias")]
        return {f"blocks/{name}": axes for name, axes in block.items()} | dict.fromkeys(other)

    def flops(self, length: int) -> float:
        """q, k, v and the output 4 D^2, the MLP 8 D^2 products per layer, attention 2 L D (half of that if causal)."""
        attention = 2 * length * self.width * (0.5 if self.causal else 1.0)
        return 2.0 * self.depth * (12 * self.width**2 + attention)


class Block(nn.Module):
    """One layer, in the form that `nn.scan` wants: (x, inputs that are the same for all layers, its cache slice)."""

    config: DiT
    deterministic: bool

    @nn.compact
    def __call__(self, x, cond, positions, mask, start, cache):
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        width, linear = cfg.width, functools.partial(Linear, dtype=dtype, products=cfg.products)
        if cfg.causal:
            shift1 = scale1 = shift2 = scale2 = 0.0
            gate1 = gate2 = 1.0
        else:
            # Chunks in the reference's order. Zero at the start.
            adaln = Linear((6, width), ("cond", None, "embed"), dtype, zero=True, name="adaln")(cond)
            shift1, scale1, gate1, shift2, scale2, gate2 = (adaln[:, None, i] for i in range(6))
        drop = Dropout(0.0 if self.deterministic else cfg.dropout)

        h = LayerNorm(dtype, name="norm1")(x, shift1, scale1)
        names = ("embed", None, "heads", "head")
        qkv = linear((3, cfg.heads, cfg.head_width), names, bias=False, name="qkv")(h)
        # `split`, not indexing: its transpose is one concatenation, that of three slices is three padded sums.
        query, key, value = (jnp.squeeze(part, 2) for part in jnp.split(qkv, 3, axis=2))
        query, key = rotary(query, positions), rotary(key, positions)
        h, cache = attend(cfg, query, key, value, mask, start, cache)
        names = ("heads", "head", "embed")
        h = linear((width,), names, bias=False, inputs=2, name="attention_out")(h)
        h = checkpoint_name(h, "branch")
        x = x + gate1 * drop(h)

        h = LayerNorm(dtype, name="norm2")(x, shift2, scale2)
        h = linear((4 * width,), ("embed", "mlp"), name="mlp_in")(h)
        h = checkpoint_name(h, "mlp_in")
        h = linear((width,), ("mlp", "embed"), name="mlp_out")(gelu(h))
        h = checkpoint_name(h, "branch")
        return split_batch(x + gate2 * drop(h)), cache


class Network(nn.Module):
    """Embeddings -> hidden states ready for the head. Parameters: embed, sigma_map, blocks (stacked), final, head."""

    config: DiT
    deterministic: bool = True

    @nn.compact
    def __call__(self, x, cond=None, positions=None, mask=None, cache=None, start=0):
        """Arguments as in `Model.apply`; returns (hidden [B, L, D], the filled cache or None)."""
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        # Declared here so that one tree holds the whole model; used through `DiT.table` and `DiT.head`.
        self.param("embed", logical(uniform_fan_in(cfg.width), "vocab", "embed"), (cfg.padded_vocab, cfg.width))
        slots = start + jnp.arange(x.shape[1])
        if positions is None:
            positions = slots
        if cache is not None and cfg.causal:
            mask = not_after(slots, cache.keys.shape[2], mask)
        if cfg.causal:
            cond = None
        else:
            sigma = jnp.zeros(1) if cond is None else cond  # without time conditioning once for the whole batch
            cond = jax.nn.silu(SigmaMap(cfg.cond, dtype, name="sigma_map")(sigma))
        blocks = scanned(Block, cfg, shared=4)(cfg, self.deterministic, name="blocks")
        x, cache = blocks(split_batch(x.astype(dtype)), cond, positions, mask, start, cache)
        x = Final(cfg, name="final")(x, cond)
        HeadParams(cfg, name="head")()
        return x, cache


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

    config: DiT

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

    config: DiT

    @nn.compact
    def __call__(self) -> None:
        cfg = self.config
        zeros = nn.initializers.zeros
        self.param("kernel", logical(zeros, "embed", "vocab"), (cfg.width, cfg.padded_vocab))
        self.param("bias", logical(zeros, "vocab"), (cfg.padded_vocab,))
