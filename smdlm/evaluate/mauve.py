"""MAUVE: how alike the distributions of samples and of human text are, between 0 and 1.

Pillutla et al. 2021 (NeurIPS; JMLR 2023): a language model's features of both sets are quantised together by k-means
into K cells, and the two histograms p, q compared along the mixtures r = w p + (1 - w) q:

    divergence curve   (exp(-c KL(q | r)), exp(-c KL(p | r))),  0 < w < 1;   MAUVE is the area under it

and, without a scale c, the frontier integral of Liu et al. 2021, 0 for equal distributions:

    2 int_0^1 [ w KL(p | r) + (1 - w) KL(q | r) ] dw  =  sum_i (p_i + q_i) / 2 - p_i q_i / (p_i - q_i) log(p_i / q_i)

MAUVE of few samples is not MAUVE of many: it is comparable at one number of samples, one K and one featuriser only.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from absl import logging

from smdlm.evaluate.base import NORMAL_95, Value
from smdlm.evaluate.genppl import Scorer
from smdlm.evaluate.samples import Samples, in_batches

FEW = 1000
MIXTURES = 25  # points of the curve, without its two ends


def divergence_curve(p: np.ndarray, q: np.ndarray, scaling: float) -> np.ndarray:
    """[MIXTURES + 2, 2]: the curve of two histograms [K] with its ends (1, 0) and (0, 1)."""
    points = []
    for weight in np.linspace(1e-6, 1 - 1e-6, MIXTURES):
        mixture = weight * p + (1 - weight) * q
        points.append([np.exp(-scaling * _kl(q, mixture)), np.exp(-scaling * _kl(p, mixture))])
    return np.array([[1.0, 0.0], *points, [0.0, 1.0]][:: 1 if points[0][0] > points[-1][0] else -1])


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    there = p > 0
    return float(np.sum(p[there] * np.log(p[there] / q[there])))


def mauve(p: np.ndarray, q: np.ndarray, scaling: float) -> float:
    """Area under the divergence curve, by trapezoids."""
    x, y = divergence_curve(p, q, scaling).T
    return float(abs(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2)))


def frontier_integral(p: np.ndarray, q: np.ndarray) -> float:
    different = (p != q) & (p > 0) & (q > 0)
    a, b = p[different], q[different]
    lone = np.where((p > 0) != (q > 0), (p + q) / 2, 0).sum()  # the second term vanishes where one of them is 0
    return float(np.sum((a + b) / 2 - a * b / (a - b) * np.log(a / b)) + lone)


def smoothed(counts: np.ndarray) -> np.ndarray:
    """Histogram [K] of counts with half a sample added to every cell (Krichevsky and Trofimov)."""
    return (counts + 0.5) / (counts.sum() + 0.5 * len(counts))


# ------------------------------------------------------------------------------------------------------- quantisation


def reduced(features: np.ndarray, share: float) -> np.ndarray:
    """Rows of unit length, on the fewest principal axes that explain `share` of their variance; not whitened."""
    unit = features.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    centred = unit - unit.mean(0)
    variances, axes = np.linalg.eigh(centred.T @ centred)  # ascending
    explained = np.cumsum(variances[::-1]) / max(variances.sum(), 1e-300)
    return centred @ axes[:, ::-1][:, : int(np.searchsorted(explained, share)) + 1]


def k_means(points: np.ndarray, cells: int, rng: np.random.Generator, restarts: int, iterations: int) -> np.ndarray:
    """[N]: the cell of every point, of the best of some runs of Lloyd's algorithm from random points."""
    runs = [_lloyd(points, cells, rng, iterations) for _ in range(restarts)]
    return min(runs, key=lambda run: run[1])[0]


def _lloyd(points: np.ndarray, cells: int, rng: np.random.Generator, iterations: int) -> tuple[np.ndarray, float]:
    """(cell of every point, sum of squared distances to the centres)."""
    centres = points[rng.choice(len(points), cells, replace=False)]
    before = None
    for _ in range(iterations):
        distances = (centres**2).sum(1) - 2 * points @ centres.T  # without |point|^2, which all cells share
        cell = distances.argmin(1)
        if before is not None and np.array_equal(cell, before):
            break
        before = cell
        counts = np.bincount(cell, minlength=cells)
        sums = np.stack([np.bincount(cell, axis, cells) for axis in points.T], axis=1)
        centres = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centres)
        # An empty cell takes the point that lies farthest from its centre.
        far = np.argsort(-(distances.min(1) + (points**2).sum(1)))[: (counts == 0).sum()]
        centres[counts == 0] = points[far]
    return before, float(((points - centres[before]) ** 2).sum())


# ------------------------------------------------------------------------------------------------------------- metric


def features(scorer: Scorer, samples: Samples, batch_size: int) -> np.ndarray:
    """[N, D] f32: the scorer's last hidden state at the last token of each text, cut to what the scorer can see."""
    bos = np.array([scorer.tokenizer.bos_id])
    tokens = [(row if len(row) else bos)[: scorer.length] for row in scorer.tokens(samples)]
    width = max(map(len, tokens))

    def compute(numbers: range) -> np.ndarray:
        shown = np.zeros((batch_size, width), np.int32)  # a causal model does not see what stands to the right
        for line, i in enumerate(numbers):
            shown[line, : len(tokens[i])] = tokens[i]
        last = np.array([len(tokens[i]) - 1 for i in numbers])
        return np.asarray(scorer.hidden(jnp.asarray(shown)), np.float32)[np.arange(len(last)), last]

    return in_batches(samples, {"features": scorer.identity}, batch_size, compute)


@dataclasses.dataclass(frozen=True)
class Mauve:
    """MAUVE of samples against reference texts.

    Attributes:
      scorer: gives the features. reference: human text, as many as there are samples or more (the first ones serve).
      cells: K of the quantisation; 0 for a tenth of the samples.
      scaling: c. share: of the variance that the principal axes explain.
      seeds: quantisations, over which the value is the mean.
      restarts, iterations: of each k-means.
      bootstrap: resamplings of both sets, with their cells, for the interval.
      batch_size: of the features.
    """

    scorer: Scorer
    reference: Samples
    cells: int = 0
    scaling: float = 5.0
    share: float = 0.9
    seeds: int = 5
    restarts: int = 5
    iterations: int = 500
    bootstrap: int = 200
    batch_size: int = 8

    def __post_init__(self):
        for name, least in (("cells", 0), ("seeds", 2), ("restarts", 1), ("iterations", 1), ("bootstrap", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"mauve: got {name} {getattr(self, name)}, wanted at least {least}")
        if not 0 < self.share <= 1 or not self.scaling > 0:
            raise ValueError(
                f"mauve: got share {self.share}, scaling {self.scaling}, wanted 0 < share <= 1 and scaling > 0"
            )

    def run(self, samples: Samples) -> dict[str, Value]:
        """mauve, mauve_smoothed and frontier_integral; mauve_seed_spread, how much of the interval k-means makes."""
        count = min(len(samples), len(self.reference))
        cells = self.check(count)
        reference = dataclasses.replace(
            self.reference, texts=self.reference.texts[:count], ids=self.reference.ids[:count]
        )
        found = features(self.scorer, reference, self.batch_size), features(self.scorer, samples, self.batch_size)
        return self.of_features(found[0], found[1][:count], cells)

    def check(self, count: int) -> int:
        """Cells for so many samples. ValueError for too few; below FEW it warns."""
        cells = self.cells or count // 10
        if cells < 2 or count < 2 * cells:
            raise ValueError(
                f"mauve: got {count} samples (or reference texts) for {cells} cells, wanted at least "
                f"{max(20, 2 * cells)}: draw more samples"
            )
        if count < FEW:
            logging.warning(
                "mauve: %d samples; below %d the value depends on their number more than on them", count, FEW
            )
        return cells

    def of_features(self, p: np.ndarray, q: np.ndarray, cells: int) -> dict[str, Value]:
        """The values for features of reference texts p [N, D] and of samples q [N, D]."""
        points = reduced(np.concatenate([p, q]), self.share)
        rows, resampled = [], []
        for seed in range(self.seeds):
            rng = np.random.default_rng(seed)
            cell = k_means(points, cells, rng, self.restarts, self.iterations)
            counts = [np.bincount(part, minlength=cells) for part in (cell[: len(p)], cell[len(p) :])]
            rows.append(self._scores(*counts))
            for _ in range(-(-self.bootstrap // self.seeds)):
                again = [rng.multinomial(c.sum(), c / c.sum()) for c in counts]
                resampled.append(np.subtract(self._scores(*again), rows[-1]))
        seeds = np.std(rows, axis=0, ddof=1)
        error = np.sqrt(np.var(resampled, axis=0) + seeds**2 / self.seeds)
        label = f"against {len(p)} texts, features of {self.scorer.name}"
        names = ("mauve", "mauve_smoothed", "frontier_integral")
        values = {
            name: Value(float(mean), float(NORMAL_95 * e), name.replace("_", " "), label)
            for name, mean, e in zip(names, np.mean(rows, axis=0), error, strict=True)
        }
        return values | {"mauve_seed_spread": Value(float(NORMAL_95 * seeds[0]), None, "mauve seed spread", label)}

    def _scores(self, p: np.ndarray, q: np.ndarray) -> list[float]:
        """MAUVE, smoothed MAUVE and frontier integral of two histograms of counts."""
        shares = p / p.sum(), q / q.sum()
        smooth = smoothed(p), smoothed(q)
        return [mauve(*shares, self.scaling), mauve(*smooth, self.scaling), frontier_integral(*shares)]
