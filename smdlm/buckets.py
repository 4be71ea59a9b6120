"""Folders in buckets, gs:// of Google and s3:// of Amazon: paths that behave like pathlib's, copies, a lock. No jax.

An object appears whole or not at all, also over an older one; nothing is ever renamed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RENEW, STALE = 15.0, 60.0  # seconds: between two signs of life of an owner; without one until it counts as dead


@dataclasses.dataclass(frozen=True)
class Cloud:
    """What differs between them.

    scheme: what its URLs begin with. name: fsspec's, and that of our extra. package: of its file system. arrays:
    whether orbax writes arrays there. login: how a person gets access.
    """

    scheme: str
    name: str
    package: str
    arrays: bool
    login: str


CLOUDS = (
    Cloud("gs", "gcs", "gcsfs", True, "`gcloud auth application-default login`"),
    Cloud("s3", "s3", "s3fs", False, "`aws configure` (or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"),
)
# Without credentials or network these have errors of their own, which are no OSError.
LIBRARIES = ("aiohttp", "botocore", "gcsfs", "google")


def cloud_of(url: str) -> Cloud | None:
    """The one whose URLs begin like this, also with a slash too few."""
    return next((cloud for cloud in CLOUDS if url.startswith(f"{cloud.scheme}:/")), None)


def path(url: str) -> Any:
    """A path in a bucket. ValueError, one line, where the package of its cloud is missing."""
    cloud = cloud_of(url)
    try:
        importlib.import_module(cloud.package)  # etils finds it by itself, and says less where it is not
        from etils import epath
    except ImportError as error:
        raise ValueError(
            f"got {url} without {cloud.package} ({error}), wanted it: pip install 'smdlm[{cloud.name}]'"
        ) from error
    _file_system(url)
    return epath.Path(url)


def _file_system(url: str) -> Any:
    """The one that etils uses as well; listings are not kept: they would hide what other processes have written."""
    import fsspec
    from etils.epath import backend

    fsspec.config.conf.setdefault(cloud_of(url).name, {})["use_listings_cache"] = False
    return backend.fsspec_backend.fs(url)


def tree(url: str) -> list[str]:
    """Names of all objects below a folder, relative to it, sorted."""
    root = f"{url.partition('://')[2].rstrip('/')}/"
    found = _file_system(url).find(url)
    return sorted(name.removeprefix(root) for name in found if name.startswith(root) and not name.endswith("/"))


def upload(file: Path, url: str) -> None:
    """Writes an object from a file, large ones in parts that are sent side by side."""
    _file_system(url).put_file(str(file), url)


def download(url: str, file: Path) -> None:
    """Writes a file from an object; makes its folder. FileNotFoundError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _file_system(url).get_file(url, str(file))


@contextlib.contextmanager
def leased(lock: Any, taken: Callable[[str], Exception]) -> Iterator[None]:
    """Holds an object as a lock, inside a `with`, and gives signs of life in it.

    One whose owner is dead is taken over: at once where that was a process of this host, else after a minute without a
    sign of life. taken: makes the error for a lock that another one holds, from a description of its owner.
    """
    me = {"pid": os.getpid(), "host": socket.gethostname(), "id": uuid.uuid4().hex, "beat": 0}
    _take(lock, me, taken)
    done = threading.Event()
    renewing = threading.Thread(target=_renew, args=(lock, me, done), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        done.set()
        renewing.join()
        if (_read(lock) or {}).get("id") == me["id"]:
            lock.unlink(missing_ok=True)


def _take(lock: Any, me: dict[str, Any], taken: Callable[[str], Exception]) -> None:
    seen, deadline = _read(lock), time.monotonic() + STALE
    while seen and not dead_here(seen) and time.monotonic() < deadline:
        time.sleep(min(RENEW, STALE) / 3)
        now = _read(lock)
        if now and now != seen:
            raise taken(f"process {now['pid']} on {now['host']}")
        seen = now
    if seen:
        lock.unlink(missing_ok=True)
    try:
        _file_system(str(lock)).pipe_file(str(lock), json.dumps(me).encode(), mode="create")
    except FileExistsError:
        raise taken("another process") from None
    if (now := _read(lock)) and now["id"] != me["id"]:
        raise taken(f"process {now['pid']} on {now['host']}")


def dead_here(owner: dict[str, Any]) -> bool:
    """Whether it was a process of this host that is no more (an earlier one may have had our own number)."""
    if owner["host"] != socket.gethostname():
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _renew(lock: Any, me: dict[str, Any], done: threading.Event) -> None:
    while not done.wait(RENEW):
        with contextlib.suppress(Exception):  # the network may be down for a while; a minute of it costs the lock
            if (_read(lock) or {}).get("id") == me["id"]:
                me["beat"] += 1
                lock.write_bytes(json.dumps(me).encode())


def _read(lock: Any) -> dict[str, Any] | None:
    try:
        return json.loads(_file_system(str(lock)).cat_file(str(lock)))  # in one request: its owner may be writing it
    except FileNotFoundError:
        return None
    except ValueError:  # of a program that writes something else there
        return {"pid": 0, "host": "another host", "id": ""}
