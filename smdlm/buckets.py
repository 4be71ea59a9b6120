"""Folders in Google Cloud Storage (gs://): paths that behave like pathlib's, and a lock. No jax.

An object appears whole or not at all, also over an older one; nothing is ever renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

RENEW, STALE = 15.0, 60.0  # seconds: between two signs of life of an owner; without one until it counts as dead


def path(url: str) -> Any:
    """A path in a bucket. ValueError, one line, where gcsfs is missing."""
    try:
        import gcsfs  # noqa: F401  (etils finds it by itself, and says less where it is not)
        from etils import epath
    except ImportError as error:
        raise ValueError(f"got {url} without gcsfs ({error}), wanted it: pip install 'smdlm[gcs]'") from error
    _file_system()
    return epath.Path(url)


def _file_system() -> Any:
    """The one that etils uses as well; listings are not kept: they would hide what other processes have written."""
    import fsspec

    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs", finalize_on_close=True)


def tree(url: str) -> list[str]:
    """Names of all objects below a folder, relative to it, sorted."""
    root = f"{url.removeprefix('gs://').rstrip('/')}/"
    found = _file_system().find(url)
    return sorted(name.removeprefix(root) for name in found if name.startswith(root) and not name.endswith("/"))


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
    while seen and not _dead_here(seen) and time.monotonic() < deadline:
        time.sleep(min(RENEW, STALE) / 3)
        now = _read(lock)
        if now and now != seen:
            raise taken(f"process {now['pid']} on {now['host']}")
        seen = now
    if seen:
        lock.unlink(missing_ok=True)
    try:
        _file_system().pipe_file(str(lock), json.dumps(me).encode(), mode="create")
    except FileExistsError:
        raise taken("another process") from None
    if (now := _read(lock)) and now["id"] != me["id"]:
        raise taken(f"process {now['pid']} on {now['host']}")


def _dead_here(owner: dict[str, Any]) -> bool:
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
        return json.loads(lock.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:  # of a program that writes something else there
        return {"pid": 0, "host": "another host", "id": ""}
