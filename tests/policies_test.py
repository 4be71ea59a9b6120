"""The schedule and the policies, on their own: what they commit, what they mask again, in which order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smdlm.readout import Draw
from smdlm.sampling.loop import uniforms
from smdlm.sampling.policies import (
    Ancestral,
    Entropy,
    FirstHitting,
    Margin,
    MaxProbability,
    Times,
    linear_times,
)
from smdlm.softmask import Feedback


def test_linear_times():
    times = linear_times(4)
    np.testing.assert_allclose(times.t, [1, 0.7500025, 0.500005, 0.2500075], rtol=1e-6)
    np.testing.assert_allclose(times.s[:3], times.t[1:], rtol=1e-6)
    np.testing.assert_allclose(times.s[3], 1e-5, rtol=0.05)
    assert times.t.dtype == times.s.dtype == jnp.float32
    with pytest.raises(ValueError, match="wanted at least 1"):
        linear_times(0)


def test_ancestral_commits_at_rate():
    """(t - s) / t of the masked positions per step, exactly on a grid of u; nothing is masked again."""
    u = jnp.asarray((np.arange(10_000) + 0.5) / 10_000, jnp.float32).reshape(1, -1)
    for t, s in ((1.0, 0.75), (0.5, 0.4), (0.1, 1e-5)):
        commit, remask, _ = Ancestral()(u, None, jnp.ones((1, 10_000), bool), None, Times(t, s), ())
        np.testing.assert_allclose(np.mean(commit), (t - s) / t, atol=2e-4)
        assert not np.any(remask)


def distributions(*shape):
    """Random ones over the last axis, some nearly certain."""
    logits = 4 * np.random.default_rng(0).normal(size=shape)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def draw_with(probs):
    """A draw whose feedback is that of distributions [B, L, V]."""
    log_p = jnp.log(jnp.asarray(probs, jnp.float32))
    top = jnp.sort(jnp.exp(log_p), -1)[..., ::-1][..., :3]
    entropy = jnp.sum(jnp.exp(log_p) * log_p, -1)
    feedback = Feedback(jnp.zeros(top.shape, jnp.int32), top, entropy, jnp.ones(top.shape[:2], bool))
    return Draw(jnp.zeros(top.shape[:2], jnp.int32), jnp.zeros(top.shape[:2]), feedback)


COUNTED = [MaxProbability(), Margin(0.3), Entropy(), FirstHitting()]


@pytest.mark.parametrize("policy", COUNTED, ids=lambda p: type(p).__name__)
def test_counts_follow_the_schedule_row_by_row(policy):
    """round(masks at the start * s) are left in each row; one per step for first-hitting if there are steps enough."""
    start = np.array([8, 5, 0])
    step, draw = jax.jit(policy), draw_with(distributions(3, 8, 6))
    for steps in (3, 8, 12):
        masked, times = jnp.arange(8) >= 8 - start[:, None], linear_times(steps)
        carry, left = policy.init(masked), []
        for i in range(steps):
            u = uniforms(jax.random.key(i), masked.shape)
            commit, remask, carry = step(u, masked, masked, draw, Times(times.t[i], times.s[i]), carry)
            assert not np.any(remask)
            masked &= ~commit
            left.append(np.sum(masked, 1))
        if policy == FirstHitting() and steps >= 8:
            wanted = np.maximum(start - 1 - np.arange(steps)[:, None], 0)
        else:
            wanted = np.round(start * np.asarray(times.s)[:, None])
        np.testing.assert_array_equal(left, wanted)
        assert not np.any(left[-1])


def test_equal_confidences_do_not_change_the_count():
    masked, times = jnp.ones((1, 8), bool), Times(jnp.float32(1.0), jnp.float32(0.625))
    draw = draw_with(np.full((1, 8, 4), 0.25))
    for policy in (*COUNTED, Entropy(1.0)):
        commit, remask, _ = policy(jnp.full((1, 8), 0.5), None, masked, draw, times, policy.init(masked))
        assert np.sum(commit) == 3 and not np.any(remask)


def test_confidence_takes_the_largest():
    """Three positions on which the measures disagree: p1 .5 / .45 / .4, margin .01 / .25 / .1, entropy."""
    probs = np.array(
        [[[0.5, 0.49, 0.005, 0.005], [0.45, 0.2, 0.2, 0.15], [0.4, 0.3, 0.3 - 1e-6, 1e-6], [0.97, 0.01, 0.01, 0.01]]]
    )
    masked = jnp.array([[True, True, True, False]])  # the surest position is known already
    times, u = Times(jnp.float32(1.0), jnp.float32(0.7)), jnp.full((1, 4), 0.5)
    for policy, best in ((MaxProbability(), 0), (Margin(), 1), (Entropy(), 0)):
        commit, _, _ = policy(u, None, masked, draw_with(probs), times, policy.init(masked))
        assert np.flatnonzero(np.asarray(commit & masked)[0]).tolist() == [best], policy
    probs[0, 0] = [0.5, 0.2, 0.15, 0.15]  # entropy 1.24 against 1.09 of position 2
    commit, _, _ = Entropy()(u, None, masked, draw_with(probs), times, Entropy().init(masked))
    assert np.flatnonzero(np.asarray(commit & masked)[0]).tolist() == [2]


def order_frequencies(policy, probs, rows=20_000):
    """How often each position is the first, and the first two, to be unmasked."""
    masked = jnp.ones((rows, probs.shape[0]), bool)
    draw = draw_with(np.broadcast_to(probs, (rows, *probs.shape)))
    u = uniforms(jax.random.key(1), masked.shape)
    out = []
    for left in (3, 2):
        times = Times(jnp.float32(1.0), jnp.float32(left / 4))
        out.append(np.asarray(policy(u, None, masked, draw, times, policy.init(masked))[0]).mean(0))
    return out


def test_order_temperature_is_a_draw_without_replacement():
    probs = np.array([[0.9, 0.1, 1e-9, 1e-9], [0.6, 0.4, 1e-9, 1e-9], [0.5, 0.5, 1e-9, 1e-9], [0.34, 0.33, 0.33, 1e-9]])
    for temperature in (0.2, 1.0):
        w = np.exp(probs.max(-1) / temperature)
        w /= w.sum()
        first, two = order_frequencies(MaxProbability(temperature), probs)
        second = [sum(w[j] * w[i] / (1 - w[j]) for j in range(4) if j != i) for i in range(4)]
        np.testing.assert_allclose(first, w, atol=0.015)
        np.testing.assert_allclose(two, w + second, atol=0.015)


def test_order_noise_reaches_the_tail():
    """The noise is Gumbel, P(noise < x) = exp(-exp(-x)), far beyond the 16 nats at which plain f32 uniforms end."""
    u = jnp.array([[0.0, 2.0**-50, 2.0**-30, 0.25, 0.5, 1 - 2.0**-24]])
    draw = Draw(None, None, Feedback(None, None, jnp.zeros(u.shape), None))
    noise = np.asarray(Entropy(1.0).score(u, draw), np.float64)[0]
    assert noise[0] == np.inf  # ahead of all, and not NaN
    np.testing.assert_allclose(1 - np.exp(-np.exp(-noise[1:])), u[0, 1:], rtol=1e-5)
    np.testing.assert_allclose(noise[1], 50 * np.log(2), rtol=1e-6)


def test_first_hitting_orders_are_uniform():
    """All 24 orders of four positions are equally likely, whatever the confidences."""
    rows, policy = 24_000, FirstHitting()
    draw = draw_with(np.broadcast_to(distributions(4, 5), (rows, 4, 5)))
    masked, carry = jnp.ones((rows, 4), bool), jnp.full(rows, 4)
    order = np.zeros(rows, int)
    for i in range(4):
        u = uniforms(jax.random.key(i), masked.shape)
        times = Times(jnp.float32(1 - i / 4), jnp.float32(0.75 - i / 4))
        commit, _, carry = policy(u, None, masked, draw, times, carry)
        commit &= masked
        assert np.all(np.sum(commit, 1) == 1)
        order = 4 * order + np.argmax(commit, 1)
        masked &= ~commit
    counts = np.unique(order, return_counts=True)[1]
    assert len(counts) == 24 and np.sum((counts - 1000) ** 2 / 1000) < 23 + 5 * np.sqrt(46)


def test_order_temperature_out_of_range_is_refused():
    with pytest.raises(ValueError, match="order_temperature: got -1, wanted >= 0"):
        Margin(-1)
