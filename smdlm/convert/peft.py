"""Adapters in PEFT's format: adapter_config.json, adapter_model.safetensors, and transparency_config.json.

The last one holds the soft mask's three numbers as the reference code names them; ours are f32, its own are rounded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from smdlm import files
from smdlm.convert.decoder import table
from smdlm.convert.files import FileError
from smdlm.convert.streams import Tensor, read_header, read_json, read_metadata, write_safetensors
from smdlm.convert.table import ConversionError, Leaf
from smdlm.convert.unpickle import shown
from smdlm.models.decoder import Decoder
from smdlm.models.lora import LoRA

CONFIG, WEIGHTS, GATE = "adapter_config.json", "adapter_model.safetensors", "transparency_config.json"
BASE_HASH = "smdlm_base_"  # and the type of the base: among the metadata of the weights
MODULES = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "attention_out": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}
# What would be another function: key of adapter_config.json, the values that are ours.
FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "use_rslora": (False, None),
    "lora_bias": (False, None),
    "alpha_pattern": ({}, None),
    "rank_pattern": ({}, None),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "modules_to_save": (None, []),
    "exclude_modules": (None,),
    "trainable_token_indices": (None,),
}


def tensors_of(lora: LoRA) -> list[Leaf]:
    """The tensors of an adapter's file: shape as there, place in our tree."""
    leaves = []
    for leaf in table(lora.base, lora.base.rows):
        module = leaf.target.removesuffix("/kernel")
        if not leaf.matrix or module.rpartition("/")[2] not in lora.targets:
            continue
        name, (outputs, inputs) = f"base_model.model.{leaf.source.removesuffix('.weight')}", leaf.shape
        leaves.append(Leaf(f"{name}.lora_A.weight", f"{module}/a", (lora.rank, inputs), leaf.layer))
        leaves.append(Leaf(f"{name}.lora_B.weight", f"{module}/b", (outputs, lora.rank), leaf.layer))
        if lora.dora:
            leaves.append(Leaf(f"{name}.lora_magnitude_vector", f"{module}/magnitude", (outputs,), leaf.layer))
    return leaves


def load(folder: Path, base: Decoder) -> tuple[LoRA, dict[str, Any]]:
    """(adapted model, adapters f32) of a PEFT folder for a base.

    Raises:
      FileError: no such folder, or a variant of LoRA that we do not have. ConversionError: every tensor that does not
        fit the base or the rank.
    """
    config = read_json(folder / CONFIG)
    for key, wanted in FIXED.items():
        if key in config and config[key] not in wanted:
            raise FileError(f"{folder / CONFIG}: got {key} {config[key]!r}, wanted {wanted[0]!r}: not ours")
    named = config.get("target_modules")
    if not isinstance(named, list) or (unknown := sorted(set(named) - set(MODULES.values()))):
        got = named if not isinstance(named, list) else unknown
        raise FileError(
            f"{folder / CONFIG}: got target_modules {got!r}, wanted a list of {', '.join(MODULES.values())}"
        )
    targets = tuple(ours for ours, name in MODULES.items() if name in named)
    try:
        lora = LoRA(base, targets, config["r"], float(config["lora_alpha"]), bool(config.get("use_dora")))
    except (KeyError, ValueError, TypeError) as error:
        raise FileError(f"{folder / CONFIG}: got {error}, wanted r and lora_alpha of a LoRA") from None
    if not (folder / WEIGHTS).is_file():
        raise FileError(f"{folder}: got no {WEIGHTS}, wanted the adapter's weights there")
    return lora, _read(folder, lora)


def _read(folder: Path, lora: LoRA) -> dict[str, Any]:
    got, leaves = read_header(folder / WEIGHTS), tensors_of(lora)
    wanted = {leaf.source: leaf.shape for leaf in leaves}
    lines = [
        f"  {shown(name)}: got {list(got[name].shape) if name in got else 'nothing'}, "
        f"wanted {list(wanted[name]) if name in wanted else 'nothing'}"
        for name in [*wanted, *(name for name in got if name not in wanted)]
        if name not in got or got[name].shape != wanted.get(name)
    ]
    if lines:
        raise ConversionError(
            f"{folder}: got an adapter with {len(lines)} differences, wanted one of rank {lora.rank} for this base\n"
            + "\n".join(lines)
        )
    shapes = nn.meta.unbox(jax.eval_shape(lora.init, jax.random.key(0)))
    shapes = traverse_util.flatten_dict(shapes, sep="/")
    out = {path: np.zeros(leaf.shape, np.float32) for path, leaf in shapes.items()}
    for leaf in leaves:
        value = got[leaf.source].read().astype(np.float32)
        slot = out[leaf.target][leaf.layer]
        slot[...] = value.T.reshape(slot.shape)
    return traverse_util.unflatten_dict(out, sep="/")


def save(
    folder: Path,
    lora: LoRA,
    adapters: Mapping[str, Any],
    gate: Mapping[str, float],
    k: int,
    base: str,
    base_hash: str = "",
) -> None:
    """Writes a folder that PEFT loads; complete or not at all.

    gate: omega_s, omega_a and omega_b, f32 as they are, or {} for a binary model. k: candidates of the feedback.
    base: name or path of the frozen model, as PEFT keeps it. base_hash: of its weights in the type
      in which they were imported, for `check_base`.
    """
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in traverse_util.flatten_dict(adapters, sep="/").items()}

    def tensor(leaf: Leaf) -> Tensor:
        value = flat[leaf.target][leaf.layer]
        matrix = len(leaf.shape) == 2
        read = lambda: value.reshape(leaf.shape[::-1]).T if matrix else value.reshape(leaf.shape)
        return Tensor(leaf.shape, np.dtype(np.float32), read)

    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": [MODULES[name] for name in lora.targets],
        "task_type": "CAUSAL_LM",
        "use_dora": lora.dora,
        "use_rslora": False,
    }
    with files.whole(folder) as temporary:
        temporary.mkdir()
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        leaves = sorted(tensors_of(lora), key=lambda leaf: leaf.source)
        about = {BASE_HASH + lora.base.param_dtype: base_hash} if base_hash else {}
        write_safetensors(temporary / WEIGHTS, {leaf.source: tensor(leaf) for leaf in leaves}, about)
        save_gate(temporary, gate, k)


def check_base(folder: Path, base: Decoder, workdir: Path, base_hash: str) -> None:
    """FileError if the adapter says that it was trained beside other weights.

    PEFT's own say nothing of them, and ours nothing of those that were imported in another type: an adapter that was
    trained beside a base in int8 may be merged into the same one in bfloat16.
    """
    wanted = read_metadata(folder / WEIGHTS).get(BASE_HASH + base.param_dtype, base_hash)
    if wanted != base_hash:
        raise FileError(
            f"--base: got {workdir} with weights {base_hash[:12]} for an adapter trained beside weights {wanted[:12]} "
            f"({folder}), wanted those"
        )


def save_gate(folder: Path, gate: Mapping[str, float], k: int) -> None:
    """Writes transparency_config.json, unless gate is {}: f32 as the shortest decimals that read back as they were."""
    if not gate:
        return
    number = lambda name: float(str(np.float32(gate[name])))
    content = {
        "transparency_alg": "mixinputs_with_topk",
        "transparency_scale": number("omega_s"),
        "transparency_steepness": number("omega_a"),
        "transparency_centre": number("omega_b"),
        "mixture_temp": 1.0,
        "mixinputs_k": k,
        "transparency_scheduling": "none",
    }
    (folder / GATE).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def load_gate(folder: Path) -> tuple[dict[str, float], int] | None:
    """({omega_s, omega_a, omega_b}, k) of transparency_config.json, None where there is none. Raises FileError."""
    if not (folder / GATE).is_file():
        return None
    config = read_json(folder / GATE)
    if config.get("transparency_alg") != "mixinputs_with_topk":
        raise FileError(f"{folder / GATE}: got {config.get('transparency_alg')!r}, wanted 'mixinputs_with_topk'")
    names = {"omega_s": "scale", "omega_a": "steepness", "omega_b": "centre"}
    try:
        return {ours: float(config[f"transparency_{name}"]) for ours, name in names.items()}, int(config["mixinputs_k"])
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{folder / GATE}: got no number for {error}, wanted scale, steepness, centre and k") from None
