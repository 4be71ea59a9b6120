"""Filters and draws against sort-based references; the compiled sampler against a plain Python loop over its step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MASK, READOUT, SOFTMASK, V, assert_identical, make_denoiser, make_params

from smdlm.full_softmask import FullSoftMask
from smdlm.ops.filters import Filters, inverse_cdf, nucleus_threshold
from smdlm.readout import Draw
from smdlm.sampling.ar import ARSampler
from smdlm.sampling.loop import Sampler, uniforms
from smdlm.sampling.policies import (
    POLICIES,
    Ancestral,
    Cap,
    Confidence,
    Entropy,
    FirstHitting,
    Loop,
    Margin,
    MaxProbability,
    Times,
    linear_times,
)
from smdlm.softmask import Feedback, SoftMask

B, L, T = 3, 8, 6

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


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_p_rule": "hf"}])
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
        ids, _ = draw(jnp.broadcast_to(jnp.asarray(p), (18008, 1000)), jnp.pad(jnp.asarray(u), (0, 18008 - len(u))))
        ids = np.asarray(ids)
        assert ids.max() < 1000 and np.all(p[ids] > 0)
        assert ids[0] == np.flatnonzero(p)[0]
        assert np.all(np.diff(ids[: len(u)]) >= 0)  # larger u, larger id


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


# The schedule and the policy


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


# A number of tokens per step


def test_uniforms_are_fine_near_zero():
    """Uniform in [0, 1); below 2^-20 still of full precision, where jax.random.uniform has eight values."""
    u = np.asarray(uniforms(jax.random.key(0), (2**23,)), np.float64)
    assert u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, 64, (0, 1))[0]
    assert np.abs(counts - 2**17).max() < 6 * np.sqrt(2**17)
    small = u[u < 2.0**-18]
    assert len(small) > 10 and len(np.unique(small)) == len(small) and np.any(small * 2**23 % 1)


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
    step, draw = jax.jit(policy), draw_with(distributions("random", 6, rows=24).reshape(3, 8, 6))
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
    draw = draw_with(np.broadcast_to(distributions("peaked", 5, rows=4), (rows, 4, 5)))
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


def test_margin_works_with_one_remembered_candidate():
    """The second candidate is for the order alone: the feedback keeps its k."""
    denoiser = make_denoiser(SoftMask(k=1, gate=SOFTMASK.gate))
    params, readout = make_params(denoiser), dataclasses.replace(READOUT, k=1)
    sampler = make_sampler(denoiser, policy=Margin(), readout=readout)
    _, carry = step_once(sampler, params, BLANK, jnp.full((B, L), 0.5))
    assert carry.feedback.ids.shape == (B, L, 1)
    wanted = make_sampler(denoiser, policy=Margin(), readout=dataclasses.replace(READOUT, k=2), use_feedback=False)
    got = make_sampler(denoiser, policy=Margin(), readout=readout, use_feedback=False)
    assert_identical(got(params, jax.random.key(0), BLANK), wanted(params, jax.random.key(0), BLANK))


# The sampler


@pytest.fixture(scope="module")
def denoiser():
    return make_denoiser()


@pytest.fixture(scope="module")
def params(denoiser):
    return make_params(denoiser)


def make_sampler(denoiser, **changes):
    return Sampler(**{"denoiser": denoiser, "readout": READOUT, "policy": Ancestral(), "steps": T, **changes})


@pytest.fixture(scope="module")
def sampler(denoiser):
    return make_sampler(denoiser, filters=Filters(top_p=0.9))


def canvas_with_prompts(batch=B, seed=0):
    """About a third of the positions given, in the middle too (infilling)."""
    rng = np.random.default_rng(seed)
    tokens = np.where(rng.random((batch, L)) < 0.35, rng.integers(0, MASK, (batch, L)), MASK)
    return jnp.asarray(tokens, jnp.int32)


BLANK = jnp.full((B, L), MASK, jnp.int32)


@dataclasses.dataclass(frozen=True)
class Shuffling:
    """A policy that commits and re-masks at random: exercises what Ancestral never does. Carries a step count."""

    def init(self, masked):
        return jnp.zeros(len(masked), jnp.int32)

    def __call__(self, u, canvas, masked, draw, times, carry):
        return u < 0.6, u > 0.7, carry + 1


VARIANTS = {
    "ancestral": {"filters": Filters(top_p=0.9)},
    "binary": {"use_feedback": False},
    "on_change": {"refresh": "on_change"},
    "remask_subs": {"policy": Shuffling()},
    "remask_raw": {"policy": Shuffling(), "feedback_source": "raw"},
    "cold": {"filters": Filters(temperature=0.0)},
    "cap": {"policy": Cap(0.3), "filters": Filters(top_p=0.9, top_p_rule="reference")},
    "conf": {"policy": Confidence(), "feedback_source": "raw", "refresh": "on_change"},
    "loop": {"policy": Loop(0.1, 0.55, 0.2, 0.8), "use_feedback": False},
    "margin": {"policy": Margin(0.1), "refresh": "on_change"},
    "entropy": {"policy": Entropy(), "feedback_source": "raw", "filters": Filters(0.0)},
    "first_hitting": {"policy": FirstHitting(), "use_feedback": False, "filters": Filters(top_p=0.9)},
}


def python_loop(sampler, params, key, canvas, times):
    """The sampler's scan, written as a loop over `step` with the same uniforms."""
    prompt = canvas != sampler.denoiser.mask_id
    keys = [jax.random.fold_in(key, row) for row in range(len(canvas))]
    step = jax.jit(sampler.step)
    t, s = np.asarray(times.t), np.asarray(times.s)
    carry, canvases = jax.jit(sampler.init)(canvas), []
    for i in range(len(t)):
        u = np.stack([uniforms(jax.random.fold_in(k, i), (2, L)) for k in keys])
        carry = step(params, carry, Times(t[i], s[i]), prompt, u[:, 0], u[:, 1])
        canvases.append(np.asarray(carry.canvas))
    return jax.jit(sampler.finish)(params, carry), canvases


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_scan_is_a_python_loop(denoiser, params, variant):
    sampler = make_sampler(denoiser, **VARIANTS[variant])
    key, canvas = jax.random.key(3), canvas_with_prompts()
    got = sampler(params, key, canvas)
    wanted, _ = python_loop(sampler, params, key, canvas, linear_times(T))
    assert_identical(got, wanted)
    prompt = np.asarray(canvas != MASK)
    tokens = np.asarray(got.tokens)
    assert np.all((tokens >= 0) & (tokens < MASK))  # every mask is filled
    np.testing.assert_array_equal(tokens[prompt], np.asarray(canvas)[prompt])
    assert 1 <= int(got.forwards) <= T + 1


def test_a_committed_token_stays(sampler, params):
    _, canvases = python_loop(sampler, params, jax.random.key(0), BLANK, linear_times(T))
    for before, after in zip(canvases[:-1], canvases[1:], strict=True):
        known = before != MASK
        np.testing.assert_array_equal(after[known], before[known])
    assert np.sum(canvases[0] == MASK) > np.sum(canvases[-1] == MASK)


def test_remasking_never_touches_a_prompt(denoiser, params):
    sampler, canvas = make_sampler(denoiser, policy=Shuffling()), canvas_with_prompts()
    _, canvases = python_loop(sampler, params, jax.random.key(1), canvas, linear_times(T))
    prompt, again = np.asarray(canvas != MASK), 0
    for before, after in zip(canvases[:-1], canvases[1:], strict=True):
        again += np.sum((before != MASK) & (after == MASK))
        np.testing.assert_array_equal(after[prompt], np.asarray(canvas)[prompt])
    assert again > 0


def step_once(sampler, params, canvas, u_move, feedback_of=None):
    """(carry before, carry after) one step at t = .5 whose u_move is given."""
    before = jax.jit(sampler.init)(canvas)
    u = jax.random.uniform(jax.random.key(2), canvas.shape)
    prompt = jnp.zeros(canvas.shape, bool)
    step = jax.jit(sampler.step)
    return before, step(params, before, Times(jnp.float32(0.5), jnp.float32(0.25)), prompt, u, u_move)


@pytest.mark.parametrize("source", ["subs", "raw"])
def test_what_is_remembered(denoiser, params, source):
    """Still masked: this step's unfiltered prediction. Masked again: a one-hot of the old token, or the prediction."""
    sampler = make_sampler(denoiser, policy=Shuffling(), feedback_source=source, filters=Filters(top_p=0.5))
    canvas = canvas_with_prompts()
    u_move = jax.random.uniform(jax.random.key(4), canvas.shape)
    before, after = step_once(sampler, params, canvas, u_move)
    hidden = jax.jit(denoiser)(params, canvas, before.feedback)
    masked = np.asarray(canvas == MASK)
    wanted = jax.jit(READOUT.feedback)(denoiser.head(params), hidden, jnp.ones_like(canvas, bool))
    still = masked & ~np.asarray(u_move < 0.6)
    again = ~masked & np.asarray(u_move > 0.7)
    assert still.any() and again.any()
    got = after.feedback
    np.testing.assert_array_equal(got.active, still | again)
    np.testing.assert_array_equal(got.active, after.canvas == MASK)
    for got_leaf, wanted_leaf in zip(got.replace(active=None).__dict__.values(), wanted.__dict__.values(), strict=True):
        if got_leaf is not None:
            np.testing.assert_allclose(
                np.asarray(got_leaf)[still], np.asarray(wanted_leaf)[still], rtol=1e-4, atol=1e-6
            )
    if source == "subs":
        np.testing.assert_array_equal(np.asarray(got.ids)[again, 0], np.asarray(canvas)[again])
        np.testing.assert_array_equal(np.asarray(got.probs)[again], np.tile([1.0, 0, 0], (again.sum(), 1)))
        assert not np.any(np.asarray(got.neg_entropy)[again])
    else:
        np.testing.assert_array_equal(np.asarray(got.ids)[again], np.asarray(wanted.ids)[again])


def test_feedback_reaches_the_next_step(denoiser, params):
    """Same uniforms with and without feedback: the first step agrees (nothing is remembered yet), later ones differ."""
    with_feedback, without = make_sampler(denoiser), make_sampler(denoiser, use_feedback=False)
    key = jax.random.key(0)
    _, one = python_loop(with_feedback, params, key, BLANK, linear_times(T))
    _, two = python_loop(without, params, key, BLANK, linear_times(T))
    np.testing.assert_array_equal(one[0], two[0])
    assert np.any(one[-1] != two[-1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_does_not_depend_on_its_neighbours(denoiser, params, variant):
    sampler = make_sampler(denoiser, **VARIANTS[variant])
    key, canvas = jax.random.key(5), canvas_with_prompts()
    together = sampler(params, key, canvas).tokens
    if variant in ("ancestral", "on_change", "conf", "margin"):  # a lone row is another program
        np.testing.assert_array_equal(together[:1], sampler(params, key, canvas[:1]).tokens)
    other = sampler(params, key, canvas.at[0].set(MASK)).tokens  # another neighbour
    np.testing.assert_array_equal(together[1:], other[1:])


def test_on_batch_change_is_the_references_cache(denoiser, params):
    """All rows run again if any changed; so a row depends on its neighbours, unless it is alone."""
    sampler = make_sampler(denoiser, refresh="on_batch_change")
    u_move = jnp.ones((B, L)).at[1].set(0.0)  # row 1 commits everything, rows 0 and 2 nothing
    _, after = step_once(sampler, params, BLANK, u_move)
    np.testing.assert_array_equal(after.changed, [True, True, True])
    _, after = step_once(sampler, params, BLANK, jnp.ones((B, L)))
    np.testing.assert_array_equal(after.changed, [False, False, False])
    steps, key, canvas = 30, jax.random.key(5), canvas_with_prompts()
    by_row, by_batch = (make_sampler(denoiser, refresh=r, steps=steps) for r in ("on_change", "on_batch_change"))
    one, two = by_row(params, key, canvas[:1]), by_batch(params, key, canvas[:1])
    assert_identical(one, two)
    assert int(one.forwards) < steps
    pairs = [(by_row(params, k, canvas), by_batch(params, k, canvas)) for k in jax.random.split(key, 8)]
    assert any(np.any(one.tokens != two.tokens) for one, two in pairs)


def test_rows_and_keys_differ(sampler, params):
    tokens = np.asarray(sampler(params, jax.random.key(0), BLANK).tokens)
    assert np.any(tokens[0] != tokens[1]) and np.any(tokens[1] != tokens[2])
    assert np.any(tokens != np.asarray(sampler(params, jax.random.key(1), BLANK).tokens))
    np.testing.assert_array_equal(tokens, sampler(params, jax.random.key(0), BLANK).tokens)


def test_one_compilation_per_shape(denoiser, params):
    sampler = make_sampler(denoiser, steps=5)  # not used elsewhere
    size = Sampler.run._cache_size()
    for seed in range(3):
        sampler(params, jax.random.key(seed), canvas_with_prompts(seed=seed))
    times = linear_times(5)
    sampler.run(params, jax.random.key(0), BLANK, Times(times.t * 0.9, times.s * 0.8))
    make_sampler(denoiser, steps=5)(params, jax.random.key(0), BLANK)  # an equal sampler is the same program
    assert Sampler.run._cache_size() == size + 1
    sampler.run(params, jax.random.key(0), BLANK, linear_times(4))
    assert Sampler.run._cache_size() == size + 2


def test_on_change_is_exact_without_feedback_and_runs_less(denoiser, params):
    """More steps than tokens: most steps change nothing. Without feedback the cache is exact."""
    steps = 40
    always = make_sampler(denoiser, use_feedback=False, steps=steps)
    cached = make_sampler(denoiser, use_feedback=False, steps=steps, refresh="on_change")
    canvas = BLANK[:1]
    for seed in range(3):
        one, two = (s(params, jax.random.key(seed), canvas) for s in (always, cached))
        np.testing.assert_array_equal(one.tokens, two.tokens)
        assert int(one.forwards) in (steps, steps + 1)
        assert int(two.forwards) <= L + 2  # at most one forward per change, the first, and the last
    full = canvas_with_prompts(1).at[:].set(3)
    assert int(cached(params, jax.random.key(0), full).forwards) == 1
    assert int(always(params, jax.random.key(0), full).forwards) == steps  # nothing left for the noise removal


def test_on_change_refreshes_rows_one_by_one(denoiser, params):
    """A row that did not change keeps its hidden states, also while another row is run again."""
    sampler = make_sampler(denoiser, refresh="on_change")
    u_move = jnp.ones((B, L)).at[1].set(0.0)  # row 1 commits everything, rows 0 and 2 nothing
    before, after = step_once(sampler, params, BLANK, u_move)
    np.testing.assert_array_equal(after.changed, [False, True, False])
    u = jnp.full((B, L), 0.5)
    last = jax.jit(sampler.step)(
        params, after, Times(jnp.float32(0.25), jnp.float32(0.2)), jnp.zeros((B, L), bool), u, jnp.ones((B, L))
    )
    np.testing.assert_array_equal(last.hidden[0], after.hidden[0])
    assert np.abs(last.hidden[1] - after.hidden[1]).max() > 1e-3
    assert int(last.forwards) == 2


def test_temperature_zero_is_greedy(denoiser, params):
    """One step, everything committed: the argmax of a forward on the bare canvas."""
    sampler = make_sampler(denoiser, filters=Filters(temperature=0.0), steps=1)
    canvas = canvas_with_prompts()
    logits = denoiser.head(params).logits(jax.jit(denoiser)(params, canvas))
    np.testing.assert_array_equal(
        sampler(params, jax.random.key(0), canvas).tokens, jnp.where(canvas == MASK, logits.argmax(-1), canvas)
    )


def test_draws_follow_the_models_distribution(denoiser, params):
    """One step commits (nearly) everything: the first position's ids over 1000 rows against its probabilities."""
    sampler = make_sampler(denoiser, steps=1, use_feedback=False)
    canvas = jnp.full((1000, 1), MASK, jnp.int32)
    ids = np.asarray(sampler(params, jax.random.key(0), canvas).tokens).ravel()
    log_probs = READOUT.log_probs(denoiser.head(params), jax.jit(denoiser)(params, canvas[:1]))
    p = np.exp(np.asarray(log_probs, np.float64)).ravel()[:MASK]
    counts = np.bincount(ids, minlength=MASK)
    expected = 1000 * p
    big = expected > 5
    chi2 = np.sum((counts[big] - expected[big]) ** 2 / expected[big])
    assert chi2 < big.sum() + 4 * np.sqrt(2 * big.sum())


def test_full_softmask_can_be_sampled():
    denoiser = make_denoiser(FullSoftMask(k=3, gate=SOFTMASK.gate, chunk=5))
    params = make_params(denoiser)
    sampler = make_sampler(denoiser, policy=Shuffling())
    got = sampler(params, jax.random.key(0), canvas_with_prompts())
    wanted, _ = python_loop(sampler, params, jax.random.key(0), canvas_with_prompts(), linear_times(T))
    assert_identical(got, wanted)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"feedback_source": "all"}, {"refresh": "never"}])
def test_sampler_fields_out_of_range_are_refused(denoiser, wrong):
    with pytest.raises(ValueError, match="got .*, wanted"):
        make_sampler(denoiser, **wrong)


def test_feedback_needs_a_soft_masked_model():
    with pytest.raises(ValueError, match="use_feedback"):
        make_sampler(make_denoiser(None))


EVERYTHING = {
    "feedback": {"filters": Filters(top_p=0.9)},
    "binary": {"filters": Filters(top_p=0.9, top_p_rule="reference"), "refresh": "on_change", "use_feedback": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", EVERYTHING.values(), ids=EVERYTHING)
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_with_everything(denoiser, params, name, changes):
    """Prompts stay, masks are filled, rows stand alone, one program: with each policy, filter rule and the cache."""
    sampler = make_sampler(denoiser, policy=POLICIES[name](), steps=7, **changes)
    size, key, canvas = Sampler.run._cache_size(), jax.random.key(6), canvas_with_prompts(seed=6)
    tokens = np.asarray(sampler(params, key, canvas).tokens)
    prompt = np.asarray(canvas != MASK)
    np.testing.assert_array_equal(tokens[prompt], np.asarray(canvas)[prompt])
    assert np.all((tokens >= 0) & (tokens < MASK))
    other = sampler(params, key, canvas.at[1].set(MASK)).tokens
    np.testing.assert_array_equal(tokens[[0, 2]], np.asarray(other)[[0, 2]])
    assert np.any(tokens != np.asarray(sampler(params, jax.random.key(7), canvas).tokens))
    assert Sampler.run._cache_size() == size + 1


# The AR baseline


@pytest.fixture(scope="module")
def causal():
    denoiser = make_denoiser(None, causal=True)
    return denoiser, make_params(denoiser)


def test_ar_sampler_is_a_loop_over_full_forwards(causal):
    """With the KV cache, at every position: the draw from a forward over all tokens so far; prompts are forced."""
    denoiser, params = causal
    filters, key, canvas = Filters(top_p=0.9), jax.random.key(1), canvas_with_prompts()
    got = ARSampler(denoiser, READOUT, bos_id=2, filters=filters)(params, key, canvas)
    keys = [jax.random.fold_in(key, row) for row in range(B)]
    tokens = np.array(jnp.where(canvas[:, 0] == MASK, 2, canvas[:, 0]))[:, None]
    forward = jax.jit(lambda x: denoiser.head(params).logits(denoiser(params, x)))
    for i in range(L - 1):
        padded = np.pad(tokens, ((0, 0), (0, L - tokens.shape[1])))
        u = np.array([jax.random.uniform(jax.random.fold_in(k, i)) for k in keys])
        ids, _ = inverse_cdf(filters.probs(forward(padded)[:, i]), u)
        given = np.asarray(canvas[:, i + 1])
        tokens = np.concatenate([tokens, np.where(given == MASK, ids, given)[:, None]], axis=1)
    np.testing.assert_array_equal(got.tokens, tokens)
    assert int(got.forwards) == L - 1
    assert np.asarray(got.tokens).max() < MASK


def test_ar_rows_are_independent_and_compile_once(causal):
    denoiser, params = causal
    sampler = ARSampler(denoiser, READOUT, bos_id=2)
    together = sampler(params, jax.random.key(0), BLANK).tokens
    size = ARSampler.__call__._cache_size()
    assert np.any(together[0] != together[1]) and np.all(np.asarray(together)[:, 0] == 2)
    sampler(params, jax.random.key(1), canvas_with_prompts())
    assert ARSampler.__call__._cache_size() == size
    np.testing.assert_array_equal(sampler(params, jax.random.key(0), BLANK[:1]).tokens, together[:1])


def test_vocabulary_of_the_fixture():
    assert MASK == V - 1
