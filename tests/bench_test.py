"""What the benchmark says of a step: its arithmetic, and the batch of the sampler."""

import dataclasses

import pytest

from smdlm.tools import bench

MICRO = bench.Size(width=16, depth=2, heads=2, length=8, batch=4, vocab=24, chunk=32, steps=2)


def test_flops_of_a_step_are_those_counted_by_hand():
    """2 per multiply-add; 16 of 32 tokens are read out."""
    denoiser, _ = bench.model(MICRO)
    qkv_and_out, mlp = 32 * 16 * (3 * 16 + 16), 32 * 16 * (64 + 64)
    scores_and_values = 2 * 4 * 8 * 8 * 16
    forward = 2 * 2 * (qkv_and_out + mlp + scores_and_values) + 2 * 16 * 16 * 24
    assert bench.step_flops(denoiser, MICRO) == pytest.approx(forward * (1 + 1 + 2))


def test_mfu_is_the_share_of_the_chips_peak(monkeypatch):
    assert bench._mfu(1e12, 10.0) is None  # of a CPU no peak is known

    @dataclasses.dataclass
    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(bench.jax, "devices", lambda: [Device()])
    assert bench._mfu(989e12 * 0.01 * 0.45, 10.0) == pytest.approx(0.45)


@pytest.mark.long
def test_the_sampler_has_a_batch_of_its_own(monkeypatch):
    """And its ratio is that to a forward of the same batch."""
    shapes = []

    class Sampler(bench.Sampler):
        def __call__(self, params, key, canvas):
            shapes.append(canvas.shape)
            return super().__call__(params, key, canvas)

    monkeypatch.setattr(bench, "Sampler", Sampler)
    row = bench.measure(dataclasses.replace(MICRO, canvases=3), repeats=1)
    assert set(shapes) == {(3, 8)}
    assert row["sampler_over_forward"] == pytest.approx(row["sampler_step_ms"] / row["forward_ms"])
    assert row["mfu"] is None and sum(row["parts_ms"].values()) > 0
