"""Zero-shot sets: the detokenisation of the published numbers, blocks, and every way in which a set is bad."""

import numpy as np
import pytest

from smdlm.data.detokenise import RULES, detokenise
from smdlm.data.sources import make_source
from smdlm.data.tokenizer import make_tokenizer
from smdlm.evaluate import zeroshot
from smdlm.evaluate.zeroshot import SETS, TextSet, blocks, documents, named_sets

BYTES = make_tokenizer("bytes")
EOS = BYTES.eos_id


# Worked out by hand from the rules of the public code.
@pytest.mark.parametrize(
    "rules, text, wanted",
    [
        ("none", " a , b ", " a , b "),
        ("wikitext", " = Valkyria Chronicles = \n", " = Valkyria Chronicles =\n"),
        ("wikitext", " = = = Plot = = = \n", " === Plot ===\n"),
        ("wikitext", "role @-@ play ( lit . \" x \" ) , 3 @,@ 000 's", 'role-play (lit. "x"), 3,000\'s'),
        ("wikitext", "[ a ] { b } 1 @.@ 5 ; c ! ?", "[a] {b} 1.5; c! ?"),
        ("ptb", "mr. <unk> 's $ N N shares do n't \\/ # N x", "mr. ?'s $1 1 shares don't / #1 x"),
        ("lm1b", "He said : \" no \" , and ( so ) left .", 'He said: "no", and (so) left.'),
        ("lm1b", "it 's $ 5 or \u00a3 3 a / b ?", "it's $5 or \u00a33 a/b?"),
        ("lm1b", "see http : / / x / y ! a b . ok", "see http://x/y! a b. ok"),
        ("lambada", "  \u201chi\u201d she said \n", '\n"hi" she said'),
        ("scientific_papers", "we see ( fig . 1 ) , and [ 2 ] .", "we see (fig. 1), and [2] ."),
    ],
)  # fmt: skip
def test_detokenisation(rules, text, wanted):
    assert detokenise(text, RULES[rules]) == wanted


def test_the_seven_sets():
    assert set(SETS) == {"lm1b", "lambada", "ptb", "ag_news", "pubmed", "arxiv", "wikitext"}
    seven = named_sets("lm1b,lambada,ptb=text:p,ag_news,pubmed,arxiv,wikitext=text:w")
    assert list(seven) and seven["ptb"].rules == "ptb" and seven["wikitext"].documents == "all_lines"
    for how in seven.values():
        make_source(how.source, how.given)
    assert make_source(seven["pubmed"].source, seven["pubmed"].given).field == "article"
    assert named_sets("lm1b=jsonl:x")["lm1b"] == TextSet("jsonl:x", {}, "lm1b")
    assert named_sets("mine=text:x")["mine"] == TextSet("text:x")


@pytest.mark.parametrize(
    "spec, said",
    [("", "--sets: got ''"), ("owt", "--sets: got 'owt'"), ("ptb", "got ptb without a file"),
     ("mine=web:x", "data.source: got 'web:x'"), ("lm1b,,ptb=text:x", "--sets: got ''"),
     ("../a=text:x", "--sets: got the name '../a'")],
)  # fmt: skip
def test_bad_specs_are_one_line(spec, said):
    with pytest.raises(ValueError, match=said) as error:
        named_sets(spec)
    assert "\n" not in str(error.value)


def read(tmp_path, text, **how):
    (tmp_path / "set.txt").write_text(text)
    how = TextSet(f"text:{tmp_path}/set.txt", **how)
    return how, list(documents(make_source(how.source, how.given), how))


def test_documents(tmp_path):
    text = " one 's \n\n two \n"
    assert read(tmp_path, text)[1] == [text]
    assert read(tmp_path, text, rules="ptb", documents="lines")[1] == ["one's", "two"]
    assert read(tmp_path, text, documents="all_lines")[1] == [" one 's \n", "", " two \n"]


def test_blocks_follow_each_other_and_are_framed_like_the_models_data(tmp_path):
    how, _ = read(tmp_path, "abc\ndefg\n", documents="lines")
    stream = [*b"abc", EOS, *b"defg", EOS]
    assert blocks("x", how, BYTES, 4, "stream").tolist() == [stream[:4], stream[4:8]]
    framed = blocks("x", how, BYTES, 5, "bos_eos")
    assert framed.tolist() == [[EOS, *stream[i : i + 3], EOS] for i in (0, 3, 6)] and framed.dtype == np.int32


def test_what_is_left_of_a_group_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(zeroshot, "GROUP", 2)
    how, _ = read(tmp_path, "ab\ncd\nef\ngh\n", documents="lines")  # 6 tokens a group, with their EOS
    assert [bytes(row[:2].tolist()) for row in blocks("x", how, BYTES, 4, "stream")] == [b"ab", b"ef"]


@pytest.mark.parametrize(
    "text, said", [("", "got no text in"), (" \n \n", "got no text in"), ("ab", "too little text")]
)
def test_a_set_without_text_is_one_line(tmp_path, text, said):
    how, _ = read(tmp_path, text)
    with pytest.raises(ValueError, match=f"zero-shot set mine: .*{said}"):
        blocks("mine", how, BYTES, 8, "stream")
    with pytest.raises(ValueError, match="got no file"):
        blocks("mine", TextSet(f"text:{tmp_path}/no.txt"), BYTES, 8, "stream")
