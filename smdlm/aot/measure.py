"""Compiles one program for a topology and reads memory, work and a roofline estimate from what the compiler made."""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smdlm.aot.chips import Chip, Topology
from smdlm.aot.hlo import Program, Work, collective
from smdlm.build import Config, Experiment
from smdlm.models.dit import DiT
from smdlm.partition import BATCH_AXES, batch_sharding, replicated
from smdlm.sampling.loop import ARSampler, linear_times

GIB = 2**30
BISECTION_STEPS = 20  # of top-p, until one token is left between the bounds; a run-time value


@dataclasses.dataclass(frozen=True)
class Report:
    """Figures of one program, per chip unless said otherwise. None: this compiler does not tell.

    Attributes:
      program: 'train' or 'sample'. batch: global.
      arguments_gib, temp_gib, peak_gib: HBM; peak is arguments, temporaries, outputs that reuse no argument, and code.
      largest: (GiB, what) of the largest buffers alive at the peak.
      work: everything run, see hlo.py; loops: trip counts that were assumed.
      model_flops: what the mathematics needs, without recomputation: all chips together.
    """

    topology: str
    chip: Chip
    chips: int
    program: str
    batch: int
    tokens: int
    fits: bool
    arguments_gib: float
    temp_gib: float
    peak_gib: float
    largest: list[tuple[float, str]]
    work: list[Work]
    assumed: list[str]
    model_flops: float
    compile_s: float

    @property
    def flops(self) -> float:
        return sum(w.flops for w in self.work)

    @property
    def hbm(self) -> float:
        return sum(w.hbm for w in self.work)

    def collectives(self) -> dict[str, float]:
        """Bytes sent by kind."""
        kinds: dict[str, float] = {}
        for w in self.work:
            if kind := collective(w.opcode):
                kinds[kind] = kinds.get(kind, 0.0) + w.sent
        return kinds

    def seconds(self) -> float:
        """Roofline: instructions one after the other, each at the chip's peak FLOPs or bytes per second, whichever
        takes longer; collectives overlap with everything and count when all of them take longer than that."""
        return max(self._compute(self.work), sum(self.collectives().values()) / self.chip.links)

    def _compute(self, work: list[Work]) -> float:
        return sum(max(w.flops / self.chip.flops, w.hbm / self.chip.hbm) for w in work)

    def parts(self) -> list[tuple[str, float, float, float]]:
        """(file, FLOPs, HBM bytes, roofline seconds), slowest first."""
        names = {w.part for w in self.work}
        inside = {n: [w for w in self.work if w.part == n] for n in names}
        rows = [(n, sum(w.flops for w in ws), sum(w.hbm for w in ws), self._compute(ws)) for n, ws in inside.items()]
        return sorted(rows, key=lambda row: -row[3])

    def row(self) -> dict[str, Any]:
        """The row of --json."""
        seconds = self.seconds()
        return {
            "topology": self.topology,
            "chips": self.chips,
            "program": self.program,
            "batch_per_chip": self.batch / self.chips,
            "fits": self.fits,
            "hbm_limit_gib": self.chip.limit_gib,
            "arguments_gib": self.arguments_gib,
            "temp_gib": self.temp_gib,
            "peak_gib": self.peak_gib,
            "flops_per_chip": self.flops,
            "hbm_bytes_per_chip": self.hbm,
            "collective_bytes_per_chip": self.collectives(),
            "step_ms_roofline": 1e3 * seconds,
            "tokens_per_s": self.tokens / seconds,
            "mfu": self.model_flops / (seconds * self.chips * self.chip.flops),
            "compile_s": self.compile_s,
            "parts": {n: {"flops": f, "hbm_bytes": b, "ms": 1e3 * s} for n, f, b, s in self.parts()},
            "assumed": self.assumed,
        }


def compile_train(experiment: Experiment, topology: Topology) -> Report:
    """The train step of `Experiment.train_step` on the mesh of the experiment, soft-masked branch."""
    data, mesh = experiment.config.data, experiment.mesh
    shards = int(np.prod([mesh.shape[a] for a in BATCH_AXES]))
    if data.batch_size % shards:
        raise ValueError(
            f"data.batch_size: got {data.batch_size} (over all chips) for {shards} data shards, wanted a multiple of "
            f"{shards}"
        )
    sharding = batch_sharding(mesh)
    shape = (data.batch_size, data.seq_len)
    batch = {
        "tokens": jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding),
        "valid": jax.ShapeDtypeStruct(shape[:1], bool, sharding=sharding),
    }
    tokens = shape[0] * shape[1]
    rows = tokens // experiment.config.train.accumulate
    step, state = experiment.train_step(), experiment.abstract_state()
    with jax.set_mesh(mesh):
        lowered = step.lower(state, batch)
    return _measure(
        lowered, experiment, topology, "train", data.batch_size, tokens, rows, _train_flops(experiment, tokens)
    )


def compile_sampler(experiment: Experiment, topology: Topology) -> Report:
    """The sampler with config.sampling.count canvases (rounded up to the data shards) of config.data.seq_len masks."""
    mesh, config, sampler = experiment.mesh, experiment.config, experiment.sampler
    shards = int(np.prod([mesh.shape[a] for a in BATCH_AXES]))
    count = -(-config.sampling.count // shards) * shards
    length = config.data.seq_len
    canvas = jax.ShapeDtypeStruct((count, length), jnp.int32, sharding=batch_sharding(mesh))
    everywhere = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), tree
    )
    key = everywhere(jax.eval_shape(lambda: jax.random.key(0)))
    params = experiment.abstract_params()[0]
    if isinstance(sampler, ARSampler):
        program, arguments = ARSampler.__call__, (sampler, params, key, canvas)
    else:
        times = everywhere(jax.eval_shape(lambda: linear_times(sampler.steps)))
        program, arguments = type(sampler).run, (sampler, params, key, canvas, times)
    with jax.set_mesh(mesh):
        lowered = program.lower(*arguments)
    forwards = length - 1 if isinstance(sampler, ARSampler) else sampler.steps
    rows = count if isinstance(sampler, ARSampler) else count * length
    tokens = count * length
    return _measure(
        lowered, experiment, topology, "sample", count, tokens, rows, _forward_flops(experiment, tokens) * forwards
    )


def _measure(
    lowered: Any,
    experiment: Experiment,
    topology: Topology,
    program: str,
    batch: int,
    tokens: int,
    rows: int,
    model: float,
) -> Report:
    chunk = min(experiment.config.readout.chunk, rows)
    trips = -(-(rows // 2) // chunk)
    assumed: dict[str, str] = {}

    def assume(source: str) -> float:
        if source == "sampling/filters.py":
            assumed[source] = f"top-p: {BISECTION_STEPS} bisections"
            return BISECTION_STEPS
        if source == "readout.py":
            assumed[source] = f"readout: {trips} chunks of {chunk} tokens, half of {rows} masked"
            return trips
        assumed[source] = f"{source}: a loop of unknown length counted once"
        return 1

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            compiled = None
        seconds = time.perf_counter() - begin
        dump = _Dump(Path(folder))
        text = compiled.as_text() if compiled else dump.program
    if compiled:
        m = compiled.memory_analysis()
        arguments, temp = m.argument_size_in_bytes, m.temp_size_in_bytes
        peak = arguments + temp + m.output_size_in_bytes - m.alias_size_in_bytes + m.generated_code_size_in_bytes
    else:
        arguments, temp, peak = dump.arguments, dump.temp, dump.total
    parsed = Program(text)
    work, _ = parsed.work(assume)
    devices = experiment.mesh.size
    return Report(
        topology=topology.name,
        chip=topology.chip,
        chips=devices,
        program=program,
        batch=batch,
        tokens=tokens,
        fits=compiled is not None,
        arguments_gib=arguments / GIB,
        temp_gib=temp / GIB,
        peak_gib=peak / GIB,
        largest=dump.largest(parsed),
        work=work,
        assumed=list(assumed.values()),
        model_flops=model,
        compile_s=seconds,
    )


class _Dump:
    """What the compiler writes about buffers; it does so too when they do not fit."""

    def __init__(self, folder: Path):
        def read(ending: str) -> str:
            files = sorted(folder.glob(f"*{ending}"), key=lambda f: f.stat().st_size)
            return files[-1].read_text() if files else ""

        self.program = read(".after_optimizations.txt")
        self._live = read("live-range.txt")
        assignment = read(".after_optimizations-buffer-assignment.txt")
        # Color 0 is HBM and not printed; others say so.
        lines = [line for line in re.findall(r"^allocation \d+: .*", assignment, re.M) if ", color " not in line]
        size = lambda part: sum(int(re.search(r"size (\d+)", line)[1]) for line in lines if part in line)
        self.arguments, self.temp, self.total = size(", parameter "), size("preallocated-temp"), size("")

    def largest(self, program: Program, count: int = 8) -> list[tuple[float, str]]:
        """The largest buffers alive at the peak, with type and origin; equal ones together."""
        instructions = {i.name: i for body in program.computations.values() for i in body.values()}
        peak = self._live.partition("(peak):")[2].partition("Stack trace")[0]
        found: dict[str, tuple[float, int]] = {}
        for name, index, size in re.findall(r"^\s+([\w.\-]+)\{([\d,]*)\}: (\d+) bytes", peak, re.M):
            i = instructions.get(name)
            arrays = i.type if i else ()
            array = arrays[int(index.split(",")[0]) if index else 0] if arrays else None
            what = f"{array.text} {program.part(i) if i.opcode != 'parameter' else 'argument'}" if array else name
            total, n = found.get(what, (0.0, 0))
            found[what] = (total + int(size) / GIB, n + 1)
        rows = [(size, f"{n} x {what}" if n > 1 else what) for what, (size, n) in found.items()]
        return sorted(rows, reverse=True)[:count]


def _forward_flops(experiment: Experiment, tokens: int) -> float:
    """2 FLOPs per parameter of the blocks and token, attention, and the head on half of the tokens."""
    params = experiment.abstract_params()[0]["backbone"]
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    model: DiT = experiment.denoiser.model
    width, depth, length = model.config.width, model.config.depth, experiment.config.data.seq_len
    adaln = size(params["blocks"].get("adaln", {}))  # one vector for the whole batch
    blocks = 2 * (size(params["blocks"]) - adaln) + 4 * length * width * depth * (0.5 if model.config.causal else 1)
    masked = 1.0 if model.config.causal else 0.5
    return tokens * (blocks + masked * 2 * params["head"]["kernel"].size)


def _train_flops(experiment: Experiment, tokens: int) -> float:
    """Pass one forward; pass two forward and twice as much backward."""
    return _forward_flops(experiment, tokens) * (4 if experiment.objective.p_sm > 0 else 3)


def build_for(config: Config, topology: Topology) -> Experiment:
    from smdlm.build import assemble
    from smdlm.data.tokenizer import vocabulary

    return assemble(config, vocabulary(config.data.tokenizer), config.mesh.make(topology.devices()), None)
