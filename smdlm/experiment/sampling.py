"""What a trained experiment is asked: values of its metrics, samples, answers, a run to look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from smdlm.build import Experiment
from smdlm.data.sources import Lab
from smdlm.evaluate import SAMPLE_METRICS
from smdlm.evaluate.base import Subject, Value
from smdlm.evaluate.samples import Samples
from smdlm.evaluate.text import words
from smdlm.files import local_path
from smdlm.io import viewer
from smdlm.mesh.arrays import fetch
from smdlm.meter import Stopwatch
from smdlm.sampling.blocks import BlockDecoder
from smdlm.sampling.generate import Generated, Generator, Prompt
from smdlm.sampling.loop import Sampler
from smdlm.sampling.policies import POLICIES, Entropy, Margin, MaxProbability, Policy
from smdlm.sampling.trace import Trace, record, record_blocks
from smdlm.sampling.transfer import Transfer


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Filled canvases.

    Attributes:
      texts: with the prompts in them. ids: [B, L] i32.
      forwards: passes really run (the nominal NFE is sampling.steps).
      seconds: of the sampler, without compiling it.
    """

    texts: list[str]
    ids: np.ndarray
    forwards: int
    seconds: float


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
    with Stopwatch() as watch:
        samples = experiment.sampler(params, jax.random.key(seed), experiment.place(canvas))
        ids = fetch(samples.tokens)
    return Sampled([experiment.vocabulary.decode(row) for row in ids], ids, int(samples.forwards), watch.seconds)


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


def watch_answer(experiment: Experiment, params: Any, prompt: Prompt) -> dict[str, Trace]:
    """How a prompt is answered, pass by pass: with the cache of config.generate and beside it without one; where it
    uses none, with feedback and beside it without."""
    made = make_generator(experiment)
    decoder = made.decoder
    if decoder.cache != "none" and not prompt.infill:
        decoders = {f"{decoder.cache} cache": decoder, "no cache": dataclasses.replace(decoder, cache="none")}
    elif decoder.use_feedback:
        decoders = {"soft-masked": decoder, "binary": dataclasses.replace(decoder, use_feedback=False)}
    else:
        decoders = {"binary": decoder}
    (batch,) = made.batches([prompt])
    runs = {}
    for name, one in decoders.items():
        passes = dataclasses.replace(made, decoder=one).forwards(params, batch, [prompt])
        runs[name] = record_blocks(one, params, passes, batch.seen, 0)
    return runs


def show(experiment: Experiment, runs: Mapping[str, Trace]) -> viewer.Show:
    """What a page needs to know of recorded runs."""
    config = experiment.config.sampling
    settings = (
        f"{_name_of(config.policy)}, {config.steps} steps, seed {config.seed}, temperature {config.temperature:g}"
    )
    return viewer.Show(runs, viewer.words_of(experiment.vocabulary), settings=f"{settings}, top-p {config.top_p:g}")


def _name_of(policy: Policy) -> str:
    return next(name for name, cls in POLICIES.items() if cls is type(policy))


def write_viewer(experiment: Experiment, params: Any, prompt: Prompt | None = None) -> None:
    """config.sampling.viewer, where it is asked for: of a sample, or of the answer to a prompt. All processes must call
    it."""
    if experiment.config.sampling.viewer:
        runs = watch_answer(experiment, params, prompt) if prompt else watch(experiment, params)
        seen = show(experiment, runs)
        if jax.process_index() == 0:
            viewer.write(local_path("sampling.viewer", experiment.config.sampling.viewer), seen)


def sample_records(experiment: Experiment, sampled: Sampled) -> list[dict[str, Any]]:
    """What is kept of each sample: text, token ids, seed (with the sample's number in its batch) and settings."""
    settings = experiment.config.sampling.described
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
    return frozenset(words(experiment.vocabulary.decode(experiment.data.train_ids(2**21))))


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
    settings = experiment.config.sampling.described | dataclasses.asdict(experiment.config.generate)
    for field in ("seed", "prompt", "count", "feedback_source", "refresh"):  # of the sampler alone
        del settings[field]
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
