"""Command line:

    python -m smdlm.main --config=configs/tiny.py [--workdir=DIR] [--mode=train|eval|sample] [--config.x.y=z]

Running the same command again continues an unfinished run and prints the summary of a finished one. On several hosts
the same command runs on each, with --distributed and a workdir that all of them see.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
from absl import flags

from smdlm import command, experiment, startup
from smdlm.build import Experiment, build
from smdlm.config import Config
from smdlm.io import report
from smdlm.io.checkpoint import Checkpointer
from smdlm.io.writer import Writer


def define_flags() -> None:
    command.define_config()
    flags.DEFINE_string("workdir", None, "Where everything goes; runs/<config name> by default.")
    flags.DEFINE_enum("mode", "train", ["train", "eval", "sample"], "train includes the final eval and samples.")
    flags.DEFINE_bool("overwrite", False, "Delete the workdir's run and start anew.")
    flags.DEFINE_bool("distributed", False, "One of several processes, each started with this command.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where the cluster does not tell.")
    flags.DEFINE_integer("num_processes", None, "Where the cluster does not tell.")
    flags.DEFINE_integer("process_id", None, "0 .. num_processes - 1, where the cluster does not tell.")


def main() -> None:
    given, config = flags.FLAGS, command.read_config()
    startup.quiet()
    startup.keep_memory()
    startup.join_if(given.distributed, given.coordinator, given.num_processes, given.process_id)
    workdir = Path(given.workdir or f"runs/{command.config_name()}")
    if given.mode != "eval":
        command.check_folder("--workdir", workdir)
    startup.keep_compiled(workdir.parent / "compiled")
    directory, chief = workdir / "checkpoints", jax.process_index() == 0
    if given.overwrite and given.mode == "train" and directory.exists() and chief:
        shutil.rmtree(directory)
        (workdir / "summary.json").unlink(missing_ok=True)
    snapshot = json.loads(given.config.to_json_best_effort())
    startup.meet(workdir, config=snapshot, mode=given.mode)
    checkpointer = experiment.checkpointer_of(workdir, keep=config.train.keep)
    if given.mode == "train":
        _train(config, workdir, checkpointer, snapshot)
    elif checkpointer.latest_step() is None:
        raise FileNotFoundError(
            f"{given.mode}: got no checkpoint in {directory}, wanted a trained run: --mode=train first"
        )
    else:
        made = _build(config, workdir, checkpointer)
        with jax.set_mesh(made.mesh):
            (_evaluate if given.mode == "eval" else _sample)(made, workdir, checkpointer)
    checkpointer.close()


def _build(config: Config, workdir: Path, checkpointer: Checkpointer) -> Experiment:
    made = build(config, workdir)
    startup.meet(workdir, **_identity(made), checkpoint=checkpointer.latest_step())
    return made


def _identity(made: Experiment) -> dict[str, Any]:
    return {"tokenizer": made.data.tokenizer.fingerprint, "content_hash": made.data.content_hash}


def _train(config: Config, workdir: Path, checkpointer: Checkpointer, snapshot: dict[str, Any]) -> None:
    chief = jax.process_index() == 0
    summary = experiment.finished(workdir, checkpointer, config.updates)
    if summary:
        experiment.check_same_config(workdir, checkpointer.read_meta().get("config", snapshot), snapshot)
        if chief:
            print(f"{workdir} holds a finished run (--overwrite starts anew):")
    else:
        if config.train.init_from and checkpointer.latest_step() is None:
            experiment.init_source(config.train.init_from)  # before the data is read
        made = _build(config, workdir, checkpointer)
        meta = {"config": snapshot, "model": dataclasses.asdict(made.denoiser.model), **_identity(made)}
        with jax.set_mesh(made.mesh):
            summary = experiment.train(made, workdir, checkpointer, meta)
    if chief:
        print(report.summary(summary, workdir), flush=True)


def _evaluate(made: Experiment, workdir: Path, checkpointer: Checkpointer) -> None:
    omega = made.config.eval.omega
    params, step = experiment.restore(made, checkpointer, omega)
    weights = experiment.described_weights(omega)
    values = experiment.evaluate(made, params)
    if jax.process_index() == 0:
        print(f"checkpoint of step {step} in {checkpointer.directory}, {weights}\n\n{report.values_table(values)}")
        print(f"(validation, fixed masks, {weights}; ± is a 95 % interval)")


def _sample(made: Experiment, workdir: Path, checkpointer: Checkpointer) -> None:
    omega, chief = made.config.sampling.omega, jax.process_index() == 0
    params, step = experiment.restore(made, checkpointer, omega)
    sampled = experiment.sample(made, params)
    writer = Writer(workdir, total_steps=step, enabled=chief)
    writer.samples(f"step_{step:08d}", experiment.sample_records(made, sampled))
    if chief:
        weights = experiment.described_weights(omega)
        print(f"checkpoint of step {step} in {checkpointer.directory}, {weights}")
        print(report.samples(sampled.texts, sampled.forwards))


if __name__ == "__main__":
    command.run(main, define_flags)
