"""GPT-2: names, layouts and config.json of Hugging Face <-> our trees and `GPT2`.

Its linear layers are Conv1D, whose weights are (in, out): they are handed on transposed, as every other Linear is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from smdlm.convert.files import FileError
from smdlm.convert.streams import Tensor
from smdlm.convert.table import Leaf, linear
from smdlm.models.gpt2 import GPT2

SIZES = {
    "vocab_size": "vocab_size",
    "width": "n_embd",
    "depth": "n_layer",
    "heads": "n_head",
    "positions": "n_positions",
}
# What would be another network: key of config.json, the value that is ours.
FIXED = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_by_inverse_layer_idx": False}
LINEAR = {"attn.c_attn": ("qkv", 3, 1), "attn.c_proj": ("attention_out", 1, 1), "mlp.c_fc": ("mlp_in", 4, 1)}
LINEAR |= {"mlp.c_proj": ("mlp_out", 1, 4)}  # name: (ours, outputs / width, inputs / width)


def of_config(config: Mapping[str, Any], name: str) -> GPT2:
    """The model that a config.json describes. FileError, one line: another family, a missing size, a variant."""
    if config.get("model_type", "gpt2") != "gpt2":
        raise FileError(f"{name}: got model_type {config['model_type']!r}, wanted 'gpt2'")
    if missing := [key for key in SIZES.values() if not isinstance(config.get(key), int)]:
        raise FileError(f"{name}: got no {', '.join(missing)}, wanted all sizes of a GPT-2")
    for key, wanted in FIXED.items():
        if config.get(key, wanted) != wanted:
            raise FileError(f"{name}: got {key} {config[key]!r}, wanted {wanted!r}: this variant is not ours")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise FileError(f"{name}: got n_inner {config['n_inner']}, wanted {4 * config['n_embd']} (4 n_embd)")
    try:
        return GPT2(**{field: config[key] for field, key in SIZES.items()})
    except ValueError as error:
        raise FileError(f"{name}: got sizes that fit no model ({error}), wanted those of a GPT-2") from None


def config_of(model: GPT2, rows: int) -> dict[str, Any]:
    """config.json for a model that did not come from one. rows: of the table in the file."""
    sizes = {key: getattr(model, field) for field, key in SIZES.items()}
    fixed = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **FIXED}
    return {**fixed, **sizes, "vocab_size": rows, "n_ctx": model.positions, "torch_dtype": "float32"}


def table(model: GPT2, rows: int) -> list[Leaf]:
    """All tensors in the order of `GPT2Model`'s state_dict, of Linear layers (out, in). rows: of the table."""
    width = model.width
    leaves = [Leaf("wte.weight", "embed", (rows, width), vocab=True)]
    leaves.append(Leaf("wpe.weight", "positions", (model.positions, width)))
    for i in range(model.depth):
        block = _norm("ln_1", "norm1", width) + _norm("ln_2", "norm2", width)
        for name, (ours, outputs, inputs) in LINEAR.items():
            block += linear(name, ours, (outputs * width, inputs * width))
        leaves += [
            dataclasses.replace(b, source=f"h.{i}.{b.source}", target=f"blocks/{b.target}", layer=i) for b in block
        ]
    return leaves + _norm("ln_f", "norm", width)


def _norm(source: str, target: str, width: int) -> list[Leaf]:
    return [Leaf(f"{source}.weight", f"{target}/scale", (width,)), Leaf(f"{source}.bias", f"{target}/bias", (width,))]


def is_conv(name: str) -> bool:
    return name.startswith("h.") and name.endswith(tuple(f"{layer}.weight" for layer in LINEAR))


def transposed(name: str, tensor: Tensor) -> Tensor:
    """A Conv1D's weight as that of a Linear, or the other way round; other tensors as they are."""
    if not is_conv(name) or len(tensor.shape) != 2:
        return tensor
    read = lambda: np.ascontiguousarray(tensor.read().T)
    return dataclasses.replace(tensor, shape=tensor.shape[::-1], read=read)


def cleaned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefix `transformer.`, without the causal masks that old files keep and the tied head."""
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    kept = {n: t for n, t in bare.items() if n != "lm_head.weight" and not n.endswith((".attn.bias", ".masked_bias"))}
    return {name: transposed(name, tensor) for name, tensor in kept.items()}
