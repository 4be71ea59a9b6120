"""GPT-2: learned positions, LayerNorm with bias, GELU by tanh, and its embedding table as its head.

Facts: the released configurations (`GPT2LMHeadModel`). A language model: position i predicts token i + 1.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from smdlm.mesh.traced import split_batch
from smdlm.models.base import Head, KVCache, MatrixAxes, Model, Params
from smdlm.models.layers import (
    LayerNorm,
    Linear,
    attend,
    causal_slots,
    check_choices,
    check_sizes,
    gelu,
    logical,
    scanned,
)

_init = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class GPT2(Model):
    """The model behind the protocol, and its config. The defaults are the sizes of GPT-2 small.

    Attributes:
      vocab_size: V with a mask id, which GPT-2 does not use and is appended.
      positions: rows of the position table: the longest input.
      vocab_multiple: the table is padded to a multiple of this, so that it can be sharded; pad ids never predicted.
      dtype, products, remat, attention: see `Model`. unroll: see `layers.scanned`.
    """

    vocab_size: int
    width: int = 768
    depth: int = 12
    heads: int = 12
    positions: int = 1024
    dtype: str = "float32"
    products: str = "dtype"
    remat: str = "light"
    unroll: bool = False
    attention: str = "auto"
    vocab_multiple: int = 128
    causal = True
    tied = True

    def __post_init__(self):
        check_sizes(self, "vocab_size", "width", "depth", "heads", "positions", "vocab_multiple")
        check_choices(self)
        if self.width % self.heads:
            raise ValueError(f"model.heads: got {self.heads}, wanted a divisor of model.width, {self.width}")

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def init(self, key: jax.Array) -> Params:
        return Network(self).init(key, jnp.zeros((1, 1, self.width), self.dtype))["params"]

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
        """As in the protocol; there is no conditioning on time and no dropout."""
        slots = x.shape[1] if cache is None else cache.keys.shape[2]
        if positions is None and slots > self.positions:
            raise ValueError(
                f"model.positions: got an input of {slots} positions for a table of {self.positions}, wanted fewer"
            )
        hidden, filled = Network(self).apply({"params": params}, x, positions, mask, cache, start)
        return hidden if cache is None else (hidden, filled)

    def table(self, params: Params) -> jax.Array:
        return params["embed"]

    def head(self, params: Params) -> Head:
        return Head(params["embed"].T, jnp.zeros(self.rows, jnp.float32), self.products)

    def cache(self, batch: int, length: int) -> KVCache:
        return KVCache.zeros(self.depth, batch, length, self.heads, self.head_width, self.dtype)

    def matrices(self) -> dict[str, MatrixAxes | None]:
        linear = {
            "qkv": MatrixAxes((1,), (3, 4)),  # [N, D, 3, H, E]
            "attention_out": MatrixAxes((1, 2), (3,)),  # [N, H, E, D]
            "mlp_in": MatrixAxes((1,), (2,)),
            "mlp_out": MatrixAxes((1,), (2,)),
        }
        block: dict[str, MatrixAxes | None] = {f"blocks/{name}/kernel": axes for name, axes in linear.items()}
        block |= dict.fromkeys(f"blocks/{name}/bias" for name in linear)
        block |= dict.fromkeys(f"blocks/{norm}/{part}" for norm in ("norm1", "norm2") for part in ("scale", "bias"))
        return block | dict.fromkeys(("embed", "positions", "norm/scale", "norm/bias"))

    def flops(self, length: int) -> float:
        """q, k, v and the output 4 D^2, the MLP 8 D^2 products per layer, attention L D."""
        return 2.0 * self.depth * (12 * self.width**2 + length * self.width)


class Block(nn.Module):
    """One layer: (x, inputs that are the same for all layers, its slice of the cache) -> (x, that slice, filled)."""

    config: GPT2

    @nn.compact
    def __call__(self, x, positions, mask, start, cache):
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        linear = functools.partial(Linear, dtype=dtype, init=_init, products=cfg.products)
        h = LayerNorm(dtype, bias=True, name="norm1")(x)
        names = ("embed", None, "heads", "head")
        qkv = linear((3, cfg.heads, cfg.head_width), names, name="qkv")(h)
        query, key, value = (jnp.squeeze(part, 2) for part in jnp.split(qkv, 3, axis=2))
        h, cache = attend(cfg, query, key, value, mask, start, cache)
        names = ("heads", "head", "embed")
        h = linear((cfg.width,), names, inputs=2, name="attention_out")(h)
        x = x + checkpoint_name(h, "branch")

        h = LayerNorm(dtype, bias=True, name="norm2")(x)
        h = checkpoint_name(linear((4 * cfg.width,), ("embed", "mlp"), name="mlp_in")(h), "mlp_in")
        h = linear((cfg.width,), ("mlp", "embed"), name="mlp_out")(gelu(h))
        return split_batch(x + checkpoint_name(h, "branch")), cache


class Network(nn.Module):
    """Embeddings -> normed hidden states. Parameters: embed, positions, blocks (stacked), norm."""

    config: GPT2

    @nn.compact
    def __call__(self, x, positions=None, mask=None, cache=None, start=0):
        """Arguments as in `Model.apply`; returns (hidden [B, L, D], the filled cache or None)."""
        cfg, dtype = self.config, jnp.dtype(self.config.dtype)
        # Declared here so that one tree holds the whole model; used through `GPT2.table` and `GPT2.head`.
        self.param("embed", logical(_init, "vocab", "embed"), (cfg.rows, cfg.width))
        table = self.param(
            "positions", logical(nn.initializers.normal(0.01), None, "embed"), (cfg.positions, cfg.width)
        )
        slots = start + jnp.arange(x.shape[1])
        if positions is None:
            positions = slots
        if mask is None and cache is not None:
            mask = causal_slots(cache, slots)
        x = (x + jnp.take(table, positions, axis=0)).astype(dtype)
        blocks = scanned(Block, cfg, shared=3)(cfg, name="blocks")
        x, cache = blocks(split_batch(x), positions, mask, start, cache)
        return LayerNorm(dtype, bias=True, name="norm")(x), cache
