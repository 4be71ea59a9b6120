"""The figures of one compiled program, as text and as a row of JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from smdlm.mesh.chips import Chip
from smdlm.tools.aot.chips import Topology
from smdlm.tools.aot.costs import Work, collective

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Report:
    """One program on one topology; per chip unless said otherwise.

    Attributes:
      program: 'train', 'train (plain)' or 'sample'.
      batch, tokens: examples and tokens of all chips together; steps: forward passes of a sampler, 1 for training.
      arguments, temp, peak: bytes of HBM; the peak may be less than the sum of the two.
      largest: (bytes, what) of the values alive when the most is, largest first; two may share their memory.
      work: all that runs, see costs.py; None where the compiler's text does not say (GPUs, programs that do not fit).
      assumed: choices made where a run-time value decides.
      model_flops: what the mathematics needs without recomputing anything, all chips together.
      advice: what would make it fit.
    """

    topology: Topology
    program: str
    chips: int
    batch: int
    tokens: int
    steps: int
    fits: bool
    arguments: int
    temp: int
    peak: int
    largest: list[tuple[int, str]]
    work: list[Work] | None
    assumed: list[str]
    model_flops: float
    compile_s: float
    advice: str

    @property
    def chip(self) -> Chip:
        return self.topology.chip

    def collectives(self) -> dict[str, float]:
        """Bytes sent by kind."""
        kinds: dict[str, float] = {}
        for w in self.work or ():
            if kind := collective(w.opcode):
                kinds[kind] = kinds.get(kind, 0.0) + w.sent
        return kinds

    def seconds(self) -> float:
        """Roofline: instructions one after the other, each at the chip's peak FLOPs or bytes per second, whichever
        takes longer. Collectives overlap with all of that, and count when together they take longer."""
        return max(self._seconds(self.work), sum(self.collectives().values()) / self.chip.links)

    def _seconds(self, work: Iterable[Work]) -> float:
        return sum(max(w.flops / self.chip.flops, w.hbm / self.chip.hbm) for w in work)

    def parts(self) -> list[tuple[str, float, float, float]]:
        """(part, FLOPs, HBM bytes, roofline seconds), slowest first."""
        inside: dict[str, list[Work]] = {}
        for w in self.work or ():
            inside.setdefault(w.part, []).append(w)
        rows = [(n, sum(w.flops for w in ws), sum(w.hbm for w in ws), self._seconds(ws)) for n, ws in inside.items()]
        return sorted(rows, key=lambda row: -row[3])

    def row(self) -> dict[str, Any]:
        """The row of --json; None for what this compiler does not tell."""
        row = {
            "topology": self.topology.name,
            "program": self.program,
            "chips": self.chips,
            "batch_per_chip": self.batch / self.chips,
            "fits": self.fits,
            "hbm_limit_gib": self.chip.limit_gib,
            "arguments_gib": self.arguments / GIB,
            "temp_gib": self.temp / GIB,
            "peak_gib": self.peak / GIB,
            "compile_s": self.compile_s,
            "assumed": self.assumed,
            "largest": [{"gib": size / GIB, "what": what} for size, what in self.largest],
        }
        names = ("flops_per_chip", "hbm_bytes_per_chip", "collective_bytes", "step_ms_roofline", "tokens_per_s", "mfu")
        if self.work is None:
            return row | dict.fromkeys((*names, "parts"))
        seconds = self.seconds()
        values = (
            sum(w.flops for w in self.work),
            sum(w.hbm for w in self.work),
            self.collectives(),
            1e3 * seconds / self.steps,
            self.tokens / seconds,
            self.model_flops / (seconds * self.chips * self.chip.flops),
        )
        parts = [{"part": n, "flops": f, "hbm_bytes": b, "ms": 1e3 * s} for n, f, b, s in self.parts()]
        return row | dict(zip(names, values, strict=True)) | {"parts": parts}

    def __str__(self) -> str:
        row = self.row()
        state = "fits" if self.fits else "DOES NOT FIT"
        lines = [
            f"{self.program}: {self.topology.name}, {self.chips} chips, batch {self.batch} "
            f"({row['batch_per_chip']:g} per chip); per chip:",
            f"  HBM             {row['arguments_gib']:.2f} GiB arguments, {row['temp_gib']:.2f} GiB temporaries, peak "
            f"{row['peak_gib']:.2f} of {self.chip.limit_gib:.2f} GiB: {state}",
        ]
        if self.work is None:
            why = "this compiler offers no cost analysis" if self.topology.gpu else "not of a program that does not fit"
            lines.append(f"  work, speed     - ({why})")
        else:
            each = "" if self.steps == 1 else f" per step, {self.steps} steps"
            sent = ", ".join(f"{kind} {size / 1e9:.3f} GB" for kind, size in self.collectives().items() if size > 5e5)
            lines += [
                f"  FLOPs           {row['flops_per_chip'] / 1e12:.3f} T, of which the mathematics needs "
                f"{self.model_flops / self.chips / 1e12:.3f} T",
                f"  HBM traffic     {row['hbm_bytes_per_chip'] / 1e9:.2f} GB",
                f"  collectives     {sent or 'none'}",
                f"  roofline        {row['step_ms_roofline']:.2f} ms{each}, {row['tokens_per_s']:,.0f} tokens/s, "
                f"MFU {row['mfu']:.0%}",
            ]
        lines += [f"  compile time    {self.compile_s:.0f} s", *(f"  assumed         {a}" for a in self.assumed)]
        if self.work:
            lines.append(f"  {'where':24}{'TFLOP':>10}{'HBM GB':>10}{'ms':>10}")
            lines += [f"    {n:22}{f / 1e12:10.3f}{b / 1e9:10.2f}{1e3 * s:10.2f}" for n, f, b, s in self.parts()]
        lines.append("  largest values at the peak (one updated in place is there twice)")
        lines += [f"    {size / GIB:8.3f} GiB  {what}" for size, what in self.largest]
        return "\n".join(lines if self.fits else [*lines, f"  to make it fit: {self.advice}"])
