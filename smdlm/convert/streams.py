"""Weights that pass through memory one tensor at a time: safetensors read by their headers, written as they come.

A folder's tensors are known by name, type and shape before any of them is read, so that whatever does not fit is said
before anything is written.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from smdlm.convert.files import INDEX, SAFETENSORS, FileError
from smdlm.convert.table import FLOATS, ConversionError, Leaf
from smdlm.convert.unpickle import shown
from smdlm.io.streamed import Streamed

MODEL = "model.safetensors"
NAMES = {np.dtype(kind): name for name, kind in SAFETENSORS.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor that is read when it is asked for. file: its name, where it comes from a folder."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    file: str = ""


# --------------------------------------------------------------------------------------------------------- reading


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, config.json) of a Hugging Face folder with model.safetensors, or its index and shards.

    Raises:
      FileError: what is not there, damaged, or named twice; one line.
    """
    if not folder.is_dir():
        raise FileError(
            f"got no folder {folder}, wanted one on this machine with config.json and {MODEL}, e.g. what "
            "`hf download ORGANISATION/NAME --local-dir NAME` leaves"
        )
    config = read_json(folder / "config.json")
    if (folder / MODEL).is_file():
        return read_header(folder / MODEL), config
    index = folder / f"{MODEL}{INDEX}"
    if not index.is_file():
        raise FileError(f"{folder}: got no {MODEL} and no {index.name}, wanted one of them: copy it there")
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise FileError(f"{index}: got no weight_map, wanted {{tensor: file of its shard}}: copy the index again")
    shards = sorted(set(where.values()))
    if odd := [name for name in shards if Path(name).name != name]:
        raise FileError(f"{index}: got shards {_few(odd)}, wanted files beside it")
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise FileError(f"{index}: got no {_few(missing)}, wanted all {len(shards)} shards: copy what is missing")
    tensors: dict[str, Tensor] = {}
    problems = []
    for shard in shards:
        for name, tensor in read_header(folder / shard).items():
            if name in tensors:
                problems.append(f"  {shown(name)}: got it in {tensors[name].file} and in {shard}, wanted it once")
            elif where.get(name) != shard:
                problems.append(
                    f"  {shown(name)}: got it in {shard}, wanted it in {where.get(name)}, as the index says"
                )
            tensors[name] = tensor
    problems += [f"  {shown(n)}: got nothing, wanted it in {where[n]}" for n in where if n not in tensors]
    if problems:
        raise FileError(
            f"{index}: got {len(problems)} tensors elsewhere than it says, wanted shards and index of one model: copy "
            "them again\n" + "\n".join(problems)
        )
    return tensors, config


def read_json(path: Path) -> dict[str, Any]:
    """An object. Raises FileError."""
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=once)
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path}: got no readable JSON ({type(error).__name__}), wanted an object") from None
    if not isinstance(value, dict):
        raise FileError(f"{path}: got a {type(value).__name__}, wanted an object")
    return value


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `object_pairs_hook`; json would take the last of several values. Raises FileError."""
    found = dict(pairs)
    if twice := sorted({name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1}):
        raise FileError(f"got {_few(twice)} more than once, wanted each name once: copy the file again")
    return found


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: eight bytes of length, a JSON header, then the data."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, 100_000_000):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length), object_pairs_hook=once)
        header.pop("__metadata__", None)
        tensors = {name: _tensor(path, 8 + length, entry) for name, entry in header.items()}
        if size != 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0):
            raise ValueError("its length is not that of its tensors")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(
            f"{path}: got a damaged or truncated file ({error}), wanted safetensors: copy it again"
        ) from None
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The texts beside the tensors of a file that `read_header` has read."""
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__") or {}


def _tensor(path: Path, start: int, entry: Mapping[str, Any]) -> Tensor:
    if entry["dtype"] not in SAFETENSORS:
        raise ValueError(f"type {entry['dtype']}, known are {', '.join(SAFETENSORS)}")
    dtype, shape = np.dtype(SAFETENSORS[entry["dtype"]]), tuple(int(n) for n in entry["shape"])
    first, last = entry["data_offsets"]
    count = math.prod(shape)
    if min((0, *shape)) < 0 or last - first != count * dtype.itemsize or first < 0:
        raise ValueError(f"{last - first} bytes for {entry['dtype']}{list(shape)}")

    def read() -> np.ndarray:
        return np.fromfile(path, dtype, count, offset=start + first).reshape(shape)

    return Tensor(shape, dtype, read, path.name)


def _few(names: list[str], most: int = 8) -> str:
    return ", ".join(map(shown, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def check(name: str, got: Mapping[str, Tensor], table: list[Leaf]) -> None:
    """ConversionError that lists every missing, superfluous, misshapen or mistyped tensor."""
    wanted = {leaf.source: leaf.shape for leaf in table}
    lines = []
    for key in [*wanted, *(key for key in got if key not in wanted)]:
        g = f"{got[key].dtype.name}{list(got[key].shape)}" if key in got else "nothing"
        w = f"float32{list(wanted[key])}" if key in wanted else "nothing"
        if g == "nothing" or w == "nothing" or got[key].shape != wanted[key] or got[key].dtype.name not in FLOATS:
            lines.append(f"  {shown(key)}: got {g}, wanted {w}")
    if lines:
        raise ConversionError(
            f"{name}: got weights with {len(lines)} differences, wanted those that its config.json describes\n"
            + "\n".join(lines)
        )


# ----------------------------------------------------------------------------------------------- to our tree and back


def to_tree(
    got: Mapping[str, Tensor], table: list[Leaf], shapes: Mapping[str, Any], mask_row: bool = False
) -> dict[str, Any]:
    """Our tree of `Streamed` arrays. got must fit the table; shapes: our tree of things with a shape and a type.

    Where a kernel is int8 it is rounded, and its scale is made of the same tensor.
    mask_row: the row behind the vocabulary, a mask that the source does not have, becomes the mean of all rows.
    """
    flat = traverse_util.flatten_dict(shapes, sep="/")
    sources: dict[str, list[Leaf]] = {}
    for leaf in table:
        sources.setdefault(leaf.target, []).append(leaf)

    def streamed(target: str) -> Streamed:
        origin = target if target in sources else target.replace("/scale", "/kernel")
        shape, leaves = flat[origin].shape, sources[origin]
        stacked, dtype = leaves[0].layer is not None, np.dtype(flat[target].dtype)

        def parts() -> Iterator[np.ndarray]:
            for leaf in sorted(leaves, key=lambda leaf: leaf.layer or 0):
                value = got[leaf.source].read()
                if leaf.vocab:
                    value = _padded(value, shape[1] if leaf.matrix else shape[0], mask_row)
                value = (value.T if leaf.matrix else value).reshape(shape[1:] if stacked else shape)
                if flat[origin].dtype == np.int8:
                    outputs = flat[origin.replace("/kernel", "/scale")].ndim - 1
                    value = _quantised(value, outputs)[origin != target]
                yield value.astype(dtype)

        return Streamed(tuple(flat[target].shape), dtype, stacked, parts)

    out = {target: streamed(target) for target in flat}
    return traverse_util.unflatten_dict(out, sep="/")


def _quantised(kernel: np.ndarray, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """(whole numbers -127 .. 127 of the kernel's shape, the f32 scale of each output); outputs: axes at the end."""
    inputs = tuple(range(kernel.ndim - outputs))
    scale = np.maximum(np.abs(kernel).max(inputs, keepdims=True).astype(np.float32) / 127, np.float32(1e-30))
    return np.rint(kernel.astype(np.float32) / scale), scale.squeeze(inputs)


def _padded(value: np.ndarray, rows: int, mask_row: bool) -> np.ndarray:
    """[V, ...] -> [rows, ...]: zeros behind the vocabulary, where no id has a token."""
    out = np.zeros((rows, *value.shape[1:]), value.dtype)
    out[: len(value)] = value
    if mask_row:
        out[len(value)] = value.mean(0, dtype=np.float32)
    return out


def from_tree(tree: Mapping[str, Any], table: list[Leaf]) -> dict[str, np.ndarray]:
    """Our tree -> tensors by their names, in the type of the tree."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    return {leaf.source: tensor_of(flat, leaf) for leaf in table}


def tensor_of(flat: Mapping[str, Any], leaf: Leaf) -> np.ndarray:
    """One tensor of the table, of our parameters by path."""
    value = np.asarray(flat[leaf.target] if leaf.layer is None else flat[leaf.target][leaf.layer])
    if leaf.matrix:
        value = value.reshape(leaf.shape[1], -1).T
    return np.require(value[: leaf.shape[0]].reshape(leaf.shape), requirements="C")


# --------------------------------------------------------------------------------------------------------- writing


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """A safetensors file, one tensor in memory at a time. about: texts that `read_metadata` gives back."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(about or {})}}
    at = 0
    for name, tensor in tensors.items():
        end = at + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            np.ascontiguousarray(tensor.read(), tensor.dtype).tofile(file)
