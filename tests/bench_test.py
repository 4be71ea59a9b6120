"""What the benchmark says of a step: its arithmetic, and the batch of the sampler."""

import dataclasses
import json

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


def rows_file(folder, rows):
    file = folder / "other.json"
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return file


def test_ratios_to_another_program(tmp_path):
    """Of the times that it has: above 1 where it takes longer. Its other columns are passed over."""
    rows = [{"size": "tiny", "batch": 32, "train_sm_ms": 396.0, "sampler_step_ms": 50.0, "peak_gib": 9.0}]
    other = bench.read_times(rows_file(tmp_path, rows))
    bench.check_batches(["tiny", "6x192"], 0, other)
    ours = {"train_binary_ms": 100.0, "train_sm_ms": 198.0, "sampler_step_ms": 100.0}
    wanted = "  against: train_sm_ms 396.00, 2.00 times ours, sampler_step_ms 50.00, 0.50 times ours"
    assert bench.ratio_line(ours, other["tiny"]) == wanted


GOOD = {"size": "tiny", "batch": 32, "train_sm_ms": 396.0}


@pytest.mark.parametrize(
    "rows, message",
    [
        ("nothing", "which is not read"),
        ({"tiny": 1}, "with something else"),
        ([GOOD | {"size": "huge"}], "wanted a list of rows like .*of tiny, 6x192, 169m"),
        ([{"size": "tiny", "train_sm_ms": 396.0}], "wanted a list of rows like"),
        ([{"size": "tiny", "batch": 32}], "wanted a list of rows like"),
        ([GOOD | {"train_sm_ms": "396"}], "got train_sm_ms '396' of tiny, wanted milliseconds > 0"),
        ([GOOD | {"train_sm_ms": 0}], "got train_sm_ms 0 of tiny"),
        ([GOOD, GOOD], "wanted each size once"),
    ],
)
def test_other_rows_are_refused(rows, message, tmp_path):
    with pytest.raises(ValueError, match=f"--against: .*{message}") as error:
        bench.read_times(rows_file(tmp_path, rows))
    assert "\n" not in str(error.value)


def test_another_batch_or_size_is_refused_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measured", lambda *_: pytest.fail("measured"))
    file = rows_file(tmp_path, [GOOD])
    for flags, message in (
        (["--batch=8"], "got batch 32 at tiny, wanted that of --batch, 8"),
        (["--size=6x192"], "got rows of tiny, wanted one of 6x192"),
    ):
        with pytest.raises(SystemExit):
            bench.main([f"--against={file}", *flags])
        assert message in capsys.readouterr().err


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
