"""Hugging Face folders and GGUF files -> workdirs, and workdirs -> folders: `decoder`, `gpt2`, `gguf`.

A mask that the vocabulary does not have becomes one row behind it, the mean of all rows.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from smdlm import command, files
from smdlm.convert import adapter, decoder, gguf, gpt2, peft
from smdlm.convert.files import FileError
from smdlm.convert.streams import Tensor, check, read_folder, tensor_of, to_tree, write_safetensors
from smdlm.convert.table import Leaf
from smdlm.convert.workdir import new_workdir, save
from smdlm.data import pretrained
from smdlm.data.tokenizer import make_tokenizer
from smdlm.full_softmask import FullSoftMask
from smdlm.io.checkpoint import checkpointer_of
from smdlm.models.decoder import Decoder
from smdlm.models.gpt2 import GPT2
from smdlm.softmask import SoftMask

OPERATORS: dict[str, SoftMask | None] = {"topk": SoftMask(), "full": FullSoftMask(), "none": None}
COPIED = ("config.json", "generation_config.json")


@dataclasses.dataclass(frozen=True)
class Family:
    """What a kind of model knows of its folder.

    Attributes:
      model: class of the models. of_config: (config.json, name for messages) -> model.
      config_of: (model, rows of the table) -> config.json. table: the same -> its tensors.
      cleaned: tensors of a file -> those under the names of the table.
      stored: (name, tensor of the table) -> as the file has it.
    """

    model: type
    of_config: Callable[[Mapping[str, Any], str], Any]
    config_of: Callable[[Any, int], dict[str, Any]]
    table: Callable[[Any, int], list[Leaf]]
    cleaned: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
    stored: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor


FAMILIES = {
    "decoder": Family(Decoder, decoder.of_config, decoder.config_of, decoder.table),
    "gpt2": Family(GPT2, gpt2.of_config, gpt2.config_of, gpt2.table, gpt2.cleaned, gpt2.transposed),
}


@dataclasses.dataclass(frozen=True)
class Found:
    """What a source holds; `tree` has `Streamed` leaves, nothing of which has been read. meta: of the checkpoint."""

    model: Any
    tree: dict[str, Any]
    meta: dict[str, Any]
    notes: list[str]


def import_folder(args: argparse.Namespace) -> list[str]:
    """SRC -> DST/checkpoints and, where SRC has one, DST/tokenizer; returns the lines to print."""
    return import_weights(args.kind, args.src, files.workdir_of(args.dst), args.softmask, args.dtype)


def import_weights(
    kind: str, src: Path, workdir: Path, softmask: str | None = None, dtype: str | None = None
) -> list[str]:
    """The same for programs; nothing is written on an error. softmask: of OPERATORS, by default 'none' if causal."""
    if kind not in (*FAMILIES, "gguf"):
        raise FileError(f"got a source of kind {kind!r}, wanted one of {', '.join(FAMILIES)}, gguf")
    with new_workdir(workdir) as checkpointer:
        if kind == "gguf":
            src = gguf.found(src)
            tensors, config, made = gguf.read(src)
            found = find("decoder", src, tensors, config, dtype)
            tokenizer = {name: json.dumps(content).encode() for name, content in made.items()}
        else:
            found = find(kind, src, *read_folder(src), dtype)
            there = [name for name in pretrained.FILES if (src / name).is_file()]
            tokenizer = {name: (src / name).read_bytes() for name in there} if pretrained.holds_tokenizer(src) else {}
        operator = OPERATORS[softmask or ("none" if found.model.causal else "topk")]
        gate = peft.load_gate(src) if operator == OPERATORS["topk"] else None
        if gate:  # of a fine-tuned network that was exported
            about, omega = {"k": gate[1], "new": []}, adapter.raw_omega(gate[0])
            found.notes.append(f"omega of {peft.GATE}, softmask.k {gate[1]}")
        else:
            omega = operator.init() if operator else {}
            about = {"new": [f"softmask/{name}" for name in omega]}
        params = {"backbone": found.tree, "softmask": omega}
        save(checkpointer, params, params, {**found.meta, "convert": {**found.meta["convert"], **about}})
    for name, content in tokenizer.items():
        files.write(workdir / "tokenizer" / name, content)
    also = [f"wrote {workdir / 'tokenizer'}: data.tokenizer=hf:{workdir / 'tokenizer'}"] if tokenizer else []
    return [*found.notes, f"wrote {checkpointer.directory} (step 0)", *also]


def find(kind: str, path: Path, tensors: Mapping[str, Tensor], config: dict[str, Any], dtype: str | None) -> Found:
    """Compares every tensor with what config.json describes. Raises FileError and ConversionError."""
    family = FAMILIES[kind]
    own = family.cleaned(tensors)
    released = family.of_config(config, path.name)
    rows = released.vocab_size
    table = family.table(released, rows)
    check(path.name, own, table)
    ids, mask_id = _ids(path, config, rows)
    if dtype is None:
        half = kind == "decoder" and all(tensor.dtype.name == "bfloat16" for tensor in own.values())
        dtype = "bfloat16" if half else "float32"
    appended = ids > rows
    own_fields = {"param_dtype": dtype, "table_rows": 0 if appended else rows} if kind == "decoder" else {}
    model = dataclasses.replace(released, vocab_size=ids, **own_fields)
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    tree = to_tree(own, table, shapes, mask_row=appended)
    texts = {name: _text(path / name) for name in COPIED if (path / name).is_file()}
    stored = {name: [tensor.dtype.name, tensor.file] for name, tensor in tensors.items()}
    meta = {
        "model": dataclasses.asdict(model),
        "mask_id": mask_id,
        "convert": {"kind": kind, "source": path.name, "rows": rows, "files": texts, "tensors": stored},
    }
    count = sum(int(np.prod(tensor.shape)) for tensor in own.values())
    notes = [f"{count:,} parameters, kept as {dtype}; {ids} ids in {model.rows} rows, mask {mask_id}"]
    return Found(model, tree, meta, notes)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: got no text ({files.one_line(error)}), wanted UTF-8: copy it again") from None


def _ids(path: Path, config: Mapping[str, Any], rows: int) -> tuple[int, int]:
    """(ids with the mask, mask id): those of the tokenizer's files where there are some, else of config.json."""
    if pretrained.holds_tokenizer(path):
        tokenizer = make_tokenizer(f"hf:{path}")
        ids, mask_id = tokenizer.model_vocab_size, tokenizer.mask_id
        if ids > rows + 1 or (ids > rows and mask_id != rows):
            raise FileError(f"{path}: got a tokenizer of {ids} ids for tables of {rows} rows, wanted that of the model")
    else:
        mask_id = config.get("mask_token_id")
        ids, mask_id = (rows + 1, rows) if mask_id is None else (rows, mask_id)
    if config.get("mask_token_id") not in (None, mask_id):
        raise FileError(
            f"{path}: got a tokenizer with mask {mask_id}, wanted {config['mask_token_id']} as in config.json"
        )
    return ids, mask_id


# ---------------------------------------------------------------------------------------------------------- export


def export_folder(args: argparse.Namespace) -> list[str]:
    """The newest checkpoint of SRC -> the folder DST, adapters merged into their base; returns the lines to print.

    The soft mask of a fine-tuned network goes along as the reference keeps it beside adapters; an import reads it back.
    """
    if args.dst.exists():
        raise FileError(f"got {args.dst}, which exists, wanted a new folder: name another one or delete it")
    command.check_folder("DST", args.dst.parent)
    workdir, which = files.workdir_of(args.src), {"raw": "params", "ema": "ema"}[args.weights or "raw"]
    with contextlib.closing(checkpointer_of(workdir)) as checkpointer:
        params, meta = checkpointer.restore_params(None, which)
    backbone, laid_out, also = params.get("backbone", {}), meta, ""
    if "base" in meta:
        backbone, laid_out = adapter.merged(meta, backbone)
        also = f", merged into {meta['base']['workdir']}"
    with files.whole(args.dst) as temporary:
        temporary.mkdir()
        count = write_folder(temporary, args.kind, backbone, laid_out)
        if not meta.get("convert", {}).get("new"):  # an omega that an import made up belongs to no network
            try:
                peft.save_gate(temporary, *adapter.gate_of(params.get("softmask", {}), meta, args.src))
            except FileError as error:
                also += f", without its omega: {error}"
        for file in (workdir / "tokenizer" / name for name in pretrained.FILES):
            if file.is_file():
                shutil.copyfile(file, temporary / file.name)
    return [f"wrote {args.dst}: {count} tensors ({which} of step {meta['step']}{also})"]


def write_folder(folder: Path, kind: str, backbone: Mapping[str, Any], meta: Mapping[str, Any]) -> int:
    """Writes config.json and weights, in the shards, types and order of an import; returns the number of tensors."""
    family, convert = FAMILIES[kind], meta.get("convert", {})
    fields = meta.get("model") or {}
    known = {field.name for field in dataclasses.fields(family.model)}
    if set(fields) - known or "vocab_size" not in fields:
        raise FileError(f"got a checkpoint of another model, wanted one of kind {kind}: change KIND")
    model = family.model(**fields)
    if getattr(model, "param_dtype", "") == "int8":
        raise FileError("got weights rounded to int8, wanted float32 or bfloat16: export what they were imported from")
    # A language model has no use of a mask that was appended.
    rows = convert.get("rows") or getattr(model, "table_rows", 0) or model.vocab_size
    rows = rows if model.causal or model.vocab_size <= rows else model.vocab_size
    flat = traverse_util.flatten_dict(backbone, sep="/")

    def tensor(leaf: Leaf, dtype: np.dtype) -> Tensor:
        made = Tensor(leaf.shape, dtype, lambda: tensor_of(flat, leaf).astype(dtype))
        return family.stored(leaf.source, made)

    leaves = {leaf.source: leaf for leaf in family.table(model, rows)}
    default = jnp.dtype(getattr(model, "param_dtype", "float32"))
    origin = convert.get("tensors") or {name: [default.name, ""] for name in leaves}
    shards: dict[str, dict[str, Tensor]] = {}
    for name, (dtype, file) in origin.items():
        leaf = leaves.get(name.removeprefix("transformer."))
        if leaf is not None:
            file = file if file.endswith(".safetensors") else "model.safetensors"
            shards.setdefault(file, {})[name] = tensor(leaf, np.dtype(jnp.dtype(dtype)))
    for file, tensors in shards.items():
        write_safetensors(folder / file, tensors)
    if list(shards) != ["model.safetensors"]:
        _write_index(folder, shards)
    texts = dict(convert.get("files") or {})
    if rows != convert.get("rows") or "config.json" not in texts:
        ids = {} if model.causal else {"mask_token_id": meta.get("mask_id")}
        texts["config.json"] = json.dumps(family.config_of(model, rows) | ids, indent=2) + "\n"
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
    return sum(map(len, shards.values()))


def _write_index(folder: Path, shards: Mapping[str, Mapping[str, Tensor]]) -> None:
    tensors = [tensor for shard in shards.values() for tensor in shard.values()]
    total = sum(int(np.prod(tensor.shape)) * tensor.dtype.itemsize for tensor in tensors)
    where = {name: file for file, shard in shards.items() for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
