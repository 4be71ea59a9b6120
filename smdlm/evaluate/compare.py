"""Results of several runs in one table, if they were measured alike: `python -m smdlm.main --mode=compare A B ..`.

A, B, ..: workdirs, whose results/*.json are read, or single results. What was measured under one protocol stands
together, with the difference to the first run: over pairs of samples where both shared their noise.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from smdlm.evaluate.base import Value
from smdlm.evaluate.record import Record, read_record
from smdlm.evaluate.samples import Ratio, paired
from smdlm.files import local_path

FORMATS = ("markdown", "csv")
NO_PAIRS = "*"  # marks a difference whose interval is that of two separate measurements


class Entry(NamedTuple):
    run: str
    file: str
    record: Record


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
    runs = [_entries(argument) for argument in arguments]
    everything = [entry for run in runs for entry in run]
    known = list(dict.fromkeys(n for e in everything for values in e.record.values.values() for n in values))
    if unknown := [name for name in only if name not in known]:
        raise ValueError(f"--only: got {', '.join(unknown)}, wanted some of {', '.join(known)}")
    names = list(only) or known
    groups = _alike(runs, names)
    left_out = [e for e in everything if not any(e in group for group in groups)]
    rows = [row for group in groups for row in _rows(group, names)]
    header = ["run", "protocol", "NFE", "forwards", *names]
    if style == "csv":
        return _csv(header, rows)
    lines = [_markdown(header, rows), "", "± is a 95 % interval; differences are over pairs of samples"]
    if any(NO_PAIRS in cell for row in rows for cell in row):
        lines[-1] += f", those with {NO_PAIRS} over the two values apart"
    lines += [f"left out, the others have no counterpart: {e.file}" for e in left_out]
    return "\n".join(lines)


def _entries(argument: str) -> list[Entry]:
    path = local_path("compare", argument)
    found = sorted((path / "results").glob("*.json")) if path.is_dir() else [path]
    if not found or not all(file.is_file() for file in found):
        where = path / "results" if path.is_dir() else path
        raise FileNotFoundError(f"compare: got no result in {where}, wanted one: --mode=score measures a run")
    return [Entry(path.stem if path.is_file() else path.name, str(file), read_record(file)) for file in found]


def _alike(runs: Sequence[Sequence[Entry]], names: Sequence[str]) -> list[list[Entry]]:
    """Groups of one entry per run that were measured alike; ValueError if there is none."""
    keyed = [{json.dumps(e.record.conditions(names), sort_keys=True): e for e in run} for run in runs]
    shared = [key for key in keyed[0] if all(key in run for run in keyed)]
    if shared:
        return [[run[key] for run in keyed] for key in shared]
    pairs = [(a, b) for other in runs[1:] for a in runs[0] for b in other]
    unlike = [(a, b, d) for a, b in pairs if (d := differences(a.record, b.record, names))]
    a, b, fields = min(unlike, key=lambda found: len(found[2]))
    common = [n for n in names if a.record.value(n) and b.record.value(n) and not differences(a.record, b.record, [n])]
    hint = f"--only={','.join(common)} compares what is alike" if common else "nothing in them is alike"
    raise ValueError(
        f"compare: got unlike protocols, {a.file} and {b.file} differ in "
        f"{'; '.join(f'{name} ({x!r}, {y!r})' for name, (x, y) in fields.items())}; wanted one protocol: {hint}"
    )


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


def _rows(group: Sequence[Entry], names: Sequence[str]) -> list[list[str]]:
    rows = []
    for entry in group:
        about, protocol = entry.record.about, entry.record.protocol
        facts = [str(protocol["name"]), _known(about.get("nfe")), _known(about.get("forwards"))]
        rows.append([entry.run, *facts, *(_cell(entry.record.value(name)) for name in names)])
    for entry in group[1:]:
        cells = [_difference(group[0].record.value(name), entry.record.value(name)) for name in names]
        rows.append([f"{entry.run} - {group[0].run}", "", "", "", *cells])
    return rows


def _known(number: float | None) -> str:
    return "" if number is None else f"{number:g}"


def _cell(value: Value | None) -> str:
    if value is None:
        return ""
    return f"{value.mean:.4g}" + ("" if value.interval is None else f" ± {value.interval:.2g}")


def _difference(a: Value | None, b: Value | None) -> str:
    if a is None or b is None:
        return ""
    if isinstance(a, Ratio) and isinstance(b, Ratio) and len(a.amounts) == len(b.amounts):
        mean, interval = paired(a, b)
        return f"{mean:+.4g} ± {interval:.2g}"
    apart = None if a.interval is None or b.interval is None else np.hypot(a.interval, b.interval)
    return f"{b.mean - a.mean:+.4g}" + (NO_PAIRS if apart is None else f" ± {apart:.2g}{NO_PAIRS}")


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned, so that it reads as plain text too."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    wide = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, wide, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in wide) + "|", *lines[1:]])


def _csv(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue().rstrip("\n")
