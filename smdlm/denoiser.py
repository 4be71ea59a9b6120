"""The one seam between models and everything else: (params, tokens, feedback) -> hidden states, and the head."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from smdlm.feedback.gates import Params
from smdlm.mesh.traced import lookup
from smdlm.models.base import Head, KVCache, MatrixAxes, Model
from smdlm.readout import exclude
from smdlm.softmask import Feedback, SoftMask


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A model behind the soft-mask operator. Training and sampling call the same object.

    Attributes:
      model: see models/base.py.
      vocab_size: V without padding.
      mask_id: embedded as the mask, never predicted.
      softmask: None for a model without soft-masking (binary masks, AR).
    """

    model: Model
    vocab_size: int
    mask_id: int
    softmask: SoftMask | None = None

    def init(self, key: jax.Array) -> Any:
        """{'backbone': ..., 'softmask': raw omega (empty without soft-masking)}; boxed with logical axes."""
        return {"backbone": self.model.init(key), "softmask": self.init_omega(jax.random.fold_in(key, 1))}

    def init_omega(self, key: jax.Array) -> Params:
        """Those of the operator alone."""
        return self.softmask.init(key, self.model.width) if self.softmask else {}

    def matrices(self) -> dict[str, MatrixAxes | None]:
        """`Model.matrices`, and those of the operator as softmask/NAME."""
        operators = self.softmask.matrices() if self.softmask else {}
        return {**self.model.matrices(), **{f"softmask/{name}": axes for name, axes in operators.items()}}

    def whole(self, params: Any, base: Any) -> Any:
        """What all other methods take, of what is trained (`init`) and the frozen base, None where everything is."""
        if base is None:
            return params
        return {**params, "backbone": self.model.join(base, params["backbone"])}

    def flops(self, length: int, read: float = 1.0) -> float:
        """Of the matrix products of a forward pass of so many tokens, per token: the model's, and those of the head for
        the share of the tokens that are read out."""
        return self.model.flops(length) + read * 2.0 * self.model.width * self.vocab_size

    def __call__(
        self, params: Any, tokens: jax.Array, feedback: Feedback | None = None, **options: Any
    ) -> jax.Array | tuple[jax.Array, KVCache]:
        """Hidden states [B, L, D]: those of a masked position predict its own token, of an AR model the next one.

        Args:
          params: as from `init`, unboxed.
          tokens: [B, L] i32 canvas.
          feedback: what masked positions remember; None embeds the tokens as they are.
          options: `cond`, `positions`, `mask`, `dropout_key`, and `cache` with `start`: those of `Model.apply`. With a
            cache the result is (hidden, cache).
        """
        table = self.model.table(params["backbone"])
        if feedback is None:
            x = lookup(table, tokens)
        else:
            x = self.softmask(params["softmask"], table, self.head(params), tokens, feedback, self.mask_id)
        return self.model.apply(params["backbone"], x.astype(self.model.dtype), **options)

    def head(self, params: Any) -> Head:
        """The output head under SUBS: mask and padding ids can not be predicted."""
        return exclude(self.model.head(params["backbone"]), self.vocab_size, self.mask_id)

    def omega(self, params: Any) -> dict[str, jax.Array]:
        """Readable gate values (omega_s, omega_a, omega_b), empty without soft-masking."""
        return self.softmask.gate.values(params["softmask"]) if self.softmask else {}
