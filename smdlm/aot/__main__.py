"""Memory and speed of a config on hardware that is not there:

    python -m smdlm.aot --config=configs/owt.py --topology=v5e:4x4 [--plain] [--sweep] [--json=FILE] [--config.x.y=z]

compiles the train step and the sampler of the config for the named chips, with the chips' own compiler, and prints, per
chip, memory against the chip's, FLOPs, bytes and a roofline estimate. data.batch_size is the batch of all chips. TPUs
need `pip install -e '.[aot]'`, GPUs `pip install -e '.[cuda]'`; no accelerator, no data.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax starts: nothing is run, and this machine's accelerators stay free

from absl import app, flags
from ml_collections import config_flags

from smdlm import command
from smdlm.aot.chips import EXAMPLES, Topology
from smdlm.aot.measure import compile_sampler, compile_train, largest_batch
from smdlm.aot.report import Report
from smdlm.build import read

CONFIG = command.define_config()
TOPOLOGY = flags.DEFINE_string("topology", None, f"Chip and shape, e.g. {EXAMPLES}.")
PROGRAM = flags.DEFINE_enum("program", "all", ["all", "train", "sample"], "What is compiled.")
PLAIN = flags.DEFINE_bool("plain", False, "Only the train step, with all logits, XLA's attention and no remat.")
SWEEP = flags.DEFINE_bool("sweep", False, "Only train steps: the largest batch that fits, by doubling and bisection.")
JSON = flags.DEFINE_string("json", None, "Write the rows to this file.")


def reports() -> Iterator[Report]:
    given = config_flags.get_override_values(flags.FLAGS["config"])
    config, topology = read(CONFIG.value, given), Topology(TOPOLOGY.value)
    if SWEEP.value:
        yield from largest_batch(config, topology, simple=PLAIN.value)
        return
    if PROGRAM.value != "sample":
        yield compile_train(config, topology, simple=PLAIN.value)
    if PROGRAM.value != "train" and not PLAIN.value:
        yield compile_sampler(config, topology)


def main(_: Sequence[str]) -> None:
    rows = []
    for report in reports():
        print(f"{report}\n", flush=True)
        rows.append(report.row())
        if JSON.value:
            Path(JSON.value).write_text(json.dumps(rows, indent=1))
    if SWEEP.value:
        best = max((row["batch_per_chip"] for row in rows if row["fits"]), default=None)
        print(f"largest batch that fits: {f'{best:g} per chip' if best else 'none'}, {len(rows)} tried")


def _fail(error: BaseException) -> None:
    print(f"error: {command.message(error)}", file=sys.stderr)
    sys.exit(2)


def _main(argv: Sequence[str]) -> None:
    try:
        main(argv)
    except (ValueError, OSError, ImportError) as error:
        _fail(error)


def _parse(argv: Sequence[str]) -> Sequence[str]:
    try:
        command.check_config_file(argv)
        rest = flags.FLAGS(argv)
        if TOPOLOGY.value is None:
            raise ValueError("--topology: got nothing, wanted e.g. --topology=v5e:4x4")
        if len(rest) > 1:
            raise ValueError(f"arguments: got {rest[1:]}, wanted only --flags")
        if PROGRAM.value == "sample" and (PLAIN.value or SWEEP.value):
            raise ValueError("--program: got sample with --plain or --sweep, which are of train steps, wanted train")
        if JSON.value:
            command.check_file("--json", Path(JSON.value))
        Topology(TOPOLOGY.value).prepare()
        return rest
    except command.MISTAKES as error:
        _fail(error)
        raise


if __name__ == "__main__":
    app.run(_main, flags_parser=_parse)
