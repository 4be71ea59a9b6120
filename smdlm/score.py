"""A run measured under a protocol (--mode=score) or on text it was not trained on (--mode=zeroshot).

WORKDIR/samples/NAME.jsonl    the protocol's samples, batch by batch; a killed run goes on where it was
WORKDIR/samples/NAME.cache/   what slow metrics have computed
WORKDIR/results/NAME.json     the record, with NAME.npz; once it is there, the measurement is done
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging

import smdlm
from smdlm import experiment
from smdlm.build import Experiment, assemble, build
from smdlm.config import Config
from smdlm.data.kept import tokenizer_of_run
from smdlm.data.sources import make_source
from smdlm.data.text import ArrayBlocks, batches
from smdlm.evaluate import zeroshot
from smdlm.evaluate.base import Subject, Value
from smdlm.evaluate.compare import FORMATS, entries, table
from smdlm.evaluate.genppl import Scorer
from smdlm.evaluate.likelihood import LABELS, Likelihood
from smdlm.evaluate.protocol import PRESETS, Protocol, preset
from smdlm.evaluate.record import Record, write_record
from smdlm.evaluate.samples import Ratio, Samples, append, facts, kept, read_samples
from smdlm.files import local_path, sha256
from smdlm.io.checkpoint import MANIFEST, Checkpointer


def define_flags() -> None:
    """Those of --mode=score, zeroshot and compare."""
    flags.DEFINE_enum("protocol", "tiny", list(PRESETS), "score: how samples are drawn and measured.")
    flags.DEFINE_list("also", [], "score: metrics beside the protocol's, e.g. code.")
    flags.DEFINE_integer("nfe", None, "score: nominal NFE, in place of the protocol's.", lower_bound=1)
    flags.DEFINE_string("samples", None, "score: a .jsonl of samples that are there, in place of drawing them.")
    flags.DEFINE_string("scorer", None, "score: workdir of the causal model that judges, trained or converted.")
    flags.DEFINE_string("scorer_config", None, "score: config file of a converted scorer.")
    flags.DEFINE_string("sets", "", "zeroshot: e.g. lm1b,ptb=text:ptb.test.txt,mine=jsonl:FILES.")
    flags.DEFINE_list("only", [], "compare: names of values; what the others depend on may differ.")
    flags.DEFINE_enum("format", FORMATS[0], FORMATS, "compare: of the table.")


@dataclasses.dataclass(frozen=True)
class Run:
    """What is measured: a workdir with its config (settings: as the dict of a record) and newest checkpoint."""

    workdir: Path
    config: Config
    settings: Mapping[str, Any]
    checkpointer: Checkpointer

    def checkpoint(self) -> dict[str, Any]:
        """Step and hash; the manifest holds the hashes of all files."""
        step = self.checkpointer.latest_step()
        return {"step": step, "sha256": sha256(self.checkpointer.directory / str(step) / MANIFEST)}

    def about(self) -> dict[str, Any]:
        """What every record says of the model."""
        data = self.checkpointer.read_meta().get("content_hash")
        return {"config": self.settings, "checkpoint": self.checkpoint(), "data": {"content_hash": data}}


def run(found: Run, given: Any) -> None:
    """--mode=score or zeroshot, as the flags say; prints values and where they are.

    Raises:
      FileNotFoundError, ValueError: one line; whatever does not fit, before anything is written.
    """
    if jax.process_count() > 1:
        raise ValueError(f"--mode={given.mode}: got {jax.process_count()} processes, wanted one")
    if given.mode == "zeroshot":
        files = zero_shot(found, given.sets)
    else:
        chosen = preset(given.protocol, given.nfe)
        chosen = dataclasses.replace(chosen, also=(*chosen.also, *given.also))
        there = given.samples and local_path("--samples", given.samples)
        files = [score(found, chosen, given.scorer, given.scorer_config, there)]
    for file in files:
        (entry,) = entries(str(file))
        print(table([[entry]], entry.names))
        labels = dict.fromkeys(value.label for values in entry.record.values.values() for value in values.values())
        print(f"({', '.join(labels)}; ± is a 95 % interval)\n{file}\n")


# ---------------------------------------------------------------------------------------------------------- protocols


def score(
    found: Run, protocol: Protocol, scorer: str | None, scorer_config: str | None = None, there: Path | None = None
) -> Path:
    """Draws a protocol's samples, measures them and writes the record: its file. What is there is not done again.

    there: a file of samples, in place of drawing them.
    """
    config = found.config
    if config.chat:
        raise ValueError("--mode=score: got a run on conversations, wanted one on running text (see --mode=generate)")
    protocol = protocol.filled(config.data.seq_len, config.sampling.steps, config.data.tokenizer)
    if scorer and protocol.scorer == "":
        raise ValueError(f"--scorer: got {scorer} for the protocol {protocol.name}, which has no scorer, wanted none")
    judge = load_scorer(scorer, scorer_config) if scorer else None
    config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, **protocol.sampling()))
    sampler = {name: config.sampling.described[name] for name in ("use_feedback", "feedback_source", "policy")}
    drawn = {"protocol": protocol.drawn(), "sampler": sampler, "checkpoint": found.checkpoint()}
    stem = f"{protocol.name}-nfe{protocol.steps}-{_digest(drawn)}"
    file = there or found.workdir / "samples" / f"{stem}.jsonl"
    judged = {name: facts(metric) for name, metric in protocol.metrics(judge, None).items()}
    judged["samples"] = {"there": read_samples(there).identity if there else None}
    result = found.workdir / "results" / f"{stem}-{_digest(judged)}.json"
    if result.exists():
        return result
    if judge is None:
        made = assemble(config, tokenizer_of_run(found.workdir, config.data.tokenizer), config.mesh.make(), None)
    else:
        made = build(config, found.workdir)  # MAUVE is against its validation texts
    if there is None:
        with jax.set_mesh(made.mesh):
            params, _ = experiment.restore(made, found.checkpointer, protocol.omega)
            draw(made, params, protocol, file)
    cache = found.workdir / "samples" / f"{stem}.cache"
    samples = read_samples(file, made.vocabulary.fingerprint, cache)
    protocol.check(samples)
    metrics = protocol.metrics(judge, judge and reference_texts(made, protocol.samples, cache))
    values = {name: metric.run(samples) for name, metric in metrics.items()}
    about = {
        **found.about(),
        "sampler": drawn["sampler"],
        "samples": {"file": str(there or f"samples/{file.name}"), "sha256": sha256(file)},
        "seed": protocol.seed,
        "nfe": protocol.steps,
        **work(made, file, protocol.batch),
    }
    write_record(result, Record(protocol.drawn(), {n: facts(m) for n, m in metrics.items()}, values, about))
    return result


def work(made: Experiment, file: Path, batch: int) -> dict[str, Any]:
    """What samples cost, as their file tells: forwards per sample and their FLOPs, seconds of all without compiling."""
    lines = file.read_text("utf-8").splitlines()
    calls = [json.loads(line) for line in lines[::batch]]
    if not all({"forwards", "wall_s"} <= call.keys() for call in calls):
        return {"forwards": None, "flops_per_sample": None, "wall_s": None, "samples_per_s": None}
    forwards = float(np.mean([call["forwards"] for call in calls]))
    wall_s = sum(call["wall_s"] for call in calls)
    cost = {"forwards": forwards, "flops_per_sample": forwards * flops(made)}
    return {**cost, "wall_s": wall_s, "samples_per_s": len(calls) * batch / wall_s}


def draw(made: Experiment, params: Any, protocol: Protocol, file: Path) -> None:
    """Adds to a file what it lacks of the protocol's samples."""
    there = len(kept(file))
    canvas = np.full((protocol.batch, protocol.length), made.denoiser.mask_id, np.int32)
    for number, start in enumerate(range(0, protocol.samples, protocol.batch)):
        end = min(start + protocol.batch, protocol.samples)
        if there >= end:
            continue
        seed = int(np.random.SeedSequence([protocol.seed, number]).generate_state(1)[0])
        sampled = experiment.fill(made, params, canvas, seed)
        shared = {"seed": protocol.seed, "call": number, "wall_s": sampled.seconds}
        rows = experiment.sample_records(made, sampled)[: end - start]
        rows = [{**row, "number": start + i, **shared} for i, row in enumerate(rows)]
        append(file, rows[max(0, there - start) :])  # of a call that was cut off only the rest
        logging.info("%d of %d samples", end, protocol.samples)


def flops(made: Experiment) -> float:
    """Of matrix products of one forward of one sample; the head counted at every position, an upper bound."""
    length = made.config.data.seq_len
    return length * made.denoiser.flops(length)


def reference_texts(made: Experiment, count: int, cache: Path) -> Samples:
    """Validation blocks as texts, shuffled, `count` or all that there are."""
    order = np.random.default_rng(0).permutation(len(made.data.val))[:count]
    ids = np.stack([made.data.val[int(i)] for i in order])
    texts = tuple(made.vocabulary.decode(row) for row in ids)
    return Samples(texts, ids, made.vocabulary.fingerprint, cache)


def load_scorer(folder: str, config: str | None) -> Scorer:
    """The causal model of a workdir, trained or converted.

    Raises:
      FileNotFoundError, ValueError: one line; no such folder or checkpoint, not causal.
    """
    path = local_path("--scorer", folder)
    if not path.is_dir():
        raise FileNotFoundError(f"--scorer: got no folder {path}, wanted the workdir of a causal model")
    model = smdlm.load(path, config)
    directory = experiment.checkpointer_of(path).directory
    fingerprint = sha256(directory / str(model.step) / MANIFEST)
    return Scorer(path.resolve().name, model.denoiser, model.params, model.tokenizer, model.length, fingerprint)


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode("utf-8")).hexdigest()[:8]


# ---------------------------------------------------------------------------------------------------------- zero-shot


def zero_shot(found: Run, spec: str) -> list[Path]:
    """Likelihood of every set of `spec`, a record each: their files. What is there is not done again."""
    config, sets = found.config, zeroshot.named_sets(spec)
    texts = {name: make_source(how.source, how.given).identity() for name, how in sets.items()}  # are they there?
    tokenizer = tokenizer_of_run(found.workdir, config.data.tokenizer)
    made = assemble(config, tokenizer, config.mesh.make(), None)
    likelihood = next((m for m in config.eval.metrics if isinstance(m, Likelihood)), Likelihood())
    files = []
    with jax.set_mesh(made.mesh):
        params, _ = experiment.restore(made, found.checkpointer, config.eval.omega)
        for name, how in sets.items():
            length, framing = config.data.seq_len, config.data.framing
            protocol = zeroshot.conditions(name, how, length, framing, tokenizer) | {"omega": config.eval.omega}
            fields = dataclasses.asdict(likelihood)
            key = _digest([protocol, fields, found.checkpoint(), texts[name]])
            files.append(found.workdir / "results" / f"zeroshot-{name}-{key}.json")
            if files[-1].exists():
                continue
            begin = time.monotonic()
            blocks = zeroshot.blocks(name, how, tokenizer, length, framing)
            values = likelihood_values(made, params, likelihood, blocks)
            text = hashlib.sha256(blocks.tobytes()).hexdigest()
            about = found.about() | {"text": {"blocks": len(blocks), "sha256": text}}
            about |= {"wall_s": time.monotonic() - begin, "seed": likelihood.seed}
            protocol["text_sha256"] = text
            write_record(files[-1], Record(protocol, {"likelihood": fields}, {"likelihood": values}, about))
    return files


def likelihood_values(made: Experiment, params: Any, likelihood: Likelihood, blocks: np.ndarray) -> dict[str, Value]:
    """perplexity_NAME and bits_per_byte_NAME of every estimate, with their terms block by block."""

    def first(count: int, batch_size: int) -> Any:
        chosen = ArrayBlocks(blocks[:count])
        return batches(chosen, batch_size=min(batch_size, len(chosen)), seed=0, shuffle=False, repeat=False)

    token_bytes = made.vocabulary.token_bytes
    nll, sizes, lengths = likelihood.blockwise(Subject(made.objective, params, token_bytes, first, made.place))
    values: dict[str, Value] = {}
    for name, nll_N in nll.items():
        label = LABELS[name]
        values[f"perplexity_{name}"] = Ratio.of(nll_N, lengths, "perplexity", label, exp=True)
        values[f"bits_per_byte_{name}"] = Ratio.of(nll_N, sizes * np.log(2), "bits/byte", label)
    return values
