"""Metrics of text alone, and the files they read: hand-counted values, and every way in which a file is bad."""

import dataclasses
import json

import numpy as np
import pytest

from smdlm.evaluate.samples import Ratio, Samples, append, facts, in_batches, kept, paired, read_samples
from smdlm.evaluate.text import Blank, Code, Distinct, Entropy, RealWords, Repetition


def samples(*texts, ids=None):
    return Samples(texts, np.zeros((len(texts), 4), np.int32) if ids is None else np.array(ids, np.int32))


def means(metric, *texts, **options):
    return {name: value.mean for name, value in metric.run(samples(*texts, **options)).items()}


def test_entropy_is_that_of_the_tokens_of_a_sample():
    ids = [[1, 1, 1, 1], [1, 2, 3, 4], [1, 1, 2, 2]]
    value = Entropy().run(samples("a", "b", "c", ids=ids))["sample_entropy"]
    np.testing.assert_allclose(value.amounts, [0, np.log(4), np.log(2)])
    assert value.mean == pytest.approx(np.log(8) / 3) and value.interval > 0


def test_distinct_within_and_over_samples():
    got = means(Distinct(2), "a b a b", "a b c d", "")
    # words: 2 of 4 and 4 of 4; pairs: {ab, ba} of 3 and {ab, bc, cd} of 3
    assert got["distinct_1"] == pytest.approx(6 / 8) and got["distinct_1_all"] == pytest.approx(4 / 8)
    assert got["distinct_2"] == pytest.approx(5 / 6) and got["distinct_2_all"] == pytest.approx(4 / 6)
    assert "distinct_3" not in means(Distinct(3), "a b")


def test_repetition_and_duplicates():
    got = means(Repetition(2), "a b a b", "a b c", "a b c", "x")
    assert got["repeated_2"] == pytest.approx((1 / 3 + 0 + 0) / 3) and got["duplicates"] == pytest.approx(1 / 4)
    assert list(means(Repetition(4), "a b c", "a")) == ["duplicates"]


def test_real_words_stand_in_the_training_text():
    """Four letters or more, in any case; the words at both ends may be cut."""
    texts = ("urn Return the lisst of Values strin", "a b c", "Lists, values; the_mapping")
    samples = Samples(texts, np.zeros((3, 4), np.int32), known_words=frozenset({"return", "values", "lists"}))
    value = RealWords().run(samples)["real_words"]
    assert value.amounts.tolist() == [2, 0, 1] and value.sizes.tolist() == [3, 0, 1]
    with pytest.raises(ValueError, match="real_words: got samples without their training text"):
        RealWords().run(dataclasses.replace(samples, known_words=frozenset()))


def test_blank_means_without_letter_or_digit():
    assert means(Blank(), "  \n", "----  | |", "é", " 7 ")["blank"] == 0.5


def test_code_must_parse_and_must_be_there():
    good, bad = ["x = 1\n", "def f():\n    return '\\d'"], ["", "# only a comment", "x = = 1", "\0", "(" * 500]
    assert means(Code(), *good, *bad)["parses"] == pytest.approx(2 / 7)


def test_facts_are_the_fields():
    assert facts(Distinct(2)) == {"most": 2} and facts(Blank()) == {}


# ------------------------------------------------------------------------------------------------------------- ratios


def test_a_ratio_and_its_pairs():
    rng = np.random.default_rng(0)
    sizes, noise = rng.uniform(1, 3, 400), rng.normal(size=400)
    a = Ratio.of(2 * sizes + noise, sizes, "u", "l")
    b = Ratio.of(2.5 * sizes + noise, sizes, "u", "l")
    mean, interval = paired(a, b)
    assert mean == pytest.approx(0.5) and interval < 1e-9 < a.interval  # the noise is shared, and falls out
    shuffled = Ratio.of(b.amounts[::-1], b.sizes[::-1], "u", "l")
    assert paired(a, shuffled)[1] == pytest.approx(np.hypot(a.interval, b.interval), rel=0.2)
    assert 1.96 * np.sqrt((a.influence**2).sum() / 399 / 400) == pytest.approx(a.interval)


def test_an_exponential_is_to_first_order_the_ratio_times_itself():
    a, b = (Ratio.of([x, 1.0, 2.0], [1, 1, 1], "u", "l", exp=True) for x in (0.0, 1e-6))
    assert a.mean == pytest.approx(np.e) and paired(a, b)[0] == pytest.approx(np.e * 1e-6 / 3, rel=1e-3)
    plain = Ratio.of([0.0, 1.0, 2.0], None, "u", "l")
    assert a.interval == pytest.approx(np.e * plain.interval)


# -------------------------------------------------------------------------------------------------------------- files


def line(text="a", ids=(1, 2)):
    return json.dumps({"text": text, "ids": list(ids), "number": 0})


def test_reads_what_was_written(tmp_path):
    append(tmp_path / "s" / "x.jsonl", [{"text": "\ud800 é", "ids": [1, 2]}])
    append(tmp_path / "s" / "x.jsonl", [{"text": "b", "ids": [3, 4]}])
    got = read_samples(tmp_path / "s" / "x.jsonl", "print")
    assert got.texts == ("? é", "b") and got.ids.tolist() == [[1, 2], [3, 4]] and got.tokenizer == "print"


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "got no samples"),
        (line() + "\n" + line()[:9], "last line (2) that is cut"),
        (line() + "\n{oops\n" + line() + "\n", "line 2 that is not JSON"),
        ('{"ids": [1]}\n', "no 'text'"),
        ('{"text": "a"}\n', "no 'text' with its 'ids'"),
        ('{"text": "a", "ids": ["b"]}\n', "no 'text' with its 'ids'"),
        (line() + "\n" + line(ids=[1]) + "\n", "1 to 2 tokens"),
    ],
)
def test_bad_files_are_one_line(tmp_path, content, said):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ValueError) as error:
        read_samples(tmp_path / "x.jsonl")
    assert said in str(error.value) and "\n" not in str(error.value) and "wanted" in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="got no file"):
        read_samples(tmp_path / "x.jsonl")


def test_a_cut_line_is_dropped_when_sampling_goes_on(tmp_path):
    file = tmp_path / "x.jsonl"
    assert kept(file) == []
    file.write_text(line("one") + "\n" + line("two")[:7])
    assert [record["text"] for record in kept(file)] == ["one"]
    append(file, [{"text": "two", "ids": [1, 2]}])
    assert read_samples(file).texts == ("one", "two")


def test_slow_metrics_go_on_where_they_were(tmp_path):
    asked = []

    def compute(numbers, dies=False):
        if dies and 2 in numbers:
            raise KeyboardInterrupt
        asked.extend(numbers)
        return np.array([[i, i * i] for i in numbers])

    five = Samples(tuple("abcde"), np.zeros((5, 1), np.int32), cache=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        in_batches(five, {"what": 1}, 2, lambda numbers: compute(numbers, dies=True))
    assert in_batches(five, {"what": 1}, 2, compute).tolist() == [[i, i * i] for i in range(5)]
    assert asked == [0, 1, 2, 3, 4]
    in_batches(five, {"what": 2}, 2, compute)  # another computation
    other = Samples(tuple("abcdf"), five.ids, cache=tmp_path)
    in_batches(other, {"what": 1}, 2, compute)  # other samples
    assert len(asked) == 15
