"""The chunked readout against the dense computation, for every number of masked tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MASK, B, V, assert_close, assert_identical

from smdlm.models.base import Head
from smdlm.ops.filters import Filters, inverse_cdf
from smdlm.readout import Readout, exclude
from smdlm.softmask import Feedback, summarize

D, L, PADDED = 6, 5, 32  # N = 20 rows: chunks of 8 do not divide them, 24 .. 31 are padding
N = B * L
COUNTS = [0, 1, 7, 8, 9, 16, N - 1, N]
CHUNKS = [1, 8, 100]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def head():
    return Head(normal(1, D, PADDED), normal(2, PADDED))


@pytest.fixture(scope="module")
def hidden():
    return normal(3, B, L, D)


def subs(head):
    return exclude(head, V, MASK)


def masked_tokens(count):
    """[B, L] bool with `count` positions anywhere."""
    chosen = np.zeros(N, bool)
    chosen[np.random.default_rng(count).permutation(N)[:count]] = True
    return jnp.asarray(chosen.reshape(B, L))


@functools.cache
def jitted(method, chunk, *static):
    """One compiled function for all counts."""
    bound = getattr(Readout(k=3, chunk=chunk), method)
    return jax.jit(lambda *xs: bound(*xs, *static))


# Feedback


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("count", COUNTS)
def test_feedback_is_the_dense_one(head, hidden, count, chunk):
    masked = masked_tokens(count)
    got = jitted("feedback", chunk)(subs(head), hidden, masked)
    wanted = summarize(Readout().log_probs(subs(head), hidden), masked, 3)
    clear = lambda x: jnp.where(masked.reshape(B, L, *[1] * (x.ndim - 2)), x, 0)  # nothing is said elsewhere
    wanted = Feedback(*(clear(x) for x in (wanted.ids, wanted.probs, wanted.neg_entropy)), masked)
    np.testing.assert_array_equal(got.ids, wanted.ids)
    assert_close(got, wanted, rtol=1e-4)
    assert got.ids.dtype == jnp.int32 and got.probs.dtype == got.neg_entropy.dtype == jnp.float32


def test_feedback_at_extremes(head):
    """Peaked and flat distributions: probabilities and entropy are exact there, not NaN."""
    flat = Head(jnp.zeros((D, PADDED)), jnp.zeros(PADDED))
    got = jitted("feedback", 8)(subs(flat), normal(0, B, L, D), jnp.ones((B, L), bool))
    np.testing.assert_allclose(got.neg_entropy, -np.log(V - 1), rtol=1e-6)
    np.testing.assert_allclose(got.probs, 1 / (V - 1), rtol=1e-6)
    got = jitted("feedback", 8)(subs(head), 1e4 * normal(0, B, L, D), jnp.ones((B, L), bool))
    np.testing.assert_allclose(got.neg_entropy, 0, atol=1e-6)
    np.testing.assert_allclose(got.probs[..., 0], 1, rtol=1e-6)


# Negative log-likelihood


def dense_nll(head, hidden, targets, weights):
    log_probs = jax.nn.log_softmax(head.logits(hidden))
    nll = -jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    return jnp.sum(weights * nll), jnp.where(weights != 0, nll, 0)


def problem(count):
    targets = jax.random.randint(jax.random.key(7), (B, L), 0, MASK)
    weights = jnp.where(masked_tokens(count), jax.random.uniform(jax.random.key(8), (B, L), minval=0.1), 0)
    return targets, weights


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("count", COUNTS)
def test_nll_and_its_gradients_are_the_dense_ones(head, hidden, count, chunk):
    targets, weights = problem(count)

    inputs = {"head": head, "hidden": hidden}
    assert_close(
        jitted("nll", chunk)(subs(head), hidden, targets, weights),
        dense_nll(subs(head), hidden, targets, weights),
        1e-4,
    )
    got = gradient(chunk)(inputs, targets, weights)
    wanted = gradient(None)(inputs, targets, weights)
    assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@functools.cache
def gradient(chunk):
    """Of the readout's loss, or of the dense one (None), with a cotangent that is not 1."""
    nll = Readout(chunk=chunk).nll if chunk else dense_nll
    return jax.jit(jax.grad(lambda x, *rest: 3.0 * nll(subs(x["head"]), x["hidden"], *rest)[0]))


def test_nll_value_is_the_same_with_and_without_gradient(head, hidden):
    targets, weights = problem(9)
    both = jax.jit(jax.value_and_grad(lambda h: Readout(chunk=8).nll(subs(head), h, targets, weights), has_aux=True))
    assert_identical(both(hidden)[0], jitted("nll", 8)(subs(head), hidden, targets, weights))


def test_excluded_ids_get_no_gradient(head, hidden):
    targets, weights = problem(N)
    grads = gradient(8)({"head": head, "hidden": hidden}, targets, weights)["head"]
    excluded = np.arange(PADDED) >= MASK  # the mask is the last id before the padding
    assert not np.any(grads.matrix[:, excluded]) and not np.any(grads.bias[excluded])
    assert np.all(np.abs(grads.bias[~excluded]) > 0)


def test_per_token_values_carry_no_gradient(head, hidden):
    targets, weights = problem(9)
    grads = jax.grad(lambda h: Readout(chunk=8).nll(subs(head), h, targets, weights)[1].sum())(hidden)
    assert not np.any(grads)


def test_nll_in_bfloat16(head, hidden):
    """Logits are accumulated in f32; gradients come back in the type of their argument."""
    targets, weights = problem(N)
    inputs = {"head": head, "hidden": hidden.astype(jnp.bfloat16)}
    loss, nll = jitted("nll", 8)(subs(head), inputs["hidden"], targets, weights)
    wanted, _ = dense_nll(subs(head), hidden, targets, weights)
    assert loss.dtype == nll.dtype == jnp.float32
    np.testing.assert_allclose(loss, wanted, rtol=0.02)
    got, exact = gradient(8)(inputs, targets, weights), gradient(8)({"head": head, "hidden": hidden}, targets, weights)
    assert got["hidden"].dtype == jnp.bfloat16 and got["head"].matrix.dtype == jnp.float32
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(np.asarray(g, np.float32), w, atol=0.03 * np.abs(w).max())


# Draws


def dense_draw(head, hidden, u, filters):
    """(ids, log-probabilities) of the filtered, renormalised distribution."""
    probs = filters.probs(head.logits(hidden.reshape(N, D)))
    ids, total = inverse_cdf(probs, u.reshape(N))
    return ids.reshape(B, L), jnp.log(probs[jnp.arange(N), ids] / total).reshape(B, L)


@pytest.mark.parametrize("chunk", [8, 100])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("filters", [Filters(), Filters(0.7, 0.8), Filters(temperature=0.0)])
def test_draw_is_the_dense_one(head, hidden, filters, count, chunk):
    masked, u = masked_tokens(count), jax.random.uniform(jax.random.key(5), (B, L))
    draw = jitted("draw", chunk, filters)(subs(head), hidden, masked, u)
    if filters.temperature:
        ids, log_prob = dense_draw(subs(head), hidden, u, filters)
    else:
        ids, log_prob = subs(head).logits(hidden).argmax(-1), jnp.zeros((B, L))
    np.testing.assert_array_equal(draw.ids, jnp.where(masked, ids, 0))
    np.testing.assert_allclose(draw.log_prob, jnp.where(masked, log_prob, 0), rtol=1e-4, atol=1e-5)
    # What is remembered is the unfiltered distribution at temperature 1, whatever the filters.
    assert_close(draw.feedback, jitted("feedback", chunk)(subs(head), hidden, masked), rtol=1e-5)


@pytest.mark.parametrize("filters", [Filters(), Filters(temperature=5.0), Filters(top_p=0.999)])
def test_mask_and_padding_are_never_predicted_nor_drawn(filters):
    """Even where the head prefers them, over a grid of u that includes its last float."""
    wild = Head(jnp.zeros((D, PADDED)), jnp.where(jnp.arange(PADDED) >= MASK, 50.0, 0.0))
    head = subs(wild)
    grid = jnp.concatenate([jnp.linspace(0, 1, 4 * N - 2, endpoint=False), jnp.array([1 - 2**-24, 1 - 2**-23])])
    draw = jitted("draw", 8, filters)
    seen = set()
    for u in grid.reshape(4, B, L):
        out = draw(head, jnp.ones((B, L, D)), jnp.ones((B, L), bool), u)
        seen |= set(np.asarray(out.ids).ravel().tolist())
        assert np.asarray(out.feedback.ids).max() < MASK and np.isfinite(out.log_prob).all()
    assert seen == set(range(MASK))
    assert not np.any(np.exp(Readout().log_probs(head, jnp.ones(D)))[MASK:])


def test_exclude_leaves_the_rest_alone(head):
    got = subs(head)
    np.testing.assert_array_equal(got.matrix, head.matrix)
    np.testing.assert_array_equal(got.bias[:MASK], head.bias[:MASK])
    middle = exclude(head, PADDED, 3).bias
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(middle) != np.asarray(head.bias)), [3])


def test_one_program_serves_every_count(head, hidden):
    compiled = jax.jit(Readout(chunk=8).feedback)
    for count in COUNTS:
        compiled(subs(head), hidden, masked_tokens(count))
    assert compiled._cache_size() == 1


def test_work_follows_the_number_of_masked_tokens(head, hidden, monkeypatch):
    """ceil(count / chunk) products with the head, none for none."""
    calls = []
    logits = Head.logits

    def counted(self, rows):
        jax.debug.callback(lambda: calls.append(1))
        return logits(self, rows)

    monkeypatch.setattr(Head, "logits", counted)
    run = jax.jit(Readout(chunk=8).feedback)
    for count in COUNTS:
        calls.clear()
        jax.block_until_ready(run(subs(head), hidden, masked_tokens(count)))
        jax.effects_barrier()
        assert len(calls) == -(-count // 8), count


@pytest.mark.parametrize("sizes", [{"k": 0}, {"chunk": 0}])
def test_sizes_out_of_range_are_refused(sizes):
    with pytest.raises(ValueError, match="got .*, wanted"):
        Readout(**sizes)
