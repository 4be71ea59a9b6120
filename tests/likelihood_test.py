"""Validation likelihood: fixed masks, labels, intervals, and each estimate against the same number worked out by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MASK, READOUT, L, V, make_denoiser, make_params

import smdlm.evaluate.likelihood
from smdlm.denoiser import Denoiser
from smdlm.diffusion import TimeSampler
from smdlm.evaluate.likelihood import EvalConfig, _estimators, likelihood
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


def tame(objective):
    """Without the heavy tail of the weight 1/t, so that intervals themselves are not a matter of luck."""
    return dataclasses.replace(objective, times=TimeSampler(t_min=0.3, t_max=1.0))


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """`likelihood` compiles its estimators at each call; here equal objectives share theirs."""
    cached = functools.cache(lambda objective, chain: _estimators(objective, EvalConfig(chain=chain)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smdlm.evaluate.likelihood, "_estimators", lambda objective, c: cached(objective, c.chain))
        yield


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


def test_estimates_are_unbiased(objective, params):
    """With a flat head the NELBO is log(V - 1) times .999; the chain covers t evenly and varies less."""
    found = evaluate(objective, flat(params), batches_of(400), chain=8)
    for estimate in found.values():
        assert abs(estimate.nats_per_token - 0.999 * np.log(V - 1)) < 1.7 * estimate.nats_interval
    assert found["carried"].nats_interval < 0.7 * found["one_pass"].nats_interval


def test_one_and_two_passes_by_hand(objective, params):
    batch = batches_of(BATCH)[0]
    placed = {k: jnp.asarray(v) for k, v in batch.items()}
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 0), 0)  # seed, batch, draw
    example = objective.corrupt(key, placed)
    got = evaluate(objective, params, [batch], seed=3)
    for name, coin in (("one_pass", False), ("two_pass", True)):
        # The training loss on these masks is already per token of the batch.
        wanted, _ = jax.jit(lambda p, c: objective(p, example, c, None))(params, coin)
        np.testing.assert_allclose(got[name].nats_per_token, wanted, rtol=1e-4)


def test_chain_of_one_is_one_pass_by_hand(objective, params):
    """chain 1: t = t_min + (t_max - t_min) u, no feedback yet; the weighted NLL of that canvas."""
    batch = batches_of(BATCH)[0]
    got = evaluate(objective, params, [batch], chain=1)["carried"]
    key_t, key_mask = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0))
    t = 1e-3 + 0.999 * jax.random.uniform(key_t, (BATCH,))
    masked = jax.random.uniform(key_mask, (BATCH, L)) < 0.999 * t[:, None]
    canvas = jnp.where(masked, MASK, batch["tokens"])
    denoiser = objective.denoiser
    log_probs = READOUT.log_probs(denoiser.head(params), jax.jit(denoiser)(params, canvas))
    nll = -jnp.take_along_axis(log_probs, jnp.asarray(batch["tokens"])[..., None], -1)[..., 0]
    np.testing.assert_allclose(got.nats_per_token, jnp.sum(masked * nll / t[:, None]) / (BATCH * L), rtol=1e-4)


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


def test_interval_shrinks_with_blocks(objective, params):
    few = evaluate(tame(objective), params, batches_of(24))
    many = evaluate(tame(objective), params, batches_of(24 * 9))
    for name in few:
        assert 0.2 < many[name].nats_interval / few[name].nats_interval < 0.55  # 1/3 but for the luck of the draw
        assert few[name].nats_interval > 0 and few[name].bits_interval > 0


def test_more_draws_narrow_the_noise(objective, params):
    few, many = (evaluate(tame(objective), flat(params), batches_of(40), draws=n)["one_pass"] for n in (1, 9))
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


@pytest.mark.parametrize("wrong", [{"blocks": 0}, {"batch_size": 0}, {"draws": 0}, {"chain": -1}])
def test_fields_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="got .*, wanted"):
        EvalConfig(**wrong)
