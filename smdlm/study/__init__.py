"""A study: runs that differ in a few fields, each sampled in several ways, and one page that compares them.

    python -m smdlm.main --mode=study --config=configs/lab.py [--workdir=DIR]

A config with a section `study` (see plan.py) is a study; the other modes do not look at that section. What is there
already is not done again, so the same command continues a killed study, and another metric needs no new samples:

WORKDIR/RUN-seed0/                           an ordinary workdir
WORKDIR/cells/RUN-seed0-steps8-KEY.jsonl     the samples of a cell
WORKDIR/cells/RUN-seed0-steps8-KEY-KEY.json  its values, with .npz: a record, as --mode=compare reads it
WORKDIR/study.md, .csv, .png, training.png   the page, written anew after every run (report.py)

All runs of one seed sample with the same noise, so that their differences come with the interval of the pairs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from smdlm import experiment, identity
from smdlm.build import Experiment, assemble, build
from smdlm.data.kept import tokenizer_of_run
from smdlm.evaluate import EVALUATORS, OF_A_FILE
from smdlm.evaluate.genppl import GenerativePerplexity, Scorer
from smdlm.evaluate.likelihood import Likelihood
from smdlm.evaluate.record import Record, read_record, write_record
from smdlm.evaluate.samples import facts, read_samples
from smdlm.files import owned, sha256, write
from smdlm.io.plots import draw_panels
from smdlm.score import load_scorer, work
from smdlm.study.plan import JUDGED, Cell, Study, digest, read_study
from smdlm.study.report import Done, csv_of, page, panels, training_panels


def run(given: Any, workdir: Path) -> None:
    """Does what is missing and prints the page. ValueError, one line, for a config that is no study."""
    if jax.process_count() > 1:
        raise ValueError(f"--mode=study: got {jax.process_count()} processes, wanted one")
    study, cells = read_study(given, workdir)
    begin, judge = time.time(), _judge(study)
    with owned(workdir, "--workdir"):
        missing = [cell for cell in cells if _record(workdir, study, judge, cell) is None]
        for number, cell in enumerate(missing, 1):
            samples = workdir / "cells" / f"{cell.name}.jsonl"
            if not samples.exists():
                _train(cell, workdir / cell.folder)
                _sample(cell, workdir / cell.folder, samples)
            _score(study, cell, judge, workdir)
            left, seconds = len(missing) - number, time.time() - begin
            print(f"cell {cell.name}: done, {left} of {len(cells)} left, {seconds:.0f} s", flush=True)
            if left and missing[number].folder != cell.folder:
                _write_page(study, cells, judge, workdir)
                # The programs of a run are not used again. Linux limits the pieces of memory that a process may have
                # (vm.max_map_count), and after some forty runs LLVM got none for the next program.
                jax.clear_caches()
        print(_write_page(study, cells, judge, workdir))


def _judge(study: Study) -> Scorer | None:
    """The model behind study.scorer, if a metric asks for one. ValueError, one line, if there is none."""
    if JUDGED not in study.metrics.split(","):
        return None
    if not study.scorer:
        raise ValueError(
            f"study.scorer: got none for the metric {JUDGED}, wanted the workdir of a causal model: python -m "
            "smdlm.convert import gguf FILE WORKDIR"
        )
    return load_scorer(study.scorer, None)


def _train(cell: Cell, folder: Path) -> None:
    """Trains the run of a cell to its end, if it is not there yet."""
    config = cell.trained
    checkpointer = experiment.checkpointer_of(folder, keep=config.train.keep)
    identity.check_same_run(folder, checkpointer, config)
    if experiment.finished(folder, checkpointer, config.updates) is None:
        if config.train.init_from:
            experiment.init_source(config.train)
        made = build(config, folder)
        about = {"tokenizer": made.vocabulary.fingerprint, "content_hash": made.data.content_hash}
        with jax.set_mesh(made.mesh):
            experiment.train(made, folder, checkpointer, {"config": cell.settings, **about})
    checkpointer.close()


def _assembled(cell: Cell, folder: Path) -> Experiment:
    """The experiment of a cell, without the data that its run was trained on."""
    config = cell.config
    return assemble(config, tokenizer_of_run(folder, config.data.tokenizer), config.mesh.make(), None)


def _sample(cell: Cell, folder: Path, file: Path) -> None:
    """Draws the samples of a cell and writes them, all or none."""
    made, checkpointer = _assembled(cell, folder), experiment.checkpointer_of(folder)
    with jax.set_mesh(made.mesh):
        params, _ = experiment.restore(made, checkpointer, cell.config.sampling.omega)
        sampled = experiment.sample(made, params)
    checkpointer.close()
    records = [record | {"wall_s": round(sampled.seconds, 3)} for record in experiment.sample_records(made, sampled)]
    write(file, "".join(json.dumps(record) + "\n" for record in records))


def _score(study: Study, cell: Cell, judge: Scorer | None, workdir: Path) -> None:
    """Reads the samples of a cell and writes their values."""
    made, params = _assembled(cell, workdir / cell.folder), None
    metrics = {name: _metric(name, judge, cell) for name in study.metrics.split(",")}
    if any(isinstance(metric, Likelihood) for metric in metrics.values()):
        made, params = _with_weights(cell, workdir / cell.folder)
    file = workdir / "cells" / f"{cell.name}.jsonl"
    samples = read_samples(file, made.vocabulary.fingerprint, workdir / "cells" / f"{cell.name}.cache")
    seen = dataclasses.replace(experiment.subject(made, params), sample=lambda: samples.ids)
    values, about = {}, {}
    for name, metric in metrics.items():
        with jax.set_mesh(made.mesh) if isinstance(metric, Likelihood) else contextlib.nullcontext():
            values[name] = metric.run(seen if name in EVALUATORS else samples)
        about[name] = facts(metric)
    where = {"run": cell.run, "seed": cell.seed, "sampling": dict(cell.changed), "nfe": cell.config.sampling.steps}
    where["samples_sha256"] = sha256(file)
    cost = work(made, file, len(samples))
    write_record(_record_file(workdir, study, judge, cell), Record(_conditions(cell), about, values, where | cost))


def _with_weights(cell: Cell, folder: Path) -> tuple[Experiment, Any]:
    """(the experiment of a cell with its data, its weights as they are evaluated)."""
    made = build(cell.config, folder)
    with contextlib.closing(experiment.checkpointer_of(folder)) as checkpointer, jax.set_mesh(made.mesh):
        return made, experiment.restore(made, checkpointer, cell.config.eval.omega)[0]


def _conditions(cell: Cell) -> dict[str, Any]:
    """Under which the samples were drawn: what the runs of a study share."""
    return {"name": "study", "length": cell.config.data.seq_len, **cell.drawn["sampling"], "seed": cell.seed}


def _metric(name: str, judge: Scorer | None, cell: Cell) -> Any:
    """The metric of a name, as config.eval has it if it is named there too."""
    if name == JUDGED:
        return GenerativePerplexity(judge)
    cls = {**EVALUATORS, **OF_A_FILE}[name]
    return next((metric for metric in cell.config.eval.metrics if type(metric) is cls), None) or cls()


def _record_file(workdir: Path, study: Study, judge: Scorer | None, cell: Cell) -> Path:
    measured = {name: facts(_metric(name, judge, cell)) for name in study.metrics.split(",")}
    return workdir / "cells" / f"{cell.name}-{digest(measured)}.json"


def _record(workdir: Path, study: Study, judge: Scorer | None, cell: Cell) -> Record | None:
    """What is kept of a cell; None if it is missing, damaged or of other settings."""
    try:
        return read_record(_record_file(workdir, study, judge, cell))
    except ValueError:
        return None


def _write_page(study: Study, cells: Sequence[Cell], judge: Scorer | None, workdir: Path) -> str:
    """Writes the page, the table of all values and the plots: the page."""
    records = [(cell, _record(workdir, study, judge, cell)) for cell in cells]
    done = [Done(cell.run, cell.seed, cell.changed, record) for cell, record in records if record]
    trained = _summaries(cells, workdir)
    text = page(study, done, len(cells), trained)
    write(workdir / "study.md", text)
    write(workdir / "study.csv", csv_of(done))
    draw_panels(panels(study, done), workdir / "study.png")
    operators = {cell.weights: cell.trained.softmask.operator for cell in cells}
    learned = training_panels({run: operator.gate for run, operator in operators.items() if operator}, trained)
    if learned:
        draw_panels(learned, workdir / "training.png")
    return text


def _summaries(cells: Sequence[Cell], workdir: Path) -> dict[str, list[Mapping[str, Any]]]:
    """{run: summaries of its seeds that are trained}."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for name, folder in dict.fromkeys((cell.weights, cell.folder) for cell in cells):
        file = workdir / folder / "summary.json"
        if file.exists():
            found.setdefault(name, []).append(json.loads(file.read_text("utf-8")))
    return found
