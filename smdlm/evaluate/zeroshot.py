"""Zero-shot perplexity: the likelihood of sets that a model was not trained on, cut into blocks as its own data is.

The seven sets of the literature are at hand by name, with the splits, detokenisation and blocks of the published
numbers: documents end in EOS, and blocks follow each other without overlap (the stride is the block). The reference
groups documents by 1000 and drops what is left of each group; so do we.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from smdlm.data.detokenise import RULES, detokenise
from smdlm.data.documents import NoText, Source
from smdlm.data.packing import Packer
from smdlm.data.sources import make_source
from smdlm.data.vocabulary import Tokenizer

GROUP = 1000  # documents


@dataclasses.dataclass(frozen=True)
class TextSet:
    """Text to be scored, and how it is read.

    Attributes:
      source: 'kind:target' of data.sources. '' must be told: no registry has it.
      given: fields of the source.
      rules: of detokenise.RULES.
      documents: what is a document: 'whole' what the source says, 'lines' each line that is not blank, 'all_lines'
        each line with its end, blank ones as empty documents.
    """

    source: str
    given: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rules: str = "none"
    documents: str = "whole"


# tfds has no Wikitext and no PTB: give their files, --sets=wikitext=text:wiki.test.raw. Its AG News is split into title
# and description, of which the published numbers take both.
SETS: dict[str, TextSet] = {
    "lm1b": TextSet("tfds:lm1b", {"train_split": "test"}, "lm1b"),
    "lambada": TextSet("tfds:lambada", {"field": "passage", "train_split": "test"}, "lambada"),
    "ptb": TextSet("", {}, "ptb", "lines"),
    "ag_news": TextSet("tfds:ag_news_subset", {"field": "description", "train_split": "test"}),
    "pubmed": TextSet(
        "tfds:scientific_papers/pubmed", {"field": "article", "train_split": "validation"}, "scientific_papers"
    ),
    "arxiv": TextSet(
        "tfds:scientific_papers/arxiv", {"field": "article", "train_split": "validation"}, "scientific_papers"
    ),
    "wikitext": TextSet("", {}, "wikitext", "all_lines"),
}


def named_sets(spec: str) -> dict[str, TextSet]:
    """{name: set} of 'lm1b,ptb=text:ptb.txt,mine=jsonl:FILES'.

    A name of SETS keeps its rules where another source is given; any other name is read as it stands.

    Raises:
      ValueError: one line; an unknown name or source, a set that nobody can look up.
    """
    found = {}
    for part in spec.split(","):
        name, _, source = part.strip().partition("=")
        if name not in SETS and not source:
            raise ValueError(f"--sets: got {part!r}, wanted some of {', '.join(SETS)}, or NAME=text:GLOB")
        if not re.fullmatch(r"[\w.-]+", name):  # it becomes a part of the record's file name
            raise ValueError(f"--sets: got the name {name!r}, wanted letters, digits, '_', '-' and '.': NAME=text:GLOB")
        known = SETS.get(name, TextSet(""))
        if source:
            given = known.given if source.startswith("tfds:") else {}
            known = dataclasses.replace(known, source=source, given=given)
        if not known.source:
            raise ValueError(f"--sets: got {name} without a file, which no registry has: {name}=text:GLOB")
        make_source(known.source, known.given)  # is it spelled well?
        found[name] = known
    return found


def documents(source: Source, how: TextSet) -> Iterator[str]:
    """The detokenised texts of a set, one by one; records without text are left out."""
    rules = RULES[how.rules]
    for document in source.documents():
        try:
            text = document.read()
        except NoText:
            continue
        if how.documents == "whole":
            parts = [text]
        elif how.documents == "lines":
            parts = [line.strip() for line in text.split("\n") if line.strip()]
        else:
            parts = [f"{line}\n" if line.strip() else "" for line in text.removesuffix("\n").split("\n")]
        yield from (detokenise(part, rules) for part in parts)


def blocks(name: str, how: TextSet, tokenizer: Tokenizer, length: int, framing: str) -> np.ndarray:
    """[N, L] i32: the set's blocks, framed as the model's own data is.

    Raises:
      ValueError: one line; no text, or too little for one block.
    """
    found, group, read = [], [], False

    def close() -> None:
        packer = Packer(tokenizer, length, framing)
        ids = [packer.document(tokens) for tokens in tokenizer.encode_batch(group)] if group else []
        found.append(packer.add(np.concatenate([np.zeros(0, np.int32), *ids])))
        group.clear()

    for text in documents(make_source(how.source, how.given), how):
        read = read or bool(text.strip())
        group.append(text)
        if len(group) == GROUP:
            close()
    close()
    if not read:
        raise ValueError(f"zero-shot set {name}: got no text in {how.source}, wanted at least one document")
    whole = np.concatenate(found)
    if not len(whole):
        raise ValueError(f"zero-shot set {name}: got too little text for one block of {length} tokens, wanted more")
    return whole


def conditions(name: str, how: TextSet, length: int, framing: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """How a set was read, for a record."""
    read = {field.name: getattr(how, field.name) for field in dataclasses.fields(how)}
    return {
        "name": f"zero-shot {name}",
        "version": 1,
        **{**read, "given": dict(how.given)},
        "length": length,
        "framing": framing,
        "stride": length,
        "tokenizer": tokenizer.fingerprint,
    }
