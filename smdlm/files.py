"""Files and terminals, once each for the package: atomic writes, hashes, paths, locks, plain text. No jax.

A path is a `pathlib.Path`, or one in a bucket that behaves like it (`path_of`); what differs between them is here.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import IO, Any

from smdlm import buckets


@contextlib.contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name for a file or a folder, made by the caller and renamed to `path` at the end; makes its folder.

    Nothing is left under either name if the block raises. OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # not the pid: two hosts may share the folder
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def write(path: str | os.PathLike, content: bytes | str) -> None:
    """Writes a file whole or not at all; makes its folder. OSError."""
    content = content if isinstance(content, bytes) else content.encode("utf-8")
    if is_url(path):
        as_path(path).write_bytes(content)
        return
    with whole(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """The same for a value as indented JSON with a newline at its end; NaN and inf are refused (ValueError)."""
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sha256(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file."""
    with as_path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def one_line(error: BaseException, most: int = 300) -> str:
    """Kind and text of an error on one line; of a long one the beginning and the end, where libraries put the cause."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= most else f"{text[: most // 3]} ... {text[-2 * most // 3 :]}"


def local_path(what: str, text: str | os.PathLike) -> Path:
    """The path on this machine that a person wrote, with '~' as the home folder.

    Raises:
      ValueError: a URL, which would silently become a local folder named 'gs:'. what: the flag or field, for the line.
    """
    if not isinstance(text, (str, os.PathLike)) or not str(text):
        raise ValueError(f"{what}: got {text!r}, wanted a path")
    if is_url(text):
        raise ValueError(
            f"{what}: got the URL {text}, wanted a local path: copy it, or mount the bucket (gcsfuse, s3fs) "
            "and name its folder"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{what}: got {text} ({error}), wanted a path") from None


def path_of(what: str, text: str | os.PathLike) -> Path:
    """The same where a folder may also be in a bucket: gs://BUCKET/.. or s3://BUCKET/..

    Raises:
      ValueError: another URL, or the package for such paths is missing.
    """
    if not is_bucket(text):
        return local_path(what, text)
    if not re.fullmatch(r"[^:]+://[^/]+(/.*)?", os.fspath(text)):
        raise ValueError(f"{what}: got {text}, wanted {os.fspath(text).partition(':')[0]}://BUCKET/FOLDER")
    try:
        return buckets.path(os.fspath(text))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def as_path(path: str | os.PathLike) -> Path:
    """A path as an object: what `path_of` or `local_path` made stays as it is."""
    return path if isinstance(path, PurePath) else path_of("path", path)


def is_bucket(path: Any) -> bool:
    """Whether it is meant to be in a bucket that `path_of` takes."""
    return isinstance(path, (str, os.PathLike)) and buckets.cloud_of(os.fspath(path)) is not None


def is_url(path: str | os.PathLike) -> bool:
    """Whether it is in a bucket and not on this machine."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)))


def copy_folder(source: Path, target: Path) -> None:
    """Copies the files of a folder, one by one and each whole, beside what is in `target`. OSError."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            write(target / path.relative_to(source).as_posix(), path.read_bytes())


def size(path: Path) -> int:
    """Bytes of a file."""
    found = path.stat()
    return found.length if is_url(path) else found.st_size


def tree(folder: Path) -> list[str]:
    """Names of all files below a folder, relative to it with '/', sorted."""
    if not is_url(folder):
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return buckets.tree(str(folder))


def remove_tree(folder: Path) -> None:
    """Deletes a folder and all in it, as far as that is possible."""
    if is_url(folder):
        with contextlib.suppress(Exception):  # the libraries of buckets have families of their own
            folder.rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def workdir_of(path: Path) -> Path:
    """A workdir, which may be named by its folder `checkpoints`."""
    return path.parent if path.name == "checkpoints" else path


def plain_output() -> None:
    """Lets an ASCII or Latin-1 terminal show what it has no character for, instead of ending a run by an error.

    Some characters of ours are spelled out, others shown as in a Python string.
    """
    spelled = {"±": "+-", "ω": "omega", "λ": "lambda"}

    def spell(error: UnicodeError) -> tuple[str, int]:
        missing = error.object[error.start : error.end]
        escaped = (spelled.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing)
        return "".join(escaped), error.end

    codecs.register_error("smdlm_spell", spell)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="smdlm_spell")


LOCK = ".lock"


@contextlib.contextmanager
def owned(folder: Path, what: str) -> Iterator[None]:
    """Makes this process the only one that writes a folder; others may read it meanwhile.

    By a lock of the operating system on FOLDER/.lock, which ends with the process however it ends. The folder is made,
    and taken away again if nothing was written. Where a file system has no locks nothing is prevented. In a bucket
    the lock is an object with signs of life (`buckets.leased`).

    Raises:
      ValueError: another process has it (names its pid and host), or it can not be made. what: the flag, for the line.
    """
    if is_url(folder):
        with buckets.leased(folder / LOCK, lambda owner: _taken(what, folder, owner)):
            yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{what}: got {folder} ({error.strerror}), wanted a folder that can be written") from error
    file = _locked(folder, what)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        file.close()
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if it is empty


def _taken(what: str, folder: Path, owner: str) -> ValueError:
    return ValueError(
        f"{what}: got {folder}, which {owner} is writing, wanted a folder of its own: wait for it, stop it, or name "
        "another one"
    )


def _locked(folder: Path, what: str) -> IO[str]:
    """The open lock file, with the owner's name in it."""
    path = folder / LOCK
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _taken(what, folder, file.read().strip() or "another process") from None
        except OSError:
            return file
        # The owner before may have taken the file away between our opening and locking it.
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return file
        file.close()
