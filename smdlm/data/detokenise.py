"""Undoing the tokenisation of the zero-shot sets: Wikitext, PTB and LM1B separate punctuation and contractions.

A set's perplexity depends on these rules as much as on the model, so they are those of the published numbers (the
public MDLM code), order and oddities included. Each is a list of replacements made one after the other: plain text, or
a pattern with its template.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Rule = tuple[str | re.Pattern, str]


def inside(left: str, right: str, content: str, spaces: str) -> Rule:
    """Takes the spaces from just inside a pair of delimiters."""
    opening, closing = re.escape(left), re.escape(right)
    return re.compile(f"{opening}{spaces}({content}){spaces}{closing}"), f"{left}\\1{right}"


WIKITEXT: list[Rule] = [
    ("s '", "s'"),
    (re.compile("/' [0-9]/"), "/'[0-9]/"),  # as it stands in the reference: never meant, hardly ever found
    *((f" @{sign}@ ", sign) for sign in "-,."),
    *((f" {sign} ", f"{sign} ") for sign in ":;.!?,"),
    inside("(", ")", r"[^\)]*?", r"\s*"),
    inside("[", "]", r"[^\]]*?", r"\s*"),
    inside("{", "}", r"[^}]*?", r"\s*"),
    inside('"', '"', r'[^"]*?', r"\s*"),
    inside("'", "'", r"[^']*?", r"\s*"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]

PTB: list[Rule] = [
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    ("\\/", "/"),
    *[(" N ", " 1 ")] * 10,  # of several in a row each pass finds every other one
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
]

LM1B: list[Rule] = [
    ("http : / / ", "http://"),
    ("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "),
    (re.compile(r" (\w+) \.$"), r" \1."),
    (" ? ", "? "),
    (re.compile(r" \?$"), "?"),
    (" ! ", "! "),
    (re.compile(r" \!$"), "!"),
    *((f" {sign} ", f"{sign} ") for sign in ",:;"),
    (" / ", "/"),
    inside('"', '"', '[^"]+', " "),
    inside("'", "'", "[^']+", " "),
    inside("(", ")", r"[^\(\)]+", " "),
    inside("[", "]", r"[^\[\]]+", " "),
    ("$ ", "$"),
    ("\N{POUND SIGN} ", "\N{POUND SIGN}"),
]

LAMBADA: list[Rule] = [
    ("\N{LEFT DOUBLE QUOTATION MARK}", '"'),
    ("\N{RIGHT DOUBLE QUOTATION MARK}", '"'),
    (re.compile(r"\s+\Z"), ""),
    (re.compile(r"\A\s*"), "\n"),
]

RULES: dict[str, list[Rule]] = {
    "none": [],
    "wikitext": WIKITEXT,
    "ptb": PTB,
    "lm1b": LM1B,
    "lambada": LAMBADA,
    "scientific_papers": WIKITEXT + LM1B,
}


def detokenise(text: str, rules: Sequence[Rule]) -> str:
    for found, wanted in rules:
        text = text.replace(found, wanted) if isinstance(found, str) else found.sub(wanted, text)
    return text
