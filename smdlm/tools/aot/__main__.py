"""Memory and speed of a config on hardware that is not there:

    python -m smdlm.tools.aot --config=configs/owt.py --topology=v5e:4x4 [--plain] [--sweep] [--json=FILE] [..]

compiles the train step and the sampler of the config for the named chips, with the chips' own compiler, and prints, per
chip, memory against the chip's, FLOPs, bytes and a roofline estimate. data.batch_size is the batch of all chips. TPUs
need `pip install -e '.[aot]'`, GPUs `pip install -e '.[cuda]'`; no accelerator, no data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax starts: nothing is run, and this machine's accelerators stay free

from absl import flags

from smdlm import command
from smdlm.tools.aot.chips import EXAMPLES, Topology
from smdlm.tools.aot.measure import compile_sampler, compile_train, largest_batch
from smdlm.tools.aot.report import Report


def define_flags() -> None:
    command.define_config()
    flags.DEFINE_string("topology", None, f"Chip and shape, e.g. {EXAMPLES}.")
    flags.DEFINE_enum("program", "all", ["all", "train", "sample"], "What is compiled.")
    flags.DEFINE_bool("plain", False, "Only the train step, with all logits, XLA's attention and no remat.")
    flags.DEFINE_bool("sweep", False, "Only train steps: the largest batch that fits, by doubling and bisection.")
    flags.DEFINE_string("json", None, "Write the rows to this file.")


def check_flags() -> None:
    given = flags.FLAGS
    if given.topology is None:
        raise ValueError("--topology: got nothing, wanted e.g. --topology=v5e:4x4")
    if given.program == "sample" and (given.plain or given.sweep):
        raise ValueError("--program: got sample with --plain or --sweep, which are of train steps, wanted train")
    if given.json:
        command.check_file("--json", Path(given.json))
    Topology(given.topology).prepare()


def reports() -> Iterator[Report]:
    given, config = flags.FLAGS, command.read_config()
    topology = Topology(given.topology)
    if given.sweep:
        yield from largest_batch(config, topology, simple=given.plain)
        return
    if given.program != "sample":
        yield compile_train(config, topology, simple=given.plain)
    if given.program != "train" and not given.plain:
        yield compile_sampler(config, topology)


def main() -> None:
    given, rows = flags.FLAGS, []
    for report in reports():
        print(f"{report}\n", flush=True)
        rows.append(report.row())
        if given.json:
            Path(given.json).write_text(json.dumps(rows, indent=1))
    if given.sweep:
        best = max((row["batch_per_chip"] for row in rows if row["fits"]), default=None)
        print(f"largest batch that fits: {f'{best:g} per chip' if best else 'none'}, {len(rows)} tried")


if __name__ == "__main__":
    command.run(main, define_flags, check_flags)
