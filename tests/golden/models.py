"""The checkpoints of the set behind our own objects."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from golden.arrays import ROOT, Arrays, Folder, Group
from smdlm.convert import files, mdlm
from smdlm.denoiser import Denoiser
from smdlm.models.dit import Block, DiT
from smdlm.readout import Readout
from smdlm.softmask import Feedback, SoftMask

MDLM = Folder(ROOT / "mdlm" if (ROOT / "mdlm").is_dir() else ROOT)  # $SMDLM_GOLDEN may name that folder itself


@dataclasses.dataclass(frozen=True)
class Reference:
    """A converted checkpoint; its vocabulary is padded, and the padding must not show."""

    denoiser: Denoiser
    params: Any
    ema: Any
    readout: Readout
    ema_decay: float

    @property
    def model(self) -> DiT:
        return self.denoiser.model

    @property
    def vocab(self) -> int:
        return self.denoiser.vocab_size

    @property
    def backbone(self) -> Any:
        return self.params["backbone"]

    @property
    def table(self) -> jax.Array:
        return self.model.table(self.backbone)[: self.vocab]

    @property
    def not_mask(self) -> np.ndarray:
        """[V]: all columns but the mask's, which holds -1e6 there (an f32 ulp of 0.06) and -1e30 here."""
        return np.arange(self.vocab) != self.denoiser.mask_id

    def logits(self, hidden: jax.Array, params: Any = None) -> np.ndarray:
        """[B, L, V]: as the model gives them, the mask's included."""
        backbone = (params or self.params)["backbone"]
        return np.asarray(self.model.head(backbone).logits(hidden)[..., : self.vocab])

    def run(self, x: jax.Array, cond: Any = None) -> np.ndarray:
        """Embeddings [B, L, D] -> logits [B, L, V]."""
        return self.logits(forward(self.model, self.backbone, x, cond))

    def log_probs(self, params: Any, hidden: jax.Array, canvas: np.ndarray) -> np.ndarray:
        """[B, L, V]: our prediction at masked positions, the token itself elsewhere (SUBS)."""
        return subs(self.readout.log_probs(self.denoiser.head(params), hidden)[..., : self.vocab], canvas, self)


def subs(log_probs: jax.Array, canvas: np.ndarray, reference: Reference) -> np.ndarray:
    """The reference's form of a prediction: log-probabilities [B, L, V] of a known token are 0 and -1e6."""
    known = np.where(np.arange(reference.vocab) == canvas[..., None], 0.0, -1e6)
    return np.where((canvas == reference.denoiser.mask_id)[..., None], log_probs, known)


@functools.partial(jax.jit, static_argnums=0)
def forward(model: DiT, backbone: Any, x: jax.Array, cond: Any) -> jax.Array:
    return model.apply(backbone, x, cond=cond)


@functools.partial(jax.jit, static_argnums=0)
def denoise(denoiser: Denoiser, params: Any, tokens: Any, feedback: Feedback | None = None) -> jax.Array:
    return denoiser(params, tokens, feedback)


@functools.partial(jax.jit, static_argnums=0)
def run_block(model: DiT, layer: Any, x: jax.Array, cond: Any) -> jax.Array:
    positions = jnp.arange(x.shape[1])
    return Block(model, deterministic=True).apply({"params": layer}, x, cond, positions, None, 0, None)[0]


def check_blocks(stored: Arrays, group: Group, prefix: str, reference: Reference, x: jax.Array, cond: Any) -> None:
    """Every block's output, from the input of the first."""
    for i in range(reference.model.depth):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], reference.backbone["blocks"])
        x = run_block(reference.model, layer, x, cond)
        stored.check(group, f"{prefix}{i}", x)


def load_reference(name: str, kind: str, mask_id: int, softmask: SoftMask | None) -> Reference:
    source, shadow = files.load(MDLM.need(f"{name}.ckpt", f"{name}.safetensors")), None
    if kind == "mdlm" and source.shadow is None:  # where the EMA was off it stands in a file of its own
        shadow = files.load(MDLM.need("ema.ckpt", "ema.safetensors"))
    made = mdlm.import_source(source, kind, shadow=shadow, softmask=softmask)
    denoiser = Denoiser(made.config, made.config.vocab_size, mask_id, softmask)
    params, ema = jax.tree.map(jnp.asarray, (made.params, made.ema))
    decay = (made.meta["convert"]["ema"] or {}).get("decay", 0.0)
    # A small odd chunk, so that sweeps have several steps and a padded last one.
    return Reference(denoiser, params, ema, Readout(k=softmask.k if softmask else 1, chunk=17), decay)
