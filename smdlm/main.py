"""The command line: flags and dispatch. `python -m smdlm.main --help` says what there is (command.HELP)."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import jax
from absl import flags

from smdlm import command, describe, experiment, generation, identity, score, startup, study
from smdlm.build import assemble, build
from smdlm.config import Config, read
from smdlm.data.kept import tokenizer_of_run
from smdlm.evaluate.compare import compare
from smdlm.files import is_url, owned, path_of, remove_tree
from smdlm.io import report
from smdlm.io.checkpoint import Checkpointer
from smdlm.io.writer import Writer, unused_name

IN_BUCKETS = ("train", "eval", "sample")  # modes whose workdir may be gs://.. or s3://..


def define_flags() -> None:
    command.define_config()
    score.define_flags()
    generation.define_flags()
    flags.DEFINE_string("workdir", None, "Where everything goes; runs/<config name> by default.")
    flags.DEFINE_enum("mode", "train", list(command.MODES), "train includes the final eval and samples.")
    flags.DEFINE_bool("overwrite", False, "Delete the workdir's run and start anew.")
    command.define_processes()


def main(*results: str) -> None:
    given = flags.FLAGS
    if given.mode == "compare":
        return print(compare(results, given.only, given.format))
    config = command.read_config()
    if given.mode == "show":
        file = command.load_config(command.config_file())
        return print(describe.settings(config, read(file), file.to_dict()))
    workdir = path_of("--workdir", f"runs/{command.config_name()}" if given.workdir is None else given.workdir)
    if is_url(workdir) and given.mode not in IN_BUCKETS:
        raise ValueError(f"--workdir: got {workdir} with --mode={given.mode}, wanted a copy on this machine")
    startup.prepare(workdir.parent / "compiled")
    startup.join_if(given.distributed, given.coordinator, given.num_processes, given.process_id)
    if given.mode != "eval":
        command.check_folder("--workdir", workdir)
    if given.mode == "study":
        return study.run(given.config, workdir)
    snapshot = json.loads(given.config.to_json_best_effort())
    startup.meet(workdir, config=snapshot, mode=given.mode)
    checkpointer = experiment.checkpointer_of(workdir, keep=config.train.keep)
    if given.mode == "train":
        _train(config, workdir, checkpointer, snapshot, given.overwrite)
    elif checkpointer.latest_step() is None:
        raise FileNotFoundError(f"{given.mode}: got no checkpoint in {workdir}, wanted one of --mode=train first")
    elif given.mode in ("score", "zeroshot"):
        score.run(score.Run(workdir, config, snapshot, checkpointer), given)
    else:
        {"eval": _evaluate, "sample": _sample, "generate": generation.run}[given.mode](config, workdir, checkpointer)
    checkpointer.close()


def _train(config: Config, workdir: Path, checkpointer: Checkpointer, snapshot: dict, overwrite: bool) -> None:
    chief = jax.process_index() == 0
    if not overwrite:
        identity.check_same_run(workdir, checkpointer, config)
        if summary := experiment.finished(workdir, checkpointer, config.updates):
            if chief:
                print(f"{workdir} holds a finished run (--overwrite starts anew):")
                print(describe.ending(summary, workdir, config.model.causal), flush=True)
            return
    if config.train.init_from and (overwrite or checkpointer.latest_step() is None):
        experiment.init_source(config.train)  # before the data is read, which may need its tokenizer
    with owned(workdir, "--workdir") if chief else contextlib.nullcontext():
        if overwrite and chief:
            remove_tree(checkpointer.directory)
            (workdir / "summary.json").unlink(missing_ok=True)
        made = build(config, workdir)
        facts = {"tokenizer": made.vocabulary.fingerprint, "content_hash": made.data.content_hash}
        startup.meet(workdir, **facts, checkpoint=checkpointer.latest_step())
        identity.check_same_data(workdir, checkpointer, facts["content_hash"])
        if chief:
            print(describe.opening(made, workdir, checkpointer.latest_step()), flush=True)
        with jax.set_mesh(made.mesh):
            summary = experiment.train(made, workdir, checkpointer, {"config": snapshot, **facts})
    if chief:
        print(describe.ending(summary, workdir, config.model.causal), flush=True)


def _evaluate(config: Config, workdir: Path, checkpointer: Checkpointer) -> None:
    made = build(config, workdir)
    startup.meet(workdir, content_hash=made.data.content_hash, checkpoint=checkpointer.latest_step())
    with jax.set_mesh(made.mesh):
        params, step = experiment.restore(made, checkpointer, config.eval.omega)
        values = experiment.evaluate(made, params)
    if jax.process_index() == 0:
        weights = experiment.described_weights(config.eval.omega)
        print(f"checkpoint of step {step} in {checkpointer.directory}, {weights}\n\n{report.values_table(values)}")
        print(f"(validation, fixed masks, {weights}; ± is a 95 % interval)")


def _sample(config: Config, workdir: Path, checkpointer: Checkpointer) -> None:
    made = assemble(config, tokenizer_of_run(workdir, config.data.tokenizer), config.mesh.make(), None)
    startup.meet(workdir, checkpoint=checkpointer.latest_step())
    with jax.set_mesh(made.mesh):
        params, step = experiment.restore(made, checkpointer, config.sampling.omega)
        sampled = experiment.sample(made, params)
        experiment.write_viewer(made, params)
    if jax.process_index() == 0:
        name = unused_name(workdir / "samples", f"step_{step:08d}_sample")
        Writer(workdir, total_steps=step).samples(name, experiment.sample_records(made, sampled))
        weights = experiment.described_weights(config.sampling.omega)
        files = ", ".join(filter(None, [f"samples/{name}.txt", ".jsonl", config.sampling.viewer]))
        print(f"checkpoint of step {step} in {checkpointer.directory}, {weights}: {files}")
        print(report.samples(sampled.texts, sampled.forwards))


if __name__ == "__main__":
    command.run(main, define_flags, help_text=command.help_text())
