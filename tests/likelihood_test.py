"""Validation likelihood: fixed masks, labels, intervals, each estimate against the same number worked out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MASK, READOUT, L, V, make_denoiser, make_params

from smdlm.denoiser import Denoiser
from smdlm.diffusion import TimeSampler
from smdlm.evaluate.likelihood import EvalConfig, _estimate, _estimators, likelihood, weights
from smdlm.objective import NextToken, SoftMaskedDiffusion

BATCH = 4
TOKEN_BYTES = np.arange(1, V + 1) % 4 + 1


def batches_of(count, seed=0):
    """Rows of random tokens in batches of BATCH; the last one padded with id 0 and marked."""
    tokens = np.random.default_rng(seed).integers(0, MASK, (count, L)).astype(np.int32)
    padded = np.pad(tokens, ((0, -count % BATCH), (0, 0)))
    valid = np.arange(len(padded)) < count
    return [{"tokens": padded[i : i + BATCH], "valid": valid[i : i + BATCH]} for i in range(0, len(padded), BATCH)]


@pytest.fixture(scope="module")
def objective():
    return SoftMaskedDiffusion(make_denoiser(), READOUT, 0.8)


@pytest.fixture(scope="module")
def params(objective):
    return make_params(objective.denoiser)


@pytest.fixture(scope="module")
def causal():
    denoiser = make_denoiser(None, causal=True)
    return NextToken(denoiser, READOUT), make_params(denoiser)


def flat(params):
    """Parameters whose head is zero: every token costs log(V - 1), so only masks and weights are left."""
    head = jax.tree.map(jnp.zeros_like, params["backbone"]["head"])
    return {**params, "backbone": {**params["backbone"], "head": head}}


def evaluate(objective, params, batches, **config):
    return likelihood(objective, params, batches, TOKEN_BYTES, EvalConfig(**{"chain": 3, **config}))


@pytest.fixture(scope="module")
def estimates(objective, params):
    return evaluate(objective, params, batches_of(7))


def test_labels(objective, params, causal, estimates):
    assert list(estimates) == ["one_pass", "two_pass", "carried"]
    assert list(evaluate(objective, params, batches_of(4), chain=0)) == ["one_pass", "two_pass"]
    binary = SoftMaskedDiffusion(make_denoiser(None), READOUT, 0.0)
    assert list(evaluate(binary, {**params, "softmask": {}}, batches_of(4))) == ["one_pass"]
    assert list(evaluate(*causal, batches_of(4))) == ["next_token"]
    values = [e.nats_per_token for e in estimates.values()]
    assert len({round(x, 4) for x in values}) == 3


def test_two_calls_see_the_same_masks(objective, params, estimates):
    assert evaluate(objective, params, batches_of(7)) == estimates
    other = evaluate(objective, params, batches_of(7), seed=1)
    assert all(other[name] != estimates[name] for name in estimates)


def test_two_checkpoints_and_both_passes_see_the_same_masks(objective, params):
    """With a flat head the estimate is a function of the masks alone."""
    one = evaluate(objective, flat(params), batches_of(8))
    two = evaluate(objective, flat(make_params(objective.denoiser, seed=5)), batches_of(8))
    assert one == two and one["one_pass"] == one["two_pass"]
    assert one["one_pass"].nats_interval > 0


def test_a_uniform_model_costs_log_v(objective, params, causal):
    """Exactly: every token of the causal model; of the diffusion model every masked token, times its weight 1/t."""
    model, uniform = causal
    got = evaluate(model, flat(uniform), batches_of(6))["next_token"]
    np.testing.assert_allclose(got.nats_per_token, np.log(V - 1), rtol=1e-6)  # the mask is never predicted
    np.testing.assert_allclose(got.nats_interval, 0, atol=1e-6)
    batch = batches_of(BATCH)[0]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0)
    weight = objective.corrupt(key, {k: jnp.asarray(v) for k, v in batch.items()}).weights.sum()
    got = evaluate(objective, flat(params), [batch])
    for name in ("one_pass", "two_pass"):
        np.testing.assert_allclose(got[name].nats_per_token, np.log(V - 1) * weight, rtol=1e-5)


def test_estimates_are_unbiased(objective, params):
    """With a flat head the NELBO is log(V - 1) times .999, which the intervals cover; the chain covers t evenly and
    varies less."""
    found = evaluate(objective, flat(params), batches_of(400), chain=8)
    for estimate in found.values():
        assert abs(estimate.nats_per_token - 0.999 * np.log(V - 1)) < 1.7 * estimate.nats_interval
    assert found["carried"].nats_interval < 0.7 * found["one_pass"].nats_interval


def test_one_and_two_passes_by_hand(objective, params):
    batch = batches_of(BATCH)[0]
    placed = {k: jnp.asarray(v) for k, v in batch.items()}
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 0), 0)  # seed, batch, draw
    example = objective.corrupt(key, placed)
    got = evaluate(objective, params, [batch], seed=3, chain=0)
    for name, coin in (("one_pass", False), ("two_pass", True)):
        # The training loss on these masks is already per token of the batch.
        wanted, _ = jax.jit(lambda p, c: objective(p, example, c, None))(params, coin)
        np.testing.assert_allclose(got[name].nats_per_token, wanted, rtol=1e-4)


def test_a_chain_of_one_is_one_pass(objective, params):
    """One canvas, nothing carried yet; with independent t the two draw the same noise."""
    independent = dataclasses.replace(objective, times=TimeSampler("iid"))
    got = evaluate(independent, params, batches_of(7), chain=1)
    for field in ("nats_per_token", "nats_interval", "bits_per_byte"):
        np.testing.assert_allclose(getattr(got["carried"], field), getattr(got["one_pass"], field), rtol=1e-4)


@dataclasses.dataclass(frozen=True)
class Recorded(Denoiser):
    """Reports each canvas and which positions remembered something."""

    calls: list = dataclasses.field(default_factory=list, hash=False, compare=False)

    def __call__(self, params, tokens, feedback=None, cond=None, *, dropout_key=None):
        active = jnp.zeros(tokens.shape, bool) if feedback is None else feedback.active
        jax.debug.callback(lambda *x: self.calls.append(x), tokens, active, ordered=True)
        return super().__call__(params, tokens, feedback, cond, dropout_key=dropout_key)


def test_carried_canvases_are_nested(objective, params):
    """Each unmasks part of the one before; what was masked there is remembered here; one t in each stratum."""
    recorded = Recorded(**vars(objective.denoiser))
    chain = 6
    batch = batches_of(BATCH)[0]
    watched = dataclasses.replace(objective, denoiser=recorded, times=TimeSampler(t_min=0.1, t_max=1.0))
    evaluate(watched, params, [batch], chain=chain)
    jax.effects_barrier()
    calls = recorded.calls[-chain:]
    assert len(calls) == chain and not np.any(calls[0][1])
    for (canvas, _), (after, active) in zip(calls[:-1], calls[1:], strict=True):
        masked, still = np.asarray(canvas) == MASK, np.asarray(after) == MASK
        np.testing.assert_array_equal(active, masked)
        assert not np.any(still & ~masked)
        np.testing.assert_array_equal(np.asarray(after)[~still], batch["tokens"][~still])
    counts = [np.sum(np.asarray(canvas) == MASK) for canvas, _ in calls]
    assert counts[0] > 0.7 * BATCH * L and counts[-1] < 0.4 * BATCH * L


def test_padding_does_not_change_the_numbers(objective, params, estimates):
    """Whatever the rows that are not valid hold, and whether they are there at all."""
    junk = batches_of(7)
    junk[-1]["tokens"][~junk[-1]["valid"]] = 5
    assert evaluate(objective, params, junk) == estimates
    cut = batches_of(7)
    cut[-1] = {"tokens": cut[-1]["tokens"][:3], "valid": np.ones(3, bool)}
    for name, estimate in evaluate(objective, params, cut).items():
        np.testing.assert_allclose(vars(estimate)["nats_per_token"], estimates[name].nats_per_token, rtol=1e-5)
    assert {e.blocks for e in estimates.values()} == {7} and {e.tokens for e in estimates.values()} == {7 * L}


def test_intervals_cover():
    """95 % of them hold the true ratio, for nats and bits, with blocks of unequal bytes; nine times the blocks narrow
    them to a third."""
    rng = np.random.default_rng(0)

    def draw(blocks):
        size = rng.integers(10, 30, blocks).astype(np.float64)
        nll = 2.0 * size + rng.gamma(2.0, 5.0, blocks)
        return _estimate(nll, size, np.full(blocks, 8.0), "")

    found = [draw(100) for _ in range(1000)]
    truth = {"nats": (2 * 19.5 + 10) / 8, "bits": (2 * 19.5 + 10) / 19.5 / np.log(2)}
    for value, interval, name in (
        ("nats_per_token", "nats_interval", "nats"),
        ("bits_per_byte", "bits_interval", "bits"),
    ):
        covered = np.mean([abs(getattr(e, value) - truth[name]) < getattr(e, interval) for e in found])
        assert 0.93 < covered < 0.97, (name, covered)
    narrow = np.mean([draw(900).nats_interval for _ in range(50)]) / np.mean([e.nats_interval for e in found])
    assert 0.32 < narrow < 0.35


def test_draws_are_averaged(objective, params):
    """Two draws are the mean of the two alone: those of the keys fold_in(key, 0) and fold_in(key, 1)."""
    batch = batches_of(BATCH)[0]
    placed = {k: jnp.asarray(v) for k, v in batch.items()}
    key = jax.random.fold_in(jax.random.key(0), 0)
    binary = dataclasses.replace(objective, p_sm=0.0)
    loss = jax.jit(lambda p, example: binary(p, example, False, None)[0])
    alone = [loss(params, objective.corrupt(jax.random.fold_in(key, d), placed)) for d in range(2)]
    got = evaluate(objective, params, [batch], draws=2, chain=0)["one_pass"]
    assert alone[0] != alone[1]
    np.testing.assert_allclose(got.nats_per_token, np.mean(alone), rtol=1e-5)


def test_more_draws_narrow_the_noise(objective, params):
    light = dataclasses.replace(objective, times=TimeSampler(t_min=0.3))  # weights up to 1000 would drown the effect
    few, many = (evaluate(light, flat(params), batches_of(40), draws=n, chain=0)["one_pass"] for n in (1, 9))
    assert many.nats_interval < 0.5 * few.nats_interval and many.tokens == few.tokens


def test_next_token_is_exact(causal):
    """No noise: the mean over all predicted tokens, the same for every seed; bytes of the predicted tokens only."""
    objective, params = causal
    batches = batches_of(6)
    got = evaluate(objective, params, batches)["next_token"]
    assert evaluate(objective, params, batches, seed=9)["next_token"] == got
    tokens = np.concatenate([b["tokens"][b["valid"]] for b in batches])
    denoiser = objective.denoiser
    log_probs = READOUT.log_probs(denoiser.head(params), jax.jit(denoiser)(params, tokens[:, :-1]))
    nll = -np.take_along_axis(np.asarray(log_probs, np.float64), tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(got.nats_per_token, nll.mean(), rtol=1e-5)
    np.testing.assert_allclose(got.perplexity, np.exp(nll.mean()), rtol=1e-4)
    size = TOKEN_BYTES[tokens[:, 1:]].sum()
    np.testing.assert_allclose(got.bits_per_byte, nll.sum() / np.log(2) / size, rtol=1e-5)
    assert got.tokens == 6 * (L - 1) and got.blocks == 6
    # The interval is that of a mean over blocks (all of one length).
    wanted = 1.96 * nll.mean(1).std(ddof=1) / np.sqrt(6)
    np.testing.assert_allclose(got.nats_interval, wanted, rtol=1e-4)


def test_one_block_is_enough_and_none_is_refused(objective, params, causal):
    assert evaluate(*causal, batches_of(1))["next_token"].blocks == 1
    with pytest.raises(ValueError, match="got no validation block"):
        evaluate(objective, params, [])


def test_omega_of_the_evaluation_is_labelled(objective, params):
    """'ema' takes the average as it is, 'live' the last omega beside the averaged backbone; one pass knows no omega."""
    last = {**make_params(objective.denoiser, seed=2), "softmask": {k: v + 1 for k, v in params["softmask"].items()}}
    assert weights(params, last, "ema") is params
    mixed = weights(params, last, "live")
    assert mixed["backbone"] is params["backbone"] and mixed["softmask"] is last["softmask"]
    ema, live = (evaluate(objective, weights(params, last, o), batches_of(7), omega=o) for o in ("ema", "live"))
    assert (ema["two_pass"].weights, live["two_pass"].weights) == ("EMA weights", "EMA weights, live omega")
    assert ema["one_pass"].nats_per_token == live["one_pass"].nats_per_token
    assert ema["two_pass"].nats_per_token != live["two_pass"].nats_per_token


def test_one_compilation_for_all_validations_of_a_run(objective, params):
    first, second = (_estimators(objective, 3) for _ in range(2))
    evaluate(objective, params, batches_of(7))
    sizes = {name: fn._cache_size() for name, fn in first.items()}
    evaluate(objective, params, batches_of(7), seed=4)
    assert {name: fn._cache_size() for name, fn in second.items()} == sizes


@pytest.mark.parametrize("wrong", [{"blocks": 0}, {"batch_size": 0}, {"draws": 0}, {"chain": -1}, {"omega": "raw"}])
def test_fields_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="got .*, wanted"):
        EvalConfig(**wrong)
