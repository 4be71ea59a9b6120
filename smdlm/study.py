"""A study: runs that differ in a few fields, each sampled in several ways, and one page that compares them.

    python -m smdlm.main --mode=study --config=configs/lab.py [--workdir=DIR]

A config with a section `study` (see `Study`) is a study; the other modes do not look at that section. What is there
already is not done again, so the same command continues a killed study:

WORKDIR/RUN-seed0/              an ordinary workdir
WORKDIR/cells/RUN-seed0-steps8.json, .jsonl    values of a cell, and its samples
WORKDIR/study.md                the page, written anew after every cell

All runs of one seed sample with the same noise, so that their differences come with the interval of the pairs.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from smdlm import experiment, identity
from smdlm.build import assemble, build
from smdlm.config import Config, pick, read
from smdlm.data.kept import tokenizer_of_run
from smdlm.evaluate import EVALUATORS
from smdlm.evaluate.base import ratio
from smdlm.files import owned, write, write_json

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # half-width of a 95 % interval of so many seeds, in standard errors


@dataclasses.dataclass(frozen=True)
class Study:
    """config.study.

    Attributes:
      runs: {name: {section: {field: value}}}: what each run changes of the config.
      baseline: the run with which all others are compared.
      grids: {name: {field of config.sampling: value, or a tuple of values to combine}}; a cell is one combination.
      metrics: of evaluate.EVALUATORS, joined by commas, applied to the samples of a cell.
      score: the value by which runs are compared, one that a metric also gives per sample (`rows`); less is better.
      show: values of the second table.
      seeds: every run is trained and sampled with the seeds 0 .. seeds - 1.
    """

    runs: Mapping[str, Mapping[str, Mapping[str, Any]]]
    baseline: str
    grids: Mapping[str, Mapping[str, Any]]
    metrics: str
    score: str
    show: Sequence[str]
    seeds: int = 1

    def __post_init__(self):
        if len(self.runs) < 2 or self.baseline not in self.runs:
            raise ValueError(
                f"study.runs: got {list(self.runs)} with baseline {self.baseline!r}, wanted two runs or more, the "
                "baseline among them"
            )
        if self.seeds < 1:
            raise ValueError(f"study.seeds: got {self.seeds}, wanted at least 1")
        for name in self.metrics.split(","):
            pick("study.metrics", name, EVALUATORS)

    def settings(self) -> list[dict[str, Any]]:
        """Every combination of the grids, each once."""
        found = []
        for grid in self.grids.values():
            several = [values if isinstance(values, (tuple, list)) else (values,) for values in grid.values()]
            found += [dict(zip(grid, chosen, strict=True)) for chosen in itertools.product(*several)]
        return [one for i, one in enumerate(found) if one not in found[:i]]


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One run, one seed, one way to sample.

    Attributes:
      changed: this way, {field of config.sampling: value}.
      settings: the config of the run by sections, as it is trained. trained: the same, read.
      config: the same with this way in its section sampling.
    """

    run: str
    seed: int
    changed: Mapping[str, Any]
    settings: Mapping[str, Any]
    trained: Config
    config: Config

    @property
    def run_name(self) -> str:
        return f"{self.run}-seed{self.seed}"

    @property
    def name(self) -> str:
        return "-".join([self.run_name, *(f"{field}{value}" for field, value in self.changed.items())])

    def identity(self, metrics: str) -> dict[str, Any]:
        """What a result must have been made of to be this cell's."""
        sampling = self.config.sampling
        settings = {**dataclasses.asdict(sampling), "policy": repr(sampling.policy)}
        return {"run": self.run_name, "updates": self.config.updates, "metrics": metrics, "sampling": settings}


def read_study(given: Any) -> tuple[Study, list[Cell]]:
    """The study of a ConfigDict and all its cells, so that every mistake is found before anything is trained."""
    settings = given.to_dict()
    if "study" not in settings:
        raise ValueError("config: got no section study, wanted one (as configs/lab.py has): --mode=study")
    try:
        study = Study(**settings.pop("study"))
    except TypeError as error:
        raise ValueError(f"config.study: got other fields than wanted ({error})") from error
    cells = []
    for seed, (run, changes), changed in itertools.product(range(study.seeds), study.runs.items(), study.settings()):
        mine = dict(settings)
        for section, values in (*changes.items(), ("train", {"seed": seed}), ("sampling", {"seed": seed})):
            mine[section] = {**mine.get(section, {}), **values}
        sampled = mine | {"sampling": mine["sampling"] | changed}
        cells.append(Cell(run, seed, changed, mine, read(mine), read(sampled)))
    return study, cells


def run(given: Any, workdir: Path) -> None:
    """Does what is missing and prints the page. ValueError, one line, for a config that is no study."""
    if jax.process_count() > 1:
        raise ValueError(f"--mode=study: got {jax.process_count()} processes, wanted one")
    study, cells = read_study(given)
    with owned(workdir, "--workdir"):
        begin = time.time()
        missing = [cell for cell in cells if _result(workdir, study, cell) is None]
        for _, group in itertools.groupby(missing, key=lambda cell: cell.run_name):
            group = list(group)
            _train(group[0], workdir / group[0].run_name)
            for cell in group:
                _sample(study, cell, workdir)
                left = sum(_result(workdir, study, one) is None for one in cells)
                print(f"cell {cell.name}: done, {left} of {len(cells)} left, {time.time() - begin:.0f} s", flush=True)
                write(workdir / "study.md", page(study, cells, workdir))
        text = page(study, cells, workdir)
        write(workdir / "study.md", text)
    print(text)


def _train(cell: Cell, folder: Path) -> None:
    """Trains the run of a cell to its end, if it is not there yet."""
    config = cell.trained
    checkpointer = experiment.checkpointer_of(folder, keep=config.train.keep)
    identity.check_same_run(folder, checkpointer, config)
    if experiment.finished(folder, checkpointer, config.updates) is None:
        if config.train.init_from:
            experiment.init_source(config.train)
        made = build(config, folder)
        facts = {"tokenizer": made.vocabulary.fingerprint, "content_hash": made.data.content_hash}
        with jax.set_mesh(made.mesh):
            experiment.train(made, folder, checkpointer, {"config": cell.settings, **facts})
    checkpointer.close()


def _sample(study: Study, cell: Cell, workdir: Path) -> None:
    """Samples and scores a cell: first the samples are written, then their values."""
    begin, folder, config = time.time(), workdir / cell.run_name, cell.config
    made = assemble(config, tokenizer_of_run(folder, config.data.tokenizer), config.mesh.make(), None)
    checkpointer = experiment.checkpointer_of(folder)
    with jax.set_mesh(made.mesh):
        params, _ = experiment.restore(made, checkpointer, config.sampling.omega)
        sampled = experiment.sample(made, params)
        seconds = time.time() - begin
        seen = dataclasses.replace(experiment.subject(made, params), sample=lambda: sampled.ids)
        metrics = [EVALUATORS[name]() for name in study.metrics.split(",")]
        values = {name: value for metric in metrics for name, value in metric.run(seen).items()}
        rows = {name: row for metric in metrics if hasattr(metric, "rows") for name, row in metric.rows(seen).items()}
    checkpointer.close()
    records = experiment.sample_records(made, sampled)
    write(workdir / "cells" / f"{cell.name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    result = {
        "cell": cell.identity(study.metrics),
        "forwards": sampled.forwards,
        "wall_s": round(seconds, 1),
        "values": {name: dataclasses.asdict(value) for name, value in values.items()},
        "rows": {name: np.round(row, 5).tolist() for name, row in rows.items()},
    }
    write_json(workdir / "cells" / f"{cell.name}.json", result)


def _result(workdir: Path, study: Study, cell: Cell) -> dict[str, Any] | None:
    """What is kept of a cell; None if it is missing or of other settings."""
    try:
        result = json.loads((workdir / "cells" / f"{cell.name}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    wanted = json.loads(json.dumps(cell.identity(study.metrics)))
    return result if result.get("cell") == wanted else None


# -------------------------------------------------------------------------------------------------------------- page


def page(study: Study, cells: Sequence[Cell], workdir: Path) -> str:
    """Markdown of all cells that are done: the score of every run against the baseline's, then the other values."""
    results = {cell: result for cell in cells if (result := _result(workdir, study, cell))}
    others = [run for run in study.runs if run != study.baseline]
    names = [study.baseline, *others]
    head = ["sampling", *names, *(f"{run} - {study.baseline}" for run in others)]
    lines, better = [_row(head), _row(["---"] * len(head))], {run: [] for run in others}
    for changed in study.settings():
        here = {run: [r for c, r in results.items() if c.run == run and c.changed == changed] for run in names}
        numbers = [_number(_over_seeds([_rows(study, r) for r in here[run]])) for run in names]
        for run in others:
            difference = _over_seeds(_pairs(study, results, run, changed))
            numbers.append(_number(difference, sign="+"))
            if difference and difference[0] + difference[1] < 0:
                better[run].append(_spelled(changed))
        lines.append(_row([_spelled(changed), *numbers]))
    verdicts = [
        f"{run} better than {study.baseline} beyond the interval at: {', '.join(found) if found else 'none'}."
        for run, found in better.items()
    ]
    count = f"{len(results)} of {len(cells)} cells, {study.seeds} seeds"
    what = f"{study.score}, less is better ({count}; ± is the 95 % interval, of the pairs for differences)"
    return "\n".join([what, "", *lines, "", *verdicts, "", *_other_values(study, results), ""])


def _rows(study: Study, result: Mapping[str, Any]) -> np.ndarray:
    return np.array(result["rows"][study.score])


def _pairs(study: Study, results: Mapping[Cell, Any], run: str, changed: Mapping[str, Any]) -> list[np.ndarray]:
    """Differences [N] between the samples of a run and the baseline's, for every seed that has both."""
    found = {(c.run, c.seed): _rows(study, result) for c, result in results.items() if c.changed == changed}
    seeds = [seed for name, seed in found if name == run and (study.baseline, seed) in found]
    return [found[run, seed] - found[study.baseline, seed] for seed in seeds]


def _over_seeds(rows: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """(mean, half-width of its 95 % interval) of samples [N] of several seeds: the wider of the interval over all
    samples and, which counts what training makes of a seed, the one over the seeds' means."""
    if not rows:
        return None
    mean, interval = ratio(np.concatenate(rows), np.ones(sum(map(len, rows))))
    if len(rows) in T_95:
        means = [row.mean() for row in rows]
        interval = max(interval, T_95[len(rows)] * np.std(means, ddof=1) / np.sqrt(len(rows)))
    return mean, float(interval)


def _other_values(study: Study, results: Mapping[Cell, Any]) -> list[str]:
    """A table of study.show for every cell, seeds averaged."""
    lines = [_row(["run", "sampling", *study.show, "forwards", "s"]), _row(["---"] * (len(study.show) + 4))]
    for run, changed in itertools.product(study.runs, study.settings()):
        here = [r for c, r in results.items() if c.run == run and c.changed == changed]
        if not here:
            continue
        means = [np.mean([r["values"][name]["mean"] for r in here]) for name in study.show]
        speed = [f"{np.mean([r[name] for r in here]):.0f}" for name in ("forwards", "wall_s")]
        lines.append(_row([run, _spelled(changed), *(f"{mean:.3f}" for mean in means), *speed]))
    return lines


def _spelled(changed: Mapping[str, Any]) -> str:
    return " ".join(f"{field} {value}" for field, value in changed.items())


def _number(value: tuple[float, float] | None, sign: str = "") -> str:
    return "-" if value is None else f"{value[0]:{sign}.3f} ± {value[1]:.3f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
