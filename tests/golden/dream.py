"""The Dream folders of the set behind our own objects. All sizes are those of their config.json."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from golden.arrays import ROOT, Folder
from smdlm.convert import decoder, streams
from smdlm.models.decoder import Decoder

DREAM = Folder(ROOT / "dream")


@dataclasses.dataclass(frozen=True)
class Released:
    """A folder as it is released: the model, its f32 weights, its config.json."""

    model: Decoder
    params: Any
    config: dict[str, Any]

    def hidden(self, x: Any, shift: bool = False, **options: Any) -> jax.Array:
        """Embeddings [B, L, D] -> hidden states, as the network gives them or shifted, as the model does."""
        return _apply(dataclasses.replace(self.model, shift=shift), self.params, x, options)

    def logits(self, hidden: jax.Array) -> np.ndarray:
        """[B, L, V], all columns of the released table."""
        return np.asarray(self.model.head(self.params).logits(hidden))

    def embed(self, ids: np.ndarray) -> jax.Array:
        return self.model.table(self.params)[ids]


@functools.partial(jax.jit, static_argnums=0)
def _apply(model: Decoder, params: Any, x: jax.Array, options: dict[str, Any]) -> jax.Array:
    return model.apply(params, x, **options)


@functools.cache
def load_dream(name: str = "hf") -> Released:
    tensors, config = streams.read_folder(DREAM.need(name))
    model = decoder.of_config(config, name)
    table = decoder.table(model, model.rows)
    streams.check(name, tensors, table)
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    tree = streams.to_tree(tensors, table, shapes)
    leaf = lambda x: jnp.asarray(x.whole())
    return Released(model, jax.tree.map(leaf, tree, is_leaf=lambda x: isinstance(x, streams.Streamed)), config)
