"""The compiled sampler against a plain Python loop over its step; feedback, caches, prompts, independence of rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MASK, READOUT, SOFTMASK, assert_identical, make_denoiser, make_params

from smdlm.feedback.gates import ConstantGate
from smdlm.full_softmask import FullSoftMask
from smdlm.ops.filters import Filters
from smdlm.sampling.loop import Sampler, uniforms
from smdlm.sampling.policies import (
    POLICIES,
    Ancestral,
    Confidence,
    Entropy,
    Margin,
    Times,
    linear_times,
)
from smdlm.sampling.policy import Drawing, Revising
from smdlm.softmask import SoftMask

B, L, T = 3, 8, 6


@pytest.fixture(scope="module")
def denoiser():
    return make_denoiser()


@pytest.fixture(scope="module")
def params(denoiser):
    return make_params(denoiser)


def make_sampler(denoiser, **changes):
    return Sampler(**{"denoiser": denoiser, "readout": READOUT, "policy": Ancestral(), "steps": T, **changes})


def with_omega(params, sampler):
    """The same backbone, with the parameters of the sampler's own operator."""
    return {**params, "softmask": sampler.denoiser.softmask.init()}


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


class Looking(Shuffling, Drawing):
    """Has every masked position drawn before it decides."""


@dataclasses.dataclass(frozen=True)
class Rewriting(Revising):
    """Re-masks, and writes the best token over what the model finds unlikely. Carries what it was told of it."""

    floor: float = 0.1

    def init(self, masked):
        return jnp.zeros(masked.shape)

    def __call__(self, u, canvas, masked, draw, times, carry):
        edit = jnp.where(draw.canvas_prob < self.floor, draw.feedback.ids[..., 0], -1)
        return u < 0.5, u > 0.9, edit, draw.canvas_prob


@dataclasses.dataclass(frozen=True)
class Everywhere(SoftMask):
    """Committed positions take half of the prediction too: what needs the row of the mask looks it up."""

    everywhere = True

    def __call__(self, omega, table, head, tokens, feedback, mask_id):
        rows, candidate, _ = self.look_up(omega, table, head, tokens, feedback)
        return jnp.where(feedback.active[..., None], (table[mask_id] + candidate) / 2, rows)


@dataclasses.dataclass(frozen=True)
class Clock:
    """A gate of the number of forwards and the time alone."""

    labels = {}

    def init(self):
        return {}

    def __call__(self, omega, seen):
        return jnp.broadcast_to(0.1 * seen.forwards + 0.1 * seen.time, seen.neg_entropy.shape)

    def values(self, omega):
        return {}


# Everything that changes what a step carries or does; every policy by itself is in EVERYTHING below.
VARIANTS = {
    "ancestral": {"filters": Filters(top_p=0.9)},
    "binary": {"use_feedback": False},
    "on_change": {"refresh": "on_change"},
    "remask_subs": {"policy": Shuffling()},
    "remask_raw": {"policy": Shuffling(), "feedback_source": "raw"},
    "conf": {"policy": Confidence(), "feedback_source": "raw", "refresh": "on_change"},
    "margin": {"policy": Margin(0.1), "refresh": "on_change"},
    "entropy": {"policy": Entropy(), "feedback_source": "raw", "filters": Filters(0.0)},
    "rewriting": {"policy": Rewriting(), "refresh": "on_change"},
    "everywhere": {"policy": Shuffling(), "denoiser": make_denoiser(Everywhere())},
    "clock": {"denoiser": make_denoiser(SoftMask(gate=Clock())), "refresh": "on_change"},
}


# Shared by all tests: one program for each sampler.
init, step, finish = (jax.jit(method, static_argnums=0) for method in (Sampler.init, Sampler.step, Sampler.finish))


def python_loop(sampler, params, key, canvas, times):
    """The sampler's scan, written as a loop over `step` with the same uniforms."""
    prompt = canvas != sampler.denoiser.mask_id
    keys = [jax.random.fold_in(key, row) for row in range(len(canvas))]
    t, s = np.asarray(times.t), np.asarray(times.s)
    carry, canvases = init(sampler, canvas), []
    for i in range(len(t)):
        u = np.stack([uniforms(jax.random.fold_in(k, i), (2, L)) for k in keys])
        carry = step(sampler, params, carry, Times(t[i], s[i]), prompt, u[:, 0], u[:, 1])
        canvases.append(np.asarray(carry.canvas))
    return finish(sampler, params, carry), canvases


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_scan_is_a_python_loop(denoiser, params, variant):
    sampler = make_sampler(**{"denoiser": denoiser, **VARIANTS[variant]})
    params, key, canvas = with_omega(params, sampler), jax.random.key(3), canvas_with_prompts()
    got = sampler(params, key, canvas)
    wanted, _ = python_loop(sampler, params, key, canvas, linear_times(T))
    assert_identical(got, wanted)
    prompt = np.asarray(canvas != MASK)
    tokens = np.asarray(got.tokens)
    assert np.all((tokens >= 0) & (tokens < MASK))  # every mask is filled
    np.testing.assert_array_equal(tokens[prompt], np.asarray(canvas)[prompt])
    assert 1 <= int(got.forwards) <= T + 1


def test_drawing_only_what_is_committed_changes_nothing(denoiser, params):
    lazy, eager = (make_sampler(denoiser, policy=p, filters=Filters(top_p=0.9)) for p in (Shuffling(), Looking()))
    key, canvas = jax.random.key(5), canvas_with_prompts()
    assert_identical(lazy(params, key, canvas), eager(params, key, canvas))


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


def step_once(sampler, params, canvas, u_move):
    """(carry before, carry after) one step at t = .5 whose u_move is given."""
    before = init(sampler, canvas)
    u = jax.random.uniform(jax.random.key(2), canvas.shape)
    prompt = jnp.zeros(canvas.shape, bool)
    return before, step(sampler, params, before, Times(jnp.float32(0.5), jnp.float32(0.25)), prompt, u, u_move)


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
    for name in ("ids", "probs", "neg_entropy"):
        np.testing.assert_allclose(getattr(got, name)[still], getattr(wanted, name)[still], rtol=1e-4, atol=1e-6)
    if source == "subs":
        np.testing.assert_array_equal(np.asarray(got.ids)[again, 0], np.asarray(canvas)[again])
        np.testing.assert_array_equal(np.asarray(got.probs)[again], np.tile([1.0, 0, 0], (again.sum(), 1)))
        assert not np.any(np.asarray(got.neg_entropy)[again])
    else:
        np.testing.assert_array_equal(np.asarray(got.ids)[again], np.asarray(wanted.ids)[again])


def test_forwards_and_time_reach_the_gate(params):
    """Rows count their own forwards, as the cache runs them; the time is that at which the feedback will be read."""
    sampler = make_sampler(make_denoiser(SoftMask(gate=Clock())), refresh="on_change")
    carry, u = init(sampler, BLANK), jnp.full((B, L), 0.5)
    u_move = jnp.ones((B, L)).at[1].set(0.0)  # row 1 commits everything, rows 0 and 2 nothing
    prompt, counts = jnp.zeros((B, L), bool), []
    for t, s in ((1.0, 0.75), (0.75, 0.5)):
        carry = step(sampler, params, carry, Times(jnp.float32(t), jnp.float32(s)), prompt, u, u_move)
        counts.append(carry.feedback.forwards.tolist())
        np.testing.assert_array_equal(carry.feedback.time, np.full(B, s, np.float32))
    assert counts == [[1, 1, 1], [1, 2, 1]]
    with_clock = jax.jit(sampler.denoiser)(params, BLANK, carry.feedback)
    fixed = make_denoiser(SoftMask(gate=ConstantGate(0.1 * 1 + 0.1 * 0.5)))
    np.testing.assert_allclose(with_clock[0], jax.jit(fixed)(params, BLANK, carry.feedback)[0], rtol=1e-3, atol=1e-4)


def test_a_revising_policy_sees_and_replaces_what_was_committed(denoiser, params):
    """It is told the probability of each committed token, writes over those only, and never over a prompt."""
    canvas = canvas_with_prompts()
    prompt = (canvas != MASK) & (jnp.arange(L) < L // 2)
    u_move = jnp.full((B, L), 0.7)  # nothing is committed, nothing re-masked
    committed = np.asarray((canvas != MASK) & ~prompt)
    log_probs = READOUT.log_probs(denoiser.head(params), jax.jit(denoiser)(params, canvas))
    p_old = np.exp(np.take_along_axis(np.asarray(log_probs), np.asarray(canvas)[..., None], -1)[..., 0])
    floor = float(np.median(p_old[committed]))
    sampler, times = make_sampler(denoiser, policy=Rewriting(floor)), Times(jnp.float32(0.5), jnp.float32(0.25))
    u = jax.random.uniform(jax.random.key(2), (B, L))
    after = step(sampler, params, init(sampler, canvas), times, prompt, u, u_move)
    np.testing.assert_allclose(after.policy, np.where(committed, p_old, 0), rtol=1e-4, atol=1e-6)
    edited = committed & (p_old < floor)
    assert edited.any() and (committed & ~edited).any()
    np.testing.assert_array_equal(after.canvas, np.where(edited, np.argmax(log_probs, -1), canvas))


def test_an_operator_that_wants_everything_gets_all_but_the_prompt(params):
    sampler, canvas = make_sampler(make_denoiser(Everywhere())), canvas_with_prompts()
    prompt = (canvas != MASK) & (jnp.arange(L) < L // 2)
    times, u = Times(jnp.float32(0.5), jnp.float32(0.25)), jnp.full((B, L), 0.5)
    after = step(sampler, params, init(sampler, canvas), times, prompt, u, jnp.ones((B, L)))
    np.testing.assert_array_equal(after.feedback.active, ~np.asarray(prompt))
    hidden = jax.jit(sampler.denoiser)(params, canvas)
    wanted = jax.jit(READOUT.feedback)(sampler.denoiser.head(params), hidden, ~prompt)
    committed = np.asarray((canvas != MASK) & ~prompt)
    assert committed.any()
    np.testing.assert_array_equal(after.feedback.ids[committed], wanted.ids[committed])


def test_margin_works_with_one_remembered_candidate():
    """The second candidate is for the order alone: the feedback keeps its k."""
    denoiser = make_denoiser(SoftMask(k=1, gate=SOFTMASK.gate))
    params, readout = make_params(denoiser), dataclasses.replace(READOUT, k=1)
    sampler = make_sampler(denoiser, policy=Margin(), readout=readout)
    _, carry = step_once(sampler, params, BLANK, jnp.full((B, L), 0.5))
    assert carry.feedback.ids.shape == (B, L, 1)
    two = make_sampler(denoiser, policy=Margin(), readout=dataclasses.replace(READOUT, k=2))
    _, wanted = step_once(two, params, BLANK, jnp.full((B, L), 0.5))
    np.testing.assert_array_equal(carry.canvas, wanted.canvas)
    assert 0 < np.sum(np.asarray(carry.canvas) == MASK) < B * L


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
    sampler = make_sampler(**{"denoiser": denoiser, **VARIANTS[variant]})
    params, key, canvas = with_omega(params, sampler), jax.random.key(5), canvas_with_prompts()
    together = sampler(params, key, canvas).tokens
    if variant in ("ancestral", "on_change", "conf", "margin"):  # a lone row is another program
        np.testing.assert_array_equal(together[:1], sampler(params, key, canvas[:1]).tokens)
    other = sampler(params, key, canvas.at[0].set(MASK)).tokens  # another neighbour
    np.testing.assert_array_equal(together[1:], other[1:])


def test_on_batch_change_is_the_references_cache(denoiser, params):
    """All rows run again if any changed; so a row depends on its neighbours, unless they are complete."""
    sampler = make_sampler(denoiser, refresh="on_batch_change")
    u_move = jnp.ones((B, L)).at[1].set(0.0)  # row 1 commits everything, rows 0 and 2 nothing
    _, after = step_once(sampler, params, BLANK, u_move)
    np.testing.assert_array_equal(after.changed, [True, True, True])
    _, after = step_once(sampler, params, BLANK, jnp.ones((B, L)))
    np.testing.assert_array_equal(after.changed, [False, False, False])
    steps, key, canvas = 30, jax.random.key(5), canvas_with_prompts()
    by_row, by_batch = (make_sampler(denoiser, refresh=r, steps=steps) for r in ("on_change", "on_batch_change"))
    alone = canvas.at[1:].set(3)
    one, two = by_row(params, key, alone), by_batch(params, key, alone)
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
    last = step(
        sampler, params, after, Times(jnp.float32(0.25), jnp.float32(0.2)), jnp.zeros((B, L), bool), u, jnp.ones((B, L))
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
@pytest.mark.parametrize(
    "name, kind", [*((name, "feedback") for name in POLICIES), ("mdlm", "binary"), ("remdm_cap", "binary")]
)
def test_every_policy_with_everything(denoiser, params, name, kind):
    """Prompts stay, masks are filled, rows stand alone, one program: with each policy, filter rule and the cache."""
    sampler = make_sampler(denoiser, policy=POLICIES[name](), steps=7, **EVERYTHING[kind])
    size, key, canvas = Sampler.run._cache_size(), jax.random.key(6), canvas_with_prompts(seed=6)
    tokens = np.asarray(sampler(params, key, canvas).tokens)
    prompt = np.asarray(canvas != MASK)
    np.testing.assert_array_equal(tokens[prompt], np.asarray(canvas)[prompt])
    assert np.all((tokens >= 0) & (tokens < MASK))
    other = sampler(params, key, canvas.at[1].set(MASK)).tokens
    np.testing.assert_array_equal(tokens[[0, 2]], np.asarray(other)[[0, 2]])
    assert np.any(tokens != np.asarray(sampler(params, jax.random.key(7), canvas).tokens))
    assert Sampler.run._cache_size() == size + 1


def test_uniforms_are_fine_near_zero():
    """Uniform in [0, 1); below 2^-20 still of full precision, where jax.random.uniform has eight values."""
    u = np.asarray(uniforms(jax.random.key(0), (2**23,)), np.float64)
    assert u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, 64, (0, 1))[0]
    assert np.abs(counts - 2**17).max() < 6 * np.sqrt(2**17)
    small = u[u < 2.0**-18]
    assert len(small) > 10 and len(np.unique(small)) == len(small) and np.any(small * 2**23 % 1)
