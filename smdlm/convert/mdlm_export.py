"""The way back of mdlm.py: our weights become a checkpoint as the PyTorch code writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from smdlm.convert.files import Source
from smdlm.convert.mdlm import OMEGA, ROTARY, from_tree, rotary_frequencies, table
from smdlm.convert.table import ConversionError
from smdlm.full_softmask import FullSoftMask
from smdlm.models.dit import DiT


def export_tree(params: Mapping[str, Any], meta: Mapping[str, Any], kind: str, vocab_size: int | None = None) -> Source:
    """Our weights -> state_dict with the rotary buffer and, if there is an omega, the soft-mask head.

    meta: of the checkpoint; `convert` of an import restores the bits that our trees do not hold. vocab_size: wanted if
    the meta has no model sizes. The result's `shadow` is that of these weights: the caller replaces it.
    """
    convert = meta.get("convert", {})
    config = model_config(params["backbone"], meta, kind, vocab_size)
    tensors: dict[str, np.ndarray] = {}
    for name, value in from_tree(params["backbone"], config).items():
        if name.startswith("backbone.blocks.0.") and ROTARY not in tensors:
            kept = convert.get("rotary")
            frequencies = rotary_frequencies(config.width // config.heads)
            tensors[ROTARY] = frequencies if kept is None else np.asarray(kept, np.float32)
        tensors[name] = value
    shadow = [tensors[leaf.source] for leaf in table(config)]
    tensors |= _head(params.get("softmask", {}), convert.get("unused", {}))
    for name in tensors.keys() & convert.get("types", {}).keys():  # back to half precision where that loses nothing
        half = tensors[name].astype(jnp.dtype(convert["types"][name]))
        if np.array_equal(half.astype(np.float32), tensors[name]):
            tensors[name] = half
    step = meta.get("step", 0)
    ema = convert.get("ema") or {"decay": 0.9999, "num_updates": step}
    progress = _progress(step) | convert.get("progress", {})
    return Source(kind, tensors, shadow, ema, progress, convert.get("config") or _hugging_face(config, meta))


def _head(softmask: Mapping[str, Any], unused: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The soft-mask head by the reference's names; unused: what an import had no place for."""
    omega = {name: np.float32(value) for name, value in unused.items()}
    omega |= {name: softmask[ours] for name, ours in OMEGA.items() if ours in softmask}
    if omega and softmask:
        # The reference always has a temperature, whichever operator runs.
        omega.setdefault("tran_head.raw_temperature", FullSoftMask().init()["raw_temperature"])
    return {name: np.asarray(omega[name], np.float32) for name in OMEGA if name in omega}


def _progress(step: int) -> dict[str, Any]:
    """What Lightning reads when it resumes, after `step` updates."""
    done = {"current": {"completed": step}, "total": {"completed": step}}
    none = {"current": {"completed": 0}, "total": {"completed": 0}}
    loops = {"epoch_progress": none, "epoch_loop.batch_progress": done}
    loops["epoch_loop.state_dict"] = {"_batches_that_stepped": step}
    return {"epoch": 0, "global_step": step, "pytorch-lightning_version": "2.2.1", "loops": {"fit_loop": loops}}


def _hugging_face(config: DiT, meta: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of MDLM's released model directories."""
    return {
        "architectures": ["MDLM"],
        "model_type": "mdlm",
        "vocab_size": config.vocab_size,
        "model_length": meta.get("config", {}).get("data", {}).get("seq_len", 1024),
        "hidden_dim": config.width,
        "cond_dim": config.cond,
        "n_blocks": config.depth,
        "n_heads": config.heads,
        "dropout": config.dropout,
        "time_conditioning": False,
        "return_dict": False,
    }


def model_config(backbone: Mapping[str, Any], meta: Mapping[str, Any], kind: str, vocab_size: int | None) -> DiT:
    """Sizes of a tree of ours. ConversionError: another KIND, or the vocabulary without padding is not known."""
    causal = "sigma_map" not in backbone
    if causal != (kind == "ar"):
        raise ConversionError(f"got a checkpoint of an {'ar' if causal else 'mdlm'} model, wanted {kind}: change KIND")
    rows, width = backbone["embed"].shape
    depth, _, _, heads, _ = backbone["blocks"]["qkv"]["kernel"].shape
    cond = 128 if causal else backbone["sigma_map"]["out"]["kernel"].shape[0]
    known = meta.get("model", {}).get("vocab_size")
    if known and vocab_size not in (None, known):
        raise ConversionError(f"--vocab_size: got {vocab_size}, wanted {known}, the checkpoint's own: leave it out")
    vocab = known or vocab_size
    if not vocab or not 0 < vocab <= rows:
        raise ConversionError(
            f"got vocabulary {vocab} for tables of {rows} rows, wanted its size without padding (with the mask): "
            "pass --vocab_size=N"
        )
    dropout = meta.get("model", meta.get("config", {}).get("model", {})).get("dropout", 0.1)
    return DiT(vocab, width, depth, heads, cond, dropout, causal=causal, vocab_multiple=rows)
