"""How far a model is from the truth, where the truth is known: metrics of the laboratory (`smdlm.data.lab`).

`markov_values` and `sums_values` are functions of token ids [N, L], for whoever has samples. The same numbers are
given for as many true samples, so that a distance is read against what chance alone makes of it. What a sampler of few
steps costs even with an ideal denoiser, since it draws several tokens at once as if they were independent, says

    python -m smdlm.tools.ideal markov:64:1:0 --length=64 --steps=8,16,32,64

Samples of low entropy look good to a score like perplexity. Of a chain the score splits exactly,

    excess = (entropy rate of the samples - true entropy rate) + divergence of their transitions from the true ones

(all in nats/token): narrowing lowers the first term below 0, nothing lowers the divergence below 0.

Shapes: N samples, L positions, A symbols.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from smdlm.data.lab import Law, Markov, Sums, symbols_of
from smdlm.evaluate.base import NORMAL_95, Subject, Value, ratio
from smdlm.evaluate.likelihood import Likelihood
from smdlm.evaluate.samples import Ratio
from smdlm.mesh.arrays import fetch
from smdlm.objective import counted

FLOOR = 1e-4  # what an impossible transition is charged as: 9.2 nats. Possible ones have at least 1e-3.
TRUE_DRAWS = 8  # sets of true samples beside the model's
LONGEST = 3  # n-grams


def values_of(law: Law, ids: np.ndarray) -> dict[str, Value]:
    """All values of the law for samples [N, L]. ValueError for fewer than 2 samples, or too short ones."""
    if ids.ndim != 2 or len(ids) < 2 or ids.shape[1] <= LONGEST or ids.shape[1] % law.period:
        raise ValueError(
            f"samples: got ids of shape {ids.shape}, wanted at least 2 samples, longer than {LONGEST} and a multiple "
            f"of {law.period} tokens"
        )
    return markov_values(law, ids) if isinstance(law, Markov) else sums_values(law, ids)


# --------------------------------------------------------------------------------------------------------------- chain


def markov_values(law: Markov, ids: np.ndarray) -> dict[str, Value]:
    """Excess nats, impossible transitions, entropies and distances of n-grams of samples [N, L]."""
    symbols = symbols_of(law, ids)
    costs = _costs(law, symbols)
    excess, impossible = costs.mean(1) - law.entropy_rate, (costs == -np.log(FLOOR)).mean(1)
    mine, true = _counted_values(law, symbols), _true_values(law, *ids.shape)
    values = {
        "lab_excess_nats": Ratio.of(excess, None, "nats/token", "samples above the entropy rate"),
        "lab_impossible": Ratio.of(impossible, None, "share", "impossible transitions"),
    }
    for name, (unit, label) in _COUNTED.items():
        values[f"lab_{name}"] = Value(mine[name], None, unit, label)
        spread = NORMAL_95 * np.std(true[name], ddof=1)
        values[f"lab_{name}_true"] = Value(float(np.mean(true[name])), float(spread), unit, f"{label}, true samples")
    return values


_COUNTED = {
    "divergence": ("nats/token", "divergence of transitions"),
    "entropy_rate": ("nats/token", "entropy rate"),
    "entropy_unigram": ("nats/token", "unigram entropy"),
    **{f"tv_{n}": ("total variation", f"{n}-grams") for n in range(1, LONGEST + 1)},
    **{f"js_{n}": ("Jensen-Shannon", f"{n}-grams") for n in range(1, LONGEST + 1)},
}


def _costs(law: Markov, symbols: np.ndarray) -> np.ndarray:
    """-log P of each transition [N, L - order], nats; one that is impossible, or has another byte in it, at FLOOR."""
    known = symbols >= 0
    inside = np.where(known, symbols, 0)
    possible = np.lib.stride_tricks.sliding_window_view(known, law.order + 1, axis=1).all(2)
    p = law.transitions[law.contexts_of(inside)[:, :-1], inside[:, law.order :]]
    return -np.log(np.where(possible & (p > 0), p, FLOOR))


def _counted_values(law: Markov, symbols: np.ndarray) -> dict[str, float]:
    """What is read off the counts of n-grams of a whole set; bytes that are no symbols are one more symbol."""
    entropy = lambda p: float(-(p[p > 0] * np.log(p[p > 0])).sum())
    found, size = {}, law.symbols + 1
    for n in range(1, LONGEST + 1):
        p, q = _shares(symbols, n, size), _with_outside(law, n)
        middle = (p + q) / 2
        found[f"tv_{n}"] = float(abs(p - q).sum() / 2)
        found[f"js_{n}"] = entropy(middle) - (entropy(p) + entropy(q)) / 2
    found["entropy_unigram"] = entropy(_shares(symbols, 1, size))
    # Contexts as they begin a transition: the last ones of the samples begin none.
    found["entropy_rate"] = entropy(_shares(symbols, law.order + 1, size)) - entropy(
        _shares(symbols[:, :-1], law.order, size)
    )
    found["divergence"] = float(_costs(law, symbols).mean()) - found["entropy_rate"]
    return found


def _shares(symbols: np.ndarray, n: int, size: int) -> np.ndarray:
    """Shares [size^n] of the n-grams inside the sequences [N, L]; the symbol -1 counts as the last one."""
    digits, width = symbols % size, symbols.shape[1] - n + 1
    numbers = sum(digits[:, i : i + width] * size ** (n - 1 - i) for i in range(n))
    return np.bincount(numbers.ravel(), minlength=size**n) / numbers.size


@functools.lru_cache(maxsize=8)
def _with_outside(law: Markov, n: int) -> np.ndarray:
    """The true probabilities [(A + 1)^n], none for n-grams with another byte."""
    inside = law.ngrams(n).reshape([law.symbols] * n)
    return np.pad(inside, (0, 1)).ravel()


@functools.lru_cache(maxsize=8)
def _true_values(law: Markov, count: int, length: int) -> dict[str, list[float]]:
    draws = [_counted_values(law, law.sample(count, length, seed)) for seed in range(TRUE_DRAWS)]
    return {name: [draw[name] for draw in draws] for name in draws[0]}


# ---------------------------------------------------------------------------------------------------------------- sums


def sums_values(law: Sums, ids: np.ndarray) -> dict[str, Value]:
    """Lines that are well formed, true, true among those of held-out pairs; how the pairs are spread."""
    symbols = symbols_of(law, ids)
    pairs, true = law.pairs(symbols), law.true_lines(symbols)
    formed = pairs >= 0
    held_out = formed & law.held_out[pairs]
    shares = np.bincount(pairs[formed], minlength=len(law.lines)) / max(1, formed.sum())
    entropy = float(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())
    lines = np.full(len(ids), formed.shape[1])
    values = {
        "lab_well_formed": Ratio.of(formed.sum(1), lines, "share", "lines well formed"),
        "lab_untrue": Ratio.of((~true).sum(1), lines, "share", "lines not true"),
        "lab_operand_entropy": Value(entropy, None, "nats", f"entropy of operands (at most {_most(law, formed):.2f})"),
    }
    if formed.any():
        share = ratio(held_out.sum(1), formed.sum(1))
        values["lab_held_out"] = Value(*share, "share", f"held-out pairs (true {law.held_out.mean():.2f})")
    if held_out.any():
        share = ratio((true & held_out).sum(1), held_out.sum(1))
        values["lab_true_held_out"] = Value(*share, "share", "lines true, held-out pairs")
    return values


def _most(law: Sums, formed: np.ndarray) -> float:
    """Nats of operands that could be shown by so many lines."""
    return float(np.log(max(1, min(len(law.lines), formed.sum()))))


# ---------------------------------------------------------------------------------------------------------- evaluators


def _law(subject: Subject) -> Law:
    if subject.law is None:
        raise ValueError("eval.metrics: got 'lab' for data whose law is not known, wanted data.source='lab:..'")
    return subject.law


@dataclasses.dataclass(frozen=True)
class LabSamples:
    """Exact quality of sampling.count samples, drawn as config.sampling says."""

    def run(self, subject: Subject) -> dict[str, Value]:
        """See `markov_values` and `sums_values`."""
        return values_of(_law(subject), subject.sample())


@dataclasses.dataclass(frozen=True)
class LabLikelihood(Likelihood):
    """The likelihood bound of an ideal denoiser on the blocks and masks of `Likelihood`, and what a model is above it.

    The ideal one needs no feedback: one pass and two passes are the same for it. Fields as of `Likelihood`.
    """

    def run(self, subject: Subject) -> dict[str, Value]:
        """nats_per_token_ideal, and lab_gap_one_pass, lab_gap_two_pass: differences of the pairs."""
        law = _law(subject)
        nll, _, lengths = dataclasses.replace(self, chain=0).blockwise(subject)
        ideal = self._ideal(law, subject)
        found = {"nats_per_token_ideal": Value(*ratio(ideal, lengths), "nats/token", "ideal denoiser (true law)")}
        for name, nll_N in nll.items():
            label = f"{name.replace('_', ' ')} above the ideal (paired)"
            found[f"lab_gap_{name}"] = Value(*ratio(nll_N - ideal, lengths), "nats/token", label)
        return found

    def _ideal(self, law: Law, subject: Subject) -> np.ndarray:
        """Weighted nats [N] of the true tokens under the true conditionals."""
        objective, sums = subject.objective, []
        for batch, real, placed in self.numbered(subject):
            symbols, draws = symbols_of(law, np.asarray(batch["tokens"])[real]), []
            for key in self.keys:
                example = objective.corrupt_by_number(key, placed)
                masked = fetch(example.canvas)[real] == objective.denoiser.mask_id
                weights = fetch(example.weights)[real] * float(counted(batch).sum())
                p = np.take_along_axis(law.posterior(symbols, masked), symbols[:, :, None], axis=2)[:, :, 0]
                draws.append(-(weights * np.log(np.where(masked, p, 1))).sum(1))
            sums.append(np.mean(draws, axis=0))
        return np.concatenate(sums)


# ----------------------------------------------------------------------------------------------------- ideal denoiser


def ideal_samples(law: Law, count: int, length: int, steps: int, seed: int) -> np.ndarray:
    """Symbols [count, length] that ancestral sampling in so many steps makes of the true conditionals.

    At `steps` >> `length` they are true samples. With fewer, tokens of one step do not know of each other: no denoiser
    that draws each position on its own is better for that step.
    """
    random = np.random.RandomState(seed)
    symbols, masked = np.zeros((count, length), int), np.ones((count, length), bool)
    for left in range(steps, 0, -1):  # t = left / steps; committed with probability (t - s) / t
        commit = masked & (random.random_sample(masked.shape) * left < 1)
        cumulative = law.posterior(symbols, masked).cumsum(2)
        cumulative /= cumulative[:, :, -1:]
        drawn = (cumulative <= random.random_sample(masked.shape)[:, :, None]).sum(2)
        symbols, masked = np.where(commit, drawn, symbols), masked & ~commit
    return symbols
