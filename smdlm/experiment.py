"""What one does with an experiment: train, evaluate, sample, restore. The same for programs, notebooks and tests.

WORKDIR/checkpoints/      see io/checkpoint.py
WORKDIR/metrics.jsonl ..  see io/writer.py
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging

from smdlm import command
from smdlm.build import Experiment
from smdlm.config import SamplingConfig
from smdlm.convert.folders import import_weights
from smdlm.data.kept import save_tokenizer
from smdlm.data.sources import Lab
from smdlm.evaluate import SAMPLE_METRICS
from smdlm.evaluate.base import Subject, Value, weights
from smdlm.evaluate.samples import Samples
from smdlm.evaluate.text import words
from smdlm.files import local_path
from smdlm.identity import check_same_base, diverged, weights_hash
from smdlm.io import viewer
from smdlm.io.checkpoint import Checkpointer, checkpointer_of
from smdlm.io.writer import Writer
from smdlm.mesh.arrays import fetch
from smdlm.mesh.rules import replicated
from smdlm.optimizer import TrainState
from smdlm.sampling.blocks import BlockDecoder
from smdlm.sampling.generate import Generated, Generator
from smdlm.sampling.loop import Sampler
from smdlm.sampling.policies import POLICIES, Entropy, Margin, MaxProbability, Policy
from smdlm.sampling.trace import Trace, record
from smdlm.sampling.transfer import Transfer
from smdlm.train import TrainConfig, Training, check_saved, run


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Filled canvases.

    Attributes:
      texts: with the prompts in them. ids: [B, L] i32.
      forwards: passes really run (the nominal NFE is sampling.steps).
    """

    texts: list[str]
    ids: np.ndarray
    forwards: int


# ---------------------------------------------------------------------------------------------- evaluating, sampling


def subject(experiment: Experiment, params: Any) -> Subject:
    """What the metrics see of an experiment with these weights."""
    source = experiment.config.data.source
    return Subject(
        objective=experiment.objective,
        params=params,
        token_bytes=experiment.vocabulary.token_bytes,
        batches=experiment.eval_batches,
        place=experiment.place,
        sample=lambda: sample(experiment, params).ids,
        law=source.law if isinstance(source, Lab) else None,
    )


def evaluate(experiment: Experiment, params: Any) -> dict[str, Value]:
    """Every metric of config.eval for params (`restore` with eval.omega)."""
    seen = subject(experiment, params)
    return {name: value for metric in experiment.config.eval.metrics for name, value in metric.run(seen).items()}


def described_weights(omega: str) -> str:
    return "EMA weights" + (", live omega" if omega == "live" else "")


def sample(experiment: Experiment, params: Any) -> Sampled:
    """sampling.count texts; the prompt, if any, stands at the start of every canvas and never changes."""
    config = experiment.config.sampling
    return fill(experiment, params, _canvas(experiment, config.count), config.seed)


def _canvas(experiment: Experiment, count: int) -> np.ndarray:
    """[count, L] i32: the prompt, and masks."""
    prompt = prompt_ids(experiment)
    canvas = np.full((count, experiment.config.data.seq_len), experiment.denoiser.mask_id, np.int32)
    canvas[:, : len(prompt)] = prompt
    return canvas


def prompt_ids(experiment: Experiment) -> np.ndarray:
    """sampling.prompt as tokens [n]. ValueError if it leaves nothing of the canvas to fill."""
    prompt, length = experiment.config.sampling.prompt, experiment.config.data.seq_len
    ids = experiment.vocabulary.encode(prompt) if prompt else np.zeros(0, np.int32)
    if len(ids) >= length:
        raise ValueError(f"sampling.prompt: got {len(ids)} tokens, wanted fewer than data.seq_len = {length}")
    return ids


def fill(experiment: Experiment, params: Any, canvas: np.ndarray, seed: int) -> Sampled:
    """Fills the masks of a canvas [B, L] i32 with the experiment's sampler."""
    samples = experiment.sampler(params, jax.random.key(seed), experiment.place(canvas))
    ids = fetch(samples.tokens)
    return Sampled([experiment.vocabulary.decode(row) for row in ids], ids, int(samples.forwards))


def watch(experiment: Experiment, params: Any) -> dict[str, Trace]:
    """Sample 1 of `sample`, step by step, by the name of the run: 'soft-masked', beside it 'binary', or that alone.

    The binary run of a soft-masked model has the same weights and the same noise, and nothing is fed back in it.

    Raises:
      ValueError: one line; a causal model, which has no masks to look at.
    """
    sampler = experiment.sampler
    if not isinstance(sampler, Sampler):
        raise ValueError("watch: got a causal (AR) model, wanted a diffusion model: it has no masks")
    key = jax.random.key(experiment.config.sampling.seed)
    canvas = experiment.place(_canvas(experiment, 1))
    runs = {"binary": dataclasses.replace(sampler, use_feedback=False)}
    if sampler.use_feedback:
        runs = {"soft-masked": sampler, **runs}
    return {name: record(run, params, key, canvas)[0] for name, run in runs.items()}


def show(experiment: Experiment, runs: Mapping[str, Trace]) -> viewer.Show:
    """What a page needs to know of recorded runs."""
    config = experiment.config.sampling
    settings = (
        f"{_name_of(config.policy)}, {config.steps} steps, seed {config.seed}, temperature {config.temperature:g}"
    )
    return viewer.Show(runs, viewer.words_of(experiment.vocabulary), settings=f"{settings}, top-p {config.top_p:g}")


def _name_of(policy: Policy) -> str:
    return next(name for name, cls in POLICIES.items() if cls is type(policy))


def write_viewer(experiment: Experiment, params: Any) -> None:
    """config.sampling.viewer, where it is asked for; all processes must call it."""
    if experiment.config.sampling.viewer:
        seen = show(experiment, watch(experiment, params))
        if jax.process_index() == 0:
            viewer.write(local_path("sampling.viewer", experiment.config.sampling.viewer), seen)


def sample_records(experiment: Experiment, sampled: Sampled) -> list[dict[str, Any]]:
    """What is kept of each sample: text, token ids, seed (with the sample's number in its batch) and settings."""
    settings = _settings(experiment.config.sampling)
    shared = {"seed": settings.pop("seed"), "forwards": sampled.forwards, "settings": settings}
    return [
        {"text": text, "ids": ids.tolist(), "number": i, **shared}
        for i, (text, ids) in enumerate(zip(sampled.texts, sampled.ids, strict=True))
    ]


def sample_values(experiment: Experiment, sampled: Sampled) -> dict[str, Value]:
    """What config.eval.samples asks of these samples."""
    names = [name for name in experiment.config.eval.samples.split(",") if name]
    known = known_words(experiment) if "real_words" in names else frozenset()
    fingerprint = experiment.vocabulary.fingerprint
    samples = Samples(tuple(sampled.texts), sampled.ids, fingerprint, known_words=known)
    return {name: value for metric in names for name, value in SAMPLE_METRICS[metric]().run(samples).items()}


def known_words(experiment: Experiment) -> frozenset[str]:
    """The words of the training text, of its first two million tokens."""
    blocks = experiment.data.train
    few = range(min(len(blocks), 2**21 // experiment.config.data.seq_len))
    return frozenset(words(experiment.vocabulary.decode(np.concatenate([blocks[i] for i in few]))))


def _settings(config: SamplingConfig) -> dict[str, Any]:
    """config.sampling as JSON values."""
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    del settings["viewer"]
    return settings | {"policy": {"name": type(config.policy).__name__, **dataclasses.asdict(config.policy)}}


# --------------------------------------------------------------------------------------------------------- generating


def make_generator(experiment: Experiment) -> Generator:
    """What answers prompts, from config.sampling and config.generate. ValueError for a causal model."""
    config, sampling, denoiser = experiment.config.generate, experiment.config.sampling, experiment.denoiser
    policy = sampling.policy
    if config.parity and isinstance(policy, (MaxProbability, Margin, Entropy)):
        policy = Transfer(policy, sampled=sampling.temperature > 0)
    decoder = BlockDecoder(
        denoiser=denoiser,
        readout=experiment.config.readout,
        policy=policy,
        filters=sampling.filters,
        block=config.block,
        cache=config.cache,
        ahead=config.ahead,
        use_feedback=sampling.use_feedback and denoiser.softmask is not None,
        parity=config.parity,
    )
    if config.block:  # else one row after another would be refused, after the first has been waited for
        decoder.plan(config.new_tokens, 0, sampling.steps)
    length = experiment.config.data.seq_len
    return Generator(decoder, experiment.vocabulary, config, length, sampling.steps, experiment.place)


def answer_records(experiment: Experiment, generated: Generated) -> list[dict[str, Any]]:
    """What is kept of each answer: the prompt as it was given, text, token ids, seed, passes and settings."""
    settings = _settings(experiment.config.sampling) | dataclasses.asdict(experiment.config.generate)
    del settings["seed"], settings["prompt"], settings["count"]
    return [
        {
            **answer.prompt.given,
            "text": answer.text,
            "ids": answer.ids.tolist(),
            "seed": answer.prompt.seed,
            "forwards": answer.forwards,
            "finish": answer.finish,
            "settings": settings,
        }
        for answer in generated.answers
    ]


# ---------------------------------------------------------------------------------------------------------- restoring


def restore(experiment: Experiment, checkpointer: Checkpointer, omega: str) -> tuple[Any, int]:
    """(weights for evaluation or sampling, step). Raises ValueError if they are of another size or vocabulary."""
    abstract, _ = experiment.abstract_params()
    ema, meta = checkpointer.restore_params(abstract, "ema")
    check_vocabulary(experiment, meta)
    params = checkpointer.restore_params(abstract, "params", meta["step"])[0] if omega == "live" else None
    base = None
    if experiment.frozen:
        base, facts = frozen_base(experiment, load_weights(experiment, init_source(experiment.config.train)))
        check_same_base(meta.get("base"), facts)
    return experiment.denoiser.whole(weights(ema, params, omega), base), meta["step"]


def described(experiment: Experiment) -> dict[str, Any]:
    """What a checkpoint keeps of the network, for conversions."""
    return {"model": dataclasses.asdict(experiment.network), "mask_id": experiment.denoiser.mask_id}


def check_vocabulary(experiment: Experiment, meta: Mapping[str, Any]) -> None:
    """ValueError if a checkpoint's ids mean other tokens: tables of equal padded size hide that."""
    tokenizer = experiment.vocabulary
    mine = {"model.vocab_size": experiment.denoiser.vocab_size, "mask_id": tokenizer.mask_id}
    theirs = {"model.vocab_size": meta.get("model", {}).get("vocab_size"), "mask_id": meta.get("mask_id")}
    mine["tokenizer"], theirs["tokenizer"] = tokenizer.fingerprint, meta.get("tokenizer")
    wrong = [name for name, value in theirs.items() if value not in (None, mine[name])]
    if wrong:
        raise ValueError(
            f"checkpoint: got {', '.join(f'{n} {theirs[n]}' for n in wrong)}, wanted "
            f"{', '.join(f'{n} {mine[n]}' for n in wrong)} (data.tokenizer {tokenizer.name!r}): "
            "use the tokenizer it was trained with"
        )


def init_source(config: TrainConfig) -> Checkpointer:
    """The checkpoints that train.init_from names, made by train.init_import where there are none.

    Raises:
      FileNotFoundError: there are none. ValueError: what they would be made of does not fit.
    """
    workdir = local_path("train.init_from", config.init_from)
    source = checkpointer_of(workdir)
    if source.latest_step() is None and config.init_import and jax.process_count() == 1:
        kind, _, path = config.init_import.partition(":")
        print(f"importing {path} into {workdir}", flush=True)
        for line in import_weights(kind, local_path("train.init_import", path), workdir):
            print(line, flush=True)
    if source.latest_step() is None:
        raise FileNotFoundError(
            f"train.init_from: got no checkpoint in {source.directory}, wanted a workdir that holds one: train it, or "
            f"python -m smdlm.convert import mdlm FILE {config.init_from}"
        )
    return source


def continue_from(experiment: Experiment, source: Checkpointer) -> tuple[TrainState, str]:
    """(fresh state with the raw weights of another run, a line that says what was loaded and where omega is from).

    The EMA starts at the loaded weights: the reference builds its EMA before it loads them, from a random start, which
    the warm-up forgets within a few dozen updates (weight 10! / n^9). Raises as `load_weights` does.
    """
    loaded = load_weights(experiment, source)
    return experiment.start_from(loaded.params), loaded.line


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The raw weights of another run, {'backbone', 'softmask'} on the mesh, and a line on what they are."""

    params: Any
    line: str


def load_weights(experiment: Experiment, source: Checkpointer) -> Loaded:
    """The newest raw weights of another run: the network's own, and an omega that this model has a place for.

    omega is newly initialised if the checkpoint has none of its own (it is binary, or a conversion made one up), and
    left out if this model has none.

    Raises:
      CheckpointMismatch: other sizes, every differing leaf listed. ValueError: another vocabulary.
    """
    abstract = {"backbone": experiment.abstract_base()[0], "softmask": experiment.abstract_params()[0]["softmask"]}
    saved, meta = source.shapes("params")
    made_up = meta.get("convert", {}).get("new", [])
    omega = saved.get("softmask", {})
    keep = bool(abstract["softmask"]) and any(f"softmask/{name}" not in made_up for name in omega)
    if not keep:
        everywhere = replicated(experiment.mesh)

        def whole(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

        abstract = {**abstract, "softmask": jax.tree.map(whole, omega)}
    params, _ = source.restore_params(abstract, "params", meta["step"])
    check_vocabulary(experiment, meta)
    if not keep:
        key = jax.random.key(experiment.config.train.seed)
        params["softmask"] = nn.meta.unbox(experiment.denoiser.init_omega(key))
    names = ", ".join(f"softmask/{name}" for name in sorted(params["softmask"]))
    origin = f"{'from the checkpoint' if keep else 'newly initialised'}: {names}" if names else "none"
    what = "beside the frozen" if experiment.frozen else "from"
    return Loaded(params, f"starting {what} step {meta['step']} of {source.directory}, raw weights; omega {origin}")


def frozen_base(experiment: Experiment, loaded: Loaded) -> tuple[Any, dict[str, Any]]:
    """(weights of the frozen network, what a checkpoint keeps of them)."""
    base = loaded.params["backbone"]
    config = experiment.config
    facts = {"workdir": config.train.init_from, "hash": weights_hash(base), "adapter": config.adapter.described}
    return base, facts


# ----------------------------------------------------------------------------------------------------------- training


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
    readable = experiment.denoiser.omega(state.params)
    summary = {
        "steps": config.updates,
        "wall_s": seconds(),
        "tokens_per_s": tokens_per_s or None,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        **{name: float(value) for name, value in readable.items()},
        "omega": {gate.labels[name]: float(value) for name, value in readable.items()},
        "evaluated": f"validation, fixed masks, {described_weights(config.eval.omega)}",
        **{f"val_{name}": value.mean for name, value in values.items()},
        "values": {name: value.plain() for name, value in values.items()},
        "forwards_per_sample": sampled.forwards,
        "samples": sampled.texts[:3],
    }
    writer.summary(summary)
    writer.close()
    write_viewer(experiment, params)  # last, for a folder that cannot be written
    return summary


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
