"""What everything else may ask of a model, and what models hand out. A new model is one class in one file.

A model maps embeddings to hidden states and knows nothing of masks, noise or sampling. Those who train it, sample from
it or compile it know this protocol and no model.

Shapes: B examples, L positions, M positions that can be attended to, D width, V vocabulary, G key heads, E head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from smdlm.ops import cpu

Params = Any  # a nested dict of arrays


class Head(flax.struct.PyTreeNode):
    """The output head as plain arrays, which the readout sweeps in chunks: matrix [D, V], bias [V] f32.

    Attributes:
      products: `Model.products`.
    """

    matrix: jax.Array
    bias: jax.Array
    products: str = flax.struct.field(pytree_node=False, default="dtype")

    def operands(self, hidden: jax.Array) -> Any:
        """The type in which hidden states and matrix are multiplied."""
        return cpu.operands(hidden.dtype, self.products)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V] f32: multiplied in the type of hidden or as `products` says, accumulated in f32."""
        of = self.operands(hidden)
        if of == hidden.dtype:
            return cpu.product(hidden, self.matrix.astype(of)) + self.bias
        return cpu.matmul(hidden, self.matrix, of) + self.bias


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of all layers: [N layers, B, M, G, E]; slot i of M holds what was written there."""

    keys: jax.Array
    values: jax.Array

    @classmethod
    def zeros(cls, layers: int, batch: int, length: int, heads: int, width: int, dtype: Any) -> KVCache:
        shape = (layers, batch, length, heads, width)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def write(self, key: jax.Array, value: jax.Array, start: jax.Array | int) -> KVCache:
        """One layer's [B, M, G, E] with the slots start .. start + L - 1 replaced by key and value [B, L, G, E]."""
        return KVCache(
            jax.lax.dynamic_update_slice_in_dim(self.keys, key, start, axis=1),
            jax.lax.dynamic_update_slice_in_dim(self.values, value, start, axis=1),
        )


class MatrixAxes(NamedTuple):
    """Which axes of a parameter are the input and the output of a linear map; all others number separate matrices."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Model(Protocol):
    """A frozen dataclass; its fields are the fields of config.model, checked in `__post_init__`.

    Attributes:
      vocab_size: V with the mask id, without padding.
      width: D.
      causal: position i sees positions <= i and predicts token i + 1 (AR); otherwise it predicts token i.
      tied: `table` and `head` are the same parameter.
      dtype: 'float32' or 'bfloat16', of the computation; parameters are f32.
      products: 'dtype', or 'bfloat16': on a CPU operands of large products are rounded to it, all else stays in dtype
        (ops/cpu.py).
      remat: 'none', 'light' or 'block', what the backward pass computes again; attention: 'auto' or 'xla'. Neither
        changes a result.
    """

    vocab_size: int
    width: int
    causal: bool
    tied: bool
    dtype: str
    products: str
    remat: str
    attention: str

    def init(self, key: jax.Array) -> Params:
        """Parameters f32, boxed with their logical axes (`layers.logical`; mesh.rules.RULES has the names)."""
        ...

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
        """Embeddings x [B, L, D] -> hidden states [B, L, D] in `dtype`, ready for the head; with a cache also that.

        Args:
          params: as from `init`, unboxed.
          cond: [B] f32 sigma of the noise, or None (no time conditioning).
          positions: [L] or [B, L] i32 for the position embedding; start .. start + L - 1 by default.
          mask: [B or 1, L or 1, M] bool, what each position may attend to: padding, or anything else; None is all. A
            causal model sees nothing after a position whatever the mask says. With a cache the mask must hide the slots
            that nothing was written to, but for a causal model, which does not look ahead.
          cache: keys and values of M slots, of which start .. start + L - 1 are written by this call; M = L without.
          dropout_key: None turns dropout off.
        """
        ...

    def table(self, params: Params) -> jax.Array:
        """The embedding table [V padded, D]."""
        ...

    def head(self, params: Params) -> Head:
        """The output head, V padded like the table."""
        ...

    def cache(self, batch: int, length: int) -> KVCache:
        """An empty cache of `length` slots."""
        ...

    def matrices(self) -> Mapping[str, MatrixAxes | None]:
        """{path of a parameter, joined by '/'}: axes, where an optimizer may orthogonalise it (Muon), None elsewhere.

        Every parameter must be listed: the optimizer refuses one that is not.
        """
        ...

    def flops(self, length: int) -> float:
        """FLOPs of matrix products per token of one forward over `length` positions, without the head."""
        ...


@dataclasses.dataclass(frozen=True)
class Frozen(Model):
    """A model of which nothing is trained, behind the same protocol: what else a run trains is the soft mask.

    Its trained parameters are {}; those of the base are handed to `join`. What it is asked for is what its base is.
    """

    base: Model

    @property
    def vocab_size(self) -> int:
        return self.base.vocab_size

    @property
    def width(self) -> int:
        return self.base.width

    @property
    def causal(self) -> bool:
        return self.base.causal

    @property
    def tied(self) -> bool:
        return self.base.tied

    @property
    def dtype(self) -> str:
        return self.base.dtype

    @property
    def products(self) -> str:
        return self.base.products

    @property
    def remat(self) -> str:
        return self.base.remat

    @property
    def attention(self) -> str:
        return self.base.attention

    def init(self, key: jax.Array) -> Params:
        return {}

    def start(self, base: Params, adapters: Params) -> Params:
        """Trained parameters as from `init` (unboxed), completed by what only the base knows."""
        return adapters

    def beside(self, base: Params, adapters: Params) -> Params:
        """One tree of both, of arrays, shapes or shardings alike; the base's own where nothing is adapted."""
        return base

    def join(self, base: Params, adapters: Params) -> Params:
        """What `apply`, `table` and `head` take. No gradient flows to the base."""
        return jax.lax.stop_gradient(base)

    def merge(self, base: Params, adapters: Params) -> Params:
        """Parameters of `self.base` that are the same function, in the types of the base."""
        return base

    def apply(self, params: Params, x: jax.Array, **options: Any) -> Any:
        return self.base.apply(params, x, **options)

    def table(self, params: Params) -> jax.Array:
        return self.base.table(params)

    def head(self, params: Params) -> Head:
        return self.base.head(params)

    def cache(self, batch: int, length: int) -> KVCache:
        return self.base.cache(batch, length)

    def matrices(self) -> dict[str, MatrixAxes | None]:
        return {}

    def flops(self, length: int) -> float:
        return self.base.flops(length)
