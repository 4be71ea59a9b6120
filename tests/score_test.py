"""A run measured from end to end: samples that go on where they were, records, refusals that leave nothing behind."""

import dataclasses
import json
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from conftest import ROOT, environment

from smdlm import experiment, score
from smdlm.build import build
from smdlm.config import read
from smdlm.evaluate.compare import compare
from smdlm.evaluate.protocol import Protocol
from smdlm.evaluate.record import read_record

SETTINGS = {
    "model": {"width": 16, "depth": 1, "heads": 2, "cond": 8, "dropout": 0.0, "vocab_multiple": 1},
    "data": {"tokenizer": "bytes", "seq_len": 16, "batch_size": 8, "val_fraction": 0.5},
    "softmask": {"p_sm": 0.8, "scale": 0.4, "centre": -2.0, "steepness": 2.0},
    "optimizer": {"warmup": 0, "lr": 3e-3},
    "train": {"steps": 2, "log_every": 2, "save_every": 2},
    "sampling": {"steps": 3, "count": 2},
    "eval": {"blocks": 64, "batch_size": 8, "chain": 2},
}
SMALL = Protocol("small", samples=40, length=16, steps=3, batch=16, tokenizer="bytes", scorer=None)


def train(folder, name, **changes):
    """A workdir with a run of two updates, and all that is measured of it."""
    (folder / "corpus").mkdir(exist_ok=True)
    for i in range(12):
        (folder / "corpus" / f"{i}.txt").write_text(f"Document {i} says hello, and then {i * i} more things. " * 4)
    settings = {section: {**fields, **changes.get(section, {})} for section, fields in SETTINGS.items()}
    settings["data"]["source"] = f"text:{folder}/corpus/*.txt"
    made, workdir = build(read(settings), folder), folder / name
    with jax.set_mesh(made.mesh):
        checkpointer = experiment.checkpointer_of(workdir)
        experiment.train(made, workdir, checkpointer, {"config": settings, "content_hash": made.data.content_hash})
    return score.Run(workdir, made.config, settings, checkpointer)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    judge = train(folder, "judge", model={"causal": True}, softmask={"p_sm": 0.0})
    return train(folder, "soft"), str(judge.workdir)


@pytest.fixture
def fresh(runs, tmp_path):
    """A copy of the run in which nothing is measured yet."""
    shutil.copytree(runs[0].workdir, tmp_path / "run", ignore=shutil.ignore_patterns("samples", "results"))
    return score.Run(tmp_path / "run", runs[0].config, runs[0].settings, experiment.checkpointer_of(tmp_path / "run"))


@pytest.fixture(scope="module")
def result(runs):
    return score.score(runs[0], SMALL, runs[1])


def drawn(result):
    """The file of samples behind a result."""
    return result.parents[1] / read_record(result).about["samples"]["file"]


def records(result):
    return [json.loads(line) for line in drawn(result).read_text().splitlines()]


def test_a_record_says_what_was_measured_and_on_what(runs, result):
    record, found = read_record(result), runs[0]
    names = ["generative_perplexity", "sample_entropy", "mauve", "distinct_1", "duplicates", "blank"]
    assert all(record.value(name) is not None for name in names)
    assert "re-tokenised" not in record.value("generative_perplexity").label  # bytes both
    about = record.about
    assert about["checkpoint"]["step"] == 2 and len(about["checkpoint"]["sha256"]) == 64
    assert len(about["data"]["content_hash"]) == len(about["samples"]["sha256"]) == 64
    assert about["config"] == found.settings and about["sampler"]["policy"]["name"] == "Ancestral"
    assert about["nfe"] == 3 and 1 <= about["forwards"] <= 4 and about["wall_s"] > 0
    assert about["samples_per_s"] == pytest.approx(3 * 16 / about["wall_s"])  # of three calls, the last one filled up
    model, width, vocab = found.config.model, 16, 258
    per_forward = 16 * (model.flops(16) + 2 * width * vocab)
    assert about["flops_per_sample"] == pytest.approx(about["forwards"] * per_forward)
    assert record.protocol["samples"] == 40 and record.protocol["top_p_rule"] == "reference"
    rows = records(result)
    assert [row["number"] for row in rows] == list(range(40)) and len({row["text"] for row in rows}) > 30
    assert rows[0]["settings"]["top_p"] == 0.9 and rows[0]["settings"]["steps"] == 3


def test_what_is_there_is_not_measured_again(runs, result):
    before = result.stat().st_mtime_ns
    assert score.score(runs[0], SMALL, runs[1]) == result and result.stat().st_mtime_ns == before


def test_a_killed_run_goes_on_where_it_was(runs, result, fresh, monkeypatch):
    append = score.append

    def dies(path, rows):
        if path.exists():
            with open(path, "a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows[:5]) + '{"text": "cut')
            raise KeyboardInterrupt
        append(path, rows)

    monkeypatch.setattr(score, "append", dies)
    with pytest.raises(KeyboardInterrupt):
        score.score(fresh, SMALL, runs[1])
    assert not (fresh.workdir / "results").exists()
    monkeypatch.setattr(score, "append", append)
    again = score.score(fresh, SMALL, runs[1])
    whole, straight = records(again), records(result)
    assert [(row["text"], row["number"]) for row in whole] == [(row["text"], row["number"]) for row in straight]
    for name in ("generative_perplexity", "mauve"):
        assert read_record(again).value(name).mean == read_record(result).value(name).mean


def test_samplers_under_one_protocol_are_compared_by_pairs(runs, result, tmp_path):
    config = read({**SETTINGS, "data": runs[0].settings["data"], "sampling": {"policy": "remdm_cap", "eta": 0.3}})
    other = score.score(score.Run(runs[0].workdir, config, runs[0].settings, runs[0].checkpointer), SMALL, runs[1])
    assert other != result
    text = compare([str(result), str(other)], ["generative_perplexity", "sample_entropy"], "markdown")
    assert f"{other.stem} - {result.stem}" in text and "apart" not in text
    a, b = (read_record(file).value("sample_entropy").amounts for file in (result, other))
    assert np.any(a != b)


def refused(call, *arguments, **options):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_scorers_and_protocols_leave_nothing(runs, fresh):
    assert "got no folder" in refused(score.score, fresh, SMALL, "/no/such/judge")
    assert "got scorer None, wanted one" in refused(score.score, fresh, SMALL, None)
    unjudged = dataclasses.replace(SMALL, name="unjudged", scorer="")
    assert "got J for the protocol unjudged, which has no scorer" in refused(score.score, fresh, unjudged, "J")
    assert "not causal" in refused(score.score, fresh, SMALL, str(runs[0].workdir))
    paper = score.preset("sm2026")
    assert "protocol sm2026: got length 16" in refused(score.score, fresh, paper, runs[1])
    assert not (fresh.workdir / "samples").exists() and not (fresh.workdir / "results").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda rows: rows[:3], "got 3 samples, wanted 40"),
        (lambda rows: [{**row, "ids": row["ids"][:9]} for row in rows], "samples of 9 tokens, wanted 16"),
        (lambda rows: [], "got no samples"),
        (lambda rows: [{"ids": row["ids"]} for row in rows], "got no 'text'"),
        (lambda rows: [{**row, "settings": {"top_p": 1.0}} for row in rows], "drawn with top_p 1.0, wanted top_p 0.9"),
        (None, "is cut"),
    ],
)
def test_bad_samples_leave_no_result(runs, result, fresh, tmp_path, change, said):
    rows, file = records(result), tmp_path / "given.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in (rows if change is None else change(rows)))
    file.write_text(text[:-20] if change is None else text)
    assert said in refused(score.score, fresh, SMALL, runs[1], there=file)
    assert "got no file" in refused(score.score, fresh, SMALL, runs[1], there=tmp_path / "no.jsonl")
    assert not (fresh.workdir / "results").exists()


def test_samples_that_are_there_are_measured_like_those_that_are_drawn(runs, result, fresh, tmp_path):
    shutil.copy(drawn(result), tmp_path / "given.jsonl")
    given = read_record(score.score(fresh, SMALL, runs[1], there=tmp_path / "given.jsonl"))
    assert given.value("generative_perplexity").mean == read_record(result).value("generative_perplexity").mean
    assert given.about["forwards"] == read_record(result).about["forwards"]


# ---------------------------------------------------------------------------------------------------------- zero-shot


def test_zero_shot_is_the_likelihood_of_the_sets_blocks(runs, tmp_path):
    (tmp_path / "ptb.txt").write_text("shares do n't fall \n" * 12)
    spec = f"ptb=text:{tmp_path}/ptb.txt,mine=text:{tmp_path}/ptb.txt"
    files = score.zero_shot(runs[0], spec)
    ptb, mine = map(read_record, files)
    assert ptb.about["text"]["blocks"] == 12 * len("shares don't fall_") // 16
    two, one = ptb.value("perplexity_two_pass"), ptb.value("perplexity_one_pass")
    assert two.mean == pytest.approx(np.exp(two.amounts.sum() / two.sizes.sum())) and two.mean != one.mean
    assert two.sizes.tolist() == [16] * ptb.about["text"]["blocks"]
    assert 100 < one.mean < 1000 and ptb.protocol["rules"] == "ptb"  # near the 257 of an untrained model
    assert score.zero_shot(runs[0], spec) == files
    assert "rules ('ptb', 'none')" in refused(compare, [str(file) for file in files], [], "markdown")
    assert mine.about["text"]["sha256"] != ptb.about["text"]["sha256"]


def test_a_set_that_is_not_there_or_empty_leaves_nothing(fresh, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    good = f"mine=text:{ROOT}/README.md"
    assert "got no file" in refused(score.zero_shot, fresh, f"{good},other=text:{tmp_path}/no.txt")
    assert "got no text" in refused(score.zero_shot, fresh, f"empty=text:{tmp_path}/empty.txt")
    assert not (fresh.workdir / "results").exists()


# ------------------------------------------------------------------------------------------------------- command line


def test_flags_reach_the_measurement(runs, monkeypatch, capsys, result):
    asked = []
    monkeypatch.setattr(score, "score", lambda *arguments: asked.append(arguments) or result)
    flags = {
        "mode": "score",
        "protocol": "lab",
        "nfe": 7,
        "scorer": "J",
        "scorer_config": "C",
        "samples": None,
        "also": ["code"],
    }
    score.run(runs[0], types.SimpleNamespace(**flags))
    ((_, protocol, *rest),) = asked
    assert (protocol.name, protocol.steps, rest) == ("lab", 7, ["J", "C", None]) and "code" in protocol.also
    out = capsys.readouterr().out
    assert "generative_perplexity" in out.splitlines()[0] and "sample_entropy" in out.splitlines()[0]
    assert str(result) in out and "scored by judge" in out


def test_compare_needs_no_config_and_fails_in_one_line(result):
    command = [sys.executable, "-m", "smdlm.main", "--mode=compare", str(result)]
    call = lambda *more: subprocess.run(
        [*command, *more], cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=300
    )
    good = call(str(result), "--only=blank", "--format=csv")
    assert good.returncode == 0 and good.stdout.startswith("run,protocol,nfe"), good.stderr
    bad = call()
    assert bad.returncode == 2 and bad.stderr.splitlines()[-1].startswith("error: compare: got 1 results, wanted two")
    assert "Traceback" not in bad.stderr


def test_conversations_are_refused_before_anything_is_drawn(fresh):
    run = dataclasses.replace(fresh, config=types.SimpleNamespace(chat=True))
    with pytest.raises(ValueError, match="--mode=score: got a run on conversations"):
        score.score(run, SMALL, None)
    assert not (fresh.workdir / "samples").exists()
