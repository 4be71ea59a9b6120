"""Decoders: names, layouts and config.json of Hugging Face's Llama, Qwen2 and Dream <-> our trees and `Decoder`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smdlm.convert.files import FileError
from smdlm.convert.table import ConversionError, Leaf
from smdlm.models.decoder import Decoder

# model_type: fields that config.json does not say.
TYPES: dict[str, dict[str, Any]] = {
    "llama": {"qkv_bias": False, "causal": True},
    "qwen2": {"qkv_bias": True, "causal": True},
    "Dream": {"qkv_bias": True, "causal": False, "shift": True},
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "Dream": "DreamModel"}
# Field of Decoder: key of config.json.
SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "key_heads": "num_key_value_heads",
    "hidden": "intermediate_size",
    "rope_base": "rope_theta",
    "eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
# What would be another network: key of config.json, the values that are ours.
FIXED = {
    "rope_scaling": (None,),
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
}


def of_config(config: Mapping[str, Any], name: str) -> Decoder:
    """The model that a config.json describes, with the released table: all rows count as ids.

    Raises:
      FileError: another family, a missing size, or a variant that we do not have; one line.
    """
    kind = config.get("model_type")
    if kind not in TYPES:
        raise FileError(f"{name}: got model_type {kind!r}, wanted one of {', '.join(TYPES)}")
    fields = dict(TYPES[kind])
    defaults = {
        "num_key_value_heads": config.get("num_attention_heads"),
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
    }
    # Newer files keep the base of the rotary positions in an object of its own.
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise FileError(f"{name}: got rope_type {rope['rope_type']!r}, wanted 'default': longer contexts are not ours")
    given = defaults | {key: value for key, value in {**rope, **config}.items() if value is not None}
    if missing := [key for key in SIZES.values() if given.get(key) is None]:
        raise FileError(f"{name}: got no {', '.join(missing)}, wanted all sizes of a {kind} model")
    for key, wanted in FIXED.items():
        if key in config and config[key] not in wanted:
            raise FileError(f"{name}: got {key} {config[key]!r}, wanted {wanted[0]!r}: this variant is not ours")
    if given.get("attention_bias") and kind == "llama":
        raise FileError(f"{name}: got attention_bias true, wanted false: its bias behind the output is not ours")
    fields |= {field: given[key] for field, key in SIZES.items()}
    fields["qkv_bias"] = given.get("qkv_bias", fields["qkv_bias"])  # ours: a Dream that was made of a Llama has none
    try:
        model = Decoder(**fields, table_rows=given["vocab_size"])
    except (ValueError, TypeError) as error:
        raise FileError(f"{name}: got sizes that fit no model ({error}), wanted those of a {kind} model") from None
    if given.get("head_dim", model.head_width) != model.head_width:
        raise FileError(f"{name}: got head_dim {given['head_dim']}, wanted {model.head_width} (width / heads)")
    return model


def config_of(model: Decoder, rows: int) -> dict[str, Any]:
    """config.json for a model that did not come from one. rows: of the tables in the file."""
    kind = "Dream" if model.shift else "qwen2" if model.qkv_bias else "llama"
    sizes = {key: getattr(model, field) for field, key in SIZES.items()}
    if TYPES[kind]["qkv_bias"] != model.qkv_bias:
        sizes["qkv_bias"] = model.qkv_bias
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **sizes,
        "vocab_size": rows,
        "hidden_act": "silu",
        "head_dim": model.head_width,
        "torch_dtype": model.param_dtype,
    }


def table(model: Decoder, rows: int) -> list[Leaf]:
    """All tensors in the order of Hugging Face's state_dict. rows: of the tables in the file."""
    width, keys = model.width, model.key_heads * model.head_width
    leaves = [Leaf("model.embed_tokens.weight", "embed", (rows, width), vocab=True)]
    attention = {"q": ("q_proj", (width, width)), "k": ("k_proj", (keys, width)), "v": ("v_proj", (keys, width))}
    others = {
        "attention_out": ("self_attn.o_proj", (width, width)),
        "gate": ("mlp.gate_proj", (model.hidden, width)),
        "up": ("mlp.up_proj", (model.hidden, width)),
        "down": ("mlp.down_proj", (width, model.hidden)),
    }
    for i in range(model.depth):
        layer = f"model.layers.{i}"
        for ours, (name, shape) in attention.items():
            source = f"{layer}.self_attn.{name}"
            leaves.append(Leaf(f"{source}.weight", f"blocks/{ours}/kernel", shape, i))
            if model.qkv_bias:
                leaves.append(Leaf(f"{source}.bias", f"blocks/{ours}/bias", shape[:1], i))
        leaves += [
            Leaf(f"{layer}.{n}.weight", f"blocks/{ours}/kernel", shape, i) for ours, (n, shape) in others.items()
        ]
        for ours, name in (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")):
            leaves.append(Leaf(f"{layer}.{name}.weight", f"blocks/{ours}/scale", (width,), i))
    leaves.append(Leaf("model.norm.weight", "norm/scale", (width,)))
    if not model.tied:
        leaves.append(Leaf("lm_head.weight", "head/kernel", (rows, width), vocab=True))
    return leaves


def model_of(fields: Mapping[str, Any]) -> Decoder:
    """The model whose fields a checkpoint's meta holds. Raises ConversionError."""
    try:
        return Decoder(**fields)
    except TypeError:
        raise ConversionError("got a checkpoint of another model, wanted that of a decoder: change KIND") from None
