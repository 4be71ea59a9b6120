"""Filters and draws against references that sort, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smdlm.ops import filters
from smdlm.ops.filters import Filters, inverse_cdf, kth_largest, nucleus_threshold

# Top-k


@pytest.mark.parametrize("kind", ["random", "peaked", "tied"])
def test_top_k_is_that_of_a_sort(kind):
    """Equal probabilities stand or fall together."""
    probs = distributions(kind, 60)
    for k in (1, 2, 7, 60):
        np.testing.assert_array_equal(kth_largest(probs, k), np.sort(probs, -1)[:, -k])
    np.testing.assert_array_equal(kth_largest(probs, 61), np.zeros(len(probs)))


def test_top_k_comes_after_top_p():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    kept = lambda **fields: np.flatnonzero(Filters(**fields).probs(logits)[0]).tolist()
    assert kept(top_k=3) == [0, 1, 2] and kept(top_k=3, top_p=0.7) == [0, 1] and kept(top_k=1, top_p=0.7) == [0]
    log_probs = np.asarray(Filters(0.0, top_k=2).log_probs(logits, -7.0))[0]  # at temperature 0 as at 1
    np.testing.assert_allclose(log_probs, [np.log(0.5), np.log(0.3), -7, -7], rtol=1e-5)
    assert Filters().plain and Filters(0.0).plain
    assert not any(f.plain for f in (Filters(0.5), Filters(top_p=0.9), Filters(top_k=5)))


# Nucleus


def kept_by_sorting(probs, top_p, rule):
    """Ids that top-p keeps, from a sort in float64; equal probabilities stand or fall together.

    None where the mass comes so close to p that rounding decides.
    """
    p = probs.astype(np.float64)
    values = np.unique(p[p > 0])[::-1]
    inclusive = np.array([p[p >= v].sum() for v in values])
    if np.abs(inclusive - top_p).min() < 1e-5:
        return None
    if rule == "standard":
        threshold = values[np.argmax(inclusive >= top_p)] if inclusive[-1] >= top_p else values[-1]
    else:
        threshold = values[max(np.sum(inclusive <= top_p) - 1, 0)]
    return p >= threshold


def distributions(kind, vocab, rows=40):
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=(rows, vocab)) * {"random": 2, "peaked": 12, "flat": 1e-3}.get(kind, 1)
    if kind == "tied":
        logits = np.round(logits * 1.5)
    if kind == "zipf":
        logits = -1.2 * np.log1p(np.argsort(logits, -1))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("rule", ["standard", "reference"])
@pytest.mark.parametrize("kind", ["random", "peaked", "flat", "tied", "zipf"])
@pytest.mark.parametrize("vocab", [3, 500])
def test_nucleus_is_that_of_a_sort(rule, kind, vocab):
    probs, checked = distributions(kind, vocab), 0
    for top_p in (0.05, 0.5, 0.9, 0.999):
        threshold = np.asarray(jax.jit(nucleus_threshold, static_argnums=(1, 2))(probs, top_p, rule))
        for row, low in zip(probs, threshold, strict=True):
            wanted = kept_by_sorting(row, top_p, rule)
            if wanted is not None:
                checked += 1
                np.testing.assert_array_equal(row >= low, wanted)
    assert checked > 60


@pytest.mark.parametrize("search", [(16, 4), (3, 0), (2, 9)])
def test_several_thresholds_a_pass_keep_what_bisection_keeps(search, monkeypatch):
    """The form of the search that a GPU takes: passes that do not ask whether they are needed, several candidates."""
    kinds = ("random", "peaked", "flat", "tied", "zipf")
    probs = jnp.concatenate([distributions(kind, 500, rows=20) for kind in kinds])

    def kept():  # a function of its own, because jit knows nothing of the table
        return jax.jit(lambda p: [p >= nucleus_threshold(p, 0.9, rule)[:, None] for rule in ("standard", "reference")])

    monkeypatch.setattr(filters, "SEARCH", {})
    wanted = kept()(probs)
    monkeypatch.setattr(filters, "SEARCH", {"cpu": search})
    np.testing.assert_array_equal(kept()(probs), wanted)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_the_largest_logit_may_be_handed_in(temperature):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(50, 300)) * 4, jnp.float32)
    top = logits.max(-1, keepdims=True)
    given = Filters(temperature)
    np.testing.assert_array_equal(given.probs(logits, top), given.probs(logits))
    np.testing.assert_allclose(given.probs(logits, top + 1.0), given.probs(logits), rtol=1e-5)  # it only shifts


def test_rules_differ_by_the_crossing_token():
    probs = jnp.array([[0.5, 0.3, 0.15, 0.05]])
    kept = lambda rule, p: np.flatnonzero(probs[0] >= nucleus_threshold(probs, p, rule)[0]).tolist()
    assert kept("standard", 0.7) == [0, 1] and kept("reference", 0.7) == [0]
    assert kept("standard", 0.4) == [0] and kept("reference", 0.4) == [0]  # the first always stays


def test_filters_apply_temperature_first():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    cold = np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365
    got = np.asarray(Filters(temperature=0.5).probs(logits))[0]
    np.testing.assert_allclose(got, cold, rtol=1e-5)
    got = np.asarray(Filters(temperature=0.5, top_p=0.9).probs(logits))[0]
    np.testing.assert_allclose(got, np.where([1, 1, 0, 0], cold, 0), rtol=1e-5)  # .68 + .25 cross .9
    np.testing.assert_allclose(Filters().probs(logits)[0], [0.5, 0.3, 0.15, 0.05], rtol=1e-5)
    assert np.all(np.asarray(Filters(top_p=1.0).probs(logits)) > 0)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_p_rule": "hf"}, {"top_k": -1}]
)
def test_filters_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="got .*, wanted"):
        Filters(**wrong)


# Inverse CDF


@pytest.mark.parametrize("vocab", [2, 128, 129, 300])
def test_inverse_cdf_has_the_exact_distribution(vocab):
    """Every id owns a share of [0, 1) equal to its probability: counted on a grid of 2^16 values of u."""
    grid = (np.arange(2**16, dtype=np.float64) + 0.5) / 2**16
    for scale in (1.0, 7.0):  # unnormalised rows, as top-p leaves them
        p = distributions("peaked" if scale == 1.0 else "random", vocab, rows=1)[0]
        p[np.random.default_rng(0).permutation(vocab)[: vocab // 3]] = 0
        rows = jnp.broadcast_to(jnp.asarray(scale * p), (512, vocab))
        draw = jax.jit(inverse_cdf)
        counts = np.zeros(vocab)
        for u in grid.astype(np.float32).reshape(-1, 512):
            ids, total = draw(rows, u)
            counts += np.bincount(ids, minlength=vocab)
        np.testing.assert_allclose(total, scale * p.sum(), rtol=1e-5)
        np.testing.assert_allclose(counts / 2**16, p / p.sum(), atol=4 / 2**16)
        assert not np.any(counts[p == 0])


def awkward_rows():
    """Sparse rows of 1000 ids: what top-p leaves of a vocabulary, single ids, ends, tiny values between zeros."""
    rng = np.random.default_rng(0)
    rows = []
    for keep in (0.003, 0.02, 0.3):
        for _ in range(4):
            p = rng.exponential(size=1000) ** 3
            p[rng.random(1000) > keep] = 0
            p[rng.integers(1000)] = 1.0
            rows.append(p / p.sum())
    for i in (0, 127, 128, 999):
        rows.append(np.eye(1000)[i] * 0.3)
    rows.append(np.where(np.arange(1000) % 2, 1e-9, 0) + np.eye(1000)[2])
    return np.stack(rows).astype(np.float32)


def test_impossible_ids_are_never_drawn():
    """At the ends of [0, 1) and around each step of the cumulative sums, where one rounding decides."""
    rows = awkward_rows()
    draw = jax.jit(inverse_cdf)
    last = np.float32(1 - 2**-24)
    for p in rows:
        steps = np.concatenate([np.cumsum(p), np.asarray(jnp.cumsum(p))]) / p.sum()
        u = np.concatenate([steps * (1 + k * 2.0**-24) for k in range(-4, 5)])
        u = np.clip(np.concatenate([u, [0.0, 1e-30, last, 1 - 2**-23]]), 0, last).astype(np.float32)
        u = np.unique(u)
        padded = jnp.asarray(np.pad(u, (0, -len(u) % 1024), mode="edge")).reshape(-1, 1024)  # one program for all rows
        ids = np.concatenate([draw(jnp.broadcast_to(jnp.asarray(p), (1024, 1000)), part)[0] for part in padded])
        assert ids.max() < 1000 and np.all(p[ids] > 0)
        assert ids[0] == np.flatnonzero(p)[0]
        assert np.all(np.diff(ids) >= 0)  # larger u, larger id


def test_impossible_ids_are_never_drawn_from_many_rows():
    """Random u of the 23 bits that jax draws, over 40 blocks most of which are empty."""
    rng = np.random.default_rng(1)
    draw = jax.jit(inverse_cdf)
    for _ in range(4):
        p = rng.exponential(size=(256, 5000)).astype(np.float32) * (rng.random((256, 5000)) < 0.004)
        p[:, 7] += 1e-3
        ends = np.asarray(jnp.cumsum(jnp.asarray(np.pad(p, ((0, 0), (0, 120))).reshape(256, -1, 128).sum(-1)), -1))
        for column in range(0, 40, 3):
            u = np.nextafter(ends[:, column] / ends[:, -1], np.float32(0)).astype(np.float32)
            ids = np.asarray(draw(p, np.clip(u, 0, np.float32(1 - 2**-24)))[0])
            assert np.all(p[np.arange(256), ids] > 0)
