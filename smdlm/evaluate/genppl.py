"""Generative perplexity: how likely a causal scorer finds samples, per token of the scorer.

The number moves by a factor of two with how texts are cut, framed and counted, so all of that is a field. Sample
entropy stands in the same row, because a low perplexity can be bought with it.

Shapes: B windows, W tokens of a window, N samples.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smdlm.data.vocabulary import Tokenizer
from smdlm.denoiser import Denoiser
from smdlm.evaluate.base import Value
from smdlm.evaluate.samples import Ratio, Samples, facts, in_batches
from smdlm.evaluate.text import sample_entropy
from smdlm.readout import Readout

READOUT = Readout()
ROUND = 32  # tokens; what is scored is padded to a multiple of it


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """A causal model that judges, with its weights and tokenizer.

    Attributes:
      name: words for tables. fingerprint: of its weights.
      length: tokens it can see at once.
    """

    name: str
    denoiser: Denoiser
    params: Any
    tokenizer: Tokenizer
    length: int
    fingerprint: str

    def __post_init__(self):
        if not self.denoiser.model.causal:
            raise ValueError(
                f"scorer: got {self.name}, which is not causal, wanted a left-to-right model (GPT-2, Llama, AR)"
            )

    @property
    def identity(self) -> list[str]:
        return [self.name, self.fingerprint, self.tokenizer.fingerprint]

    def tokens(self, samples: Samples) -> list[np.ndarray]:
        """N arrays of the scorer's ids: the samples' own if the tokenizer is the same, else their texts encoded anew.

        Raises:
          ValueError: a sample still holds masks.
        """
        if not self.reads(samples):
            return self.tokenizer.encode_batch(list(samples.texts))
        wrong = np.flatnonzero((samples.ids == self.tokenizer.mask_id).any(1))
        if len(wrong):
            raise ValueError(
                f"scorer: got masks in sample {wrong[0]}, wanted finished samples: remove noise at the end"
            )
        return list(samples.ids)

    def reads(self, samples: Samples) -> bool:
        """Whether the samples' ids are the scorer's."""
        return samples.tokenizer == self.tokenizer.fingerprint

    @functools.cached_property
    def hidden(self) -> Any:
        """Jitted: tokens [B, W] -> hidden states [B, W, D]."""
        return functools.partial(jax.jit(self.denoiser.__call__), self.params)

    @functools.cached_property
    def nll(self) -> Any:
        """Jitted: (tokens [B, W], counted [B, W - 1]) -> nll of tokens 1 .. W - 1 in nats, 0 where not counted."""

        def score(params: Any, tokens: jax.Array, counted: jax.Array) -> jax.Array:
            hidden = self.denoiser(params, tokens)[:, :-1]
            return READOUT.nll(self.denoiser.head(params), hidden, tokens[:, 1:], counted)[1]

        return functools.partial(jax.jit(score), self.params)


class Window(NamedTuple):
    """Tokens start .. end - 1 of sample `row` are shown, tokens first .. end - 1 are scored."""

    row: int
    start: int
    first: int
    end: int


def windows(row: int, length: int, window: int, stride: int) -> list[Window]:
    """Windows that together score tokens 1 .. length - 1 once each.

    After the first one each shows at least window - stride tokens before what it scores.
    """
    found, first, start = [], 1, 0
    while first < length:
        end = min(start + window, length)
        found.append(Window(row, start, first, end))
        first, start = end, start + stride
    return found


@dataclasses.dataclass(frozen=True)
class GenerativePerplexity:
    """exp of the scorer's mean nats per token over all samples, with sample entropy beside it.

    Attributes:
      truncate: tokens of a sample that are scored, from its start; 0 for all.
      window: tokens shown to the scorer at once; 0 for as many as it can see.
      stride: by which the window moves over longer samples; 0 for half a window.
      bos: whether the scorer's BOS is put before a sample that does not begin with it. Without it a sample's first
        token is context only.
      eos: what counts: 'all'; 'first', every token but EOS, and the first EOS, which may be the BOS of the same id at
        the front (the reference); 'stop', everything up to the first EOS behind the front.
      batch_size: windows scored at once.
    """

    scorer: Scorer
    truncate: int = 0
    window: int = 0
    stride: int = 0
    bos: bool = False
    eos: str = "first"
    batch_size: int = 8

    def __post_init__(self):
        if self.truncate < 0 or self.batch_size < 1:
            raise ValueError(
                f"generative perplexity: got truncate {self.truncate}, batch_size {self.batch_size}, wanted 0 or more "
                "and at least 1"
            )
        if not 0 <= self.window <= self.scorer.length or self.window == 1:
            raise ValueError(
                f"generative perplexity: got window {self.window}, wanted 2 .. {self.scorer.length}, what "
                f"{self.scorer.name} can see, or 0 for all of it"
            )
        if not 0 <= self.stride < self._window:
            raise ValueError(
                f"generative perplexity: got stride {self.stride}, wanted 1 .. window - 1 = {self._window - 1}, or 0 "
                "for half a window: every token needs one before it"
            )
        if self.eos not in ("all", "first", "stop"):
            raise ValueError(f"generative perplexity: got eos {self.eos!r}, wanted 'all', 'first' or 'stop'")

    @property
    def _window(self) -> int:
        return self.window or self.scorer.length

    def run(self, samples: Samples) -> dict[str, Value]:
        """generative_perplexity and sample_entropy, one row. ValueError for a NaN score."""
        tokens = [self._framed(row) for row in self.scorer.tokens(samples)]
        longest = -(-max(map(len, tokens)) // ROUND) * ROUND  # one program for samples of about one length
        width = min(self._window, longest)
        compute = lambda numbers: self._score([tokens[i] for i in numbers], numbers[0], width)
        nll_N, count_N = in_batches(samples, facts(self), self.batch_size, compute).T
        if not count_N.any():
            raise ValueError("generative perplexity: got no token to score, wanted samples of two tokens or more")
        label = f"scored by {self.scorer.name}" + ("" if self.scorer.reads(samples) else ", text re-tokenised")
        perplexity = Ratio.of(nll_N, count_N, "perplexity (generative)", label, exp=True)
        return {"generative_perplexity": perplexity, "sample_entropy": sample_entropy(samples, label)}

    def _framed(self, tokens: np.ndarray) -> np.ndarray:
        bos = self.scorer.tokenizer.bos_id
        if self.bos and (not len(tokens) or tokens[0] != bos):
            tokens = np.concatenate([[bos], tokens])
        return tokens[: self.truncate or None].astype(np.int32)

    def _counted(self, tokens: np.ndarray) -> np.ndarray:
        """Which tokens count, [n] bool; the first one of a sample, which has no context, never does."""
        position = np.arange(len(tokens))
        end = tokens == self.scorer.tokenizer.eos_id
        if self.eos == "first":
            counts = ~end | (np.cumsum(end) == 1)
        else:
            ends = np.cumsum(end & (position > 0))  # GPT-2's BOS is its EOS
            counts = (ends - end <= 0) | (self.eos == "all")
        return counts & (position > 0)

    def _score(self, tokens: Sequence[np.ndarray], first: int, width: int) -> np.ndarray:
        """[n, 2]: nats and counted tokens of each sample; the first of them has number `first`."""
        counts = [self._counted(row) for row in tokens]
        stride = self.stride or self._window // 2
        todo = [w for i, row in enumerate(tokens) for w in windows(i, len(row), self._window, stride)]
        nll = np.zeros(len(tokens))
        for begin in range(0, len(todo), self.batch_size):
            some = todo[begin : begin + self.batch_size]
            # Always the same shape, so that one program serves; a causal model does not see what stands to the right.
            shown = np.zeros((self.batch_size, width), np.int32)
            counted = np.zeros((self.batch_size, width), np.float32)
            for line, w in enumerate(some):
                shown[line, : w.end - w.start] = tokens[w.row][w.start : w.end]
                counted[line, w.first - w.start : w.end - w.start] = counts[w.row][w.first : w.end]
            found = np.asarray(self.scorer.nll(jnp.asarray(shown), jnp.asarray(counted[:, 1:])), np.float64).sum(1)
            np.add.at(nll, [w.row for w in some], found[: len(some)])
        wrong = np.flatnonzero(~np.isfinite(nll))
        if len(wrong):
            raise ValueError(
                f"generative perplexity: got a score of {nll[wrong[0]]} for sample {first + wrong[0]}, wanted finite "
                f"numbers: the weights of {self.scorer.name} are damaged or overflow"
            )
        return np.stack([nll, [row.sum() for row in counts]], axis=1)
