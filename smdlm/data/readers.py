"""Files in: which ones a pattern names, their text without BOM and CR, and one ValueError for all that can be wrong."""

import bz2
import contextlib
import glob
import gzip
import hashlib
import io
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from smdlm.files import local_path, one_line

MAX_FILE_BYTES = 2**30  # of a text that is read whole
# What reading a file raises: EOFError, LZMAError and zlib.error come of a packed one that was cut off or damaged.
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
UNPACKED_BY = {".zip": "unzip", ".7z": "7z x", ".rar": "unrar x"}
BOM = b"\xef\xbb\xbf"


def printable(name: str | os.PathLike) -> str:
    """A file's name for messages: bytes that are not UTF-8, which Python holds as lone surrogates, as '\\udce9'."""
    return os.fspath(name).encode("utf-8", "backslashreplace").decode("utf-8")


def matching_files(what: str, pattern: str) -> list[tuple[str, Path]]:
    """(name relative to the folder they share, file), sorted by name.

    What exists is taken literally ('[', '*' and '?' in the names of folders), only what follows is a pattern.

    Raises:
      ValueError: nothing matches. what: the field that holds the pattern, for the line.
    """
    path = local_path(what, pattern)
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    rest = path.relative_to(there)
    found = _glob(os.path.join(glob.escape(str(there)), rest)) if rest.parts else [path]
    paths = [path for path in found or _glob(str(path)) if path.is_file()]
    if not paths:
        hint = "files, not a folder: FOLDER/*" if path.is_dir() else "at least one"
        raise ValueError(f"{what}: got no file that matches {printable(pattern)!r} (in {os.getcwd()}), wanted {hint}")
    return named_files(paths)


def named_files(paths: list[Path]) -> list[tuple[str, Path]]:
    """(name relative to the folder they share, file), sorted by name."""
    root = os.path.commonpath([path.absolute().parent for path in paths])
    return sorted((Path(os.path.relpath(path.absolute(), root)).as_posix(), path) for path in paths)


def _glob(pattern: str) -> list[Path]:
    return [Path(name) for name in glob.glob(pattern, recursive=True)]


def pyarrow_for(path: str | os.PathLike) -> Any:
    """The package pyarrow. ValueError, which says how to get it, where it is missing."""
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(
            f"data.source: got {printable(path)} without pyarrow ({error}), wanted it: pip install 'smdlm[data]'"
        ) from error
    return pyarrow


def _open_zst(file: IO[bytes], mode: str) -> IO[bytes]:
    pyarrow = pyarrow_for(getattr(file, "name", ".zst"))
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd"))


UNPACK = {".gz": gzip.open, ".tgz": gzip.open, ".xz": lzma.open, ".txz": lzma.open, ".bz2": bz2.open, ".zst": _open_zst}


def unpacked(file: IO[bytes], name: str) -> IO[bytes]:
    """What a file holds once it is unpacked, by the ending of its name; a plain file itself.

    Reading it raises one of UNREADABLE where it is damaged, also where it ends too early.
    """
    unpack = UNPACK.get(os.path.splitext(name)[1])
    return unpack(file, "rb") if unpack else file


@contextlib.contextmanager
def opened(path: Path, wanted: str, what: str = "data") -> Iterator[IO[bytes]]:
    """A file to read from, unpacked (.gz, .zst, .xz, .bz2); what reading it raises becomes one ValueError.

    wanted: what it was to be, what: the field or flag that names it, both for the line.
    """
    if program := UNPACKED_BY.get(path.suffix):
        raise ValueError(
            f"{what}: got {printable(path)}, wanted plain files or .gz, .zst, .xz, .bz2: unpack it with {program}"
        )
    try:
        with open(path, "rb") as file:
            yield unpacked(file, path.name)
    except UNREADABLE as error:
        cause = getattr(error, "strerror", None) or one_line(error)
        raise ValueError(f"{what}: got an unreadable {printable(path)} ({cause}), wanted {wanted}") from error


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, plain or packed, with '\\n' at the end of every line, without a byte order mark."""
    with opened(path, "a text file") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise too_large(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data: got {printable(path)} that is not UTF-8 at byte {error.start}: convert or exclude it"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def too_large(name: str | os.PathLike) -> ValueError:
    """The error for a text that is more than a document can be."""
    return ValueError(
        f"data.source: got a file of more than {MAX_FILE_BYTES / 2**30:.1f} GiB ({printable(name)}), wanted less: a "
        "text file is one document and is read whole; split it or write one JSON line per document"
    )


def read_records(path: Path, what: str = "data") -> Iterator[tuple[int, bytes]]:
    """(number of the line from 1, line) of a file of JSON lines, plain or packed, blank lines left out.

    what: the field or flag that names the file, for errors.
    """
    first = True
    with opened(path, "JSON lines (.jsonl, or packed)", what) as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(BOM) if number == 1 else line
            if not line.strip():
                continue
            if first and re.fullmatch(rb"\s*\[\s*(\{.*)?", line, re.DOTALL):
                raise ValueError(
                    f"{what}: got a JSON array in {printable(path)}, wanted one object per line: convert it with "
                    f"jq -c '.[]' FILE > FILE.jsonl"
                )
            first = False
            yield number, line


def sizes(files: list[tuple[str, Path]]) -> str:
    """A short text that changes when names or sizes of the files do."""
    listing = "\n".join(f"{name} {path.stat().st_size}" for name, path in files)
    return f"{len(files)} files {hashlib.sha256(key_bytes(listing)).hexdigest()[:16]}"


def key_bytes(name: str) -> bytes:
    """A name as bytes for hashing, also where it holds bytes of a file's name that are not UTF-8."""
    return name.encode("utf-8", "surrogateescape")
