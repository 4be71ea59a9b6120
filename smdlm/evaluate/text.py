"""Metrics of the samples' text and tokens alone: is it varied, does it repeat itself, is it there at all, is it code.

None of them is a measure of quality; they say what a good perplexity was paid with. Distinct and Repetition look at
words (what white space separates), so that models with different tokenizers can be compared.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import warnings

import numpy as np

from smdlm.evaluate.base import Value
from smdlm.evaluate.samples import Ratio, Samples


@dataclasses.dataclass(frozen=True)
class Entropy:
    """Sample entropy: -sum_v f_v log f_v, f_v being the share of token v among the L tokens of a sample; its mean.

    Nats. A lower temperature lowers generative perplexity and this entropy together: the two are always read as a pair.
    """

    def run(self, samples: Samples) -> dict[str, Value]:
        return {"sample_entropy": sample_entropy(samples, "samples")}


def sample_entropy(samples: Samples, label: str) -> Ratio:
    """The value of `Entropy`, for the row that the label names."""
    entropy = [_entropy(np.unique(row, return_counts=True)[1]) for row in samples.ids]
    return Ratio.of(entropy, None, "nats (sample entropy)", label)


def _entropy(counts: np.ndarray) -> float:
    shares = counts / counts.sum()
    return float(-np.sum(shares * np.log(shares)))


@dataclasses.dataclass(frozen=True)
class Distinct:
    """distinct_n for n = 1 .. `most`: distinct n-grams of words over all n-grams, within samples and over all samples.

    Within samples it falls when a sample repeats itself, over all samples when they resemble each other.
    """

    most: int = 3

    def __post_init__(self):
        if self.most < 1:
            raise ValueError(f"distinct: got most={self.most}, wanted at least 1")

    def run(self, samples: Samples) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for n in range(1, self.most + 1):
            grams = [ngrams(text, n) for text in samples.texts]
            total = np.array([len(row) for row in grams])
            if not total.any():
                continue  # every sample is shorter than n words
            unit = f"share (distinct {n}-grams)"
            within = np.array([len(set(row)) for row in grams])
            values[f"distinct_{n}"] = Ratio.of(within, total, unit, "within samples")
            overall = len(set().union(*grams)) / total.sum()
            values[f"distinct_{n}_all"] = Value(float(overall), None, unit, "over all samples")
        return values


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """The n-grams of a text's words, in order."""
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@dataclasses.dataclass(frozen=True)
class Repetition:
    """repeated_n: share of the n-grams of a sample that stood in it before (seq-rep-n), mean over samples that have
    any; duplicates: share of samples whose text an earlier sample had."""

    n: int = 4

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"repetition: got n={self.n}, wanted at least 1")

    def run(self, samples: Samples) -> dict[str, Value]:
        grams = [ngrams(text, self.n) for text in samples.texts]
        long_enough = np.array([bool(row) for row in grams], np.float64)
        repeated = [1 - len(set(row)) / len(row) if row else 0.0 for row in grams]
        values: dict[str, Value] = {}
        if long_enough.any():
            unit = f"share (repeated {self.n}-grams)"
            values[f"repeated_{self.n}"] = Ratio.of(repeated, long_enough, unit, "within samples")
        share = 1 - len(set(samples.texts)) / len(samples)
        values["duplicates"] = Value(share, None, "share (duplicates)", "over all samples")
        return values


@dataclasses.dataclass(frozen=True)
class Blank:
    """Share of samples without any letter or digit: white space, rules of tables, punctuation."""

    def run(self, samples: Samples) -> dict[str, Value]:
        blank = [not any(map(str.isalnum, text)) for text in samples.texts]
        return {"blank": Ratio.of(blank, None, "share (blank)", "samples")}


@dataclasses.dataclass(frozen=True)
class RealWords:
    """real_words: share of the words of four letters or more that stand in the training text.

    The first and the last word of a sample are not asked: the canvas may have cut them.
    """

    def run(self, samples: Samples) -> dict[str, Value]:
        if not samples.known_words:
            raise ValueError("real_words: got samples without their training text, wanted those of a run's end")
        rows = [words(text)[1:-1] for text in samples.texts]
        rows = [[word for word in row if len(word) >= 4] for row in rows]
        real = [sum(word in samples.known_words for word in row) for row in rows]
        counts = np.array([len(row) for row in rows])
        if not counts.any():
            return {}
        return {"real_words": Ratio.of(real, counts, "share (real words)", "samples")}


def words(text: str) -> list[str]:
    """Runs of letters, in lower case."""
    return re.findall(r"[^\W\d_]+", text.lower())


@dataclasses.dataclass(frozen=True)
class Code:
    """Share of samples that `ast.parse` of the running Python accepts and that hold at least one statement.

    An empty text is a valid module, so that a model could score by silence.
    """

    def run(self, samples: Samples) -> dict[str, Value]:
        return {"parses": Ratio.of([_parses(text) for text in samples.texts], None, "share (ast.parse)", "samples")}


def _parses(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like are no errors
            return bool(ast.parse(text).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # what the parser says of text that is no code
        return False
