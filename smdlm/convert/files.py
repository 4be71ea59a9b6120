"""Files of weights in and out, without torch: Lightning or plain checkpoints, safetensors, Hugging Face directories."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from smdlm import files
from smdlm.convert import torchfile
from smdlm.convert.unpickle import kind_of, shown

TORCH = (".ckpt", ".pt", ".pth", ".bin")
INDEX = ".index.json"  # beside the shards of a model that was written in several files
SHARDS = (".safetensors", ".bin")
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
    if path.name.endswith(INDEX):
        return _load_directory(path.parent)
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
    names = [f"{shown(k)}: {kind_of(v)}" for k, v in itertools.islice(values.items(), most)]
    return ", ".join(names) + (f" and {len(values) - most} more" if len(values) > most else "")


def _plain(value: Any) -> Any:
    """The JSON part of a value: objects, and what is more or deeper than any real file holds, become None."""
    left = 10_000  # shared parts count each time: a list of lists of lists ... can be large without end

    def convert(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1 + (len(value) // 100 if isinstance(value, str) else 0)
        if left < 0 or (isinstance(value, (dict, list, tuple)) and (depth == 0 or len(value) > 64)):
            return None
        if isinstance(value, dict):
            return {str(k): convert(v, depth - 1) for k, v in value.items() if convert(k, 0) is not None}
        if isinstance(value, (list, tuple)):
            return [convert(v, depth - 1) for v in value]
        plain = isinstance(value, (float, str)) or (isinstance(value, int) and abs(value) < 2**63)
        return value if plain else None

    return convert(value, 8)


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
    config = None
    if (path / "config.json").exists():
        config = _read_json(path / "config.json")
    if (path / "model.safetensors").exists():
        tensors = _load_safetensors(path / "model.safetensors")
    elif (path / f"model.safetensors{INDEX}").exists():
        tensors = _load_shards(path / f"model.safetensors{INDEX}")
    elif (path / "pytorch_model.bin").exists():
        tensors = _load_torch(path / "pytorch_model.bin").tensors
    elif (path / f"pytorch_model.bin{INDEX}").exists():
        tensors = _load_shards(path / f"pytorch_model.bin{INDEX}")
    else:
        raise FileError(
            f"{path.name}: got no weights, wanted model.safetensors or pytorch_model.bin, or its {INDEX} and shards"
        )
    return Source(path.name, tensors, config=config)


def _read_json(path: Path) -> dict[str, Any]:
    name = f"{path.parent.name}/{path.name}"
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{name}: got a file that is no JSON ({type(error).__name__}), wanted an object") from None
    if not isinstance(value, dict):
        raise FileError(f"{name}: got a {type(value).__name__}, wanted an object")
    return value


def _load_shards(index: Path) -> dict[str, np.ndarray]:
    """The tensors of all shards that an index names, each in the one that it says."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise FileError(f"{index.name}: got no weight_map, wanted {{tensor: file of its shard}}: copy the index again")
    shards = sorted(set(weight_map.values()))
    if odd := [shard for shard in shards if Path(shard).name != shard or Path(shard).suffix not in SHARDS]:
        raise FileError(f"{index.name}: got shards {_few(odd)}, wanted names of {' or '.join(SHARDS)} files beside it")
    if missing := [shard for shard in shards if not (index.parent / shard).is_file()]:
        raise FileError(
            f"{index.name}: got no file {_few(missing)}, wanted all {len(shards)} shards: copy what is missing"
        )
    tensors: dict[str, np.ndarray] = {}
    for shard in shards:
        path = index.parent / shard
        found = _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path).tensors
        if twice := [name for name in found if name in tensors]:
            raise FileError(f"{shard}: got {_few(twice)}, which another shard holds too, wanted each tensor once")
        if absent := [name for name, where in weight_map.items() if where == shard and name not in found]:
            raise FileError(
                f"{shard}: got no {_few(absent)}, wanted it there as {index.name} says: copy the shard again"
            )
        if unnamed := [name for name in found if name not in weight_map]:
            raise FileError(
                f"{shard}: got {_few(unnamed)}, which {index.name} does not name, wanted a file of this index"
            )
        tensors |= found
    return tensors


def _few(names: list[str], most: int = 8) -> str:
    return ", ".join(map(shown, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


# --------------------------------------------------------------------------------------------------------- writing


def format_of(path: str | os.PathLike) -> str:
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
    """Writes a checkpoint that `load` reads back; complete or not at all. FileError, OSError."""
    form = format_of(path)
    tensors = {name: np.require(value, requirements="C") for name, value in source.tensors.items()}
    try:
        with files.whole(path) as temporary:
            if form == "torch":
                tree: dict[str, Any] = {**source.progress, "state_dict": tensors}
                if source.shadow is not None:
                    tree["ema"] = {**source.ema, "shadow_params": source.shadow}
                torchfile.write(temporary, tree)
            elif form == "safetensors":
                safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
            else:
                temporary.mkdir()
                safetensors.numpy.save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
                (temporary / "config.json").write_text(json.dumps(source.config, indent=2) + "\n", "utf-8")
    except safetensors.SafetensorError as error:  # also a full disk
        raise OSError(f"could not write {path} ({files.one_line(error)})") from error
