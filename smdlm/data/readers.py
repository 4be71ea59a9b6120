"""Files in: which ones a pattern names, their text without BOM and CR, and one ValueError for all that can be wrong."""

import glob
import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from smdlm.files import local_path

# What reading a file raises: EOFError and zlib.error come of a .gz that was cut off or damaged.
UNREADABLE = (OSError, EOFError, zlib.error)
UNPACKED_BY = {".zst": "zstd -d", ".xz": "unxz", ".bz2": "bunzip2", ".zip": "unzip"}
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
    root = os.path.commonpath([path.absolute().parent for path in paths])
    return sorted((Path(os.path.relpath(path.absolute(), root)).as_posix(), path) for path in paths)


def _glob(pattern: str) -> list[Path]:
    return [Path(name) for name in glob.glob(pattern, recursive=True)]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file with '\\n' at the end of every line, without a byte order mark."""
    _refuse_packed(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data: got {printable(path)} that is not UTF-8 at byte {error.start}: convert or exclude it"
        ) from error
    except UNREADABLE as error:
        raise _unreadable(path, error, "a text file") from error
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_records(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number of the line from 1, line) of a .jsonl or .jsonl.gz file, blank lines left out."""
    _refuse_packed(path)
    first = True
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                line = line.removeprefix(BOM) if number == 1 else line
                if not line.strip():
                    continue
                if first and re.fullmatch(rb"\s*\[\s*(\{.*)?", line, re.DOTALL):
                    raise ValueError(
                        f"data: got a JSON array in {printable(path)}, wanted one object per line: convert it with "
                        f"jq -c '.[]' FILE > FILE.jsonl"
                    )
                first = False
                yield number, line
    except UNREADABLE as error:
        raise _unreadable(path, error, "JSON lines (.jsonl, .jsonl.gz)") from error


def sizes(files: list[tuple[str, Path]]) -> str:
    """A short text that changes when names or sizes of the files do."""
    listing = "\n".join(f"{name} {path.stat().st_size}" for name, path in files)
    return f"{len(files)} files {hashlib.sha256(key_bytes(listing)).hexdigest()[:16]}"


def key_bytes(name: str) -> bytes:
    """A name as bytes for hashing, also where it holds bytes of a file's name that are not UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def _refuse_packed(path: Path) -> None:
    if program := UNPACKED_BY.get(path.suffix):
        raise ValueError(f"data: got {printable(path)}, wanted plain or gzipped (.gz) files: unpack it with {program}")


def _unreadable(path: Path, error: BaseException, wanted: str) -> ValueError:
    cause = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return ValueError(f"data: got an unreadable {printable(path)} ({cause}), wanted {wanted}")
