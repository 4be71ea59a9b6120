"""Stopping a run from outside so that it can go on: preemption on pods and clusters, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from smdlm import program


class StopSignal:
    """Notices SIGTERM (preemption on pods and clusters) and the first Ctrl-C, inside a `with`.

    One process: a handler of its own, and whatever happens the ones before are put back. Several: jax's, which hands
    the notice to all processes and lets them agree on the step at which they stop. A second Ctrl-C ends at once.
    """

    def __init__(self):
        self._requested = self._interrupted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        # Only the main thread may have handlers: in another one (a notebook, a test) nothing is noticed.
        if threading.current_thread() is threading.main_thread():
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
            if not jax.distributed.is_initialized():
                self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._stop)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _stop(self, *_: Any) -> None:
        self._requested = True

    def _interrupt(self, *_: Any) -> None:
        if self._interrupted:
            program.stopped()
        self._interrupted = True
        print(
            "stopping after this update (the first one is compiled before that); Ctrl-C again ends at once, without a "
            "checkpoint",
            file=sys.stderr,
        )
        os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; to be asked at every step, by every process."""
        return self._requested or multihost_utils.reached_preemption_sync_point(step)
