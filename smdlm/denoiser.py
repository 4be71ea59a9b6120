"""The one seam between models and everything else: (params, tokens, feedback) -> hidden states, and the head."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from smdlm.models.layers import Head
from smdlm.readout import exclude
from smdlm.shard import lookup
from smdlm.softmask import Feedback, SoftMask


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A model behind the soft-mask operator. Training and sampling call the same object.

    Attributes:
      model: offers `init_params`, `__call__`, `table`, `head`, `dtype` (see models/dit.py).
      vocab_size: V without padding.
      mask_id: embedded as the mask, never predicted.
      softmask: None for a model without soft-masking (binary masks, AR).
    """

    model: Any
    vocab_size: int
    mask_id: int
    softmask: SoftMask | None = None

    def init_params(self, key: jax.Array) -> Any:
        """{'backbone': ..., 'softmask': raw omega (empty without soft-masking)}; boxed with logical axes."""
        omega = self.softmask.init() if self.softmask else {}
        return {"backbone": self.model.init_params(key), "softmask": omega}

    def __call__(
        self,
        params: Any,
        tokens: jax.Array,
        feedback: Feedback | None = None,
        cond: jax.Array | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, L, D] that predict in place (position i predicts token i).

        Args:
          params: as from `init_params`, unboxed.
          tokens: [B, L] i32 canvas.
          feedback: what masked positions remember; None embeds the tokens as they are.
          cond: [B] f32 sigma, or None (no time conditioning).
          dropout_key: None turns dropout off.
        """
        table = self.model.table(params["backbone"])
        if feedback is None:
            x = lookup(table, tokens)
        else:
            x = self.softmask(params["softmask"], table, self.head(params), tokens, feedback, self.mask_id)
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        variables = {"params": params["backbone"]}
        return self.model.apply(
            variables, x.astype(self.model.dtype), cond, deterministic=dropout_key is None, rngs=rngs
        )

    def decode(self, params: Any, tokens: jax.Array, cache: Any, start: jax.Array) -> tuple[jax.Array, Any]:
        """Causal models: hidden states of tokens [B, L] at positions start .. start + L - 1, and the filled cache."""
        x = lookup(self.model.table(params["backbone"]), tokens)
        return self.model.apply({"params": params["backbone"]}, x, cache=cache, start=start)

    def head(self, params: Any) -> Head:
        """The output head under SUBS: mask and padding ids can not be predicted."""
        return exclude(self.model.head(params["backbone"]), self.vocab_size, self.mask_id)

    def omega(self, params: Any) -> dict[str, jax.Array]:
        """Readable gate values (omega_s, omega_a, omega_b), empty without soft-masking."""
        return self.softmask.gate.values(params["softmask"]) if self.softmask else {}
