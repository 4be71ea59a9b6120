"""Memory and speed of a config on hardware that is not there:

    python -m smdlm.aot --config=configs/owt.py --topology=v5e:4x4 [--plain] [--json=FILE] [--config.x.y=z]

compiles the train step and the sampler of the config for the named chips with their own compiler and prints, per chip,
memory against the chip's, FLOPs, bytes and a roofline estimate. data.batch_size is the global batch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax starts: nothing runs, and a TPU or GPU of this machine stays free

from absl import app, flags
from ml_collections import config_flags

from smdlm.aot.chips import Topology
from smdlm.aot.measure import Report, build_for, compile_sampler, compile_train
from smdlm.aot.plain import plain
from smdlm.build import read

CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, e.g. configs/owt.py.", lock_config=True)
TOPOLOGY = flags.DEFINE_string("topology", "v5e:4x4", "Chips, e.g. v5e:4x4, v5p:2x2x4, v6e:4x4, h100:8.")
PLAIN = flags.DEFINE_bool("plain", False, "The step with full logits, XLA attention and no remat, for comparison.")
PROGRAM = flags.DEFINE_enum("program", "all", ["all", "train", "sample"], "What to compile.")
JSON = flags.DEFINE_string("json", None, "Write the rows to this file.")


def show(report: Report) -> None:
    r, row = report, report.row()
    print(f"\n{r.program}: {r.topology}, {r.chips} chips, batch {r.batch} ({r.batch / r.chips:g} per chip)")
    state = "fits" if r.fits else "DOES NOT FIT"
    lines = [
        ("HBM arguments", f"{r.arguments_gib:.2f} GiB"),
        ("HBM temporaries", f"{r.temp_gib:.2f} GiB"),
        ("HBM peak", f"{r.peak_gib:.2f} of {r.chip.limit_gib:.2f} GiB: {state}"),
        ("FLOPs", f"{r.flops / 1e12:.2f} T (the mathematics needs {r.model_flops / r.chips / 1e12:.2f} T)"),
        ("HBM traffic", f"{r.hbm / 1e9:.1f} GB"),
        ("collectives", ", ".join(f"{k} {v / 1e9:.3f} GB" for k, v in r.collectives().items()) or "none"),
        ("roofline", f"{row['step_ms_roofline']:.1f} ms, {row['tokens_per_s']:,.0f} tokens/s, MFU {row['mfu']:.0%}"),
        ("compile time", f"{r.compile_s:.0f} s"),
        ("assumed", "; ".join(r.assumed) or "nothing"),
    ]
    for name, value in lines:
        print(f"  {name:16}{value}")
    print("  where                      TFLOP     HBM GB         ms")
    for name, flops, hbm, seconds in r.parts():
        if seconds > 1e-5:
            print(f"    {name:22}{flops / 1e12:9.3f}{hbm / 1e9:11.2f}{1e3 * seconds:11.2f}")
    print("  largest buffers at the peak")
    for size, what in r.largest:
        print(f"    {size:8.3f} GiB  {what}")
    if not r.fits:
        print("  to make it fit: a smaller data.batch_size, model.remat=block, train.accumulate, or mesh.fsdp > 1")


def main(_: Sequence[str]) -> None:
    config, topology = read(CONFIG.value), Topology(TOPOLOGY.value)
    experiment = build_for(config, topology)
    reports = []
    if PROGRAM.value != "sample":
        reports.append(compile_train(plain(experiment) if PLAIN.value else experiment, topology))
        show(reports[-1])
    if PROGRAM.value != "train" and not PLAIN.value:
        reports.append(compile_sampler(experiment, topology))
        show(reports[-1])
    if JSON.value:
        Path(JSON.value).write_text(json.dumps([r.row() for r in reports], indent=1))


def _main(argv: Sequence[str]) -> None:
    try:
        main(argv)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(_main)
