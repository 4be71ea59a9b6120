"""What a compiled program does: FLOPs, HBM bytes and collectives of every instruction run.

XLA's own cost analysis counts the body of a loop once. Here every instruction carries how often it runs: bodies of
`while` are multiplied by their trip counts, of `conditional` the most expensive branch is taken. Conventions:

- FLOPs are those of matrix products (`dot`, `convolution`) and of kernels that state theirs; elementwise work is free.
- Bytes are what an instruction reads and writes in HBM: a fusion is one instruction, a slice of a large operand counts
  as the slice, and arrays that the TPU compiler keeps in on-chip memory (`S(1)` in their layout) count nothing. Kernels
  that state their bytes may read an operand several times.
- Collective bytes are what a chip sends in a ring: twice the array for an all-reduce, else once the larger side.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

import numpy as np

from smdlm.tools.aot.hlo import Array, Instruction, Loop, Program

FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "iota"),
    *("partition-id", "replica-id"),
}
FREE_CALLS = (
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "ConcatBitcast",
    "Sharding",
    "GatherScatterIndicesBitpacked",
)
# Splash attention states no FLOPs: its products of queries [B, H, L, E] and keys [B, H, M, E] (without B if it is 1) in
# each kernel.
SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Work:
    """An instruction as run: flops, hbm and sent (collective) bytes of all `count` runs together.

    part: the smdlm file that the train step or the sampler's loop called for it, or 'optax', or 'other'.
    """

    name: str
    opcode: str
    part: str
    count: float
    flops: float
    hbm: float
    sent: float


Assume = Callable[[Loop], float]


class Costs(Program):
    """A program with what it costs.

    share: of the rows, those for which the readout's kernels run; what they state is for all.
    """

    def __init__(self, text: str, share: float = 1.0):
        super().__init__(text)
        self._share = share

    def work(self, assume: Assume) -> list[Work]:
        """Everything the program runs. assume: trips of a loop when they are a run-time value."""
        return list(self._run(self.entry, 1.0, "other", assume))

    def _run(self, name: str, count: float, around: str, assume: Assume) -> Iterator[Work]:
        """around: part of the enclosing loop or branch, which instructions without a stack of their own belong to."""
        for i in self.computations[name].values():
            part = self.part(i) or around
            if i.opcode == "while":
                trips = self.trips(i)
                inside = count * (assume(self.loop(i)) if trips is None else trips)
                for attribute in ("condition", "body"):
                    yield from self._run(i.called(attribute), inside, part, assume)
            elif i.opcode == "conditional":
                runs = [list(self._run(branch, count, part, assume)) for branch in self.branches(i)]
                yield from max(runs, key=lambda run: (sum(w.flops for w in run), sum(w.hbm for w in run)))
            elif i.opcode in ("call", "async-start"):
                yield from self._run(i.called("to_apply") or i.called("calls"), count, part, assume)
            elif i.opcode not in FREE and not i.opcode.endswith("-done"):
                flops, hbm, sent = self._flops(name, i), self._hbm(name, i), self._sent(name, i)
                if flops or hbm or sent:
                    yield Work(i.name, i.opcode, part, count, count * flops, count * hbm, count * sent)

    def _flops(self, name: str, i: Instruction) -> float:
        if i.opcode == "fusion":
            inside = i.called("calls")
            return sum(self._flops(inside, j) for j in self.computations[inside].values())
        if i.opcode == "dot":
            left = self.operands(name, i)[0].type[0].dims
            return 2 * math.prod(i.type[0].dims) * math.prod(left[d] for d in i.numbers("lhs_contracting_dims"))
        if i.opcode == "convolution":
            return _convolution_flops(i, *(o.type[0].dims for o in self.operands(name, i)[:2]))
        if stated := self._stated(i, "flops"):
            return stated
        if i.opcode == "custom-call" and (found := re.match(r"splash_mha_(fwd|dq|dkv)", i.name)):
            # After tables of integers about the mask.
            query, key, *_ = [o.type[0].dims for o in self.operands(name, i) if o.type[0].text[0] in "bf"]
            return 2 * SPLASH_PRODUCTS[found[1]] * math.prod(query) * key[-2]
        return 0.0

    def _stated(self, kernel: Instruction, cost: str) -> float | None:
        found = re.search(rf'"{cost}":"?(\d+)', kernel.tail) if kernel.opcode == "custom-call" else None
        return found and float(found[1]) * (self._share if kernel.name.startswith("readout_") else 1)

    def _hbm(self, name: str, i: Instruction) -> float:
        if i.opcode == "custom-call" and any(f'custom_call_target="{t}' in i.tail for t in FREE_CALLS):
            return 0.0
        if stated := self._stated(i, "bytes_accessed"):
            return stated
        operands = self.operands(name, i)
        if i.opcode in ("copy-start", "slice-start"):
            # From or to on-chip memory: the side that lies in HBM, as large as what is moved.
            moved, source = i.type[1], operands[0].type[0]
            return moved.bytes * (source.hbm + moved.hbm)
        if i.opcode == "fusion":
            inside = self.computations[i.called("calls")]
            parameters = {int(j.arguments): j.name for j in inside.values() if j.opcode == "parameter"}
            read = sum(
                self._read(i.called("calls"), parameters[n], o) for n, o in enumerate(operands) if n in parameters
            )
            return read + self._written(i.called("calls"), i)
        wrapped = {o.name: o for o in operands}
        return sum(self._read_by(name, i, n, o.type) for n, o in wrapped.items()) + self._written_by(name, i)

    def _read(self, inside: str, parameter: str, operand: Instruction) -> float:
        whole = sum(a.bytes for a in operand.type if a.hbm)
        return min(whole, sum(self._read_by(inside, u, parameter, operand.type) for u in self.users[inside][parameter]))

    def _read_by(self, name: str, user: Instruction, operand: str, arrays: tuple[Array, ...]) -> float:
        """HBM bytes of `operand` that `user` reads; arrays is the operand's type (its memory space counts)."""
        if not any(a.hbm for a in arrays):
            return 0.0
        whole = sum(a.bytes for a in arrays if a.hbm)
        first = user.operands[0] == operand
        if user.opcode in ("dynamic-slice", "slice", "gather") and first:
            return min(whole, sum(a.bytes for a in user.type))
        if user.opcode in ("dynamic-update-slice", "scatter") and first:
            return 0.0  # in place
        if user.opcode == "bitcast":
            return sum(self._read_by(name, u, user.name, arrays) for u in self.users[name][user.name])
        if user.opcode == "fusion":
            inside = self.computations[user.called("calls")]
            position = user.operands.index(operand)
            parameter = next(
                j.name for j in inside.values() if j.opcode == "parameter" and int(j.arguments) == position
            )
            users = self.users[user.called("calls")][parameter]
            return min(whole, sum(self._read_by(user.called("calls"), u, parameter, arrays) for u in users))
        return 0.0 if user.opcode in ("get-tuple-element", "tuple") else whole

    def _written(self, inside: str, fusion: Instruction) -> float:
        root = next(j for j in self.computations[inside].values() if j.root)
        roots = self.operands(inside, root) if root.opcode == "tuple" else [root]
        if len(roots) != len(fusion.type):
            return sum(a.bytes for a in fusion.type if a.hbm)
        return sum(self._update(inside, r, a) for r, a in zip(roots, fusion.type, strict=True) if a.hbm)

    def _written_by(self, name: str, i: Instruction) -> float:
        return sum(self._update(name, i, a) if len(i.type) == 1 else a.bytes for a in i.type if a.hbm)

    def _update(self, name: str, i: Instruction, array: Array) -> float:
        while i.opcode == "bitcast":
            i = self.operands(name, i)[0]
        if i.opcode == "fusion":
            inside = self.computations[i.called("calls")]
            return self._update(i.called("calls"), next(j for j in inside.values() if j.root), array)
        if i.opcode in ("dynamic-update-slice", "scatter"):
            changed = self.operands(name, i)[1 if i.opcode == "dynamic-update-slice" else 2]
            return min(array.bytes, sum(a.bytes for a in changed.type))
        return array.bytes

    def _sent(self, name: str, i: Instruction) -> float:
        kind = collective(i.opcode)
        if kind is None:
            return 0.0
        given = sum(a.bytes for o in self.operands(name, i) for a in o.type)
        taken = (
            max((a.bytes for a in i.type), default=0.0) if i.opcode.endswith("-start") else sum(a.bytes for a in i.type)
        )
        return 2 * given if kind == "all-reduce" else max(given, taken)


def collective(opcode: str) -> str | None:
    """'all-reduce' of 'all-reduce' and 'all-reduce-start'; None for anything else."""
    name = opcode.removesuffix("-start")
    return name if name in COLLECTIVES else None


def _convolution_flops(i: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """2 x products, without those that meet padding or the holes of a dilated operand: batched products look so."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.tail)
    window = dict(re.findall(r"(\w+)=(\S+?)(?=[ }])", (re.search(r"window=\{([^}]*)\}", i.tail) or ["", ""])[1] + " "))

    def field(name: str, default: list[int]) -> list[int]:
        return [int(x) for x in window[name].split("x")] if name in window else default

    lhs, rhs, out = labels.groups()
    rank = sum(c.isdigit() for c in lhs)
    ones = [1] * rank
    stride, dilate, base = field("stride", ones), field("rhs_dilate", ones), field("lhs_dilate", ones)
    pads = [int(p.split("_")[0]) for p in window["pad"].split("x")] if "pad" in window else [0] * rank
    total = 2.0 * right[rhs.index("i")] * i.type[0].dims[out.index("b")] * i.type[0].dims[out.index("f")]
    for d in range(rank):
        size, taps, result = left[lhs.index(str(d))], right[rhs.index(str(d))], i.type[0].dims[out.index(str(d))]
        total *= _meetings(size, taps, result, stride[d], dilate[d], base[d], pads[d])
    return total


@functools.cache
def _meetings(size: int, taps: int, result: int, stride: int, dilate: int, base: int, pad: int) -> int:
    """Pairs of positions of the window and of the result that meet an entry of the operand, along one dimension."""
    at = np.arange(result)[:, None] * stride - pad + np.arange(taps) * dilate
    return int(np.sum((at >= 0) & (at < (size - 1) * base + 1) & (at % base == 0)))
