"""A recorded run against the compiled one: same tokens, and the frames say what the steps did."""

import dataclasses

import blocks_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MASK, READOUT, SOFTMASK, make_denoiser, make_params

from smdlm.feedback.committed import Doubt, Stages
from smdlm.feedback.conditioning import CarriedHidden
from smdlm.feedback.gates import ConstantGate
from smdlm.full_softmask import FullSoftMask
from smdlm.ops.filters import Filters
from smdlm.sampling.loop import Sampler
from smdlm.sampling.policies import Ancestral
from smdlm.sampling.trace import Trace, _shown, record, record_blocks
from smdlm.softmask import Feedback, SoftMask

B, L, T, K = 2, 8, 5, 3


@dataclasses.dataclass(frozen=True)
class Shuffling:
    """Commits and re-masks at random, so that every kind of frame occurs."""

    def init(self, masked):
        return ()

    def __call__(self, u, canvas, masked, draw, times, carry):
        return u < 0.5, u > 0.7, carry


@pytest.fixture(scope="module")
def denoiser():
    return make_denoiser()


@pytest.fixture(scope="module")
def params(denoiser):
    return make_params(denoiser)


def make_sampler(denoiser, **changes):
    fields = {"policy": Shuffling(), "steps": T, "filters": Filters(top_p=0.9), **changes}
    return Sampler(denoiser=denoiser, readout=READOUT, **fields)


CANVAS = jnp.full((B, L), MASK, jnp.int32).at[:, 2:4].set(5)
VARIANTS = {
    "soft": {"feedback_source": "raw", "refresh": "on_change"},
    "binary": {"use_feedback": False},
}


@pytest.fixture(scope="module")
def recorded(denoiser, params):
    made = {}

    def of(variant):
        if variant not in made:
            sampler = make_sampler(denoiser, **VARIANTS[variant])
            made[variant] = sampler, record(sampler, params, jax.random.key(3), CANVAS)
        return made[variant]

    return of


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_recorded_run_is_the_compiled_one(recorded, params, variant):
    sampler, traces = recorded(variant)
    wanted = sampler(params, jax.random.key(3), CANVAS)
    assert len(traces) == B
    for row, trace in enumerate(traces):
        assert len(trace.tokens) in (T + 1, T + 2)
        np.testing.assert_array_equal(trace.tokens[0], CANVAS[row])
        np.testing.assert_array_equal(trace.tokens[-1], wanted.tokens[row])
        assert trace.forwards[0] == 0 and trace.forwards[-1] == int(wanted.forwards)
        np.testing.assert_array_equal(trace.prompt, np.asarray(CANVAS[row] != MASK))
        assert trace.ids.shape == trace.probs.shape == (*trace.tokens.shape, K)
        assert trace.computed.tolist() == [[0, L]] * len(trace.tokens)
        assert trace.fed_back == sampler.use_feedback


@pytest.mark.parametrize("variant", VARIANTS)
def test_predictions_are_of_masked_positions_and_lambda_of_what_is_fed_back(recorded, variant):
    sampler, traces = recorded(variant)
    for trace in traces:
        assert not trace.predicted[0].any() and trace.predicted[1:-1].any()
        assert not trace.predicted[~trace.masked].any()
        entropy, probs = trace.entropy[trace.predicted], trace.probs[trace.predicted]
        assert np.all(entropy >= 0) and np.all(entropy <= np.log(MASK) + 1e-5)
        assert np.all(np.diff(probs) <= 0) and np.all(probs.sum(-1) <= 1 + 1e-5)
        assert not trace.lam[~trace.predicted].any()
        gate = SOFTMASK.gate
        wanted = gate.scale / (1 + np.exp(-gate.steepness * (-entropy - gate.centre)))
        got = trace.lam[trace.predicted]
        np.testing.assert_allclose(got, wanted if sampler.use_feedback else 0 * wanted, rtol=1e-4, atol=1e-6)


def test_a_binary_run_records_what_it_throws_away(recorded, params, denoiser):
    """The prediction of the canvas before the step, of positions that were masked before and after."""
    _, traces = recorded("binary")
    canvas = np.stack([trace.tokens[1] for trace in traces])
    hidden = jax.jit(denoiser)(params, canvas)
    wanted = READOUT.feedback(denoiser.head(params), hidden, jnp.asarray(canvas == MASK))
    for row, trace in enumerate(traces):
        where = trace.predicted[2]
        assert where.any()
        np.testing.assert_array_equal(where, trace.masked[1] & trace.masked[2])
        np.testing.assert_array_equal(trace.ids[2][where], wanted.ids[row][where])
        np.testing.assert_allclose(trace.entropy[2][where], -wanted.neg_entropy[row][where], rtol=1e-4)


def test_runs_of_the_same_noise_begin_alike(recorded):
    """Nothing is remembered at the first step, so feedback can not change it; later it does."""
    soft, binary = recorded("soft")[1][0], recorded("binary")[1][0]
    np.testing.assert_array_equal(soft.tokens[:2], binary.tokens[:2])
    both = soft.predicted[2] & binary.predicted[2]
    assert both.any() and np.all(soft.entropy[2][both] != binary.entropy[2][both])
    first = soft.predicted[1] & binary.predicted[1]
    np.testing.assert_allclose(soft.entropy[1][first], binary.entropy[1][first], rtol=1e-4)


def test_lambda_of_the_full_operator_is_that_of_its_own_temperature():
    """Its gate sees the entropy of the flatter distribution that it mixes, so lambda is smaller."""
    denoiser = make_denoiser(FullSoftMask(k=K, gate=SOFTMASK.gate, temperature=2.0))
    sampler = make_sampler(denoiser, policy=Ancestral())
    (trace,) = record(sampler, make_params(denoiser), jax.random.key(0), CANVAS[:1])
    where, gate = trace.predicted[1], SOFTMASK.gate
    plain = gate.scale / (1 + np.exp(-gate.steepness * (-trace.entropy[1][where] - gate.centre)))
    assert np.all(trace.lam[1][where] > 0) and np.all(trace.lam[1][where] < plain)


def test_only_operators_that_mix_show_a_soft_mask():
    """What an operator says of itself is what it does at a masked position; a trace shows no lambda for the others."""
    rng = np.random.default_rng(0)
    canvas = jnp.asarray([[MASK, 3, MASK, 5]])
    ids, probs = jnp.asarray(rng.integers(0, MASK, (1, 4, 2))), jnp.asarray([[[0.5, 0.2]] * 4])
    feedback = Feedback(ids, probs, jnp.full((1, 4), -1.5), jnp.ones((1, 4), bool))
    for operator in (SoftMask(k=2), Stages(k=2), Doubt(k=2), CarriedHidden(k=2)):
        operator = dataclasses.replace(operator, gate=ConstantGate(0.3))
        denoiser = make_denoiser(operator)
        params = make_params(denoiser)
        seen = operator.attach(feedback, jnp.asarray(rng.normal(size=(1, 4, 16)), jnp.float32))
        table = denoiser.model.table(params["backbone"])
        got = operator(params["softmask"], table, None, canvas, seen, MASK)
        mix = 0.7 * table[MASK] + 0.3 * (5 * table[ids[0, 0, 0]] + 2 * table[ids[0, 0, 1]]) / 7
        assert np.allclose(got[0, 0], mix, atol=1e-5) == operator.mixes
        remembered, lam = _shown(denoiser, params, canvas, seen)
        np.testing.assert_allclose(lam, [[0.3 * operator.mixes, 0, 0.3 * operator.mixes, 0]], rtol=1e-6)
        assert remembered.active.tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("soft", [True, False])
def test_a_row_of_block_decoding(soft):
    """Without its padding; a frame for each pass that it took part in, with what that computed."""
    made = blocks_test.decoder(blocks_test.DECAYING, cache="dual", use_feedback=soft)
    canvas, seen = blocks_test.prompts()
    run = blocks_test.forwards(made, canvas, seen)
    taken = np.stack([forward.waiting for forward in run]).sum(0)
    row = int(np.where(taken < len(run), taken, 0).argmax())  # of those that wait for another the longest
    padding, length = (0, 2, 1)[row], blocks_test.L - (0, 2, 1)[row]
    trace = record_blocks(made, blocks_test.PARAMS, run, np.asarray(seen), row)
    mine = [forward for forward in run if forward.waiting[row]]
    assert (len(mine) < len(run) or not soft) and len(trace.tokens) == len(mine) + 1
    assert trace.forwards.tolist() == list(range(len(trace.tokens))) and trace.fed_back == soft
    np.testing.assert_array_equal(trace.tokens[0], canvas[row, padding:])
    assert trace.prompt.tolist() == [True] * (length - 8) + [False] * 8
    for frame, forward in enumerate(mine, 1):
        np.testing.assert_array_equal(trace.tokens[frame], forward.after.canvas[row, padding:])
        start, end = forward.start - padding, forward.start + forward.size - padding
        assert trace.computed[frame].tolist() == [max(start, 0), end]
        inside = (np.arange(length) >= start) & (np.arange(length) < end)
        remembered = trace.masked[frame] if soft else trace.masked[frame] & inside
        np.testing.assert_array_equal(trace.predicted[frame], remembered)
    assert [0, length] in trace.computed[1:].tolist() and (np.diff(trace.computed) < length).any()
    entropy = trace.entropy[trace.predicted]
    assert (entropy > 0).all() and not trace.lam[~trace.predicted].any()
    np.testing.assert_allclose(trace.lam[trace.predicted], 0.6 * soft, rtol=1e-6)


def test_settled_is_the_frame_of_the_last_change():
    m = 9
    tokens = np.array([[m, m, 1, m], [2, m, 1, 4], [2, 3, 1, m], [2, 3, 1, 4], [2, 3, 1, 4]])
    empty = np.zeros(tokens.shape)
    trace = Trace(m, tokens, empty, empty, empty, empty, empty, np.arange(5), np.zeros((5, 2)), False)
    np.testing.assert_array_equal(trace.settled, [1, 2, 0, 3])
    np.testing.assert_array_equal(trace.prompt, [False, False, True, False])
