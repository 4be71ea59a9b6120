"""What a study compares: its fields, and its cells (one run, one seed, one way to sample)."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smdlm.config import Config, pick, read
from smdlm.evaluate import EVALUATORS, OF_A_FILE

JUDGED = "generative_perplexity"  # the metric that needs study.scorer


@dataclasses.dataclass(frozen=True)
class Study:
    """config.study.

    Attributes:
      runs: {name: {section: {field: value}}}: what each run changes of the config.
      baseline: the run with which all others are compared.
      grids: {name: {field of config.sampling: value, or a tuple of values to combine}}; a cell is one combination.
      only: {run: names of the grids that it is sampled by}; all grids for a run that is not named.
      metrics: names joined by commas, of evaluate.EVALUATORS (with the fields of config.eval if they are named there
        too), evaluate.SAMPLE_METRICS, or generative_perplexity.
      scorer: workdir of the causal model that judges, for generative_perplexity.
      scores: values by which runs are compared, those that metrics give per sample or block; less is better. Of several
        joined by '|' every run shows the first that it has.
      show: values of the last table.
      front: the value that is drawn against the first score, '' for none: sample_entropy for a perplexity.
      seeds: every run is trained and sampled with the seeds 0 .. seeds - 1.
      reuse: {run: another}: it is not trained, the other's weights are sampled with this run's fields.
      begin: {run: another}: its training begins at the other's weights.
    """

    runs: Mapping[str, Mapping[str, Mapping[str, Any]]]
    baseline: str
    grids: Mapping[str, Mapping[str, Any]]
    metrics: str
    scores: Sequence[str]
    show: Sequence[str]
    only: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    scorer: str = ""
    front: str = ""
    seeds: int = 1
    reuse: Mapping[str, str] = dataclasses.field(default_factory=dict)
    begin: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if len(self.runs) < 2 or self.baseline not in self.runs:
            raise ValueError(
                f"study.runs: got {list(self.runs)} with baseline {self.baseline!r}, wanted two runs or more, the "
                "baseline among them"
            )
        if self.seeds < 1:
            raise ValueError(f"study.seeds: got {self.seeds}, wanted at least 1")
        for name in ("reuse", "begin"):
            for run, other in getattr(self, name).items():
                if run not in self.runs or other not in self.runs or other in {**self.reuse, **self.begin}:
                    raise ValueError(
                        f"study.{name}: got {run!r} after {other!r}, wanted two of study.runs, the second one trained "
                        "from the start"
                    )
        if isinstance(self.scores, str) or not self.scores:
            raise ValueError(f"study.scores: got {self.scores!r}, wanted names of values, e.g. ('lab_excess_nats',)")
        for name in self.metrics.split(","):
            pick("study.metrics", name, {**EVALUATORS, **OF_A_FILE, JUDGED: None})
        for run, grids in self.only.items():
            pick("study.only", run, self.runs)
            for grid in grids:
                pick(f"study.only.{run}", grid, self.grids)

    def settings(self, run: str | None = None) -> list[dict[str, Any]]:
        """Every combination of the grids (of those of one run), each once."""
        found = []
        for name, grid in self.grids.items():
            if run is None or name in self.only.get(run, self.grids):
                several = [values if isinstance(values, (tuple, list)) else (values,) for values in grid.values()]
                found += [dict(zip(grid, chosen, strict=True)) for chosen in itertools.product(*several)]
        return [one for i, one in enumerate(found) if one not in found[:i]]


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One run, one seed, one way to sample.

    Attributes:
      weights: the run whose weights are sampled, as a rule the same.
      changed: this way, {field of config.sampling: value}.
      settings: the config of that run by sections, as it is trained. trained: the same, read.
      config: that of this run, with this way in its section sampling.
    """

    run: str
    weights: str
    seed: int
    changed: Mapping[str, Any]
    settings: Mapping[str, Any]
    trained: Config
    config: Config

    @property
    def folder(self) -> str:
        """The workdir of the weights."""
        return f"{self.weights}-seed{self.seed}"

    @property
    def drawn(self) -> dict[str, Any]:
        """What samples must have been made of to be this cell's."""
        made_of = {"weights": self.folder, "updates": self.trained.updates, "sampling": self.config.sampling.described}
        return made_of if self.weights == self.run else {**made_of, "softmask": repr(self.config.softmask.operator)}

    @property
    def name(self) -> str:
        """Of the files of its samples, without the ending."""
        changed = (f"{field}{value}" for field, value in self.changed.items())
        return "-".join([f"{self.run}-seed{self.seed}", *changed, digest(self.drawn)])


def digest(facts: Any) -> str:
    """Eight hexadecimal digits that name these facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode("utf-8")).hexdigest()[:8]


def read_study(given: Any, workdir: Path = Path()) -> tuple[Study, list[Cell]]:
    """The study of a ConfigDict and all its cells, so that every mistake is found before anything is trained.

    workdir: of the study, for runs that begin at the weights of another.

    Raises:
      ValueError: one line; no study, or a run or a way to sample that no config allows.
    """
    settings = given.to_dict()
    if "study" not in settings:
        raise ValueError("config: got no section study, wanted one (as configs/lab.py has): --mode=study")
    try:
        study = Study(**settings.pop("study"))
    except TypeError as error:
        raise ValueError(f"config.study: got other fields than wanted ({error})") from error
    cells, order = [], sorted(study.runs, key=lambda run: run in study.begin)  # what they begin at comes first
    for seed, run in itertools.product(range(study.seeds), order):
        weights = study.reuse.get(run, run)
        mine, trained = (_changed(settings, study.runs[name], seed) for name in (run, weights))
        if run in study.begin:
            trained["train"]["init_from"] = str(workdir / f"{study.begin[run]}-seed{seed}")
        as_trained = read(trained)
        for changed in study.settings(run):
            sampled = read(mine | {"sampling": mine["sampling"] | changed})
            cells.append(Cell(run, weights, seed, changed, trained, as_trained, sampled))
    return study, cells


def _changed(settings: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """The settings by sections with the changes of a run, and its seed."""
    changed = {section: dict(values) for section, values in settings.items()}
    for section, values in (*changes.items(), ("train", {"seed": seed}), ("sampling", {"seed": seed})):
        changed[section] = {**changed.get(section, {}), **values}
    return changed
