"""What a run says of itself beside its results: speed against the chip's peak, a profile, Weights & Biases."""

import dataclasses
import json
import sys
import threading
import types

import jax
import jax.numpy as jnp
import pytest
from absl import logging
from train_test import START, FakeCheckpointer, FakeWriter, counting_step

from smdlm import meter
from smdlm.io import tracking
from smdlm.io.writer import Writer
from smdlm.mesh.chips import CHIPS, chip_of
from smdlm.meter import Meter, Profile, Stopwatch
from smdlm.train import TrainConfig, Training, run


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda message, *args: lines.append(message % args))
    return lines


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5p", "v5p"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"), ("cpu", None), ("NVIDIA A100-SXM4-80GB", None), ("TPU v4 lite", "v4"),
    ],
)  # fmt: skip
def test_chips_are_known_by_what_jax_calls_them(kind, name):
    assert chip_of(kind) == (CHIPS[name] if name else None)


def measured(monkeypatch, kind, statistics=None):
    """Ten steps after the first, of 1e12 FLOPs and 100 tokens, in 2 of the 5 seconds since the loop began."""
    now = iter([0.0, 3.0, 5.0])
    device = types.SimpleNamespace(device_kind=kind, memory_stats=lambda: statistics)
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(meter.jax, "devices", lambda: [device] * 4)
    monkeypatch.setattr(meter.jax, "local_devices", lambda: [device] * 2)
    monkeypatch.setattr(meter.jax, "device_count", lambda: 4)
    clock = Meter(100, 1e12)
    for _ in range(11):
        clock.step(jnp.zeros(()))
    return clock.stop()


def test_speed_is_set_against_the_peak_of_all_chips(monkeypatch):
    values = measured(monkeypatch, "TPU v5 lite", {"peak_bytes_in_use": 3 * 2**30})
    assert values == {
        "train/tokens_per_s": pytest.approx(500),
        "train/mfu": pytest.approx(1e12 * 5 / (4 * 197e12)),
        "train/goodput": pytest.approx(2 / 5),
        "train/memory_gib": 3.0,
    }


def test_a_cpu_has_no_peak_and_tells_no_memory(monkeypatch):
    assert set(measured(monkeypatch, "cpu")) == {"train/tokens_per_s", "train/goodput"}


def test_the_progress_line_shows_them(tmp_path, capsys):
    writer = Writer(tmp_path, total_steps=10)
    writer.progress(1, {"train/tokens_per_s": 5.0, "train/mfu": 0.412, "train/goodput": 0.97, "train/memory_gib": 12.3})
    assert capsys.readouterr().out == "step 1/10  5 tokens/s  MFU 41%  goodput 97%  12.3 GiB\n"


# Profile


def train(steps, profile, step_fn=None):
    writer = FakeWriter()
    training = Training(
        config=TrainConfig(steps=steps, log_every=2, save_every=4), steps=steps, step_fn=step_fn or counting_step(),
        batches=iter(range(steps)), put=lambda x: x, tokens_per_batch=1, checkpointer=FakeCheckpointer(), writer=writer,
        meta=dict, evaluate=lambda _: {}, profile=profile,
    )  # fmt: skip
    run(START, training)
    return writer


def test_a_profile_holds_the_updates_that_were_asked_for(tmp_path):
    """The trace of the steps behind the second up to the fourth, and nothing of the others."""

    def step(state, batch):
        with jax.profiler.TraceAnnotation(f"update-{state.step + 1}-here"):
            return counting_step()(state, batch)

    train(6, Profile("2:4", tmp_path / "profile"), step)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert "plugins/profile" in trace.as_posix()
    there = {n for n in range(1, 7) if f"update-{n}-here".encode() in trace.read_bytes()}
    assert there == {3, 4}


@pytest.mark.parametrize("when", ["start", "stop"])
def test_a_profile_that_fails_is_one_warning(tmp_path, warnings, monkeypatch, when):
    def fail(*_):
        raise RuntimeError("no profiler here")

    monkeypatch.setattr(jax.profiler, "start_trace", fail if when == "start" else lambda _: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", fail if when == "stop" else lambda: None)
    assert [step for step, _ in train(6, Profile("2:4", tmp_path / "profile")).lines] == [2, 4, 6]
    assert [line.split(" (")[0] for line in warnings if "profile" in line][0] == "profile cannot be written"
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("spec", ["5", "5:5", "0:3", "7:2", "a:b", ":", "-1:4"])
def test_other_spellings_are_refused(spec):
    with pytest.raises(ValueError, match="train.profile: got .*, wanted FIRST:LAST"):
        TrainConfig(steps=10, profile=spec)


# Weights & Biases


@dataclasses.dataclass
class FakeWandb:
    """The few names that are used; `broken` raises where the network would."""

    broken: str = ""
    calls: list = dataclasses.field(default_factory=list)
    summary: dict = dataclasses.field(default_factory=dict)

    Settings = staticmethod(lambda **given: given)

    def _do(self, name, *given):
        if self.broken == name:
            raise ConnectionError("no route to host")
        self.calls.append((name, *given))

    def init(self, **given):
        self._do("init", given)
        return self

    def log(self, values, step):
        self._do("log", step, values)

    def finish(self):
        self._do("finish")


def tracked(monkeypatch, workdir, fake):
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = Writer(workdir, total_steps=4, start_step=0)
    writer.track("project", {"train": {"steps": 4}})
    for step in (2, 4):
        writer.scalars(step, {"train/loss": step / 2})
    writer.summary({"steps": 4, "values": {"x": {"mean": 1.0}}, "val_x": 1.0})
    writer.close()
    return fake


def test_metrics_and_summary_go_to_wandb_as_well(tmp_path, monkeypatch, warnings):
    fake = tracked(monkeypatch, tmp_path / "run", FakeWandb())
    (_, given), *logged, last = fake.calls
    assert given["project"] == "project" and given["name"] == "run" and given["config"] == {"train": {"steps": 4}}
    assert logged == [("log", 2, {"train/loss": 1.0}), ("log", 4, {"train/loss": 2.0})] and last == ("finish",)
    assert fake.summary == {"steps": 4, "val_x": 1.0} and warnings == []
    again = tracked(monkeypatch, tmp_path / "run", FakeWandb())
    assert again.calls[0][1]["id"] == given["id"] and again.calls[0][1]["resume"] == "allow"  # the same run goes on


@pytest.mark.parametrize("broken", ["init", "log", "finish", "missing"])
def test_no_network_no_package_and_no_key_end_no_run(tmp_path, monkeypatch, warnings, broken):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    fake = None if broken == "missing" else FakeWandb(broken)
    tracked(monkeypatch, tmp_path / "run", fake)
    assert len(warnings) == (broken != "finish") and all("wandb cannot be written" in line for line in warnings)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4] and (tmp_path / "run" / "summary.json").exists()


def test_an_upload_that_hangs_ends_no_run_late(tmp_path, monkeypatch):
    hung = threading.Event()
    fake = FakeWandb()
    fake.finish = hung.wait
    monkeypatch.setattr(tracking, "WAIT", 0.05)
    tracked(monkeypatch, tmp_path / "run", fake)  # returns
    hung.set()


def test_a_stopwatch_leaves_out_what_was_compiled(monkeypatch):
    """Compilations inside of one another count once; those from before, and what lies before its start, not at all."""
    noted, clock = [(-5.0, -1.0)], iter((0.0, 10.0))
    monkeypatch.setattr(meter, "_compilations", lambda: noted)
    monkeypatch.setattr(meter.time, "time", lambda: next(clock))
    with Stopwatch() as watch:
        noted += [(2.0, 3.0), (1.0, 4.0), (5.0, 6.0), (5.5, 7.0), (-1.0, 0.5)]
    assert watch.seconds == 10 - (3 + 2 + 0.5)


def test_compilations_are_noted():
    before = len(meter._compilations())
    jax.jit(lambda x: x + 23.0)(jnp.ones(5))
    assert len(meter._compilations()) > before
