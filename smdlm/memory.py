"""How a program uses the memory of its host: large blocks in huge pages, and nothing kept of what compiling took."""

from __future__ import annotations

import ctypes
import functools
import os
import sys

from smdlm import program

TUNABLES = "GLIBC_TUNABLES"
SLOW = 0.5  # seconds; giving back takes 0.05 to 0.1


def use_huge_pages() -> None:
    """Starts `python -m smdlm.*` anew with glibc told to ask Linux for huge pages, which it reads only at its start.

    XLA's CPU backend allocates the temporaries of a step anew each time, so that every step pays the page faults of its
    whole working set again: measured, 1.4 million of them in 32 steps of the tiny model, 0.2 million in huge pages, and
    15 to 20 % of the time. A heap that keeps freed blocks saves the faults as well, but grows by one or two working
    sets within 25 steps. Does nothing without glibc, where GLIBC_TUNABLES is set already, or in a process that is not
    such a program. Must run before anything else.
    """
    if not program.starting() or TUNABLES in os.environ or not _glibc():
        return
    os.environ[TUNABLES] = "glibc.malloc.hugetlb=1"  # since glibc 2.35; older ones ignore it
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@functools.cache
def return_after_compiling() -> None:
    """From here on a compilation's memory is given back to the system at its end: 0.4 GiB after the tiny model's step.

    glibc keeps freed blocks below blocks that live on; the peak would be a compiler's leftovers and a step together.
    """
    if not _glibc():
        return
    import jax  # the start of a program must not wait for it

    trim = ctypes.CDLL(None).malloc_trim

    def compiled(event: str, seconds: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and seconds > SLOW:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(compiled)


def _glibc() -> bool:
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, ValueError, OSError):  # Windows, macOS, musl
        return False
