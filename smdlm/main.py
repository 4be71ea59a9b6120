"""Command line:

    python -m smdlm.main --config=configs/tiny.py [--workdir=DIR] [--mode=train|eval|sample] [--config.x.y=z]

Running the same command again continues an unfinished run and prints the summary of a finished one. On several hosts
the same command runs on each, with --distributed and a workdir that all of them see.
"""

from __future__ import annotations

import dataclasses
import json
import logging as stdlib_logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from smdlm import command, cpu, runtime
from smdlm.build import Experiment, build, read
from smdlm.checkpoint import CheckpointDamaged, Checkpointer
from smdlm.evaluate.likelihood import Estimate, likelihood, weights
from smdlm.partition import fetch
from smdlm.train import NonFiniteLoss, run
from smdlm.writer import Writer

CONFIG = command.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything goes; runs/<config name> by default.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "sample"], "train includes the final eval and samples.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Delete the workdir's run and start anew.")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes, each started with this command.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where the cluster does not tell.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Where the cluster does not tell.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "0 .. num_processes - 1, where the cluster does not tell.")


def evaluate(experiment: Experiment, params: Any) -> dict[str, Estimate]:
    """Validation likelihood of params (`weights` of eval.omega)."""
    return likelihood(
        experiment.objective,
        params,
        experiment.eval_batches(),
        experiment.data.tokenizer.token_bytes,
        experiment.config.eval,
        experiment.place,
    )


def sample(experiment: Experiment, params: Any) -> tuple[list[str], int]:
    """(texts, forwards really run). The prompt, if any, stands at the start of every canvas and never changes."""
    config, tokenizer = experiment.config.sampling, experiment.data.tokenizer
    length = experiment.config.data.seq_len
    prompt = tokenizer.encode(config.prompt) if config.prompt else np.zeros(0, np.int32)
    if len(prompt) >= length:
        raise ValueError(f"sampling.prompt: got {len(prompt)} tokens, wanted fewer than data.seq_len = {length}")
    canvas = np.full((config.count, length), experiment.denoiser.mask_id, np.int32)
    canvas[:, : len(prompt)] = prompt
    samples = experiment.sampler(params, jax.random.key(config.seed), experiment.place(canvas))
    return [tokenizer.decode(row) for row in fetch(samples.tokens)], int(samples.forwards)


def _train(experiment: Experiment, workdir: Path, checkpointer: Checkpointer, meta: dict[str, Any]) -> None:
    config, begin = experiment.config, time.time()
    previous, start_step, pending = 0.0, 0, []
    if checkpointer.latest_step() is not None:
        state, data, saved = checkpointer.restore(experiment.abstract_state())
        experiment.check_vocabulary(saved)
        start_step, pending, previous = data["next_index"], data.get("pending", []), saved.get("wall_s", 0.0)
        logging.info("continuing at step %d", start_step)
    elif config.train.init_from:
        state, line = experiment.continue_from(_init_source(config.train.init_from))
        if jax.process_index() == 0:
            print(line)
    else:
        state = experiment.init_state()
    chief = jax.process_index() == 0
    if chief:  # that of a shorter run: a summary stands for a finished run, also to the scripts of launch/
        (workdir / "summary.json").unlink(missing_ok=True)
    writer = Writer(workdir, total_steps=experiment.steps, enabled=chief, start_step=start_step)

    def validate(state: Any) -> dict[str, float]:
        return _scalars(evaluate(experiment, weights(state.ema, state.params, config.eval.omega)))

    # A live view, so that each checkpoint records the time spent so far.
    meta = _Clocked(meta, begin - previous)
    state, tokens_per_s = run(
        state,
        config=config.train,
        steps=experiment.steps,
        step_fn=experiment.train_step(),
        batches=experiment.train_batches(start_step),
        put=experiment.put,
        tokens_per_batch=config.data.batch_size * config.data.seq_len,
        checkpointer=checkpointer,
        writer=writer,
        meta=meta,
        evaluate=validate,
        pending=pending,
    )
    estimates = evaluate(experiment, weights(state.ema, state.params, config.eval.omega))
    writer.scalars(experiment.steps, _scalars(estimates))
    texts, forwards = sample(experiment, weights(state.ema, state.params, config.sampling.omega))
    writer.samples(experiment.steps, texts)
    writer.curves()
    checkpointer.wait()
    omega = {k: float(v) for k, v in experiment.denoiser.omega(state.params).items()}
    summary = {
        "val_bits_per_byte_one_pass": _bits(estimates, "one_pass", "next_token"),
        "val_bits_per_byte_two_pass": _bits(estimates, "two_pass"),
        "val_bits_per_byte_carried": _bits(estimates, "carried"),
        "tokens_per_s": tokens_per_s or None,
        **{name: omega.get(name) for name in ("omega_s", "omega_a", "omega_b")},
        "steps": experiment.steps,
        "wall_s": time.time() - begin + previous,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "forwards_per_sample": forwards,
        "estimates": {name: vars(e) | {"perplexity": e.perplexity} for name, e in estimates.items()},
        "samples": texts[:3],
    }
    writer.summary(summary)
    writer.close()
    if chief:
        _print_summary(summary, workdir)


class _Clocked(dict):
    """meta whose wall_s is the time at which it is copied."""

    def __init__(self, values: dict[str, Any], begin: float):
        super().__init__(values)
        self._begin = begin

    def keys(self):
        self["wall_s"] = time.time() - self._begin
        return super().keys()


def _bits(estimates: dict[str, Estimate], *names: str) -> float | None:
    return next((estimates[n].bits_per_byte for n in names if n in estimates), None)


def _scalars(estimates: dict[str, Estimate]) -> dict[str, float]:
    return {f"val/bits_per_byte_{n}": e.bits_per_byte for n, e in estimates.items()} | {
        f"val/nats_per_token_{n}": e.nats_per_token for n, e in estimates.items()
    }


LABELS = {
    "one_pass": "one pass (no feedback)",
    "two_pass": "two passes (feedback)",
    "carried": "carried feedback",
    "next_token": "next token (exact)",
}


def _print_estimates(estimates: dict[str, dict[str, float]]) -> None:
    print(f"\n{'validation':26}{'bits/byte':>18}{'nats/token':>18}{'perplexity':>12}")
    for name, e in estimates.items():
        bits = f"{e['bits_per_byte']:.4f} ± {e['bits_interval']:.4f}"
        nats = f"{e['nats_per_token']:.4f} ± {e['nats_interval']:.4f}"
        print(f"{LABELS[name]:26}{bits:>18}{nats:>18}{e['perplexity']:12.3f}")
    e = next(iter(estimates.values()))
    print(f"({e['blocks']} validation blocks, fixed masks, {e['weights']}; ± is a 95 % interval over blocks)")


def _print_summary(summary: dict[str, Any], workdir: Path) -> None:
    _print_estimates(summary["estimates"])
    rows = [
        ("updates", f"{summary['steps']}"),
        ("parameters", f"{summary['parameters']:,}"),
        ("tokens per second", f"{summary['tokens_per_s']:,.0f}" if summary["tokens_per_s"] else "-"),
    ]
    if summary["omega_s"] is not None:
        names = {"omega_s": "scale", "omega_a": "steepness", "omega_b": "centre"}
        learned = ", ".join(f"{names[k]} {summary[k]:.3g}" for k in names if summary[k] is not None)
        rows.append(("learned omega", learned))
    rows += [
        ("wall time", f"{summary['wall_s']:.0f} s"),
        ("files", f"{workdir}/: summary.json metrics.jsonl samples/ loss.png omega.png checkpoints/ tensorboard/"),
    ]
    print()
    for name, value in rows:
        print(f"{name:26}{value}")
    for i, text in enumerate(summary["samples"]):
        print(f"\n--- sample {i + 1} ({summary['forwards_per_sample']} forwards)\n{text.strip()}")
    sys.stdout.flush()


def _restore_weights(experiment: Experiment, checkpointer: Checkpointer, omega: str) -> tuple[Any, int]:
    """(weights for evaluation or sampling, step). Raises ValueError if they are of another size or vocabulary."""
    abstract, _ = experiment.abstract_params()
    ema, meta = checkpointer.restore_params(abstract, "ema")
    experiment.check_vocabulary(meta)
    params = checkpointer.restore_params(abstract, "params", meta["step"])[0] if omega == "live" else None
    return weights(ema, params, omega), meta["step"]


def _init_source(workdir: str) -> Checkpointer:
    source = Checkpointer(Path(workdir) / "checkpoints")
    if source.latest_step() is None:
        raise FileNotFoundError(
            f"train.init_from: got no checkpoint in {source.directory}, wanted a workdir that holds one: train it, or "
            f"python -m smdlm.convert import mdlm FILE {workdir}"
        )
    return source


def _finished(workdir: Path, checkpointer: Checkpointer, steps: int) -> dict[str, Any] | None:
    """The summary of a run that is complete, else None."""
    try:
        summary = json.loads((workdir / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if summary.get("steps") == steps and checkpointer.latest_step() == steps else None


def _report(experiment: Experiment, workdir: Path, checkpointer: Checkpointer) -> None:
    """--mode=eval and --mode=sample."""
    config, chief = experiment.config, jax.process_index() == 0
    omega = config.eval.omega if MODE.value == "eval" else config.sampling.omega
    params, step = _restore_weights(experiment, checkpointer, omega)
    if chief:
        live = ", live omega" if omega == "live" else ""
        print(f"checkpoint of step {step} in {checkpointer.directory}, EMA weights{live}")
    if MODE.value == "eval":
        estimates = evaluate(experiment, params)
        if chief:
            _print_estimates({n: vars(e) | {"perplexity": e.perplexity} for n, e in estimates.items()})
        return
    texts, forwards = sample(experiment, params)
    Writer(workdir, total_steps=step, enabled=chief).samples(step, texts)
    for i, text in enumerate(texts if chief else ()):
        print(f"\n--- sample {i + 1} ({forwards} forwards)\n{text.strip()}")


def _check_same_config(workdir: Path, saved: dict[str, Any], asked: dict[str, Any]) -> None:
    """ValueError if a finished run answers another question: it differs in a field that shapes training."""
    free = {"log_every", "save_every", "eval_every", "keep"}
    different = [
        f"{section}.{field}"
        for section in ("model", "data", "noise", "times", "softmask", "optimizer", "train")
        for field in sorted({*saved.get(section, {}), *asked.get(section, {})} - free)
        if saved.get(section, {}).get(field) != asked.get(section, {}).get(field)
    ]
    if different:
        raise ValueError(
            f"{workdir}: got a finished run with another {', '.join(different)}, wanted the same: name another "
            "--workdir, or --overwrite"
        )


def main(_: Sequence[str]) -> None:
    stdlib_logging.getLogger("jax").setLevel(stdlib_logging.WARNING)  # INFO names every backend that is not there
    config = read(CONFIG.value, config_flags.get_override_values(flags.FLAGS["config"]))
    cpu.keep_memory()
    if DISTRIBUTED.value:
        runtime.join(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    elif any(flag.value is not None for flag in (COORDINATOR, NUM_PROCESSES, PROCESS_ID)):
        raise ValueError("--coordinator, --num_processes, --process_id: got a value, wanted --distributed beside it")
    chief = jax.process_index() == 0
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = Path(WORKDIR.value or f"runs/{name}")
    directory = workdir / "checkpoints"
    if MODE.value != "eval":
        command.check_folder("--workdir", workdir)
    runtime.keep_compiled(workdir.parent / "compiled")
    if OVERWRITE.value and MODE.value == "train" and directory.exists() and chief:
        shutil.rmtree(directory)
        (workdir / "summary.json").unlink(missing_ok=True)
    snapshot = json.loads(CONFIG.value.to_json_best_effort())
    runtime.meet(workdir, config=snapshot, mode=MODE.value)
    checkpointer = Checkpointer(directory, keep=config.train.keep)
    if MODE.value == "train":
        summary = _finished(workdir, checkpointer, config.train.updates(config.softmask.p_sm))
        if summary:
            _check_same_config(workdir, checkpointer.read_meta().get("config", snapshot), snapshot)
            if chief:
                print(f"{workdir} holds a finished run (--overwrite starts anew):")
                _print_summary(summary, workdir)
            return
        if config.train.init_from and checkpointer.latest_step() is None:
            _init_source(config.train.init_from)  # before the data is read
    elif checkpointer.latest_step() is None:
        raise FileNotFoundError(
            f"{MODE.value}: got no checkpoint in {directory}, wanted a trained run: --mode=train first"
        )
    experiment = build(config, workdir)
    data = {"tokenizer": experiment.data.tokenizer.fingerprint, "content_hash": experiment.data.content_hash}
    runtime.meet(workdir, **data, checkpoint=checkpointer.latest_step())
    # The one place where the mesh is set: training, evaluation and sampling are traced and run under it.
    with jax.set_mesh(experiment.mesh):
        if MODE.value == "train":
            model = dataclasses.asdict(experiment.denoiser.model.config)
            _train(experiment, workdir, checkpointer, {"config": snapshot, "model": model, **data})
        else:
            _report(experiment, workdir, checkpointer)
    checkpointer.close()


def _fail(error: BaseException) -> None:
    """One line (a mismatch lists its leaves below it), exit status 2."""
    print(f"error: {command.message(error)}", file=sys.stderr)
    if jax.distributed.is_initialized():
        # The usual exit would wait for the other processes, which may be waiting for this one.
        sys.stderr.flush()
        os._exit(2)
    sys.exit(2)


def _parse(argv: Sequence[str]) -> Sequence[str]:
    try:
        command.check_config_file(argv)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise ValueError(f"arguments: got {rest[1:]}, wanted only --flags")
        return rest
    except command.MISTAKES as error:
        _fail(error)
        raise


def _main(argv: Sequence[str]) -> None:
    try:
        main(argv)
    except (ValueError, OSError, CheckpointDamaged, NonFiniteLoss, ImportError) as error:
        _fail(error)


if __name__ == "__main__":
    app.run(_main, flags_parser=_parse)
