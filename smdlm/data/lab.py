"""The laboratory: texts whose true distribution is known, so that samples are judged exactly and without a scorer.

    data.source='lab:markov:64:1:0'    a sparse random Markov chain of 64 symbols, order 1, seed 0
    data.source='lab:sums:2:0'         lines like '37+58=095' of two digits, seed 0

A law can write its text, draw true samples, and say what an ideal denoiser would predict at every mask. All random
choices come from NumPy's RandomState, whose streams never change, and the chain's probabilities are whole thousandths,
so a text is the same on every machine and in every version.

Each split is one document, so that the EOS behind it never stands inside a block: a stream of 2^n symbols and one EOS
leaves the EOS over, whatever power of two a block is; lines of sums fill blocks of whole lines and leave it over too.

Each symbol is one printable ASCII character, and 'bytes' is the only tokenizer: a token is a symbol and its id the
character's code. It needs no vocabulary of its own; a model learns within a few updates that the ids of other bytes
never occur, and one that writes them all the same is charged for an impossible transition.

Shapes: N sequences, L positions, A symbols, S contexts (A to the power of the order), P pairs of operands.
"""

from __future__ import annotations

import dataclasses
import functools
from bisect import bisect
from typing import Protocol

import numpy as np

FIRST = 33  # '!', the character of the chain's symbol 0
MOST_SYMBOLS = 94  # printable ASCII without the blank
MOST_CONTEXTS = 1024  # dense arrays [S, S] stay small
CONCENTRATION = 0.05  # of the Dirichlet distribution of a row
THOUSANDTHS = 1000
LENGTHS = {"train": 2**21, "val": 2**16}  # symbols of a chain
LINES = {"train": 2**17, "val": 2**12}  # of sums
HELD_OUT = 0.1  # share of the pairs of operands that never occur in training
SPECS = "'lab:markov:SYMBOLS:ORDER:SEED' | 'lab:sums:DIGITS:SEED'"


class Law(Protocol):
    """A true distribution over sequences of symbols, whose characters stand in `alphabet`."""

    @property
    def alphabet(self) -> str: ...

    @property
    def period(self) -> int:
        """A block must be a multiple of so many tokens."""
        ...

    @property
    def entropy_rate(self) -> float:
        """Nats per token."""
        ...

    def text(self, split: str) -> str:
        """The document of 'train' or 'val'."""
        ...

    def sample(self, count: int, length: int, seed: int) -> np.ndarray:
        """Independent true sequences of symbols [count, length]."""
        ...

    def log_prob(self, symbols: np.ndarray) -> np.ndarray:
        """Log-probability [N] in nats of whole sequences [N, L]; -inf for an impossible one."""
        ...

    def posterior(self, symbols: np.ndarray, masked: np.ndarray) -> np.ndarray:
        """What an ideal denoiser predicts: probabilities [N, L, A], given the symbols [N, L] that are not masked.

        Right at masked positions only.
        """
        ...


@functools.cache  # its tables are made once
def law(spec: str) -> Law:
    """The law that stands behind 'lab:'. ValueError, one line, reads and draws nothing."""
    kind, *numbers = spec.split(":")
    if all(number.isdigit() for number in numbers):
        if kind == "markov" and len(numbers) == 3:
            return Markov(*map(int, numbers))
        if kind == "sums" and len(numbers) == 2:
            return Sums(*map(int, numbers))
    raise ValueError(f"data.source: got 'lab:{spec}', wanted {SPECS}")


def symbols_of(law: Law, ids: np.ndarray) -> np.ndarray:
    """Token ids of the 'bytes' tokenizer -> symbols, -1 for ids that are not in the alphabet."""
    return _lookup(law.alphabet)[np.clip(ids, 0, 258)]


@functools.cache
def _lookup(alphabet: str) -> np.ndarray:
    table = np.full(259, -1)
    table[[ord(character) for character in alphabet]] = np.arange(len(alphabet))
    return table


# --------------------------------------------------------------------------------------------------------------- chain


@dataclasses.dataclass(frozen=True)
class Markov:
    """A random chain in which few transitions are possible.

    A row is drawn from a Dirichlet distribution and rounded to thousandths, so that what is less likely than 1/2000 is
    impossible, exactly. A context is a whole number: its last `order` symbols as digits to the base A, the newest last.
    """

    symbols: int
    order: int
    seed: int

    def __post_init__(self):
        if not 2 <= self.symbols <= MOST_SYMBOLS:
            raise ValueError(f"lab:markov: got {self.symbols} symbols, wanted 2 to {MOST_SYMBOLS} (printable ASCII)")
        if self.order not in (1, 2) or self.contexts > MOST_CONTEXTS:
            raise ValueError(
                f"lab:markov: got order {self.order} of {self.symbols} symbols, wanted order 1 or 2 with at most "
                f"{MOST_CONTEXTS} contexts (SYMBOLS^ORDER)"
            )
        if not self.seed < 2**32:
            raise ValueError(f"lab:markov: got seed {self.seed}, wanted 0 <= seed < 2**32")

    period = 1

    @property
    def contexts(self) -> int:
        return self.symbols**self.order

    @property
    def alphabet(self) -> str:
        return "".join(chr(FIRST + symbol) for symbol in range(self.symbols))

    @functools.cached_property
    def transitions(self) -> np.ndarray:
        """P(next symbol | context) [S, A]. Drawn anew until every context leads to one closed class of contexts."""
        random = np.random.RandomState(self.seed)
        while True:
            gammas = random.standard_gamma(CONCENTRATION, (self.contexts, self.symbols))
            thousandths = np.rint(THOUSANDTHS * gammas / gammas.sum(1, keepdims=True))
            table = thousandths / thousandths.sum(1, keepdims=True)
            if _reachable(self._moves(table)).all(0).any():
                return table

    @functools.cached_property
    def moves(self) -> np.ndarray:
        """P(next context | context) [S, S]."""
        return self._moves(self.transitions)

    def _moves(self, transitions: np.ndarray) -> np.ndarray:
        context, symbol = np.nonzero(transitions)
        moves = np.zeros((self.contexts, self.contexts))
        moves[context, (context * self.symbols + symbol) % self.contexts] = transitions[context, symbol]
        return moves

    @functools.cached_property
    def stationary(self) -> np.ndarray:
        """Shares of the contexts [S] in an endless text: pi T = pi, with the sum of 1 in place of one equation."""
        equations = self.moves.T - np.eye(self.contexts)
        equations[-1] = 1
        shares = np.linalg.solve(equations, np.eye(self.contexts)[-1]).clip(0)
        return shares / shares.sum()

    @functools.cached_property
    def entropy_rate(self) -> float:
        p = self.transitions
        return float(-(self.stationary @ (p * np.log(np.where(p > 0, p, 1))).sum(1)))

    def ngrams(self, n: int) -> np.ndarray:
        """Probabilities [A^n] of n symbols in a row; the index is the number that they spell to the base A."""
        joint = self.stationary
        for _ in range(n - self.order):
            joint = (joint[:, None] * self.transitions[np.arange(len(joint)) % self.contexts]).ravel()
        return joint.reshape(-1, self.symbols**n).sum(0)

    def text(self, split: str) -> str:
        random = np.random.RandomState([self.seed, ("train", "val").index(split)])
        rows, characters, written = _cumulative(self.transitions).tolist(), self.alphabet, []
        context = bisect(_cumulative(self.stationary).tolist(), random.random_sample())
        for u in random.random_sample(LENGTHS[split]).tolist():
            symbol = bisect(rows[context], u)
            written.append(characters[symbol])
            context = (context * self.symbols + symbol) % self.contexts
        return "".join(written)

    def sample(self, count: int, length: int, seed: int) -> np.ndarray:
        random = np.random.RandomState(seed)
        draw = lambda cumulative: (cumulative <= random.random_sample(count)[:, None]).sum(1)
        rows, context = _cumulative(self.transitions), draw(_cumulative(self.stationary))
        found = np.empty((count, length), int)
        for t in range(length):
            found[:, t] = draw(rows[context])
            context = (context * self.symbols + found[:, t]) % self.contexts
        return found

    def contexts_of(self, symbols: np.ndarray) -> np.ndarray:
        """The contexts [N, L - order + 1] that end at the positions order - 1, .. of sequences [N, L]."""
        width = symbols.shape[1] - self.order + 1
        return sum(symbols[:, i : i + width] * self.symbols ** (self.order - 1 - i) for i in range(self.order))

    def log_prob(self, symbols: np.ndarray) -> np.ndarray:
        contexts = self.contexts_of(symbols)
        with np.errstate(divide="ignore"):
            steps = np.log(self.transitions[contexts[:, :-1], symbols[:, self.order :]])
            return np.log(self.stationary[contexts[:, 0]]) + steps.sum(1)

    def posterior(self, symbols: np.ndarray, masked: np.ndarray) -> np.ndarray:
        """By forward and backward messages between the contexts; a visible symbol rules out all others.

        Where what is visible is impossible as a whole (a sampler can bring that about), the fewest impossible
        transitions explain it.
        """
        count, length = symbols.shape
        moves = self.moves + 1e-30
        possible = masked[:, :, None] | (symbols[:, :, None] == np.arange(self.contexts) % self.symbols)
        normal = lambda message: message / message.sum(1, keepdims=True)
        before, after = np.empty((2, length, count, self.contexts))
        before[0], after[-1] = self.stationary + 1e-30, 1
        for t in range(1, length):
            before[t] = normal(before[t - 1] * possible[:, t - 1]) @ moves
        for t in range(length - 1, 0, -1):
            after[t - 1] = normal(after[t] * possible[:, t]) @ moves.T
        contexts = (before * after * possible.swapaxes(0, 1)).swapaxes(0, 1)
        found = contexts.reshape(count, length, -1, self.symbols).sum(2)
        return found / found.sum(2, keepdims=True)


def _cumulative(p: np.ndarray) -> np.ndarray:
    """Cumulative sums of the last axis that end at 1 exactly, so that what has no probability is never drawn."""
    sums = p.cumsum(-1)
    return sums / sums[..., -1:]


def _reachable(moves: np.ndarray) -> np.ndarray:
    """Whether [S, S] one context leads to the other, by squaring."""
    reach = (moves > 0) | np.eye(len(moves), dtype=bool)
    for _ in range(len(moves).bit_length()):
        reach = reach.astype(np.float32) @ reach.astype(np.float32) > 0
    return reach


# ---------------------------------------------------------------------------------------------------------------- sums


@dataclasses.dataclass(frozen=True)
class Sums:
    """Lines 'a+b=c' of two uniform operands of `digits` digits each and their sum with one digit more, all true.

    A tenth of the pairs is held out of training and makes the validation text; the law itself is that of all pairs.
    """

    digits: int
    seed: int

    def __post_init__(self):
        if self.digits not in (1, 2):  # 3 would be a million pairs, over which every posterior is a sum
            raise ValueError(f"lab:sums: got {self.digits} digits, wanted 1 or 2")
        if not self.seed < 2**32:
            raise ValueError(f"lab:sums: got seed {self.seed}, wanted 0 <= seed < 2**32")

    alphabet = "0123456789+=\n"

    @property
    def period(self) -> int:
        """Characters of a line, with its end."""
        return 3 * self.digits + 4

    @property
    def entropy_rate(self) -> float:
        return float(np.log(len(self.lines)) / self.period)

    @functools.cached_property
    def lines(self) -> np.ndarray:
        """Every true line as symbols [P, period]; its number is that of its pair, a * 10^digits + b."""
        d, most = self.digits, 10**self.digits
        text = "".join(f"{a:0{d}}+{b:0{d}}={a + b:0{d + 1}}\n" for a in range(most) for b in range(most))
        return np.array([self.alphabet.index(character) for character in text]).reshape(-1, self.period)

    @functools.cached_property
    def held_out(self) -> np.ndarray:
        """Whether each pair [P] is held out."""
        order = np.random.RandomState(self.seed).permutation(len(self.lines))
        return order < HELD_OUT * len(self.lines)

    def text(self, split: str) -> str:
        random = np.random.RandomState([self.seed, ("train", "val").index(split)])
        pairs = np.flatnonzero(self.held_out == (split == "val"))
        chosen = self.lines[pairs[random.randint(0, len(pairs), LINES[split])]]
        return "".join(self.alphabet[symbol] for symbol in chosen.ravel())

    def sample(self, count: int, length: int, seed: int) -> np.ndarray:
        random = np.random.RandomState(seed)
        return self.lines[random.randint(0, len(self.lines), (count, length // self.period))].reshape(count, length)

    def pairs(self, symbols: np.ndarray) -> np.ndarray:
        """The number of the pair of every line [N, L / period], true or not; -1 for an ill-formed line."""
        lines = symbols.reshape(len(symbols), -1, self.period)
        digits = (lines >= 0) & (lines < 10)
        signs = self.lines[0] >= 10
        formed = np.where(signs, lines == self.lines[0], digits).all(2)
        number = lambda part: part @ 10 ** np.arange(self.digits)[::-1]
        first, second = number(lines[..., : self.digits]), number(lines[..., self.digits + 1 : 2 * self.digits + 1])
        return np.where(formed, first * 10**self.digits + second, -1)

    def true_lines(self, symbols: np.ndarray) -> np.ndarray:
        """Whether [N, L / period] each line is well formed and true."""
        pairs = self.pairs(symbols)
        lines = symbols.reshape(*pairs.shape, self.period)
        return (pairs >= 0) & (lines == self.lines[pairs]).all(2)

    def log_prob(self, symbols: np.ndarray) -> np.ndarray:
        each = np.where(self.true_lines(symbols), -np.log(len(self.lines)), -np.inf)
        return each.sum(1)

    def posterior(self, symbols: np.ndarray, masked: np.ndarray) -> np.ndarray:
        """By counting: the pairs that agree with all that is visible, or with the most of it, are equally likely."""
        size = len(self.alphabet)
        spell = lambda lines: (lines[:, :, None] == np.arange(size)).reshape(len(lines), -1).astype(np.float32)
        visible = np.where(masked, -1, symbols).reshape(-1, self.period)
        table = spell(self.lines)
        agreements = spell(visible) @ table.T
        agreeing = agreements == agreements.max(1, keepdims=True)
        found = agreeing.astype(np.float32) @ table / agreeing.sum(1, keepdims=True)
        return found.reshape(*symbols.shape, size)
