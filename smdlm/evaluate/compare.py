"""Results of several runs in one table, if they were measured alike: `python -m smdlm.main --mode=compare A B ..`.

A, B, ..: workdirs, whose results/*.json are read, or single results. What was measured under one protocol stands
together, with the difference to the first run: over pairs of samples where both shared their noise.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from smdlm.evaluate.base import Value
from smdlm.evaluate.record import Record, read_record
from smdlm.evaluate.samples import Ratio, paired
from smdlm.files import local_path

FORMATS = ("markdown", "csv")
NO_PAIRS = "*"  # marks a difference whose interval is that of two separate measurements


class Entry(NamedTuple):
    """A record, the name of its run for tables, and its file."""

    run: str
    file: str
    record: Record

    @property
    def names(self) -> list[str]:
        """Of its values."""
        return [name for values in self.record.values.values() for name in values]


def compare(arguments: Sequence[str], only: Sequence[str], style: str) -> str:
    """The table as text.

    Args:
      only: names of values that are compared, empty for all; what others depend on may then differ.
      style: of FORMATS.

    Raises:
      FileNotFoundError, ValueError: one line; fewer than two runs, no results, unlike protocols, an unknown value.
    """
    if len(arguments) < 2:
        raise ValueError(
            f"compare: got {len(arguments)} results, wanted two workdirs or results/*.json or more: --mode=compare A B"
        )
    runs = [entries(argument) for argument in arguments]
    everything = [entry for run in runs for entry in run]
    known = list(dict.fromkeys(name for entry in everything for name in entry.names))
    if unknown := [name for name in only if name not in known]:
        raise ValueError(f"--only: got {', '.join(unknown)}, wanted some of {', '.join(known)}")
    groups = _alike(runs, list(only) or known)
    left_out = [e for e in everything if not any(e in group for group in groups)]
    tables: dict[tuple[str, ...], list[list[Entry]]] = {}  # likelihoods and samples are tables of their own
    for group in groups:
        shown = tuple(n for n in only or known if any(entry.record.value(n) for entry in group))
        tables.setdefault(shown, []).append(group)
    if style == "csv":
        return _csv(tables)
    lines = [f"{table(some, names)}\n" for names, some in tables.items()]
    note = "± is a 95 % interval; differences are over pairs of samples"
    if any(NO_PAIRS in line for line in lines):
        note += f", those with {NO_PAIRS} over the two values apart"
    return "\n".join([*lines, note, *(f"left out, the others have no counterpart: {e.file}" for e in left_out)])


def entries(argument: str) -> list[Entry]:
    """The results of a workdir, or one result. FileNotFoundError if there is none."""
    path = local_path("compare", argument)
    found = sorted((path / "results").glob("*.json")) if path.is_dir() else [path]
    if not found or not all(file.is_file() for file in found):
        where = path / "results" if path.is_dir() else path
        raise FileNotFoundError(f"compare: got no result in {where}, wanted one: --mode=score measures a run")
    return [Entry(path.stem if path.is_file() else path.name, str(file), read_record(file)) for file in found]


def _alike(runs: Sequence[Sequence[Entry]], names: Sequence[str]) -> list[list[Entry]]:
    """Groups of one entry per run that were measured alike, of entries with any of the named values.

    Raises:
      ValueError: there is no group, or a run has two results that would fit.
    """
    keyed = [_by_conditions([e for e in run if set(names) & set(e.names)], names) for run in runs]
    shared = [key for key in keyed[0] if all(key in run for run in keyed)]
    if shared:
        return [[run[key] for run in keyed] for key in shared]
    pairs = [(a, b) for other in keyed[1:] for a in keyed[0].values() for b in other.values()]
    unlike = [(a, b, d) for a, b in pairs if (d := differences(a.record, b.record, names))]
    if not unlike:
        raise ValueError(f"compare: got a run without {', '.join(names)}, wanted them in all: --mode=score measures it")
    a, b, fields = min(unlike, key=lambda found: len(found[2]))
    common = [n for n in names if a.record.value(n) and b.record.value(n) and not differences(a.record, b.record, [n])]
    hint = f"--only={','.join(common)} compares what is alike" if common else "no value of theirs goes without these"
    raise ValueError(
        f"compare: got unlike protocols, {a.file} and {b.file} differ in "
        f"{'; '.join(f'{name} ({x!r}, {y!r})' for name, (x, y) in fields.items())}; wanted one protocol: {hint}"
    )


def _by_conditions(found: Sequence[Entry], names: Sequence[str]) -> dict[str, Entry]:
    keyed: dict[str, Entry] = {}
    for entry in found:
        key = json.dumps(entry.record.conditions(names), sort_keys=True)
        if key in keyed:
            raise ValueError(
                f"compare: got two results of one protocol, {keyed[key].file} and {entry.file}, wanted one of a run: "
                "name the file in place of the workdir"
            )
        keyed[key] = entry
    return keyed


def differences(a: Record, b: Record, names: Sequence[str]) -> dict[str, tuple]:
    """{field: its two values}, of what the named values depend on."""
    first, second = a.conditions(names), b.conditions(names)
    missing = "not measured"
    return {
        field: (first.get(field, missing), second.get(field, missing))
        for field in {**first, **second}
        if first.get(field, missing) != second.get(field, missing)
    }


# ------------------------------------------------------------------------------------------------------------- tables


def table(groups: Sequence[Sequence[Entry]], names: Sequence[str]) -> str:
    """Markdown, aligned so that it reads as plain text too: a row per run, and below those of a group the differences
    to its first run."""
    rows = [["run", "protocol", "NFE", "forwards", *names]]
    for first, *others in groups:
        rows += [_facts(entry) + [_cell(entry.record.value(name)) for name in names] for entry in (first, *others)]
        for entry in others:
            found = [difference(first.record.value(name), entry.record.value(name)) for name in names]
            rows.append([f"{entry.run} - {first.run}", "", "", "", *map(_difference_cell, found)])
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, wide, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in wide) + "|", *lines[1:]])


def _csv(tables: Mapping[tuple[str, ...], Sequence[Sequence[Entry]]]) -> str:
    """A line per run and value, numbers in full."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow("run protocol nfe forwards value unit mean interval difference difference_interval paired".split())
    for names, groups in tables.items():
        for group in groups:
            for entry, name in itertools.product(group, names):
                if (value := entry.record.value(name)) is None:
                    continue
                found = None if entry is group[0] else difference(group[0].record.value(name), value)
                lines.writerow([*_facts(entry), name, value.unit, value.mean, value.interval, *(found or ["", "", ""])])
    return out.getvalue().rstrip("\n")


def _facts(entry: Entry) -> list[str]:
    about = entry.record.about
    numbers = ["" if about.get(name) is None else f"{about[name]:g}" for name in ("nfe", "forwards")]
    return [entry.run, str(entry.record.protocol["name"]), *numbers]


class Difference(NamedTuple):
    """mean: of the other minus the first. interval: half-width at 95 %, of the pairs of samples if `paired`."""

    mean: float
    interval: float | None
    paired: bool


def difference(first: Value | None, other: Value | None) -> Difference | None:
    """None where one of them was not measured."""
    if first is None or other is None:
        return None
    if isinstance(first, Ratio) and isinstance(other, Ratio) and len(first.amounts) == len(other.amounts):
        return Difference(*paired(first, other), True)
    known = first.interval is not None and other.interval is not None
    return Difference(other.mean - first.mean, math.hypot(first.interval, other.interval) if known else None, False)


def _cell(value: Value | None) -> str:
    return "" if value is None else f"{value.mean:.4g}{_plus_minus(value.interval)}"


def _difference_cell(found: Difference | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:+.4g}{_plus_minus(found.interval)}{'' if found.paired else NO_PAIRS}"


def _plus_minus(interval: float | None) -> str:
    return "" if interval is None else f" ± {interval:.2g}"
