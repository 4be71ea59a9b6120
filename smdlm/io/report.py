"""What a person reads at the end of a run, of an evaluation, of sampling. Text is made here, printed by callers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smdlm.evaluate.base import Value


def values_table(values: Mapping[str, Value]) -> str:
    """Labels down, units across."""
    units = list(dict.fromkeys(value.unit for value in values.values()))
    labels = list(dict.fromkeys(value.label for value in values.values()))
    cells = {(value.label, value.unit): _cell(value) for value in values.values()}
    wide = 2 + max(map(len, ("validation", *labels)))
    each = max(20, 2 + max(map(len, (*cells.values(), *units)), default=0))
    lines = [f"{'validation':{wide}}" + "".join(f"{unit:>{each}}" for unit in units)]
    lines += [
        f"{label:{wide}}" + "".join(f"{cells.get((label, unit), ''):>{each}}" for unit in units) for label in labels
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Value) -> str:
    return f"{value.mean:.4f}" + ("" if value.interval is None else f" ± {value.interval:.4f}")


def samples(texts: Iterable[str], forwards: int) -> str:
    return "\n".join(f"\n--- sample {i + 1} ({forwards} forwards)\n{text.strip()}" for i, text in enumerate(texts))


def summary(record: Mapping[str, Any], workdir: Path) -> str:
    """The table at the end of a run, from what summary.json holds."""
    speed = record["tokens_per_s"]
    rows = [
        ("updates", f"{record['steps']}"),
        ("parameters", f"{record['parameters']:,}"),
        ("tokens per second", f"{speed:,.0f}" if speed else "-"),
    ]
    if record["omega"]:
        rows.append(("learned omega", ", ".join(f"{label} {value:.3g}" for label, value in record["omega"].items())))
    rows += [("wall time", f"{record['wall_s']:.0f} s"), ("files", f"{workdir}/: {' '.join(files(workdir))}")]
    return "\n".join(
        [
            "",
            values_table({name: Value(**value) for name, value in record["values"].items()}),
            f"({record['evaluated']}; ± is a 95 % interval)",
            "",
            *(f"{name:26}{value}" for name, value in rows),
            samples(record["samples"], record["forwards_per_sample"]),
        ]
    )


def files(workdir: Path) -> Sequence[str]:
    """What a run has left for a person to open."""
    known = ("summary.json", "metrics.jsonl", "samples", "loss.png", "omega.png", "checkpoints", "tensorboard")
    there = [workdir / name for name in known if (workdir / name).exists()]
    return [f"{path.name}/" if path.is_dir() else path.name for path in there]
