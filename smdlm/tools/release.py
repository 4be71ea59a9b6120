"""Makes a released model of a trained run: python -m smdlm.tools.release RUN FOLDER

RUN is a workdir of `smdlm.main`, or that of one run of a study, whose cells beside it become a part of the results.
FOLDER is what `smdlm.load` takes (see smdlm/io/released.py); smdlm/released/NAME is `smdlm.load("NAME")`.
The data of the run must still be those that it was trained on: the validation blocks are taken along.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from smdlm import command, experiment, identity
from smdlm.build import build
from smdlm.config import read
from smdlm.evaluate.likelihood import Likelihood
from smdlm.files import local_path, plain_output
from smdlm.io import released


def release(run: Path, folder: Path) -> None:
    """Writes the folder. FileNotFoundError, ValueError: one line; no finished run, or other data than its own."""
    with contextlib.closing(experiment.checkpointer_of(run)) as checkpointer:
        if not (run / "summary.json").is_file():
            raise FileNotFoundError(f"RUN: got {run} without summary.json, wanted a finished run")
        weights, meta = checkpointer.restore_params(None, "ema")
        settings = {name: section for name, section in meta["config"].items() if name != "study"}
        config = read(settings)
        made = build(config, run)
        identity.check_same_data(run, checkpointer, made.data.content_hash)
    likelihood = next((metric for metric in config.eval.metrics if isinstance(metric, Likelihood)), Likelihood())
    count = min(likelihood.blocks, len(made.data.val))
    blocks = np.stack([np.asarray(made.data.val[i]) for i in range(count)])
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    facts = {name: meta[name] for name in ("step", "model", "mask_id", "tokenizer", "content_hash")}
    results = {"validation": summary["values"], "study": cells(run)}
    about = {"config": settings, **facts, "parameters": summary["parameters"], "results": results}
    released.write(folder, jax.tree.map(np.asarray, weights), about, made.vocabulary, blocks)


def cells(run: Path) -> list[dict[str, Any]]:
    """Records of the study beside a run that sampled its weights, without the terms of single samples."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted((run.parent / "cells").glob(f"{run.name}-*.json"))]
    return [record for record in found if f"{record['run']}-seed{record['seed']}" == run.name]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m smdlm.tools.release", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="workdir of a finished run")
    parser.add_argument("folder", metavar="FOLDER", help="to be written")
    given = parser.parse_args(argv)
    plain_output()
    with command.told():
        folder = local_path("FOLDER", given.folder)
        release(local_path("RUN", given.run), folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"wrote {folder}, {size / 1e6:.2f} MB: smdlm.load({str(folder)!r})")


if __name__ == "__main__":
    main()
