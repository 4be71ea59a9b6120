"""Reads and writes the zip format of `torch.save` without torch, and without executing a pickle (see unpickle.py).

archive.zip: NAME/data.pkl, NAME/data/<key> (one raw storage each), NAME/byteorder, NAME/version
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from smdlm.convert.unpickle import TensorRef, TorchFileError, kind_of, shown, unpickle

DTYPES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
# What zipfile raises for the many ways in which a file can be damaged.
DAMAGE = (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, RuntimeError, ValueError, KeyError, IndexError)
DAMAGE += (struct.error, OverflowError, OSError)


# --------------------------------------------------------------------------------------------------------- reading


def read(path: str | os.PathLike, keep: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    """The dict that was saved, tensors as arrays; top-level entries for which keep(name) is False are left out.

    Unknown objects come as `Opaque`. Raises TorchFileError in one line (no zip, old format, truncated, hostile, ...)
    and FileNotFoundError.
    """
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(64)
    if head[:2] != b"PK":
        raise TorchFileError(f"{path.name}: got {_guess(head)}, wanted a checkpoint written by torch.save (a zip file)")
    try:
        with zipfile.ZipFile(path) as archive:
            return _load(_Entries(archive, path), keep)
    except TorchFileError:
        raise
    except RecursionError:
        raise TorchFileError(f"{path.name}: got a dict nested without end, wanted a checkpoint: refused") from None
    except DAMAGE as error:
        raise TorchFileError(
            f"{path.name}: got a damaged or truncated zip file ({shown(error)}), wanted a whole checkpoint: copy it "
            "again"
        ) from None


def _load(entries: _Entries, keep: Callable[[str], bool]) -> dict[str, Any]:
    if entries.byteorder != b"little":
        raise TorchFileError(
            f"{entries.file}: got byte order {entries.byteorder[:20]!r}, wanted 'little': save it on such a machine"
        )
    tree = unpickle(entries.read("data.pkl"), entries.file)
    if not isinstance(tree, dict):
        raise TorchFileError(f"{entries.file}: got a saved {kind_of(tree)}, wanted a dict (checkpoint or state_dict)")
    return _Arrays(entries)({name: value for name, value in tree.items() if isinstance(name, str) and keep(name)})


def _guess(head: bytes) -> str:
    if not head:
        return "an empty file"
    if head[:2] == b"\x80\x02" and b"\x8a\nl\xfc\x9cF\xf9" in head[:16]:
        return "the format of torch before 1.6 (load and save it again with a newer torch)"
    if all(32 <= b < 127 or b in b"\t\r\n" for b in head):
        return f"a text file ({head[:20].decode()!r}...)"
    return f"a file that starts with {head[:4]!r}"


class _Entries:
    """The entries of the zip file, by their names below NAME/."""

    def __init__(self, archive: zipfile.ZipFile, path: Path):
        self.archive, self.file = archive, path.name
        self.left = path.stat().st_size
        names = [n for n in archive.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(names) != 1:
            raise TorchFileError(
                f"{self.file}: got a zip file with {len(names)} NAME/data.pkl, wanted a checkpoint by torch.save"
            )
        self.prefix = names[0].removesuffix("data.pkl")
        has_order = f"{self.prefix}byteorder" in archive.namelist()
        self.byteorder = self.read("byteorder") if has_order else b"little"

    def read(self, name: str) -> bytes:
        """KeyError if it is not there."""
        info = self.archive.getinfo(self.prefix + name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise TorchFileError(f"{self.file}: got a compressed entry {name}, wanted stored ones, as by torch.save")
        # Entries that share their bytes would fill the memory out of a small file.
        self.left -= info.file_size
        if self.left < 0:
            raise TorchFileError(f"{self.file}: got entries larger than the file, wanted a whole checkpoint: refused")
        return self.archive.read(info)


class _Arrays:
    """Replaces every TensorRef of a tree by a read-only array; storages and shared parts are read once."""

    def __init__(self, entries: _Entries):
        self.entries, self.file = entries, entries.file
        self.storages: dict[str, bytes] = {}
        # By identity, else a pickle of (x, x) forty levels deep would be walked 2^40 times.
        self.done: dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, (TensorRef, dict, list, tuple)):
            return value
        if id(value) not in self.done:
            if isinstance(value, TensorRef):
                self.done[id(value)] = self.tensor(value)
            elif isinstance(value, dict):
                self.done[id(value)] = {key: self(item) for key, item in value.items()}
            else:
                self.done[id(value)] = type(value)([self(item) for item in value])
        return self.done[id(value)]

    def tensor(self, ref: TensorRef) -> np.ndarray:
        key, elements = ref.storage.key, ref.storage.elements
        dtype = DTYPES.get(ref.storage.kind)
        if dtype is None:
            raise TorchFileError(
                f"{self.file}: got a tensor in a {shown(ref.storage.kind)}, wanted one of {', '.join(DTYPES)}"
            )
        if key not in self.storages:
            try:
                self.storages[key] = self.entries.read(f"data/{key}")
            except KeyError:
                raise TorchFileError(
                    f"{self.file}: got no storage data/{shown(key)}, wanted it in the zip file: copy it again"
                ) from None
        data = self.storages[key]
        # Bounds first: strides or an offset of the pickle's choice must not read beside the storage nor repeat it.
        count = math.prod(ref.shape)
        last = ref.offset + sum((n - 1) * s for n, s in zip(ref.shape, ref.strides, strict=True))
        if len(data) != elements * dtype.itemsize or count > elements or (count and last >= elements):
            raise TorchFileError(
                f"{self.file}: got a tensor {ref.shape} at {ref.offset} of storage data/{key} with {len(data)} bytes "
                f"({elements} x {dtype} announced), wanted one that lies inside: the file is damaged"
            )
        if not count:
            return np.zeros(ref.shape, dtype)
        flat = np.frombuffer(data, dtype)[ref.offset :]
        strides = [s * dtype.itemsize for s in ref.strides]
        return np.lib.stride_tricks.as_strided(flat, ref.shape, strides, writeable=False)


# --------------------------------------------------------------------------------------------------------- writing

STORAGES = {dtype: kind for kind, dtype in DTYPES.items()}


def write(path: str | os.PathLike, tree: dict[str, Any], name: str = "archive") -> None:
    """Writes what `torch.load(path, weights_only=True)` reads: dicts, lists, tuples, numbers, strings, None, arrays."""
    arrays: list[np.ndarray] = []
    program = b"\x80\x02" + _pickled(tree, arrays) + b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

        def entry(key: str, data: Any) -> None:
            archive.writestr(zipfile.ZipInfo(f"{name}/{key}", (1980, 1, 1, 0, 0, 0)), data)

        entry("data.pkl", program)
        entry("byteorder", b"little")
        for i, array in enumerate(arrays):
            entry(f"data/{i}", array.tobytes())
        entry("version", b"3\n")


def _pickled(value: Any, arrays: list[np.ndarray]) -> bytes:
    """Protocol 2 opcodes that leave `value` on the stack; arrays are appended and referred to by their position."""

    def recur(items: Iterable[Any]) -> bytes:
        return b"".join(_pickled(item, arrays) for item in items)

    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            if -(2**31) <= value < 2**31:
                return b"J" + struct.pack("<i", value)
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(data)]) + data
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            data = value.encode("utf-8", "surrogatepass")
            return b"X" + struct.pack("<I", len(data)) + data
        case dict():
            return b"}(" + recur(part for item in value.items() for part in item) + b"u"
        case list():
            return b"](" + recur(value) + b"e"
        case tuple():
            return b"(" + recur(value) + b"t"
        case np.ndarray():
            strides = tuple(math.prod(value.shape[i + 1 :]) for i in range(value.ndim))
            (module, kind), key = STORAGES[value.dtype].split("."), str(len(arrays))
            arrays.append(value)
            named = recur(["storage"]) + f"c{module}\n{kind}\n".encode() + recur([key, "cpu", value.size])
            storage = b"(" + named + b"tQ"
            rest = recur([0, value.shape, strides, False]) + b"ccollections\nOrderedDict\n)R"
            return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"
    raise TypeError(f"torch file: got a {type(value).__name__}, wanted arrays and plain values")
