"""How a program of ours, `python -m smdlm.*`, ends: at Ctrl-C by one line, wherever that is heard. No jax."""

from __future__ import annotations

import _thread
import os
import re
import sys
import threading
from typing import Any, NoReturn


def starting() -> bool:
    """Whether this process is about to run a module of smdlm as its program; asked while the package is imported."""
    # While Python looks for the module of `-m` it has "-m" in argv, and the package is imported on the way. What comes
    # before the module's own arguments is its name, or `-mNAME`.
    return sys.argv[:1] == ["-m"] and bool(re.search(r"^(-\w*m)?smdlm\.", sys.orig_argv[-len(sys.argv)]))


def end_by_one_line() -> None:
    """From here on an uncaught KeyboardInterrupt is one line and exit status 130."""
    sys.excepthook, sys.unraisablehook = _uncaught, _passed_over


def leave(status: int) -> NoReturn:
    """Ends the process without what Python does at its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def stopped() -> NoReturn:
    """The end at Ctrl-C. After an interrupted compilation the usual one, which takes jax apart, is a segmentation
    fault."""
    print("stopped by Ctrl-C", file=sys.stderr)
    leave(130)


def _uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        stopped()
    sys.__excepthook__(kind, error, trace)


def _passed_over(what: sys.UnraisableHookArgs) -> None:
    """Python passes over what is raised in callbacks of its garbage collector (jax has one), of weak references and in
    `__del__`. An interrupt is tried again in a moment, when it is out of there."""
    if issubclass(what.exc_type, KeyboardInterrupt):
        threading.Timer(0.01, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(what)
