"""Files of weights in and out, without torch: Lightning or plain checkpoints, safetensors, Hugging Face directories."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from smdlm.convert import torchfile
from smdlm.convert.unpickle import Opaque

TORCH = (".ckpt", ".pt", ".pth", ".bin")
# Entries of a Lightning checkpoint that no conversion needs; they hold arbitrary objects and Adam's moments.
UNNEEDED = ("optimizer_states", "lr_schedulers", "callbacks", "hyper_parameters", "hparams_name", "sampler")
# Bookkeeping that the reference reads when it resumes; kept as it is.
PROGRESS = ("epoch", "global_step", "pytorch-lightning_version", "loops")
SAFETENSORS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64}
SAFETENSORS |= {"I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}


class FileError(ValueError):
    """The file can not be used; one line: got, wanted, how to fix."""


@dataclasses.dataclass(frozen=True)
class Source:
    """What a file holds.

    Attributes:
      name: of the file, for messages.
      tensors: state_dict, in order; empty if the file holds an EMA alone.
      shadow: the EMA's unnamed list, or None. ema: its decay and num_updates.
      progress: the entries PROGRESS that are there. config: config.json of a Hugging Face directory, or None.
    """

    name: str
    tensors: dict[str, np.ndarray]
    shadow: list[np.ndarray] | None = None
    ema: dict[str, Any] = dataclasses.field(default_factory=dict)
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: dict[str, Any] | None = None


def load(path: str | os.PathLike) -> Source:
    """Reads a checkpoint; the suffix decides its format, a directory is a Hugging Face one.

    Raises FileNotFoundError, FileError, TorchFileError: one line each.
    """
    path = Path(path)
    if path.is_dir():
        return _load_directory(path)
    if not path.exists():
        raise FileNotFoundError(f"got no file {path}, wanted a checkpoint to import")
    if path.suffix in TORCH:
        return _load_torch(path)
    if path.suffix == ".safetensors":
        return Source(path.name, _load_safetensors(path))
    raise FileError(
        f"{path.name}: got suffix {path.suffix!r}, wanted {' '.join(TORCH)} .safetensors or a directory: rename it"
    )


def _load_torch(path: Path) -> Source:
    top = torchfile.read(path, keep=lambda name: name not in UNNEEDED)
    if "state_dict" in top or "ema" in top:
        tensors, ema = top.get("state_dict", {}), top.get("ema")
    else:
        tensors, ema = top, None
    if not isinstance(tensors, dict) or (ema is not None and not isinstance(ema, dict)):
        raise FileError(f"{path.name}: got {_kinds(top)}, wanted a state_dict of tensors (and ema, a dict)")
    shadow = None if ema is None else ema.get("shadow_params")
    if ema is not None and not isinstance(shadow, list):
        raise FileError(f"{path.name}: got ema with {_kinds(ema)}, wanted decay, num_updates, shadow_params (a list)")
    named = {**tensors, **{f"ema.shadow_params[{i}]": value for i, value in enumerate(shadow or ())}}
    wrong = {name: value for name, value in named.items() if not isinstance(value, np.ndarray)}
    if wrong:
        raise FileError(f"{path.name}: got {_kinds(wrong)}, wanted plain tensors there")
    progress = {name: _plain(top[name]) for name in PROGRESS if name in top and "state_dict" in top}
    scalars = {} if ema is None else {name: ema[name] for name in ("decay", "num_updates") if name in ema}
    wrong = {name: value for name, value in scalars.items() if type(value) not in (int, float)}
    if wrong:
        raise FileError(f"{path.name}: got ema with {_kinds(wrong)}, wanted numbers there")
    return Source(path.name, tensors, shadow, scalars, progress)


def _kinds(values: dict[Any, Any], most: int = 8) -> str:
    names = [f"{k}: {v.kind if isinstance(v, Opaque) else type(v).__name__}" for k, v in values.items()]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _plain(value: Any, depth: int = 8) -> Any:
    """The JSON part of a value: objects, and what lies deeper than any real file goes, become None."""
    if isinstance(value, (dict, list, tuple)) and (depth == 0 or len(value) > 64):
        return None
    if isinstance(value, dict):
        return {str(k): _plain(v, depth - 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, depth - 1) for v in value]
    return value if isinstance(value, (bool, int, float, str)) else None


def _load_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise FileError(
            f"{path.name}: got a damaged or truncated file ({error}), wanted safetensors: copy it again"
        ) from None
    unknown = {name: entry["dtype"] for name, entry in entries if entry["dtype"] not in SAFETENSORS}
    if unknown:
        raise FileError(f"{path.name}: got {unknown}, wanted types {', '.join(SAFETENSORS)}")
    return {n: np.frombuffer(e["data"], SAFETENSORS[e["dtype"]]).reshape(e["shape"]) for n, e in entries}


def _load_directory(path: Path) -> Source:
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise FileError(
            f"{path.name}: got no readable config.json ({type(error).__name__}), wanted a model directory"
        ) from None
    if not isinstance(config, dict):
        raise FileError(f"{path.name}/config.json: got a {type(config).__name__}, wanted an object")
    if (path / "model.safetensors").exists():
        tensors = _load_safetensors(path / "model.safetensors")
    elif (path / "pytorch_model.bin").exists():
        tensors = _load_torch(path / "pytorch_model.bin").tensors
    else:
        raise FileError(f"{path.name}: got no weights, wanted model.safetensors or pytorch_model.bin in one piece")
    return Source(path.name, tensors, config=config)


# --------------------------------------------------------------------------------------------------------- writing


def kind_of(path: str | os.PathLike) -> str:
    """'torch', 'safetensors' or 'directory' (no suffix). FileError for another suffix or what exists already."""
    path = Path(path)
    if path.exists():
        raise FileError(f"got {path}, which exists, wanted a new file or directory: name another one or delete it")
    if path.suffix in TORCH:
        return "torch"
    if path.suffix == ".safetensors":
        return "safetensors"
    if not path.suffix:
        return "directory"
    raise FileError(
        f"{path.name}: got suffix {path.suffix!r}, wanted {' '.join(TORCH)}, .safetensors, or none for a directory"
    )


def save(path: str | os.PathLike, source: Source) -> None:
    """Writes a checkpoint that `load` reads back; complete or not at all (a temporary name is renamed at the end)."""
    path, kind = Path(path), kind_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tensors = {name: np.require(value, requirements="C") for name, value in source.tensors.items()}
    try:
        if kind == "torch":
            tree: dict[str, Any] = {**source.progress, "state_dict": tensors}
            if source.shadow is not None:
                tree["ema"] = {**source.ema, "shadow_params": source.shadow}
            torchfile.write(temporary, tree)
        elif kind == "safetensors":
            safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
        else:
            temporary.mkdir()
            safetensors.numpy.save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
            (temporary / "config.json").write_text(json.dumps(source.config, indent=2) + "\n")
        temporary.rename(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
