"""The writer: files are whole and valid, a resumed curve has no duplicates, no failure ends a run."""

import io
import json
import math
import os
import sys

import numpy as np
import pytest
from absl import logging

from smdlm.evaluate.base import Value
from smdlm.io import plots
from smdlm.io import writer as writer_lib
from smdlm.io.writer import Writer, read_metrics


@pytest.fixture
def warnings(monkeypatch):
    """The warnings logged so far, formatted."""
    lines = []
    monkeypatch.setattr(logging, "warning", lambda message, *args: lines.append(message % args))
    return lines


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_scalars_are_json_lines_and_tensorboard_events(tmp_path, warnings):
    writer = Writer(tmp_path, total_steps=10)
    writer.scalars(1, {"train/loss": np.float32(1.5), "val/bits_per_byte_one_pass": 3})
    assert _lines(tmp_path) == [
        {"step": 1, "train/loss": 1.5, "val/bits_per_byte_one_pass": 3.0}
    ]  # flushed, not closed
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes() and b"val/bits_per_byte_one_pass" in events.read_bytes()
    assert warnings == []


def test_nan_and_inf_stay_valid_json_and_read_back(tmp_path):
    writer = Writer(tmp_path, total_steps=10)
    writer.scalars(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    writer.summary({"x": math.nan, "y": {"z": np.float32(math.inf)}, "steps": np.int32(3)})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "a": "nan", "b": "inf", "c": "-inf"}
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary == {"x": "nan", "y": {"z": "inf"}, "steps": 3}


def test_resume_drops_later_and_torn_lines(tmp_path):
    writer = Writer(tmp_path, total_steps=10, start_step=0)
    for step in (2, 4, 6, 8):
        writer.scalars(step, {"train/loss": step})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "train/l')  # kill -9 in the middle of a write
    writer = Writer(tmp_path, total_steps=10, start_step=4)
    writer.scalars(6, {"train/loss": 60})
    assert [(row["step"], row["train/loss"]) for row in _lines(tmp_path)] == [(2, 2.0), (4, 4.0), (6, 60.0)]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "tensorboard"]  # no temporary file is left


def test_append_keeps_the_run_and_cuts_a_torn_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 9, "train/loss": 1.0}\n{"step": 10, "tr')
    Writer(tmp_path, total_steps=10).scalars(10, {"val/x": 2.0})
    assert _lines(tmp_path) == [{"step": 9, "train/loss": 1.0}, {"step": 10, "val/x": 2.0}]


def test_a_disk_that_takes_half_a_line_leaves_whole_lines_and_warns_once(tmp_path, warnings):
    resource = pytest.importorskip("resource")
    writer = Writer(tmp_path, total_steps=10)
    writer.scalars(1, {"train/loss": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # files may not grow beyond half of the second line: a real short write, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 10, hard))
        writer.scalars(2, {"train/loss": 2.0})
        writer.scalars(3, {"train/loss": 3.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.scalars(4, {"train/loss": 4.0})  # space again
    assert [row["step"] for row in _lines(tmp_path)] == [1, 4]
    assert sum("metrics.jsonl" in line for line in warnings) == 1, warnings


def test_tensorboard_failure_never_blocks_a_run(tmp_path, warnings):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    writer = Writer(tmp_path, total_steps=10)
    for step in range(50):  # more than the queue that tensorboardX.SummaryWriter would block on
        writer.scalars(step, {"train/loss": 1.0})
    assert len(_lines(tmp_path)) == 50
    assert len(warnings) == 1 and "tensorboard" in warnings[0]


@pytest.mark.parametrize("package", ["tensorboardX", "matplotlib"])
def test_missing_package_warns_once(tmp_path, warnings, monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # import raises ImportError
    writer = Writer(tmp_path, total_steps=10)
    for step in (1, 2):
        writer.scalars(step, {"train/loss": 1.0})
        writer.curves({}, {})
    assert len(_lines(tmp_path)) == 2
    assert len(warnings) == 1 and package in warnings[0]


def test_unwritable_workdir_never_raises(tmp_path, warnings):
    workdir = tmp_path / "file"
    workdir.write_text("")
    writer = Writer(workdir, total_steps=10, start_step=0)
    for _ in range(2):
        writer.scalars(1, {"train/loss": 1.0})
        writer.samples("step_1", [{"text": "text"}])
        writer.summary({"steps": 1})
        writer.curves({}, {})
    writer.close()
    whats = [line.split(" cannot")[0] for line in warnings]
    assert sorted(whats) == ["curves", "metrics.jsonl", "samples", "summary.json", "tensorboard"]  # each said once


def test_disabled_writes_nothing(tmp_path, capsys):
    workdir = tmp_path / "none"
    writer = Writer(workdir, total_steps=10, enabled=False, start_step=0)
    writer.scalars(1, {"train/loss": 1.0})
    writer.progress(1, {})
    writer.values(1, {"x": Value(1.0, None, "nats/token", "x")})
    writer.samples("step_1", [{"text": "text"}])
    writer.curves({}, {})
    writer.summary({})
    writer.close()
    assert not workdir.exists() and capsys.readouterr().out == ""


VALUES = {
    "train/loss": 3.21449,
    "train/omega_s": 0.00212,
    "train/omega_a": 6.66,
    "train/omega_b": -0.75,
    "train/tokens_per_s": 12345.6,
}


def test_progress_prints_plain_lines_with_time_left(tmp_path, capsys, monkeypatch):
    seconds = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr(writer_lib.time, "monotonic", lambda: next(seconds))
    writer = Writer(tmp_path, total_steps=1000)
    writer.progress(100, VALUES)
    writer.progress(200, VALUES)
    writer.progress(200 + 100, {"train/loss": 3.0})
    writer.close()
    figures = "loss 3.214  omega s 0.00212 a 6.66 b -0.75  12,346 tokens/s"
    assert capsys.readouterr().out.splitlines() == [
        f"step 100/1000  {figures}",
        f"step 200/1000  {figures}  1:20 left",  # 10 s for 100 steps, 800 to go
        "step 300/1000  loss 3.000  1:10 left",
    ]


def test_progress_rewrites_one_line_on_a_terminal(tmp_path, monkeypatch):
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    writer = Writer(tmp_path, total_steps=1000)
    writer.progress(500, {"train/loss": 3.0})
    monkeypatch.setenv("COLUMNS", "40")
    writer.progress(600, VALUES)
    writer.close()
    empty, first, second = terminal.getvalue().split("\r")
    assert empty == "" and first == "[##########..........] step 500/1000  loss 3.000\x1b[K"
    assert (
        second.endswith("\x1b[K\n") and len(second) - len("\x1b[K\n") == 39
    )  # cut to the width, one newline at the end


def test_a_line_stands_below_the_bar(tmp_path, monkeypatch):
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    writer = Writer(tmp_path, total_steps=1000)
    writer.line("before")
    writer.progress(500, {})
    writer.line("behind")
    writer.close()
    before, bar = terminal.getvalue().split("\r")
    assert before == "before\n" and bar.endswith("\x1b[K\nbehind\n")
    Writer(tmp_path, total_steps=1, enabled=False).line("of another process")
    assert "another" not in terminal.getvalue()


def test_closed_pipe_silences_progress(tmp_path, monkeypatch, warnings):
    class Pipe(io.StringIO):
        def write(self, text):
            raise BrokenPipeError("closed")

    monkeypatch.setattr(sys, "stdout", Pipe())
    writer = Writer(tmp_path, total_steps=10)
    for step in (1, 2):
        writer.progress(step, {})
    assert len(warnings) == 1 and "BrokenPipeError" in warnings[0]


def test_samples_are_utf8_even_with_lone_surrogates(tmp_path):
    samples = [{"text": text, "ids": np.arange(2), "seed": 3} for text in ("naïve ω\n", "half \ud800 pair")]
    Writer(tmp_path, total_steps=10).samples("step_7", samples)
    text = (tmp_path / "samples" / "step_7.txt").read_text(encoding="utf-8")
    assert text == "=== sample 1 of 2\nnaïve ω\n\n\n=== sample 2 of 2\nhalf ? pair\n\n"
    rows = [json.loads(line) for line in (tmp_path / "samples" / "step_7.jsonl").read_text("utf-8").splitlines()]
    assert [row["text"] for row in rows] == ["naïve ω\n", "half \ud800 pair"]
    assert rows[1]["ids"] == [0, 1] and rows[1]["seed"] == 3


def test_curves_draw_what_is_there(tmp_path, warnings):
    writer = Writer(tmp_path, total_steps=100)
    for step in range(100):
        writer.scalars(step, {"train/loss": math.nan if step == 5 else 10 / (1 + step)})
    writer.curves({}, {})
    assert not (tmp_path / "omega.png").exists()  # an autoregressive run has no omega
    narrow = _width(tmp_path / "loss.png")
    values = {"mine": Value(3.2, 0.1, "my unit", "my label"), "other": Value(9.0, None, "another unit", "my label")}
    writer.values(100, values)
    writer.scalars(100, {"train/omega_power": 0.1, "train/omega_shift": 6.0})
    writer.curves(values, {"omega_power": "power", "omega_shift": "shift"})
    assert _width(tmp_path / "loss.png") > narrow  # a panel for validation
    assert _width(tmp_path / "omega.png") > narrow
    assert warnings == []


def test_smoothing_keeps_a_line_and_averages_noise():
    line = np.linspace(0.0, 1.0, 200)
    np.testing.assert_allclose(plots._smooth(line)[5:-5], line[5:-5])
    np.testing.assert_allclose(plots._smooth(np.ones(7)), np.ones(7))
    noise = np.random.default_rng(0).normal(size=400)
    assert plots._smooth(noise).std() < 0.4 * noise.std()


def _width(path):
    """Width in pixels, from the PNG header."""
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big")
