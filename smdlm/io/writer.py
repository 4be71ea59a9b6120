"""Metrics and other files a person reads: JSONL, TensorBoard, progress, samples, curves, summary.

    WORKDIR/metrics.jsonl    one JSON object per line: {"step": 400, "train/loss": 3.2, ...}
    WORKDIR/tensorboard/     the same scalars
    WORKDIR/samples/         step_00000400.txt, for a person, and .jsonl
    WORKDIR/loss.png, omega.png, summary.json

In a bucket, where nothing can be appended to, metrics.jsonl is written anew with every line; no tensorboard/.

With config.train.wandb the scalars and the summary also go to Weights & Biases (io/tracking.py).

Nothing here may end a run: whatever fails (full disk, missing package, closed pipe) is reported once and skipped.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from smdlm import files
from smdlm.evaluate.base import Value
from smdlm.io import plots
from smdlm.io.tracking import Wandb

OMEGA = "train/omega_"  # what the names of a gate's readable values begin with


class Writer:
    """Writes what a run reports; on processes with enabled=False every method does nothing.

    start_step: the step at which this run continues (0 for a new run); later lines of metrics.jsonl, written by a run
    that was killed, are dropped so that no step appears twice. None (evaluation) only appends.
    """

    def __init__(
        self, workdir: str | os.PathLike, *, total_steps: int, enabled: bool = True, start_step: int | None = None
    ):
        self.workdir = files.as_path(workdir)
        self.total_steps = total_steps
        self.enabled = enabled
        self._warned: set[str] = set()
        self._metrics = None  # metrics.jsonl, opened unbuffered for appending
        self._lines: bytes | None = None  # the same of a workdir in a bucket: all that is in it
        self._tensorboard = None
        self._wandb: Wandb | None = None
        self._start_step = start_step
        self._clock: tuple[int, float] | None = None  # (step, seconds) of the first progress call
        self._bar_open = False  # the cursor stands at the end of a progress bar
        if enabled and start_step is not None:
            with self._guard("metrics.jsonl"):
                _drop_lines_after(self.workdir / "metrics.jsonl", start_step)

    def track(self, project: str, config: Mapping[str, Any]) -> None:
        """From here on scalars and summary also go to a project of Weights & Biases. config: kept with the run."""
        if self.enabled:
            with self._guard("wandb"):
                self._wandb = Wandb(project, self.workdir, config)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl and the same values to TensorBoard; NaN and inf become strings in JSON."""
        if not self.enabled:
            return
        values = {name: float(value) for name, value in values.items()}
        with self._guard("metrics.jsonl"):
            self._append(json.dumps({"step": int(step), **_jsonable(values)}, allow_nan=False))
        if "tensorboard" not in self._warned and not files.is_url(self.workdir):
            with self._guard("tensorboard"):
                self._append_tensorboard(step, values)
        if self._wandb and "wandb" not in self._warned:
            with self._guard("wandb"):
                self._wandb.log(step, values)

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """One line on stdout: rewritten in place on a terminal, appended otherwise. Uses the train/... names."""
        if not self.enabled or "progress" in self._warned:
            return
        now = time.monotonic()
        first_step, start = self._clock = self._clock or (step, now)
        left = (now - start) * (self.total_steps - step) / (step - first_step) if step > first_step else math.nan
        text = _progress_text(step, self.total_steps, values, left)
        with self._guard("progress"):
            if sys.stdout.isatty():
                columns = shutil.get_terminal_size().columns
                bar = _bar(step / max(1, self.total_steps)) if len(text) + 24 < columns else ""
                # \x1b[K clears the rest of a longer line before; the last column is left free, or terminals wrap
                print(f"\r{(bar + text)[: columns - 1]}\x1b[K", end="", flush=True)
                self._bar_open = True
            else:
                print(text, flush=True)

    def line(self, text: str) -> None:
        """A line on stdout, below a progress bar."""
        if not self.enabled or "progress" in self._warned:
            return
        with self._guard("progress"):
            print(f"\n{text}" if self._bar_open else text, flush=True)
            self._bar_open = False

    def values(self, step: int, values: Mapping[str, Value]) -> None:
        """Logs the means of an evaluation as val/NAME."""
        self.scalars(step, {f"val/{name}": value.mean for name, value in values.items()})

    def samples(self, name: str, samples: Sequence[Mapping[str, Any]]) -> None:
        """Writes samples/NAME.txt, numbered texts for a person, and samples/NAME.jsonl, one sample a line.

        samples: dicts of JSON values with their 'text'.
        """
        if not self.enabled:
            return
        with self._guard("samples"):
            folder, count = self.workdir / "samples", len(samples)
            texts = (f"=== sample {i + 1} of {count}\n{sample['text']}\n\n" for i, sample in enumerate(samples))
            # decoded bytes may hold lone surrogates, which UTF-8 refuses
            files.write(folder / f"{name}.txt", "".join(texts).encode("utf-8", errors="replace"))
            lines = (json.dumps(_jsonable(sample), allow_nan=False) + "\n" for sample in samples)
            files.write(folder / f"{name}.jsonl", "".join(lines))

    def curves(self, values: Mapping[str, Value], omega: Mapping[str, str]) -> None:
        """Draws metrics.jsonl: loss.png and omega.png.

        values: of an evaluation, for names, units and labels. omega: {name: label} of the gate's readable values.
        """
        if not self.enabled:
            return
        with self._guard("curves"):
            rows = read_metrics(self.workdir / "metrics.jsonl")
            plots.draw_loss(rows, values, self.workdir / "loss.png")
            plots.draw_omega(rows, omega, self.workdir / "omega.png")

    def summary(self, values: Mapping[str, Any]) -> None:
        """Writes summary.json, whole or not at all."""
        if not self.enabled:
            return
        text = json.dumps(_jsonable(values), indent=2, allow_nan=False, default=str)
        with self._guard("summary.json"):
            files.write(self.workdir / "summary.json", f"{text}\n")
        if self._wandb and "wandb" not in self._warned:
            with self._guard("wandb"):
                self._wandb.summary(json.loads(text))

    def close(self) -> None:
        """Closes the files and ends the line of the progress bar."""
        if self._bar_open:
            with self._guard("progress"):
                print(flush=True)
            self._bar_open = False
        for name, file in (("metrics.jsonl", self._metrics), ("tensorboard", self._tensorboard)):
            if file is not None:
                with self._guard(name):
                    file.close()
        if self._wandb:
            with self._guard("wandb"):
                self._wandb.close()
        self._metrics = self._tensorboard = self._wandb = None

    @contextlib.contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        """Turns any failure into one warning per `what`."""
        try:
            yield
        except Exception as error:
            if what not in self._warned:
                self._warned.add(what)
                reason = files.one_line(error)
                logging.warning("%s cannot be written (%s); the run goes on, this is said once", what, reason)

    def _append(self, line: str) -> None:
        if files.is_url(self.workdir):
            self._append_object(line)
            return
        if self._metrics is None:
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._metrics = open(self.workdir / "metrics.jsonl", "a+b", buffering=0)
            _cut_torn_line(self._metrics)
        end = self._metrics.seek(0, os.SEEK_END)
        line = line.encode() + b"\n"
        try:
            if self._metrics.write(line) != len(line):
                raise OSError("the disk took only a part of the line")
        except OSError:
            self._metrics.truncate(end)  # a full disk must not leave half a line between two good ones
            raise

    def _append_object(self, line: str) -> None:
        path = self.workdir / "metrics.jsonl"
        if self._lines is None:
            self._lines = path.read_bytes() if path.exists() else b""
        self._lines += line.encode() + b"\n"  # kept where this write fails: the next one makes up for it
        files.write(path, self._lines)

    def _append_tensorboard(self, step: int, values: Mapping[str, float]) -> None:
        # Not tensorboardX.SummaryWriter: a full disk ends its thread, then its bounded queue blocks the run for ever.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        if self._tensorboard is None:
            folder = self.workdir / "tensorboard"
            folder.mkdir(parents=True, exist_ok=True)
            self._tensorboard = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}")
            if self._start_step is not None:  # hides what a killed run wrote from there on
                start = SessionLog(status=SessionLog.START)
                self._tensorboard.write_event(Event(step=self._start_step + 1, session_log=start))
        for name, value in values.items():
            self._tensorboard.write_event(Event(step=step, wall_time=time.time(), summary=scalar(name, value)))
        self._tensorboard.flush()


def unused_name(folder: Path, stem: str) -> str:
    """stem_1, stem_2, ...: the first for which no file is there; what was sampled before stays."""
    taken = {path.stem for path in folder.glob(f"{stem}_*")}
    return next(name for name in (f"{stem}_{number}" for number in itertools.count(1)) if name not in taken)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, numbers as floats ("nan" and "inf" too); lines that are not JSON are skipped."""
    rows = []
    for line in files.as_path(path).read_bytes().decode("utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            row = json.loads(line)
            rows.append({name: int(v) if name == "step" else float(v) for name, v in row.items()})
    return rows


def _jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    """NaN and inf as the strings "nan", "inf", "-inf", which JSON lacks and float() reads back; arrays as numbers."""

    def convert(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _jsonable(value)
        if hasattr(value, "tolist"):  # numpy and jax scalars and arrays
            value = value.tolist()
        if isinstance(value, (list, tuple)):
            return [convert(v) for v in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return {str(name): convert(value) for name, value in values.items()}


def _drop_lines_after(path: Path, step: int) -> None:
    """Rewrites `path` without the rows after `step` and without torn lines (temporary file, then rename)."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    files.write(path, b"".join(kept))


def _cut_torn_line(file: Any) -> None:
    """Truncates an open binary file after its last newline (a run killed in mid-write leaves half a line)."""
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)


def _progress_text(step: int, total: int, values: Mapping[str, float], left: float) -> str:
    """step 12/1000  loss 3.21  omega s 0.0021 b -0.75 a 6.66  12,345 tokens/s  MFU 41%  goodput 97%  1.2 GiB  2:13 left

    Unknown parts are omitted.
    """
    parts = [f"step {step}/{total}"]
    if "train/loss" in values:
        parts.append(f"loss {values['train/loss']:.3f}")
    omega = [f"{name.removeprefix(OMEGA)} {value:.3g}" for name, value in values.items() if name.startswith(OMEGA)]
    if omega:
        parts.append(" ".join(["omega", *omega]))
    if "train/tokens_per_s" in values:
        parts.append(f"{values['train/tokens_per_s']:,.0f} tokens/s")
    shown = {"train/mfu": "MFU {:.0%}", "train/goodput": "goodput {:.0%}", "train/memory_gib": "{:.1f} GiB"}
    parts += [form.format(values[name]) for name, form in shown.items() if name in values]
    if math.isfinite(left):
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        parts.append((f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}") + " left")
    return "  ".join(parts)


def _bar(share: float) -> str:
    filled = round(20 * min(1.0, share))
    return f"[{'#' * filled}{'.' * (20 - filled)}] "
