"""HLO text, parsed: instructions, the source files they come from, loops and branches."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path

BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}
PACKAGE = f"{Path(__file__).parents[2]}/"
CALLERS = (
    *("train", "objective", "build", "command", "sampling/loop", "sampling/ar"),
    *("tools/aot/__main__", "tools/aot/measure"),
)


@dataclasses.dataclass(frozen=True)
class Array:
    """An element of a type: 'f32[8,1024]', its bytes, and whether it lies in HBM."""

    text: str
    dims: tuple[int, ...]
    bytes: float
    hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. type: its arrays, flattened; operands: names; tail: attributes as text; frame: index of its stack."""

    name: str
    type: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    arguments: str
    tail: str
    root: bool

    def called(self, attribute: str) -> str | None:
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.tail)
        return found and found[1]

    def number(self, attribute: str) -> int:
        return int(re.search(rf"\b{attribute}=(\d+)", self.tail)[1])

    def numbers(self, attribute: str) -> list[int]:
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.tail)
        return [int(n) for n in found[1].split(",") if n] if found else []


@dataclasses.dataclass(frozen=True)
class Loop:
    """A `while` whose trip count is a run-time value.

    Attributes:
      source: the smdlm file that contains it, '?' if the text does not say.
      rows: length of the longest vector of 32-bit integers that it carries: the row numbers of the readout's loop.
      chunk: length of the slices it takes of that vector; rows if it takes none.
    """

    source: str
    rows: int
    chunk: int


def _array(dtype: str, dims: str, layout: str) -> Array:
    sizes = tuple(int(d.strip("<=")) for d in dims.split(",") if d)
    bits = BITS.get(dtype) if dtype in BITS else int((re.match(r"[a-z]+(\d+)", dtype) or [0, 8])[1])
    space = re.search(r"S\((\d+)\)", layout or "")
    return Array(f"{dtype}[{dims}]", sizes, math.prod(sizes) * bits / 8, space is None or space[1] == "0")


def _type(text: str) -> tuple[Array, ...]:
    return tuple(_array(*m) for m in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?", text))


def _vectors(i: Instruction) -> list[int]:
    """Lengths of the vectors of 32-bit integers among what an instruction makes."""
    return [a.dims[0] for a in i.type if len(a.dims) == 1 and a.text.startswith("s32")]


def _ours(file: str) -> str:
    """'sampling/loop.py' of that file of this package, wherever it is installed; '' of any other file."""
    return file.removeprefix(PACKAGE) if file.startswith(PACKAGE) else ""


def _balanced(text: str, start: int) -> int:
    """Index after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"hlo: got an unbalanced line {text[:80]!r}")


class Program:
    """Parsed HLO text."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self._tables: dict[str, dict[int, str]] = {}
        table: dict[int, str] | None = None
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if re.match(r"(ENTRY )?%?[\w.\-]+ \(.*\{$", line):
                table = None
                name = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
                current = self.computations.setdefault(name, {})
                if line.startswith("ENTRY"):
                    self.entry = name
            elif re.fullmatch(r"FileNames|FunctionNames|FileLocations|StackFrames", line):
                table = self._tables.setdefault(line, {})
            elif table is not None and re.match(r"\d+ ", line):
                number, _, value = line.partition(" ")
                table[int(number)] = value
            elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line):
                last = self._instruction(line, found)
                current[last.name] = last
            elif table is None and current and line.strip("} "):  # attributes of kernels span lines
                current[last.name] = last = dataclasses.replace(last, tail=last.tail + line)
        self.users = {name: self._index(body) for name, body in self.computations.items()}

    @staticmethod
    def _instruction(line: str, found: re.Match) -> Instruction:
        start = found.end()
        end = _balanced(line, start) if line[start] == "(" else line.index(" ", start)
        opening = line.index("(", end)
        closing = _balanced(line, opening)
        arguments = line[opening + 1 : closing - 1]
        operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
        opcode = line[end:opening].strip()
        return Instruction(
            found[2], _type(line[start:end]), opcode, operands, arguments, line[closing:], bool(found[1])
        )

    @staticmethod
    def _index(body: dict[str, Instruction]) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {name: [] for name in body}
        for instruction in body.values():
            for operand in set(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    # ------------------------------------------------------------------------------------------------------ sources

    def stack(self, instruction: Instruction) -> list[str]:
        """Source files of the instruction's Python stack, outermost first; [] if the text does not say."""
        found = re.search(r'source_file="([^"]*)"', instruction.tail)
        if found:
            return [found[1]]
        found = re.search(r"stack_frame_id=(\d+)", instruction.tail)
        frame, files = int(found[1]) if found else 0, []
        while frame in self._frames:
            file, frame = self._frames[frame]
            files.append(file)
        return files[::-1]

    @functools.cached_property
    def _frames(self) -> dict[int, tuple[str, int]]:
        """Stack frame -> (source file, the frame that called it)."""
        frames, locations, names = (self._tables.get(t, {}) for t in ("StackFrames", "FileLocations", "FileNames"))
        ids = {n: [int(i) for i in re.findall(r"=(\d+)", text)] for n, text in frames.items()}
        # The outermost frame's parent is printed as 1 by some versions, as 0 by others.
        offset = ids[1][1] if ids else 0

        def file(location: int) -> str:
            return names[int(re.search(r"file_name_id=(\d+)", locations[location])[1])].strip('"')

        return {n: (file(location), parent - offset) for n, (location, parent) in ids.items()}

    def part(self, instruction: Instruction) -> str | None:
        """The first file that the step or the sampler's loop calls: 'denoiser', 'readout', 'optax', .. or None."""
        names = ["optax" if "/optax/" in f else _ours(f).removesuffix(".py") for f in self.stack(instruction)]
        return next((n for n in names if n and n not in CALLERS), None)

    # -------------------------------------------------------------------------------------------------------- loops

    def trips(self, loop: Instruction) -> int | None:
        """Trip count of a `while`, None if it is a run-time value."""
        found = re.search(r'"?known_trip_count"?[:=]\{"n":"(\d+)"\}', loop.tail)
        if found:
            return int(found[1])
        body = self.computations[loop.called("condition")]
        root = next(i for i in body.values() if i.root)
        if root.opcode != "compare" or "direction=LT" not in root.tail:
            return None
        counter, limit = (body[o] for o in root.operands)
        if limit.opcode != "constant" or counter.opcode != "get-tuple-element":
            return None
        return -(-int(limit.arguments) // self._stride(loop.called("body"), counter.number("index")))

    def _stride(self, name: str, index: int) -> int:
        """What the body of a loop adds to an element of its state: 2 in loops that the compiler unrolled by two."""
        body = self.computations[name]
        root = next(i for i in body.values() if i.root)
        added = body[root.operands[index]]
        constants = [body[o] for o in added.operands if body[o].opcode == "constant"]
        return int(constants[0].arguments) if added.opcode == "add" and constants else 1

    def loop(self, i: Instruction) -> Loop:
        files = [f for f in map(_ours, self.stack(i)) if f]
        rows = max(_vectors(i), default=1)
        slices = [
            max(_vectors(j))
            for name, j in self._fused(i.called("body"))
            if j.opcode == "dynamic-slice" and rows in _vectors(self.operands(name, j)[0])
        ]
        return Loop(files[-1] if files else "?", rows, max(slices, default=rows))

    def _fused(self, name: str) -> Iterator[tuple[str, Instruction]]:
        """(computation, instruction) of a computation and of the fusions in it."""
        for i in self.computations[name].values():
            yield name, i
            if i.opcode in ("fusion", "call"):
                yield from self._fused(i.called("calls") or i.called("to_apply"))

    @staticmethod
    def branches(i: Instruction) -> list[str]:
        found = re.search(r"branch_computations=\{([^}]*)\}", i.tail)
        return re.findall(r"[\w.\-]+", found[1]) if found else [i.called(f"{b}_computation") for b in ("true", "false")]

    def operands(self, name: str, i: Instruction) -> list[Instruction]:
        return [self.computations[name][o] for o in i.operands if o in self.computations[name]]
