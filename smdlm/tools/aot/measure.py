"""Compiles the train step or the sampler of a config for a topology, and reads what the compiler made of it."""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from smdlm.build import Experiment, assemble, check_batch
from smdlm.config import Config
from smdlm.data.tokenizer import Vocabulary, vocabulary
from smdlm.mesh.rules import batch_sharding, batch_shards, replicated
from smdlm.sampling.ar import ARSampler
from smdlm.sampling.policies import linear_times
from smdlm.tools.aot.chips import Topology
from smdlm.tools.aot.costs import Costs
from smdlm.tools.aot.hlo import Loop, Program
from smdlm.tools.aot.plain import plain
from smdlm.tools.aot.report import Report

BISECTIONS = 20  # of top-p in the sampler: until at most one token lies between the bounds


@dataclasses.dataclass(frozen=True)
class _Task:
    """A lowered program, with `Report`'s fields that are known before compiling. share: of the tokens, read out."""

    lowered: Any
    program: str
    batch: int
    tokens: int
    steps: int
    model_flops: float
    share: float
    assumed: tuple[str, ...]


def compile_train(config: Config, topology: Topology, *, simple: bool = False) -> Report:
    """The step of `Experiment.train_step`; simple: the plain one of plain.py.

    Raises:
      ValueError: one line; mesh, batch and topology do not fit together.
    """
    experiment = _experiment(config, topology)
    data = config.data
    check_batch(config, experiment.mesh)
    if simple:
        experiment = plain(experiment)
    step, state, batch = experiment.train_step(), experiment.abstract_state(), experiment.abstract_batch()
    base = (experiment.abstract_base()[0],) if experiment.frozen else ()
    with jax.set_mesh(experiment.mesh):
        lowered = step.lower(state, batch, *base)
    tokens = data.batch_size * data.seq_len
    # A backward pass costs two forwards; pass one has none.
    two_passes = experiment.objective.p_step > 0
    task = _Task(
        lowered,
        "train (plain)" if simple else "train",
        data.batch_size,
        tokens,
        steps=1,
        model_flops=_forward_flops(experiment, tokens) * (4 if two_passes else 3),
        share=_share(experiment),
        assumed=("a step with feedback, that is two passes",) if two_passes else (),
    )
    return _compile(task, experiment, topology)


def compile_sampler(config: Config, topology: Topology) -> Report:
    """The sampler on sampling.count canvases of data.seq_len masks, placed as `mesh.arrays.place` does."""
    experiment = _experiment(config, topology)
    mesh, sampler, count, length = experiment.mesh, experiment.sampler, config.sampling.count, config.data.seq_len

    def everywhere(make: Any) -> Any:
        abstract = jax.eval_shape(make)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), abstract)

    split = batch_sharding(mesh) if count % batch_shards(mesh) == 0 else replicated(mesh)
    canvas = jax.ShapeDtypeStruct((count, length), jnp.int32, sharding=split)
    arguments = (sampler, experiment.abstract_whole(), everywhere(lambda: jax.random.key(0)), canvas)
    if isinstance(sampler, ARSampler):
        function, steps = ARSampler.__call__, length - 1
        tokens_read = count * steps
    else:
        function, steps = type(sampler).run, sampler.steps
        arguments = (*arguments, everywhere(lambda: linear_times(steps)))
        tokens_read = count * length * steps
    with jax.set_mesh(mesh):
        lowered = function.lower(*arguments)
    task = _Task(
        lowered,
        "sample",
        count,
        count * length,
        steps=steps,
        model_flops=_forward_flops(experiment, tokens_read),
        share=_share(experiment),
        assumed=(),
    )
    return _compile(task, experiment, topology)


def largest_batch(config: Config, topology: Topology, *, simple: bool = False) -> Iterator[Report]:
    """Train steps of the config's batch and of others, until the largest that fits and the smallest that does not are
    one example per shard or an eighth apart: doubled or halved, then where a line through the last two peaks meets the
    limit. Every one tried."""
    unit = batch_shards(_experiment(config, topology).mesh) * config.train.accumulate

    def attempt(units: int) -> Report:
        data = dataclasses.replace(config.data, batch_size=units * unit)
        return compile_train(dataclasses.replace(config, data=data), topology, simple=simple)

    fits, high, now = [], None, max(1, config.data.batch_size // unit)  # fits: (units, peak), ascending
    while now and (high is None or not fits or high - fits[-1][0] > max(1, fits[-1][0] // 8)):
        report = attempt(now)
        yield report
        if report.fits:
            fits.append((now, report.peak))
        else:
            high = now
        now = _next_batch(fits, high, topology.chip.limit_gib * 2**30)


def _next_batch(fits: list[tuple[int, int]], high: int | None, limit: float) -> int:
    """What to try after these fitted and `high` did not; 0 if not even one does."""
    if not fits:
        return high // 2
    low, peak = fits[-1]
    if len(fits) == 1:
        return 2 * low if high is None else (low + high) // 2
    before, peak_before = fits[-2]
    slope = (peak - peak_before) / (low - before)
    guess = low + int((limit - peak) / slope) if slope > 0 else 2 * low
    # At least far enough to end the search if it does not fit, or, below what did not fit, if it does.
    guess = max(guess, low + max(1, low // 8))
    return guess if high is None else min(guess, max((low + high) // 2, high - max(1, high // 9)))


def _experiment(config: Config, topology: Topology) -> Experiment:
    """Without data, on the topology's mesh."""
    mesh = config.mesh.make(topology.devices())
    return assemble(config, _vocabulary(config), mesh, None)


def _vocabulary(config: Config) -> Vocabulary:
    """Sizes of the tokenizer; where its files are not here, those that the config states, the mask behind all ids."""
    kind, _, folder = config.data.tokenizer.partition(":")
    if kind == "hf" and config.vocab_size is not None and not Path(folder).exists():
        return Vocabulary(config.vocab_size, config.vocab_size - 1, 0)
    return vocabulary(config.data.tokenizer)


def _compile(task: _Task, experiment: Experiment, topology: Topology) -> Report:
    assumed = dict.fromkeys(task.assumed)

    def assume(loop: Loop) -> float:
        if loop.source == "ops/filters.py":
            assumed[f"{BISECTIONS} bisections for top-p"] = None
            return BISECTIONS
        if loop.source != "ops/chunks.py":
            assumed[f"once: a loop of unknown length in {loop.source}"] = None
            return 1
        trips = -(-round(task.share * loop.rows) // loop.chunk)
        assumed[f"{trips} chunks of {loop.chunk} in the readout, for {task.share:g} of {loop.rows} tokens"] = None
        return trips

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = task.lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            compiled = None
        seconds = time.perf_counter() - begin
        dump = _Dump(Path(folder))
    arguments, temp, peak = dump.arguments, dump.temp, dump.total
    if compiled:
        m = compiled.memory_analysis()
        arguments, temp = m.argument_size_in_bytes, m.temp_size_in_bytes
        # TPU: the compiler's own figure; donated arguments make room for temporaries. GPU: temporaries are one block.
        peak = arguments + temp if topology.gpu else m.peak_memory_in_bytes
    # Not the dump's text, which writes elements of tuples in another way; a program that does not fit has no other.
    work = Costs(compiled.as_text(), task.share).work(assume) if compiled and not topology.gpu else None
    if any(w.name.startswith("readout_") for w in work or ()):
        assumed[f"{task.share:g} of the rows in the readout's kernels"] = None
    return Report(
        topology=topology,
        program=task.program,
        chips=experiment.mesh.size,
        batch=task.batch,
        tokens=task.tokens,
        steps=task.steps,
        # The TPU compiler refuses what does not fit, the GPU compiler does not.
        fits=compiled is not None and (not topology.gpu or peak <= topology.chip.limit_gib * 2**30),
        arguments=arguments,
        temp=temp,
        peak=peak,
        largest=dump.largest(),
        work=work,
        assumed=list(assumed),
        model_flops=task.model_flops,
        compile_s=seconds,
        advice=_advice(experiment, task, arguments, temp),
    )


def _advice(experiment: Experiment, task: _Task, arguments: int, temp: int) -> str:
    ways = []
    if task.program == "sample":
        ways.append("a smaller sampling.count")
    else:
        if experiment.denoiser.model.remat != "block":
            ways.append("--config.model.remat=block")
        ways.append(f"--config.data.batch_size={max(1, task.batch // 2)} or a larger train.accumulate")
    if arguments > temp / 2 and experiment.mesh.shape["fsdp"] == 1:
        ways.append("--config.mesh.data=1 --config.mesh.fsdp=-1")
    return "; ".join(ways)


class _Dump:
    """What the compiler writes about buffers; it does so too when they do not fit."""

    def __init__(self, folder: Path):
        def read(ending: str) -> str:
            files = sorted(folder.glob(f"*{ending}"), key=lambda file: file.stat().st_size)
            return files[-1].read_text() if files else ""

        self._program = Program(read("after_optimizations.txt"))
        self._live = read("live-range.txt")
        lines = re.findall(r"^allocation \d+: .*", read("after_optimizations-buffer-assignment.txt"), re.M)
        lines = [line for line in lines if ", color " not in line]  # color 0 is HBM, and not printed

        def size(part: str) -> int:
            return sum(int(re.search(r"size (\d+)", line)[1]) for line in lines if part in line)

        self.arguments, self.temp, self.total = size(", parameter "), size("preallocated-temp"), size("")

    def largest(self, count: int = 8) -> list[tuple[int, str]]:
        """(bytes, type and origin) of the largest values alive at the peak; equal ones are added up."""
        instructions = {i.name: i for body in self._program.computations.values() for i in body.values()}
        peak = self._live.partition("(peak):")[2].partition("Stack trace")[0]
        found: dict[str, tuple[int, int]] = {}
        for name, index, size in re.findall(r"^\s+([\w.\-]+)\{([\d,]*)\}: (\d+) bytes", peak, re.M):
            what = name
            if (i := instructions.get(name)) and i.type:
                array = i.type[min(int(index.partition(",")[0] or 0), len(i.type) - 1)]
                what = f"{array.text} {'argument' if i.opcode == 'parameter' else self._program.part(i) or i.opcode}"
            total, n = found.get(what, (0, 0))
            found[what] = (total + int(size), n + 1)
        rows = [(size, f"{n} x {what}" if n > 1 else what) for what, (size, n) in found.items()]
        return sorted(rows, reverse=True)[:count]


def _share(experiment: Experiment) -> float:
    """Of the tokens, how many are read out: half are masked in training, and in sampling on average; all in AR."""
    return 1.0 if experiment.denoiser.model.causal else 0.5


def _forward_flops(experiment: Experiment, tokens: int) -> float:
    """Of matrix products: the model's, and those of the head for the tokens that are read out."""
    return tokens * experiment.denoiser.flops(experiment.config.data.seq_len, _share(experiment))
