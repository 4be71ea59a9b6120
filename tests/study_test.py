"""Studies: which cells there are, what the page says of pairs and seeds, and that nothing is done twice."""

import csv
import dataclasses
import json

import jax
import ml_collections
import numpy as np
import pytest

from configs import lab as lab_config
from smdlm import study
from smdlm.evaluate.base import Value
from smdlm.evaluate.record import Record, read_record
from smdlm.evaluate.samples import Ratio, paired
from smdlm.feedback.gates import EntropyGate
from smdlm.study.plan import read_study
from smdlm.study.report import Done, csv_of, page, panels, training_panels


def study_config(**changed):
    """The smallest study: two runs, two numbers of steps."""
    config = ml_collections.ConfigDict()
    config.model = dict(width=16, depth=1, heads=2, cond=8, vocab_multiple=1)
    config.data = dict(source="lab:markov:4:1:0", tokenizer="bytes", seq_len=8, batch_size=4)
    config.softmask = dict(p_sm=0.5)
    config.optimizer = dict(warmup=0)
    config.train = dict(steps=2, log_every=1, save_every=2)
    config.sampling = dict(count=2, top_p=1.0)
    config.eval = dict(blocks=4, batch_size=4, chain=0)
    runs = dict(binary=dict(softmask=dict(p_sm=0.0)), softmask=dict())
    fields = dict(
        runs=runs,
        baseline="binary",
        grids=dict(nfe=dict(count=64, steps=(2, 4))),
        metrics="lab",
        scores=("lab_excess_nats",),
        show=("lab_tv_2",),
    )
    config.study = {**fields, **changed}
    return config


def test_cells_are_runs_seeds_and_settings():
    made, cells = read_study(study_config(seeds=2))
    assert [cell.name.rpartition("-")[0] for cell in cells][:3] == [
        "binary-seed0-count64-steps2",
        "binary-seed0-count64-steps4",
        "softmask-seed0-count64-steps2",
    ]
    assert len(cells) == 8 and len({cell.name for cell in cells}) == 8
    last = cells[-1]
    assert last.config.sampling.steps == 4 and last.config.sampling.seed == last.config.train.seed == 1
    assert last.trained.sampling.count == 2 and last.config.sampling.count == 64
    assert [cell.config.softmask.p_sm for cell in cells[1:3]] == [0.0, 0.5]


def test_a_run_may_be_sampled_by_some_grids_only():
    grids = dict(nfe=dict(count=64, steps=(2, 4)), once=dict(count=8))
    made, cells = read_study(study_config(grids=grids, only=dict(softmask=("once",))))
    assert [(cell.run, dict(cell.changed)) for cell in cells] == [
        ("binary", {"count": 64, "steps": 2}),
        ("binary", {"count": 64, "steps": 4}),
        ("binary", {"count": 8}),
        ("softmask", {"count": 8}),
    ]


def softened(**changed):
    """A study with a run that samples the binary weights with feedback, and one that begins at them."""
    soft = dict(softmask=dict(p_sm=0.0, soften=True, gate="constant", scale=0.3))
    runs = dict(binary=dict(softmask=dict(p_sm=0.0)), soft=soft, on=dict(softmask=dict(p_sm=1.0)))
    return study_config(**{"runs": runs, "reuse": {"soft": "binary"}, "begin": {"on": "binary"}, **changed})


def test_runs_that_use_the_weights_of_another(tmp_path):
    """Reused weights are trained once, by the other run's settings, and sampled by this one's."""
    made, cells = read_study(softened(), tmp_path)
    binary, soft, on = (next(cell for cell in cells if cell.run == run) for run in ("binary", "soft", "on"))
    assert cells.index(on) > cells.index(binary)  # begun at what is there by then
    assert (binary.folder, soft.folder, on.folder) == ("binary-seed0", "binary-seed0", "on-seed0")
    assert soft.name.startswith("soft-seed0") and soft.trained == binary.trained
    assert soft.config.softmask.operator is not None and soft.config.softmask.soften
    assert on.trained.train.init_from == str(tmp_path / "binary-seed0") and not binary.trained.train.init_from
    assert dataclasses.replace(soft, config=binary.config).name != soft.name  # another gate is another result


def test_training_is_drawn_as_it_ended():
    """Seeds averaged: nats at each step, and the learned gate at the entropies from 0 to 6 nats."""
    omega = [{"scale": scale, "centre": -2.0, "steepness": 3.0} for scale in (0.2, 0.4)]
    values = [{"step_1_nats": {"mean": a}, "step_1_gain": {"mean": 9.0}, "step_2_nats": {"mean": 1.0}} for a in (3, 5)]
    trained = {
        "binary": [{"omega": {}, "values": values[0]}],
        "softmask": [{"omega": o, "values": v} for o, v in zip(omega, values, strict=True)],
    }
    steps, gate = training_panels({"softmask": EntropyGate()}, trained)
    assert {run: list(curve.y) for run, curve in steps.curves.items()} == {"binary": [3, 1], "softmask": [4, 1]}
    curve = gate.curves["softmask"]
    at = dict(zip(curve.x, curve.y, strict=True))
    assert at[2.0] == pytest.approx(0.15, rel=1e-5) and at[0.0] == pytest.approx(0.3 / (1 + np.exp(-6.0)), rel=1e-5)
    assert training_panels({}, {"ar": [{"omega": {}, "values": {}}]}) == []


@pytest.mark.long
def test_training_free_and_continued_runs_are_sampled(tmp_path, capsys):
    study.run(softened(), tmp_path)
    assert "6 of 6 cells" in capsys.readouterr().out
    assert not (tmp_path / "soft-seed0").exists() and (tmp_path / "on-seed0" / "summary.json").exists()


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"reuse": {"softmask": "ar"}}, "study.reuse: got 'softmask' after 'ar'"),
        ({"reuse": {"binary": "softmask", "softmask": "binary"}}, "study.reuse: got 'binary' after 'softmask'"),
        ({"begin": {"new": "binary"}}, "study.begin: got 'new'"),
        ({"only": {"softmask": ("nfes",)}}, "study.only.softmask: got 'nfes'"),
        ({"runs": {"binary": {}}}, "wanted two runs"),
        ({"baseline": "ar"}, "baseline"),
        ({"seeds": 0}, "seeds: got 0"),
        ({"metrics": "mauve"}, "study.metrics: got 'mauve'"),
        ({"plot": True}, "other fields"),
        ({"grids": {"a": {"stepz": 3}}}, "stepz"),
        ({"runs": {"binary": {}, "b": {"softmask": {"p_sm": 2.0}}}}, "p_sm"),
    ],
)
def test_a_bad_study_is_one_line(changed, match):
    with pytest.raises(ValueError, match=match) as error:
        read_study(study_config(**changed))
    assert "\n" not in str(error.value)


def done_cells(cells, rows):
    """Cells whose excess of each sample is rows(cell) [N]."""
    cost = {"forwards": 2.0, "wall_s": 1.0, "flops_per_sample": 1e6, "samples_per_s": 12.5}
    found = []
    for cell in cells:
        values = {
            "lab_excess_nats": Ratio.of(rows(cell), None, "nats/token", "excess"),
            "lab_tv_2": Value(0.25, None, "", ""),
        }
        found.append(Done(cell.run, cell.seed, cell.changed, Record({}, {"lab": {}}, {"lab": values}, cost)))
    return found


def test_the_verdict_counts_pairs_and_seeds(monkeypatch):
    """Noise that both runs share drops out of their difference; three seeds that disagree widen its interval."""
    made, cells = read_study(study_config(seeds=3))
    random = np.random.RandomState(0)
    shared = {seed: random.normal(1.0, 1.0, 64) for seed in range(3)}
    better = {2: (-0.1, -0.1, -0.1), 4: (-0.6, 0.3, -0.1)}

    def rows(cell):
        gain = better[cell.changed["steps"]][cell.seed] if cell.run == "softmask" else 0.0
        return shared[cell.seed] + gain + random.normal(0, 0.02, 64)

    done = done_cells(cells, rows)
    summary = {"steps": 2, "wall_s": 60.0, "parameters": 9, "omega": {}, "values": {"bits": {"mean": 1.5}}}
    lines = page(made, done, len(cells), {"binary": [summary]}).splitlines()
    assert "12 of 12 cells, 3 seeds" in lines[0]
    differences = {line.split(" | ")[0]: line.split(" | ")[3] for line in lines if line.startswith("| count")}
    mean, interval = map(float, differences["| count 64 steps 2"].strip(" |").split(" ± "))
    assert mean == pytest.approx(-0.1, abs=0.01) and interval < 0.02
    mean, interval = map(float, differences["| count 64 steps 4"].strip(" |").split(" ± "))
    assert mean == pytest.approx(-0.13, abs=0.01) and interval > 1
    assert "softmask better than binary beyond the interval at: count 64 steps 2." in lines
    assert "| binary | 2 | 1.0 | 9 | 1.500 |" in lines
    assert sum(line.endswith(" | 2 | 12.5 |") for line in lines) == 4  # forwards, samples per second
    monkeypatch.setattr("smdlm.study.report.WIDE", 1)  # a line for each run instead of a column
    lines = {line.split(" | ")[0]: line.split(" | ")[1:] for line in page(made, done, 12, {}).splitlines()[:8]}
    assert lines["| run"] == ["count 64 steps 2", "count 64 steps 4 |"] and "(" not in lines["| binary"][0]
    assert lines["| softmask"][0].endswith(f"({differences['| count 64 steps 2'].strip(' |')})")


def test_csv_and_panels_hold_every_cell():
    made, cells = read_study(study_config(front="lab_tv_2"))
    done = done_cells(cells, lambda cell: np.arange(3.0) + cell.changed["steps"])
    rows = list(csv.DictReader(csv_of(done).splitlines()))
    assert (
        len(rows) == 8
        and rows[0]["mean"] == "3.0"
        and rows[0]["steps"] == "2"
        and rows[0]["value"] == "lab_excess_nats"
    )
    forwards, seconds, front = panels(made, done)
    assert list(forwards.curves) == ["binary", "softmask"] and forwards.curves["binary"].y == [3.0, 5.0]
    assert front.curves["softmask"].x == [0.25, 0.25] and front.curves["softmask"].y == [3.0, 5.0]


def test_a_score_that_no_metric_gives_is_one_line():
    made, cells = read_study(study_config(scores=("perplexity",)))
    with pytest.raises(ValueError, match="study.scores: got 'perplexity', wanted one of the values lab_excess_nats"):
        page(made, done_cells(cells, lambda cell: np.ones(3)), 4, {})


def test_a_score_of_several_names_is_the_first_that_a_run_has():
    """A model that has two passes by those, one that has one by that; the difference is that of their pairs."""
    made, cells = read_study(study_config(scores=("two|one",)))
    rows = {"one": np.arange(4.0), "two": np.arange(4.0) - 0.5}
    done = []
    for cell in cells:
        names = ("one",) if cell.run == "binary" else ("one", "two")
        values = {name: Ratio.of(rows[name], None, "nats", name) for name in names}
        values["lab_tv_2"] = Value(0.25, None, "", "")
        about = {"forwards": 2.0, "wall_s": 1.0, "flops_per_sample": 1e6}
        done.append(Done(cell.run, cell.seed, cell.changed, Record({}, {"lab": {}}, {"lab": values}, about)))
    lines = page(made, done, 4, {}).splitlines()
    assert "## two, or one (less is better)" in lines
    (line,) = [line for line in lines if line.startswith("| count 64 steps 4 |")]
    (binary, soft, difference) = (part.split(" ± ") for part in line.strip("| ").split(" | ")[1:])
    assert (binary[0], soft[0], difference) == ("1.500", "1.000", ["-0.500", "0.000"])


@pytest.mark.long
def test_likelihoods_are_compared_by_the_pairs_of_their_blocks(tmp_path):
    """On the blocks and with the fields of config.eval; the value is that of the end of training."""
    fields = dict(metrics="lab,likelihood", scores=("nats_per_token_two_pass|nats_per_token_one_pass",))
    config = study_config(**fields, grids=dict(once=dict(count=2)))
    study.run(config, tmp_path)
    found = {run: read_record(next((tmp_path / "cells").glob(f"{run}-*.json"))) for run in config.study.runs}
    for run, record in found.items():
        assert record.metrics["likelihood"]["blocks"] == 4 and record.metrics["likelihood"]["chain"] == 0
        summary = json.loads((tmp_path / f"{run}-seed0" / "summary.json").read_text())
        value = record.value("nats_per_token_one_pass")
        assert value.mean == pytest.approx(summary["val_nats_per_token_one_pass"], rel=1e-5) and len(value.sizes) == 4
    assert found["binary"].value("nats_per_token_two_pass") is None
    two_pass, one_pass = (
        found["softmask"].value("nats_per_token_two_pass"),
        found["binary"].value("nats_per_token_one_pass"),
    )
    assert paired(one_pass, two_pass)[0] == pytest.approx(two_pass.mean - one_pass.mean)
    assert "two_pass, or nats_per_token_one_pass" in (tmp_path / "study.md").read_text()


def test_generative_perplexity_needs_a_scorer(tmp_path):
    with pytest.raises(ValueError, match="study.scorer: got none"):
        study.run(study_config(metrics="generative_perplexity"), tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_study_continues(tmp_path, monkeypatch, capsys):
    """Cells whose values are gone are scored again from their samples, without the weights; a new metric likewise.
    The programs of a run are let go at its end: a process may not have any number of them."""
    train, held = study._train, {}

    def counted(cell, folder):
        held[cell.name] = len(jax.devices()[0].client.live_executables())
        train(cell, folder)

    monkeypatch.setattr(study, "_train", counted)
    study.run(study_config(), tmp_path)
    _, last_of_binary, first_of_softmask, _ = held.values()
    assert first_of_softmask < last_of_binary
    printed = capsys.readouterr().out
    assert "4 of 4 cells" in printed and (tmp_path / "study.md").read_text() in printed
    assert len(list((tmp_path / "cells").glob("*.jsonl"))) == len(list((tmp_path / "cells").glob("*.npz"))) == 4
    results = sorted((tmp_path / "cells").glob("*.json"))
    before = read_record(results[-1])
    results[-1].write_text('{"format"')  # cut off
    monkeypatch.setattr(study, "_sample", None)  # nothing is trained or sampled again
    study.run(study_config(), tmp_path)
    assert "0 of 4 left" in capsys.readouterr().out
    after = read_record(results[-1])
    assert {n: v.plain() for n, v in after.values["lab"].items()} == {
        n: v.plain() for n, v in before.values["lab"].items()
    }
    study.run(study_config(metrics="lab,entropy", show=("sample_entropy",)), tmp_path)
    assert "sample_entropy" in (tmp_path / "study.md").read_text() and (tmp_path / "study.png").stat().st_size > 1000


@pytest.mark.slow
def test_soft_masking_brings_samples_nearer_to_the_truth(tmp_path):
    """The effect of the paper at the size of a test: beyond the interval, and by a tenth of a nat per token."""
    config = lab_config.get_config()
    config.model.update(width=64, depth=2, heads=2)
    config.data.update(source="lab:markov:16:1:0", seq_len=32)
    config.train.update(steps=300, log_every=100, save_every=300)
    config.eval = dict(blocks=64, batch_size=64, chain=0)
    config.sampling.update(count=256, steps=32)
    config.study.grids = dict(nfe=dict(count=256, steps=32))
    study.run(config, tmp_path)
    found = {run: read_record(next((tmp_path / "cells").glob(f"{run}-*.json"))) for run in config.study.runs}
    difference, interval = paired(*(found[run].value("lab_excess_nats") for run in ("softmask", "binary")))
    assert difference - interval > 0.1
    assert (
        "softmask better than binary beyond the interval at: count 256 steps 32." in (tmp_path / "study.md").read_text()
    )
