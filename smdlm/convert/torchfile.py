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

from smdlm.convert.unpickle import Opaque, TensorRef, TorchFileError, interpret

DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


# --------------------------------------------------------------------------------------------------------- reading


def read(path: str | os.PathLike, keep: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    """The dict that was saved, tensors as arrays; top-level entries for which keep(name) is False are left out.

    Unknown objects come as `Opaque`. Raises TorchFileError in one line (no zip, old format, truncated, hostile, ...)
    and FileNotFoundError.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(64)
        if head[:2] != b"PK":
            raise TorchFileError(
                f"{path.name}: got {_guess(head)}, wanted a checkpoint written by torch.save (a zip file)"
            )
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")]
            if len(names) != 1:
                raise TorchFileError(
                    f"{path.name}: got a zip file with {len(names)} NAME/data.pkl, wanted a checkpoint by torch.save"
                )
            prefix = names[0].removesuffix("data.pkl")
            order = archive.read(prefix + "byteorder") if prefix + "byteorder" in archive.namelist() else b"little"
            if order != b"little":
                raise TorchFileError(
                    f"{path.name}: got byte order {order!r}, wanted 'little': save it on such a machine"
                )
            tree = interpret(_entry(archive, names[0], path.name), path.name)
            if not isinstance(tree, dict):
                raise TorchFileError(
                    f"{path.name}: got a saved {_kind(tree)}, wanted a dict (checkpoint or state_dict)"
                )
            tree = {name: value for name, value in tree.items() if isinstance(name, str) and keep(name)}
            return _Loader(archive, prefix, path.name)(tree)
    except RecursionError:
        raise TorchFileError(f"{path.name}: got a dict nested without end, wanted a checkpoint: refused") from None
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise TorchFileError(
            f"{path.name}: got a damaged or truncated zip file ({error}), wanted a whole checkpoint: copy it again"
        ) from None


def _guess(head: bytes) -> str:
    if not head:
        return "an empty file"
    if head[:2] == b"\x80\x02" and b"\x8a\nl\xfc\x9cF\xf9" in head[:16]:
        return "the format of torch before 1.6 (load and save it again with a newer torch)"
    if all(32 <= b < 127 or b in b"\t\r\n" for b in head):
        return f"a text file ({head[:20].decode()!r}...)"
    return f"a file that starts with {head[:4]!r}"


def _entry(archive: zipfile.ZipFile, name: str, file: str) -> bytes:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise TorchFileError(f"{file}: got a compressed entry {name}, wanted stored ones, as by torch.save")
    return archive.read(info)


def _kind(value: Any) -> str:
    return repr(value) if isinstance(value, Opaque) else type(value).__name__


class _Loader:
    """Replaces every TensorRef of a tree by a read-only array; storages and shared parts are read once."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str, file: str):
        self.archive, self.prefix, self.file = archive, prefix, file
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
        kind, key, elements = ref.storage.kind, ref.storage.key, ref.storage.elements
        dtype = DTYPES.get(kind)
        if dtype is None:
            raise TorchFileError(f"{self.file}: got a tensor in a torch.{kind}, wanted one of {', '.join(DTYPES)}")
        if key not in self.storages:
            try:
                self.storages[key] = _entry(self.archive, f"{self.prefix}data/{key}", self.file)
            except KeyError:
                raise TorchFileError(
                    f"{self.file}: got no storage data/{key}, wanted it in the zip file: copy it again"
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
            kind, key = STORAGES[value.dtype], str(len(arrays))
            arrays.append(value)
            storage = b"(" + recur(["storage"]) + f"ctorch\n{kind}\n".encode() + recur([key, "cpu", value.size]) + b"tQ"
            rest = recur([0, value.shape, strides, False]) + b"ccollections\nOrderedDict\n)R"
            return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"
    raise TypeError(f"torch file: got a {type(value).__name__}, wanted arrays and plain values")
