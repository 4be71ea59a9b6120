"""The page of a study: runs against the baseline at every way to sample, then what training and samples cost."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from smdlm.evaluate.base import Value
from smdlm.evaluate.record import Record
from smdlm.evaluate.samples import Ratio, paired
from smdlm.feedback.gates import EntropyGate, Prediction
from smdlm.io.plots import Curve, Panel
from smdlm.study.plan import Study

WIDE = 4  # more runs than this are lines of the page, not columns
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # half-width of a 95 % interval of so many seeds, in standard errors

Number = tuple[float, float] | None  # (mean, half-width of its 95 % interval)


@dataclasses.dataclass(frozen=True)
class Done:
    """A cell with its values. changed: the way to sample, {field of config.sampling: value}."""

    run: str
    seed: int
    changed: Mapping[str, Any]
    record: Record


def page(study: Study, done: Sequence[Done], total: int, trained: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown. total: the number of all cells. trained: {run: summary.json of each of its seeds}."""
    parts = [
        f"{len(done)} of {total} cells, {study.seeds} seeds; ± is the 95 % interval, of the pairs for differences."
    ]
    for score in study.scores:
        table = _by_run if len(study.runs) > WIDE else _by_sampling
        parts += ["", f"## {score.replace('|', ', or ')} (less is better)", "", *table(study, done, score)]
    parts += ["", "## Other values, seeds averaged", "", *_other_values(study, done)]
    if trained:
        parts += ["", "## Training, seeds averaged", "", *_training(trained)]
    return "\n".join([*parts, ""])


def _by_sampling(study: Study, done: Sequence[Done], score: str) -> list[str]:
    """A score of every run at every way to sample, its differences from the baseline's, and the verdicts."""
    others = [run for run in study.runs if run != study.baseline]
    names = [study.baseline, *others]
    head = ["sampling", *names, *(f"{run} - {study.baseline}" for run in others)]
    lines, better = [_row(head), _row(["---"] * len(head))], {run: [] for run in others}
    for changed in study.settings():
        here = [cell for cell in done if cell.changed == changed]
        numbers = [
            _spelled_number(_over_seeds([_own(cell, score) for cell in here if cell.run == run])) for run in names
        ]
        for run in others:
            difference = _over_seeds(_pairs(here, study.baseline, run, score))
            numbers.append(_spelled_number(difference, sign="+"))
            if difference and difference[0] + difference[1] < 0:
                better[run].append(spelled(changed))
        lines.append(_row([spelled(changed), *numbers]))
    verdicts = [
        f"{run} better than {study.baseline} beyond the interval at: {', '.join(found) if found else 'none'}."
        for run, found in better.items()
    ]
    return [*lines, "", *verdicts]


def _by_run(study: Study, done: Sequence[Done], score: str) -> list[str]:
    """The same for many runs: a line each, with the score and its difference to the baseline's at every setting."""
    lines = [_row(["run", *map(spelled, study.settings())]), _row(["---"] * (1 + len(study.settings())))]
    for run in study.runs:
        numbers = []
        for changed in study.settings():
            here = [cell for cell in done if cell.changed == changed]
            number = _spelled_number(_over_seeds([_own(cell, score) for cell in here if cell.run == run]))
            if run != study.baseline:
                number += f" ({_spelled_number(_over_seeds(_pairs(here, study.baseline, run, score)), sign='+')})"
            numbers.append(number)
        lines.append(_row([run, *numbers]))
    return lines


def _own(cell: Done, score: str) -> tuple[float, float]:
    value = _value(cell, score)
    if value is None:
        given = [name for values in cell.record.values.values() for name in values]
        raise ValueError(f"study.scores: got {score!r}, wanted one of the values {', '.join(given)}")
    return value.mean, value.interval or 0.0


def _value(cell: Done, score: str) -> Value | None:
    """Of names joined by '|', the first that the record has."""
    found = (cell.record.value(name) for name in score.split("|"))
    return next((value for value in found if value is not None), None)


def _pairs(here: Sequence[Done], baseline: str, run: str, score: str) -> list[tuple[float, float]]:
    """Differences between a run and the baseline for every seed that has both."""
    found = {(cell.run, cell.seed): _value(cell, score) for cell in here}
    seeds = [seed for name, seed in found if name == run and (baseline, seed) in found]
    pairs = [(found[baseline, seed], found[run, seed]) for seed in seeds]
    return [paired(a, b) for a, b in pairs if isinstance(a, Ratio) and isinstance(b, Ratio)]


def _over_seeds(numbers: Sequence[tuple[float, float]]) -> Number:
    """The mean over seeds, and the wider of two intervals: that of all samples together, and that of the seeds' means,
    which counts what training makes of a seed."""
    if not numbers:
        return None
    means, intervals = np.array(numbers).T
    interval = np.sqrt(np.sum(intervals**2)) / len(numbers)
    if len(numbers) in T_95:
        interval = max(interval, T_95[len(numbers)] * np.std(means, ddof=1) / np.sqrt(len(numbers)))
    return float(means.mean()), float(interval)


def _other_values(study: Study, done: Sequence[Done]) -> list[str]:
    """A table of study.show for every run and way to sample, and the sampler's speed, without compiling it."""
    lines = [_row(["run", "sampling", *study.show, "forwards", "samples/s"]), _row(["---"] * (len(study.show) + 4))]
    for run, changed in itertools.product(study.runs, study.settings()):
        here = [cell.record for cell in done if cell.run == run and cell.changed == changed]
        if not here:
            continue
        means = [np.mean([record.value(name).mean for record in here]) for name in study.show]
        forwards = f"{np.mean([record.about['forwards'] for record in here]):.0f}"
        speeds = [record.about.get("samples_per_s") for record in here]  # records of older versions have none
        speed = "-" if None in speeds else f"{np.mean(speeds):.1f}"
        lines.append(_row([run, spelled(changed), *(f"{mean:.3f}" for mean in means), forwards, speed]))
    return lines


def _training(trained: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """A table of what each run's end said: updates, minutes, parameters, the gate, every validation value."""
    values = {name: None for summaries in trained.values() for one in summaries for name in one["values"]}
    gate = {name: None for summaries in trained.values() for one in summaries for name in one["omega"]}
    head = ["run", "updates", "minutes", "parameters", *(f"ω {name}" for name in gate), *values]
    lines = [_row(head), _row(["---"] * len(head))]
    for run, summaries in trained.items():
        first = summaries[0]
        minutes = np.mean([one["wall_s"] for one in summaries]) / 60
        numbers = [f"{first['steps']}", f"{minutes:.1f}", f"{first['parameters']:,}"]
        numbers += [_mean_of([one["omega"].get(name) for one in summaries]) for name in gate]
        numbers += [_mean_of([one["values"].get(name, {}).get("mean") for one in summaries]) for name in values]
        lines.append(_row([run, *numbers]))
    return lines


def _mean_of(numbers: Sequence[float | None]) -> str:
    return "-" if None in numbers else f"{np.mean(numbers):.3f}"


def csv_of(done: Sequence[Done]) -> str:
    """One line for every cell and value."""
    fields = dict.fromkeys(field for cell in done for field in cell.changed)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(
        ["run", "seed", *fields, "forwards", "wall_s", "flops_per_sample", "value", "mean", "interval", "unit"]
    )
    for cell in done:
        cost = [cell.record.about[name] for name in ("forwards", "wall_s", "flops_per_sample")]
        where = [cell.run, cell.seed, *(cell.changed.get(field, "") for field in fields), *cost]
        for values in cell.record.values.values():
            rows.writerows([*where, name, value.mean, value.interval, value.unit] for name, value in values.items())
    return text.getvalue()


def panels(study: Study, done: Sequence[Done]) -> list[Panel]:
    """Each score against forwards and against seconds of sampling, then the first one against study.front."""
    found = []
    for score in study.scores:
        for about, words in (("forwards", "forward passes"), ("wall_s", "seconds a cell")):
            curves = {}
            for label, points in _lines_of(done).items():
                x = [np.mean([cell.record.about[about] for cell in seeds]) for seeds in points]
                y = [_over_seeds([_own(cell, score) for cell in seeds]) for seeds in points]
                curves[label] = Curve(x, [mean for mean, _ in y], [interval for _, interval in y], points[0][0].run)
            found.append(Panel(words, score, curves, logarithmic=True))
    if study.front:
        curves = {}
        for run in study.runs:
            cells = [cell for cell in done if cell.run == run]
            pairs = [(_own(cell, study.front)[0], _own(cell, study.scores[0])[0]) for cell in cells]
            curves[run] = Curve(*np.array(pairs).reshape(-1, 2).T.tolist())
        found.append(Panel(study.front, study.scores[0], curves, lines=False))
    return found


def training_panels(gates: Mapping[str, Any], trained: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Panel]:
    """What the ends of the runs said, seeds averaged: nats at each step of decoding (where eval.metrics has
    decoding_steps), and the learned gate over entropy. None for a study that has neither.

    Args:
      gates: {run: the gate of its config}. trained: as of `page`.
    """
    steps, learned = {}, {}
    entropy = np.linspace(0.0, 6.0, 61)
    for run, summaries in trained.items():
        values = [one["values"] for one in summaries]
        names = [name for name in values[0] if name.startswith("step_") and name.endswith("_nats")]
        if names:
            means = [[one[name]["mean"] for name in names] for one in values]
            steps[run] = Curve(range(1, 1 + len(names)), np.mean(means, axis=0).tolist())
        if type(gates.get(run)) is EntropyGate:  # a band also asks for the time
            lam = [_gate_over(entropy, dataclasses.replace(gates[run], **one["omega"])) for one in summaries]
            learned[run] = Curve(entropy.tolist(), np.mean(lam, axis=0).tolist())
    found = [Panel("step of decoding", "nats/masked token", steps)] if steps else []
    return found + ([Panel("entropy of the prediction, nats", "λ", learned, markers="")] if learned else [])


def _gate_over(entropy: np.ndarray, gate: EntropyGate) -> np.ndarray:
    return np.asarray(gate(gate.init(), Prediction(-jnp.asarray(entropy, jnp.float32))))


def _lines_of(done: Sequence[Done]) -> dict[str, list[list[Done]]]:
    """{run and all that changes but the number of steps: [the seeds of one number of steps]}, steps ascending."""
    found: dict[str, dict[Any, list[Done]]] = {}
    for cell in done:
        rest = spelled({field: value for field, value in cell.changed.items() if field not in ("steps", "count")})
        found.setdefault(f"{cell.run} {rest}".strip(), {}).setdefault(cell.changed.get("steps", 0), []).append(cell)
    return {label: [points[steps] for steps in sorted(points)] for label, points in found.items()}


def spelled(changed: Mapping[str, Any]) -> str:
    """A way to sample in words."""
    return " ".join(f"{field} {value}" for field, value in changed.items())


def _spelled_number(value: Number, sign: str = "") -> str:
    return "-" if value is None else f"{value[0]:{sign}.3f} ± {value[1]:.3f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
