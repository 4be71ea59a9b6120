"""What a run measures of itself while it trains: speed, share of the chips' peak and of the time, memory, a profile."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from absl import logging

from smdlm import files
from smdlm.mesh.chips import chip_of


class Meter:
    """Speed of the steps alone: the first (it compiles), saving and evaluating are left out, and counted in goodput."""

    def __init__(self, tokens_per_step: int, flops_per_step: float = 0.0):
        """flops_per_step: by count, over all devices; 0 where nobody counted."""
        self._tokens_per_step, self._flops_per_step = tokens_per_step, flops_per_step
        self._made = time.perf_counter()
        self._begin: float | None = None  # of the steps since the last `start`
        self._steps, self._seconds = 0, 0.0  # since then; in all
        self._all_steps = 0
        self._estimated = False

    def step(self, metrics: Any) -> None:
        """A step was dispatched; `metrics` are its results."""
        if self._begin is None:
            jax.block_until_ready(metrics)
            self.start()
        else:
            self._steps += 1

    def stop(self) -> dict[str, float]:
        """What is measured since the last `start`; everything dispatched must be done.

        tokens_per_s; mfu: share of the peak of all devices that the counted FLOPs take, where both are known; goodput:
        share of the time since the loop began that was spent in steps; memory_gib: the most that was in use on one of
        this host's devices, where they tell.
        """
        now = time.perf_counter()
        seconds = now - self._begin
        self._seconds, self._all_steps = self._seconds + seconds, self._all_steps + self._steps
        rate = self._steps / max(seconds, 1e-9)
        values = {"train/tokens_per_s": self._tokens_per_step * rate}
        if chip := chip_of(jax.devices()[0].device_kind):
            values["train/mfu"] = self._flops_per_step * rate / (chip.flops * jax.device_count())
        values["train/goodput"] = self._seconds / max(now - self._made, 1e-9)
        in_use = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
        if any(in_use):
            values["train/memory_gib"] = max(in_use) / 2**30
        return values

    def start(self) -> None:
        self._begin, self._steps = time.perf_counter(), 0

    def estimate(self, left: int) -> str:
        """How long the updates that are left will take, said once, after the first that were timed; '' otherwise."""
        if self._estimated or not self._all_steps or not left:
            return ""
        self._estimated = True
        seconds = left * self._seconds / self._all_steps
        unit, name = next(
            (u, n) for u, n in ((3600, "hours"), (60, "minutes"), (1, "seconds")) if seconds >= u or u == 1
        )
        return f"about {seconds / unit:.1f} {name} for the {left:,} updates left (evaluation and saving not counted)"

    @property
    def tokens_per_s(self) -> float:
        """Over all steps; 0 if only one was run."""
        return self._tokens_per_step * self._all_steps / self._seconds if self._all_steps else 0.0


class Stopwatch:
    """Inside a `with`; behind it `seconds` says how long that took, without the time in which jax compiled."""

    def __enter__(self) -> Stopwatch:
        self._compiled = _compilations()
        self._first, self._begin = len(self._compiled), time.time()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds, reached = time.time() - self._begin, self._begin
        # One compilation may hold others: no moment is taken off twice.
        for begin, end in sorted(self._compiled[self._first :]):
            self.seconds -= max(0.0, end - max(begin, reached))
            reached = max(reached, end)


@functools.cache
def _compilations() -> list[tuple[float, float]]:
    """(begin, end) of whatever jax traces, lowers and compiles from the first call on."""
    found: list[tuple[float, float]] = []

    def noted(event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            found.append((time.time() - seconds, time.time()))

    jax.monitoring.register_event_duration_secs_listener(noted)
    return found


def profiled_steps(spec: str) -> tuple[int, int]:
    """(first, last) of config.train.profile 'FIRST:LAST'; (0, 0) for ''. ValueError, one line."""
    if not spec:
        return 0, 0
    first, colon, last = spec.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and 1 <= int(first) < int(last)):
        raise ValueError(f"train.profile: got {spec!r}, wanted FIRST:LAST with 1 <= FIRST < LAST, e.g. '100:105'")
    return int(first), int(last)


class Profile:
    """An xprof trace of the updates behind `first` up to `last`, in FOLDER/plugins/profile; inside a `with`.

    A trace that cannot be made or written is one warning and never ends a run.
    """

    def __init__(self, spec: str = "", folder: Path = Path("profile")):
        (self._first, self._last), self._folder = profiled_steps(spec), folder
        self._temporary: str | None = None  # where the trace goes while it is made

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()

    def step(self, step: int, metrics: Any) -> None:
        """Update `step` was dispatched; `metrics` are its results."""
        if self._first and step == self._first:
            jax.block_until_ready(metrics)
            with _warned("profile"):
                self._temporary = tempfile.mkdtemp(prefix="smdlm-profile-")
                jax.profiler.start_trace(self._temporary)
        elif self._temporary and step == self._last:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        if self._temporary is None:
            return
        with _warned("profile"):
            jax.profiler.stop_trace()
            files.copy_folder(Path(self._temporary), self._folder)
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary = None


@contextlib.contextmanager
def _warned(what: str) -> Any:
    try:
        yield
    except Exception as error:
        logging.warning("%s cannot be written (%s); the run goes on", what, files.one_line(error))
