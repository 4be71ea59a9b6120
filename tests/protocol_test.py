"""Protocols and records: what they fix, what they refuse, and that a record gives back what was written."""

import dataclasses
import json

import numpy as np
import pytest
from genppl_test import make_scorer

from smdlm.config import SamplingConfig
from smdlm.evaluate import SAMPLE_METRICS
from smdlm.evaluate.base import Value
from smdlm.evaluate.protocol import PRESETS, Protocol, preset
from smdlm.evaluate.record import Record, read_record, write_record
from smdlm.evaluate.samples import Ratio, Samples, facts
from smdlm.sampling.policies import POLICIES


def samples(count=3, length=4, **settings):
    return Samples(tuple("abc"[:count]), np.zeros((count, length), np.int32), settings=settings)


SMALL = Protocol("small", samples=3, length=4, steps=8, tokenizer=None, scorer=None)


def test_the_presets_differ_in_what_is_measured():
    assert list(PRESETS) == ["sm2026", "remdm", "mdlm", "tiny", "lab"]
    drawn = [json.dumps({**p.drawn(), "name": ""}) for p in PRESETS.values()]
    assert len(set(drawn)) == len(drawn)
    paper = PRESETS["sm2026"]
    assert (paper.samples, paper.length, paper.top_p, paper.top_p_rule) == (5000, 1024, 0.9, "reference")
    assert (paper.scorer, paper.tokenizer, paper.omega) == ("gpt2-large", "gpt2", "live")
    with pytest.raises(dataclasses.FrozenInstanceError):
        paper.samples = 100


def test_sampling_fields_are_those_of_the_config():
    for protocol in PRESETS.values():
        filled = protocol.filled(protocol.length or 16, 8, protocol.tokenizer or "bytes")
        config = dataclasses.replace(SamplingConfig(POLICIES["mdlm"]()), **filled.sampling())
        assert config.count == protocol.batch and config.top_p == protocol.top_p
        assert config.steps == (protocol.steps or 8)


def test_what_is_open_is_taken_from_the_run_and_the_rest_is_refused():
    filled = PRESETS["tiny"].filled(64, 256, "bytes")
    assert (filled.length, filled.steps, filled.tokenizer) == (64, 256, "bytes")
    assert preset("sm2026", 128).steps == 128 and preset("sm2026").filled(1024, 8, "gpt2").steps == 1024
    with pytest.raises(ValueError, match=r"protocol sm2026: got length 64, tokenizer 'bytes', wanted length 1024"):
        PRESETS["sm2026"].filled(64, 8, "bytes")
    with pytest.raises(ValueError, match="protocol: got 'paper', wanted one of sm2026"):
        preset("paper")


def test_samples_must_be_the_protocols():
    SMALL.check(samples())
    SMALL.check(samples(temperature=1.0, top_p=0.9, steps=8))
    with pytest.raises(ValueError, match="got 2 samples, wanted 3"):
        SMALL.check(samples(2))
    with pytest.raises(ValueError, match="samples of 5 tokens, wanted 4"):
        SMALL.check(samples(length=5))
    with pytest.raises(ValueError, match="drawn with top_k 5, wanted top_k 0"):
        SMALL.check(samples(top_k=5))
    with pytest.raises(ValueError, match=r"drawn with steps 16, top_p 1.0, wanted steps 8, top_p 0.9"):
        SMALL.check(samples(temperature=1.0, top_p=1.0, steps=16))


def test_metrics_of_a_protocol():
    scorer = make_scorer()
    protocol = dataclasses.replace(SMALL, bos=True, eos="stop", truncate=7)
    with_text = protocol.metrics(scorer, samples())
    assert set(with_text) == {"generative_perplexity", "mauve", "distinct", "repetition", "blank"}
    more = dataclasses.replace(protocol, also=("code", "entropy")).metrics(scorer, None)
    assert {name: type(more[name]) for name in ("code", "entropy")} == {
        n: SAMPLE_METRICS[n] for n in ("code", "entropy")
    }
    with pytest.raises(ValueError, match="--also: got mauve, wanted some of entropy"):
        dataclasses.replace(protocol, also=("mauve",))
    judged = with_text["generative_perplexity"]
    assert (judged.bos, judged.eos, judged.truncate) == (True, "stop", 7)
    assert "mauve" not in protocol.metrics(scorer, None)
    alone = dataclasses.replace(SMALL, scorer="").metrics(None, None)
    assert "entropy" in alone and "generative_perplexity" not in alone
    for wanted, given, said in (
        ("gpt2-large", scorer, "got scorer judge, wanted gpt2-large"),
        (None, None, "got scorer None"),
    ):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(SMALL, scorer=wanted).metrics(given, None)


def test_facts_name_weights_and_texts_in_place_of_holding_them():
    scorer = make_scorer()
    for metric in SMALL.metrics(scorer, samples()).values():
        json.dumps(facts(metric))
    found = facts(SMALL.metrics(scorer, samples())["mauve"])
    assert found["scorer"] == ["judge", "weights", scorer.tokenizer.fingerprint]
    assert found["reference"] == samples().identity != samples(2).identity


# ------------------------------------------------------------------------------------------------------------ records


def record(**values):
    values = values or {"a": Ratio.of([1.0, 2.0], [1, 3], "u", "l", exp=True), "b": Value(0.5, None, "u", "l")}
    return Record(SMALL.drawn(), {"m": {"most": 3}}, {"m": values}, {"nfe": 8, "seed": 0, "checkpoint": {"step": 2}})


def test_a_record_gives_back_what_was_written(tmp_path):
    file = tmp_path / "results" / "x.json"
    write_record(file, record())
    got, wanted = read_record(file), record()
    assert (got.protocol, got.metrics, got.about["nfe"]) == (wanted.protocol, wanted.metrics, 8)
    assert got.value("b") == wanted.value("b") and got.value("c") is None
    assert isinstance(got.value("a"), Ratio) and got.value("a").exp
    np.testing.assert_array_equal(got.value("a").influence, wanted.value("a").influence)
    assert sorted(path.name for path in file.parent.iterdir()) == ["x.json", "x.npz"]


def test_conditions_are_of_the_named_values_only():
    whole = Record({"name": "p", "samples": 3}, {"m": {"k": 1}, "n": {"k": 2}},
                   {"m": {"a": Value(0, None, "u", "l")}, "n": {"b": Value(0, None, "u", "l")}}, {})  # fmt: skip
    assert whole.conditions(["a"]) == {"samples": 3, "m.k": 1}
    assert whole.conditions(["a", "b"]) == {"samples": 3, "m.k": 1, "n.k": 2}


def test_nan_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError):
        write_record(tmp_path / "x.json", record(a=Value(float("nan"), None, "u", "l")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("harm", ["{", '{"format": 0}', "[]", None])
def test_a_damaged_record_is_one_line(tmp_path, harm):
    write_record(tmp_path / "x.json", record())
    if harm is None:
        (tmp_path / "x.npz").unlink()
    else:
        (tmp_path / "x.json").write_text(harm)
    with pytest.raises(ValueError, match="x.json: got an unreadable result") as error:
        read_record(tmp_path / "x.json")
    assert "\n" not in str(error.value)
