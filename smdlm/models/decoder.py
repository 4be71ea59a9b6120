"""The family of Llama and Qwen2: RMSNorm, grouped-query attention with rotary positions, SwiGLU.

Causal it is the released language model; bidirectional with shifted predictions it is Dream, which was made of Qwen2.5
and still predicts token i at position i - 1. Facts: the released configurations and Dream's public code.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from smdlm.mesh.traced import split_batch
from smdlm.models.base import Head, KVCache, MatrixAxes, Model, Params
from smdlm.models.layers import (
    Linear,
    RMSNorm,
    attend,
    causal_slots,
    check_choices,
    check_sizes,
    logical,
    rotary,
    scanned,
)

_init = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Decoder(Model):
    """The model behind the protocol, and its config. The defaults are the sizes of SmolLM2-135M.

    Attributes:
      vocab_size: V with the mask id. The tables may have more rows: an id without a token is never predicted.
      table_rows: of both tables, as released (Dream: 152,064 for 151,667 ids); 0 is V padded to `vocab_multiple`.
      heads, key_heads: of queries, and of keys and values; a key head serves heads / key_heads query heads.
      hidden: width of the feed-forward layer.
      rope_base: wavelengths of the rotary positions run from 2 pi to 2 pi rope_base.
      eps: of the norms.
      qkv_bias: Qwen2 has biases on q, k and v, Llama none.
      tied: the head is the embedding table.
      causal: a language model that predicts the next token.
      shift: a bidirectional model whose hidden state at i - 1 predicts token i (Dream); `apply` moves the states, so
        that outside it predicts in place. The first position of a call, and one behind padding, keeps its own.
      param_dtype: of the parameters; 'bfloat16' for a frozen base, 'int8' for one whose matrices are rounded to 255
        steps, each output by itself, and all else is in bfloat16.
      dtype, products, remat, attention: see `Model`. unroll: see `layers.scanned`.
    """

    vocab_size: int
    table_rows: int = 0
    width: int = 576
    depth: int = 30
    heads: int = 9
    key_heads: int = 3
    hidden: int = 1536
    rope_base: float = 100_000.0
    eps: float = 1e-5
    qkv_bias: bool = False
    tied: bool = True
    causal: bool = False
    shift: bool = False
    dtype: str = "float32"
    products: str = "dtype"
    param_dtype: str = "float32"
    remat: str = "light"
    unroll: bool = False
    attention: str = "auto"
    vocab_multiple: int = 128

    def __post_init__(self):
        check_sizes(self, "vocab_size", "width", "depth", "heads", "key_heads", "hidden", "vocab_multiple")
        check_choices(self)
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"model.heads: got {self.heads} for width {self.width}, wanted heads that divide it into even widths"
            )
        if self.heads % self.key_heads:
            raise ValueError(f"model.key_heads: got {self.key_heads}, wanted a divisor of model.heads, {self.heads}")
        if self.table_rows and self.table_rows < self.vocab_size:
            raise ValueError(f"model.table_rows: got {self.table_rows}, wanted at least {self.vocab_size} ids, or 0")
        for name in ("eps", "rope_base"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model.{name}: got {getattr(self, name)}, wanted > 0")
        if self.causal and self.shift:
            raise ValueError("model.shift: got True for a causal model, which predicts the next token, wanted False")

    @property
    def rows(self) -> int:
        """Rows of both tables."""
        return self.table_rows or -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def other_dtype(self) -> Any:
        """Of the parameters that are no matrices of a layer."""
        return jnp.dtype("bfloat16" if self.param_dtype == "int8" else self.param_dtype)

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
        hidden, filled = Network(self).apply({"params": params}, x, positions, mask, cache, start)
        if self.shift:
            hidden = _shifted(hidden, mask, start)
        return hidden if cache is None else (hidden, filled)

    def table(self, params: Params) -> jax.Array:
        return params["embed"]

    def head(self, params: Params) -> Head:
        matrix = params["embed"].T if self.tied else params["head"]["kernel"]
        return Head(matrix, jnp.zeros(self.rows, jnp.float32), self.products)

    def cache(self, batch: int, length: int) -> KVCache:
        return KVCache.zeros(self.depth, batch, length, self.key_heads, self.head_width, self.dtype)

    def matrices(self) -> dict[str, MatrixAxes | None]:
        block: dict[str, MatrixAxes | None] = {
            **{f"{name}/kernel": MatrixAxes((1,), (2, 3)) for name in ("q", "k", "v")},  # [N, D, heads, E]
            "attention_out/kernel": MatrixAxes((1, 2), (3,)),  # [N, H, E, D]
            **{f"{name}/kernel": MatrixAxes((1,), (2,)) for name in ("gate", "up", "down")},
            **dict.fromkeys(("norm1/scale", "norm2/scale")),
        }
        if self.param_dtype == "int8":
            block |= {name.replace("kernel", "scale"): None for name in block if name.endswith("kernel")}
        if self.qkv_bias:
            block |= dict.fromkeys(("q/bias", "k/bias", "v/bias"))
        other = ["embed", "norm/scale"] if self.tied else ["embed", "norm/scale", "head/kernel"]
        return {f"blocks/{name}": axes for name, axes in block.items()} | dict.fromkeys(other)

    def flops(self, length: int) -> float:
        """q and the output 2 D^2, k and v 2 D G E, the feed-forward 3 D F products, attention 2 L D (causal: half)."""
        attention = 2 * length * self.width * (0.5 if self.causal else 1.0)
        projections = 2 * self.width**2 + 2 * self.width * self.key_heads * self.head_width
        return 2.0 * self.depth * (projections + 3 * self.width * self.hidden + attention)


def _shifted(hidden: jax.Array, mask: jax.Array | None, start: jax.Array | int) -> jax.Array:
    """Each position [B, L, D] gets the state of the one before it; where there is none, or padding, it keeps its own.

    On hidden states instead of logits, which are the same thing: the head acts on each position alone.
    """
    before = jnp.concatenate([hidden[:, :1], hidden[:, :-1]], axis=1)
    if mask is None or mask.shape[1] != 1:
        return before
    # A padding mask: a row that stands alone must not differ from the same row with padding at its left.
    seen = jax.lax.dynamic_slice_in_dim(mask[:, 0], start, hidden.shape[1], axis=1)
    seen = jnp.concatenate([seen[:, :1], seen[:, :-1]], axis=1)
    return jnp.where(seen[..., None], before, hidden)


class Block(nn.Module):
    """One layer: (x, inputs that are the same for all layers, its slice of the cache) -> (x, that slice, filled)."""

    config: Decoder

    @nn.compact
    def __call__(self, x, positions, mask, start, cache):
        cfg, dtype, stored = self.config, jnp.dtype(self.config.dtype), self.config.other_dtype

        def linear(name: str, features: tuple[int, ...], *names: str, bias: bool = False, inputs: int = 1) -> Linear:
            return Linear(
                features,
                names,
                dtype,
                bias=bias,
                inputs=inputs,
                init=_init,
                param_dtype=cfg.param_dtype,
                products=cfg.products,
                name=name,
            )

        def heads(name: str, count: int, x: jax.Array) -> jax.Array:
            return linear(name, (count, cfg.head_width), "embed", "heads", "head", bias=cfg.qkv_bias)(x)

        h = RMSNorm(cfg.eps, dtype, stored, name="norm1")(x)
        query = rotary(heads("q", cfg.heads, h), positions, cfg.rope_base)
        key = rotary(heads("k", cfg.key_heads, h), positions, cfg.rope_base)
        value = heads("v", cfg.key_heads, h)
        h, cache = attend(cfg, query, key, value, mask, start, cache)
        h = linear("attention_out", (cfg.width,), "heads", "head", "embed", inputs=2)(h)
        x = x + checkpoint_name(h, "branch")

        h = RMSNorm(cfg.eps, dtype, stored, name="norm2")(x)
        gate = checkpoint_name(linear("gate", (cfg.hidden,), "embed", "mlp")(h), "mlp_in")
        up = checkpoint_name(linear("up", (cfg.hidden,), "embed", "mlp")(h), "mlp_in")
        h = linear("down", (cfg.width,), "mlp", "embed")(jax.nn.silu(gate) * up)
        return split_batch(x + checkpoint_name(h, "branch")), cache


class Network(nn.Module):
    """Embeddings -> normed hidden states, not shifted. Parameters: embed, blocks (stacked), norm, head unless tied."""

    config: Decoder

    @nn.compact
    def __call__(self, x, positions=None, mask=None, cache=None, start=0):
        """Arguments as in `Model.apply`; returns (hidden [B, L, D], the filled cache or None)."""
        cfg, dtype, stored = self.config, jnp.dtype(self.config.dtype), self.config.other_dtype
        # Declared here so that one tree holds the whole model; used through `Decoder.table` and `Decoder.head`.
        self.param("embed", logical(_init, "vocab", "embed"), (cfg.rows, cfg.width), stored)
        if not cfg.tied:
            HeadMatrix(cfg, name="head")()
        slots = start + jnp.arange(x.shape[1])
        if positions is None:
            positions = slots
        if mask is None and cache is not None and cfg.causal:
            mask = causal_slots(cache, slots)
        blocks = scanned(Block, cfg, shared=3)(cfg, name="blocks")
        x, cache = blocks(split_batch(x.astype(dtype)), positions, mask, start, cache)
        return RMSNorm(cfg.eps, dtype, stored, name="norm")(x), cache


class HeadMatrix(nn.Module):
    """Declares the head's matrix [D, V], which the readout multiplies by."""

    config: Decoder

    @nn.compact
    def __call__(self) -> None:
        cfg = self.config
        self.param("kernel", logical(_init, "embed", "vocab"), (cfg.width, cfg.rows), cfg.other_dtype)
