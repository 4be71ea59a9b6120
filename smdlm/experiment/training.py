"""A run from where its workdir stands to its end."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging

from smdlm import command
from smdlm.build import Experiment
from smdlm.data.kept import save_tokenizer
from smdlm.describe import training_flops
from smdlm.evaluate.base import Value, weights
from smdlm.experiment.restoring import check_vocabulary, described, frozen_base, init_source, load_weights
from smdlm.experiment.sampling import (
    Sampled,
    described_weights,
    evaluate,
    prompt_ids,
    sample,
    sample_records,
    sample_values,
    write_viewer,
)
from smdlm.files import local_path
from smdlm.identity import check_same_base, diverged
from smdlm.io.checkpoint import Checkpointer
from smdlm.io.writer import Writer
from smdlm.meter import Profile
from smdlm.optimizer import TrainState
from smdlm.train import Training, check_saved, run


def train(experiment: Experiment, workdir: Path, checkpointer: Checkpointer, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Trains to the end from where the workdir stands, evaluates, samples, and writes all files: the summary.

    meta: of the checkpoints. On all processes but the first nothing is written, and the summary is as good.
    """
    config, begin = experiment.config, time.time()
    prompt_ids(experiment)  # a mistake at the end of hours would be found now
    if config.sampling.viewer:
        command.check_folder("sampling.viewer", local_path("sampling.viewer", config.sampling.viewer).parent)
    start = _start(experiment, checkpointer)
    state, base, data = start.state, start.base, start.data
    chief = jax.process_index() == 0
    if chief:  # that of a shorter run: a summary stands for a finished run, also to the scripts of launch/
        (workdir / "summary.json").unlink(missing_ok=True)
        save_tokenizer(experiment.vocabulary, workdir / "tokenizer")  # sampling needs no corpus
    writer = Writer(workdir, total_steps=config.updates, enabled=chief, start_step=data["next_index"])
    if config.train.wandb:
        writer.track(config.train.wandb, meta.get("config", {}))

    def seconds() -> float:
        return start.seconds + time.time() - begin

    def whole(state: TrainState, omega: str) -> Any:
        return experiment.denoiser.whole(weights(state.ema, state.params, omega), base)

    def evaluate_state(state: TrainState) -> dict[str, Value]:
        return evaluate(experiment, whole(state, config.eval.omega))

    step = experiment.train_step()
    training = Training(
        config=config.train,
        steps=config.updates,
        step_fn=step if base is None else lambda state, batch: step(state, batch, base),
        batches=experiment.train_batches(data["next_index"]),
        put=experiment.put,
        tokens_per_batch=round(config.data.batch_size * experiment.data.row_tokens),
        checkpointer=checkpointer,
        writer=writer,
        meta=lambda: {**meta, **start.facts, **described(experiment), "wall_s": seconds()},
        evaluate=evaluate_state,
        flops_per_batch=training_flops(experiment),
        profile=Profile(config.train.profile if chief else "", workdir / "profile"),
    )
    with diverged(workdir):
        state, tokens_per_s = run(state, training, data.get("pending", []))
    check_saved(checkpointer, config.updates)
    params = whole(state, config.sampling.omega)
    sampled = sample(experiment, params)
    values = {**evaluate_state(state), **sample_values(experiment, sampled)}
    writer.values(config.updates, values)
    writer.samples(f"step_{config.updates:08d}", sample_records(experiment, sampled))
    gate = experiment.denoiser.softmask.gate if experiment.denoiser.softmask else None
    writer.curves(values, gate.labels if gate else {})
    summary = {
        "wall_s": seconds(),
        "tokens_per_s": tokens_per_s or None,
        **_summary(experiment, state, values, sampled),
    }
    writer.summary(summary)
    writer.close()
    write_viewer(experiment, params)  # last, for a folder that cannot be written
    return summary


def _summary(
    experiment: Experiment, state: TrainState, values: Mapping[str, Value], sampled: Sampled
) -> dict[str, Any]:
    """What summary.json says of the end of a run, but for its times."""
    gate = experiment.denoiser.softmask.gate if experiment.denoiser.softmask else None
    readable = experiment.denoiser.omega(state.params)
    return {
        "steps": experiment.config.updates,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        **{name: float(value) for name, value in readable.items()},
        "omega": {gate.labels[name]: float(value) for name, value in readable.items()},
        "evaluated": f"validation, fixed masks, {described_weights(experiment.config.eval.omega)}",
        **{f"val_{name}": value.mean for name, value in values.items()},
        "values": {name: value.plain() for name, value in values.items()},
        "forwards_per_sample": sampled.forwards,
        "samples": sampled.texts[:3],
    }


@dataclasses.dataclass(frozen=True)
class _Start:
    """Where training begins.

    Attributes:
      base: weights of a frozen network, else None. facts: of it, for the meta of checkpoints.
      data: what the checkpoint says of the data. seconds: spent before.
    """

    state: TrainState
    base: Any
    facts: dict[str, Any]
    data: dict[str, Any]
    seconds: float = 0.0


def _start(experiment: Experiment, checkpointer: Checkpointer) -> _Start:
    """Resumed, continued from the weights of another run (or beside them), or new."""
    fresh, base, facts, source = checkpointer.latest_step() is None, None, {}, experiment.config.train.init_from
    if source and (fresh or experiment.frozen):
        loaded = load_weights(experiment, init_source(experiment.config.train))
        if jax.process_index() == 0:
            print(loaded.line)
        if experiment.frozen:
            base, facts["base"] = frozen_base(experiment, loaded)
    if not fresh:
        state, data, meta = checkpointer.restore(experiment.abstract_state())
        check_vocabulary(experiment, meta)
        if experiment.frozen:
            check_same_base(meta.get("base"), facts["base"])
        logging.info("continuing at step %d", data["next_index"])
        return _Start(state, base, facts, data, meta.get("wall_s", 0.0))
    state = experiment.start_from(loaded.params) if source else experiment.init_state()
    return _Start(state, base, facts, {"next_index": 0})


def finished(workdir: Path, checkpointer: Checkpointer, steps: int) -> dict[str, Any] | None:
    """The summary of a run that is complete, else None."""
    try:
        summary = json.loads((workdir / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    # Without "values" it was written by a program that knew one metric only: the end is done again.
    complete = summary.get("steps") == steps and checkpointer.latest_step() == steps
    return summary if complete and "values" in summary else None
