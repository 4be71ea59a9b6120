"""MAUVE: exact on histograms whose values are known, the quantisation by its properties."""

import logging as python_logging

import numpy as np
import pytest
from genppl_test import make_scorer

from smdlm.evaluate import mauve as m
from smdlm.evaluate.samples import Samples

P = np.array([0.1, 0.2, 0.3, 0.4])
# (counts of p, counts of q, c, MAUVE, frontier integral, both smoothed) of the public implementation
CASES = [
    (
        "25 25 16 32 17 37 21 20 48 15 15 9 24 33 25 40 30 21 24 23",
        "17 24 32 21 34 12 24 40 8 29 30 49 36 16 15 19 10 23 22 39",
        5.0, 0.8041992066623822, 0.09483916743573884, 0.8159990355223087, 0.09095647587805175,
    ),
    (
        "6 11 3 10 12 11 15 6 11 8 17 10 13 13 10 13 7 7 12 14 8 3 6 8 12 11 12 8 9 10 10 8 9 7 11 4 17 17 18 "
        "10 7 10 7 11 8 10 7 9 11 13",
        "7 10 11 11 9 8 8 9 10 2 10 12 9 15 3 16 8 11 10 17 11 4 4 11 18 5 7 17 5 12 5 9 11 8 12 10 15 11 12 "
        "9 8 9 14 8 12 12 9 10 16 10",
        5.0, 0.9711257472339082, 0.03031254185610509, 0.9764383514128836, 0.02712753698349894,
    ),
    (
        "40 32 27 2 30 35 5 1 23 5",
        "0 0 4 46 3 0 35 46 0 66",
        1.0, 0.6427545459560073, 0.7378936033378568, 0.6817490847443357, 0.6736636240607272,
    ),
]  # fmt: skip


def test_known_values():
    assert m.mauve(P, P[::-1], 1.0) == pytest.approx(0.9737737476169654, abs=1e-14)
    assert m.mauve(P, P[::-1], 5.0) == pytest.approx(0.6538536633533253, abs=1e-14)
    assert m.frontier_integral(P, P[::-1]) == pytest.approx(0.14376337397156547, abs=1e-14)


@pytest.mark.parametrize("case", CASES)
def test_the_public_implementation_on_its_histograms(case):
    p, q, scaling, *wanted = case
    p, q = np.array(p.split(), float), np.array(q.split(), float)
    pairs = (p / p.sum(), q / q.sum()), (m.smoothed(p), m.smoothed(q))
    got = [score for pair in pairs for score in (m.mauve(*pair, scaling), m.frontier_integral(*pair))]
    np.testing.assert_allclose(got, wanted, rtol=1e-13)


def test_limits_and_symmetry():
    apart = np.array([0.5, 0.5, 0, 0]), np.array([0, 0, 0.5, 0.5])
    assert m.mauve(P, P, 5.0) == pytest.approx(1) and m.frontier_integral(P, P) == 0
    assert m.mauve(*apart, 5.0) < 0.05 and m.frontier_integral(*apart) == pytest.approx(1)
    assert m.mauve(P, P[::-1], 5.0) == pytest.approx(m.mauve(P[::-1], P, 5.0))
    curve = m.divergence_curve(P, P[::-1], 5.0)
    assert curve.shape == (27, 2) and (np.diff(curve[:, 1]) * np.diff(curve[:, 0]) <= 0).all()
    # the integral in closed form against a sum over mixtures
    kl = lambda a, b: np.sum(a * np.log(a / b))
    weights = (np.arange(20000) + 0.5) / 20000
    rows = [w * P + (1 - w) * P[::-1] for w in weights]
    terms = [w * kl(P, r) + (1 - w) * kl(P[::-1], r) for w, r in zip(weights, rows, strict=True)]
    assert 2 * np.mean(terms) == pytest.approx(m.frontier_integral(P, P[::-1]), abs=1e-7)


def test_smoothing():
    np.testing.assert_allclose(m.smoothed(np.array([0, 3])), [0.125, 0.875])


def test_principal_axes_keep_the_share_of_the_variance():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 6)) * [5, 5, 5, 0.1, 0.1, 0.1]
    points = m.reduced(features, 0.99)
    assert points.shape == (300, 3)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    whole = m.reduced(features, 1.0)
    centred = unit - unit.mean(0)
    np.testing.assert_allclose(whole @ whole.T, centred @ centred.T, atol=1e-9)  # a rotation, not whitened


def test_k_means_finds_clusters_and_leaves_no_cell_empty():
    rng = np.random.default_rng(1)
    centres = np.array([[0, 0], [9, 0], [0, 9], [9, 9]])
    truth = np.repeat(np.arange(4), 50)
    points = centres[truth] + rng.normal(size=(200, 2))
    cell = m.k_means(points, 4, np.random.default_rng(0), restarts=5, iterations=100)
    assert len({(a, b) for a, b in zip(cell, truth, strict=True)}) == 4
    repeated = np.repeat(points[:20], 5, axis=0)  # starts at equal points
    assert len(set(m.k_means(repeated, 15, np.random.default_rng(0), restarts=1, iterations=100))) == 15


@pytest.fixture(scope="module")
def scorer():
    return make_scorer()


def texts(count, seed):
    ids = np.random.default_rng(seed).integers(97, 122, (count, 8)).astype(np.int32)
    return Samples(tuple(bytes(row.tolist()).decode() for row in ids), ids, "bytes?")


def metric(scorer, reference, **fields):
    return m.Mauve(scorer, reference, **{"seeds": 2, "restarts": 1, "bootstrap": 20, "batch_size": 16, **fields})


def test_near_one_for_the_same_kind_of_text_and_lower_for_another(scorer):
    run = metric(scorer, texts(60, 0), cells=4).run
    digits = Samples(tuple(text.translate({c: 48 + c % 10 for c in range(97, 122)}) for text in texts(60, 1).texts),
                     texts(60, 1).ids)  # fmt: skip
    same, other = run(texts(60, 1)), run(digits)
    assert same["mauve"].mean > 0.9 > other["mauve"].mean and same["mauve"].interval > 0
    assert other["frontier_integral"].mean > same["frontier_integral"].mean
    assert same["mauve_seed_spread"].mean >= 0


def test_the_feature_is_the_state_at_the_last_token(scorer):
    got = m.features(scorer, Samples(("abc", "", "ab"), np.zeros((3, 4), np.int32)), batch_size=2)
    for row, text in zip(got, (b"abc", None, b"ab"), strict=True):
        ids = np.array([list(text)] if text else [[scorer.tokenizer.bos_id]], np.int32)
        np.testing.assert_allclose(row, np.asarray(scorer.hidden(ids))[0, -1], rtol=2e-5, atol=1e-5)


def test_few_samples_warn_and_three_are_refused(scorer, caplog):
    with pytest.raises(ValueError, match="got 3 samples"):
        metric(scorer, texts(60, 0)).run(texts(3, 1))
    with pytest.raises(ValueError, match="got 30 samples .* for 20 cells"):
        metric(scorer, texts(60, 0), cells=20).run(texts(30, 1))
    with caplog.at_level(python_logging.WARNING):
        assert metric(scorer, texts(60, 0)).check(60) == 6
        assert len(caplog.records) == 1 and "below 1000" in caplog.text
        assert metric(scorer, texts(60, 0)).check(1000) == 100
        assert len(caplog.records) == 1


@pytest.mark.parametrize("fields", [{"cells": -1}, {"seeds": 1}, {"share": 0.0}, {"scaling": 0.0}, {"bootstrap": 1}])
def test_fields_out_of_range(scorer, fields):
    with pytest.raises(ValueError, match="mauve: got"):
        metric(scorer, texts(60, 0), **fields)
