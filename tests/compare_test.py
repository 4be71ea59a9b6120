"""Tables of results: what may stand together, what is refused and how, and the interval of pairs."""

import csv
import io

import numpy as np
import pytest

from smdlm import command
from smdlm.evaluate.base import Value
from smdlm.evaluate.compare import compare, difference
from smdlm.evaluate.record import Record, write_record
from smdlm.evaluate.samples import Ratio

NOISE = np.random.default_rng(0).normal(size=200)


def write(folder, shift=0.0, name="x", metrics=None, value="ppl", **protocol):
    """A result of 200 samples whose noise all share."""
    fields = {"name": "tiny", "version": 1, "samples": 200, "top_p": 0.9, **protocol}
    values = {
        "judge": {value: Ratio.of(NOISE + shift, None, "u", "by x")},
        "mauve": {"mauve": Value(0.5 + shift, 0.3, "u", "l")},
        "distinct": {"distinct": Value(0.9, None, "u", "l")},
    }
    facts = {"judge": {"scorer": "gpt2"}, "mauve": {"scorer": "gpt2"}, "distinct": {}, **(metrics or {})}
    file = folder / "results" / f"{name}.json"
    write_record(file, Record(fields, facts, values, {"nfe": 8, "forwards": 9.0}))
    return str(file)


def one_line(call, *arguments):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        call(*arguments)
    assert "\n" not in str(error.value) and "wanted" in str(error.value)
    return str(error.value)


@pytest.fixture
def pair(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", 0.25)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_values_and_paired_differences_in_one_table(pair):
    text = compare(pair, [], "markdown")
    lines = text.splitlines()
    assert lines[0].replace("|", "").split() == "run protocol NFE forwards ppl mauve distinct".split()
    assert len({len(line) for line in lines[:5]}) == 1 and set(lines[1]) == {"|", "-"}
    cells = [cell.strip() for cell in lines[4].split("|")[1:-1]]
    assert cells[0] == "b - a" and cells[4].startswith("+0.25 ± ") and cells[5] == "+0.25 ± 0.42*" and cells[6] == "+0*"
    found = rows(compare(pair, ["ppl", "mauve"], "csv"))
    assert [(row["run"], row["value"], row["paired"]) for row in found] == [
        ("a", "ppl", ""), ("a", "mauve", ""), ("b", "ppl", "True"), ("b", "mauve", "False"),
    ]  # fmt: skip
    assert float(found[2]["difference"]) == pytest.approx(0.25) and float(found[2]["difference_interval"]) < 1e-9
    assert float(found[0]["interval"]) == pytest.approx(1.96 * NOISE.std(ddof=1) / np.sqrt(200))
    assert float(found[3]["difference_interval"]) == pytest.approx(0.3 * np.sqrt(2))


def test_unlike_protocols_are_refused_by_their_fields(tmp_path):
    a = write(tmp_path / "a")
    b = write(tmp_path / "b", top_p=1.0, samples=100)
    said = one_line(compare, [a, b], [], "markdown")
    assert "samples (200, 100)" in said and "top_p (0.9, 1.0)" in said and "no value of theirs" in said
    assert "name" not in said.split("differ in")[1].split(";")[0]
    one_line(compare, [a, b], ["ppl"], "markdown")


def test_only_compares_what_is_alike(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b", metrics={"judge": {"scorer": "llama"}})
    said = one_line(compare, [a, b], [], "markdown")
    assert "judge.scorer ('gpt2', 'llama')" in said and "--only=mauve,distinct" in said
    assert "ppl" not in compare([a, b], ["mauve", "distinct"], "markdown")
    assert "judge.scorer" in one_line(compare, [a, b], ["ppl", "mauve"], "markdown")
    assert "got perplexity, wanted some of ppl" in one_line(compare, [a, b], ["perplexity"], "markdown")


def test_a_fact_that_one_of_them_lacks_is_a_difference(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b", metrics={"judge": {"scorer": "gpt2", "bos": True}})
    assert "judge.bos ('not measured', True)" in one_line(compare, [a, b], [], "markdown")


def test_points_of_a_curve_find_their_counterparts(tmp_path):
    for steps in (8, 16):
        write(tmp_path / "a", name=f"nfe{steps}", steps=steps)
        write(tmp_path / "b", 1.0, name=f"nfe{steps}", steps=steps)
    lone = write(tmp_path / "b", name="nfe32", steps=32)
    text = compare([str(tmp_path / "a"), str(tmp_path / "b")], ["ppl"], "markdown")
    assert text.count("b - a") == 2 and f"left out, the others have no counterpart: {lone}" in text
    write(tmp_path / "a", name="again", steps=8)
    assert "got two results of one protocol" in one_line(compare, [str(tmp_path / "a"), lone], ["ppl"], "markdown")


def test_other_values_are_another_table(tmp_path):
    for run in "ab":
        write(tmp_path / run)
        write(tmp_path / run, name="zero", value="perplexity", set="ptb")
    text = compare([str(tmp_path / "a"), str(tmp_path / "b")], ["ppl", "perplexity"], "markdown")
    assert text.count("| run") == 2
    assert "got a run without perplexity" in one_line(
        compare, [str(tmp_path / "a" / "results" / "x.json"), str(tmp_path / "b")], ["perplexity"], "markdown"
    )


def test_bad_arguments_are_one_line(pair, tmp_path):
    assert "got 1 results" in one_line(compare, pair[:1], [], "markdown")
    assert "got no result in" in one_line(compare, [*pair, str(tmp_path / "no")], [], "markdown")
    (tmp_path / "empty").mkdir()
    assert "got no result in" in one_line(compare, [*pair, str(tmp_path / "empty")], [], "markdown")


def test_pairs_only_where_there_are_as_many():
    a, b = (Ratio.of(NOISE[:n], None, "u", "l") for n in (100, 200))
    assert not difference(a, b).paired and difference(b, b).paired and difference(a, None) is None


@pytest.mark.parametrize(
    "flags, takes",
    [(["--mode=compare", "A", "B"], True), (["A", "--mode", "compare"], True), (["--mode=eval"], False), ([], False),
     (["--mode=compare", "--mode=eval"], False)],
)  # fmt: skip
def test_only_compare_takes_arguments_and_no_config(flags, takes):
    assert command.reads_results(["main", *flags]) == takes
