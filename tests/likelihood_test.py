"""Validation likelihood: fixed masks, labels, intervals, each estimate against the same number worked out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MASK, READOUT, SOFTMASK, L, V, make_denoiser, make_params

from smdlm.denoiser import Denoiser
from smdlm.diffusion import TimeSampler
from smdlm.evaluate.base import Subject, Value, ratio, weights
from smdlm.evaluate.likelihood import Likelihood, _estimators, along_chain
from smdlm.evaluate.steps import DecodingSteps
from smdlm.feedback.committed import Stages
from smdlm.io.report import values_table
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


def run(objective, params, batches, **config):
    """The values of `Likelihood`."""
    subject = Subject(objective, params, TOKEN_BYTES, lambda blocks, size: batches)
    return Likelihood(**{"chain": 3, **config}).run(subject)


def nats(objective, params, batches, **config):
    """{estimate: nats per token}."""
    values = run(objective, params, batches, **config)
    return {n.removeprefix(NATS): value for n, value in values.items() if n.startswith(NATS)}


NATS = "nats_per_token_"


@pytest.fixture(scope="module")
def values(objective, params):
    return run(objective, params, batches_of(7))


def test_names_units_and_labels(objective, params, causal, values):
    assert list(nats(objective, params, batches_of(4))) == ["one_pass", "two_pass", "carried"]
    assert list(nats(objective, params, batches_of(4), chain=0)) == ["one_pass", "two_pass"]
    binary = SoftMaskedDiffusion(make_denoiser(None), READOUT, 0.0)
    assert list(nats(binary, {**params, "softmask": {}}, batches_of(4))) == ["one_pass"]
    assert list(nats(*causal, batches_of(4))) == ["next_token"]
    assert len({round(values[NATS + name].mean, 4) for name in ("one_pass", "two_pass", "carried")}) == 3
    units = {"nats_per_token": "nats/token", "bits_per_byte": "bits/byte", "perplexity": "perplexity"}
    for name, value in values.items():
        assert value.unit == next(unit for key, unit in units.items() if key in name)
    assert len({values[f"{unit}_two_pass"].label for unit in units}) == 1  # one row of the table
    assert len({value.label for value in values.values()}) == 4


def test_two_calls_see_the_same_masks(objective, params, values):
    assert run(objective, params, batches_of(7)) == values
    other = run(objective, params, batches_of(7), seed=1)
    assert all(other[name] != values[name] for name in values)


def test_two_checkpoints_and_both_passes_see_the_same_masks(objective, params):
    """With a flat head the estimate is a function of the masks alone."""
    one = run(objective, flat(params), batches_of(8))
    assert one == run(objective, flat(make_params(objective.denoiser, seed=5)), batches_of(8))
    assert one[NATS + "one_pass"].mean == one[NATS + "two_pass"].mean and one[NATS + "one_pass"].interval > 0
    assert one["gain_nats_per_token"].mean == one["gain_nats_per_token"].interval == 0


def rebatched(count, size):
    """The blocks of batches_of(count) in batches of another size, the last one padded with other junk."""
    batches = batches_of(count)
    tokens = np.concatenate([batch["tokens"][batch["valid"]] for batch in batches])
    tokens = np.pad(tokens, ((0, -count % size), (0, 0)), constant_values=7)
    valid = np.arange(len(tokens)) < count
    return [{"tokens": tokens[i : i + size], "valid": valid[i : i + size]} for i in range(0, len(tokens), size)]


@pytest.mark.parametrize("size", [3, 16])
def test_the_batch_size_changes_nothing(objective, params, values, size):
    """Noise belongs to the block: t, masks and chain of block i are functions of (seed, draw, i)."""
    for name, value in run(objective, params, rebatched(7, size)).items():
        np.testing.assert_allclose(value.mean, values[name].mean, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_block_alone_is_that_block_among_others(objective, params):
    """Its likelihood in the first place of the split, whatever follows."""
    subject = lambda batches: Subject(objective, params, TOKEN_BYTES, lambda blocks, size: batches)
    few, _, _ = Likelihood(chain=3).blockwise(subject(rebatched(1, 1)))
    many, _, _ = Likelihood(chain=3).blockwise(subject(batches_of(7)))
    for name, nll in few.items():
        np.testing.assert_allclose(nll[0], many[name][0], rtol=1e-5)


def test_what_feedback_gains_is_paired(objective, params):
    """The difference of the two likelihoods, with the interval of the differences of the blocks."""
    subject = Subject(objective, params, TOKEN_BYTES, lambda blocks, size: batches_of(7))
    metric = Likelihood(chain=0)
    nll, sizes, lengths = metric.blockwise(subject)
    values = metric.run(subject)
    difference = nll["one_pass"] - nll["two_pass"]
    gain = values["gain_nats_per_token"]
    np.testing.assert_allclose(gain.mean, values[NATS + "one_pass"].mean - values[NATS + "two_pass"].mean, rtol=1e-9)
    np.testing.assert_allclose(gain.interval, 1.96 * difference.std(ddof=1) / L / np.sqrt(7), rtol=1e-9)
    assert values["gain_bits_per_byte"].mean == pytest.approx(difference.sum() / sizes.sum() / np.log(2))
    # The pairs share their masks: their difference is far better known than each of the two.
    assert gain.interval < 0.5 * values[NATS + "two_pass"].interval


def test_a_uniform_model_costs_log_v(objective, params, causal):
    """Exactly: every token of the causal model; of the diffusion model every masked token, times its weight 1/t."""
    model, uniform = causal
    got = nats(model, flat(uniform), batches_of(6))["next_token"]
    np.testing.assert_allclose(got.mean, np.log(V - 1), rtol=1e-6)  # the mask is never predicted
    np.testing.assert_allclose(got.interval, 0, atol=1e-6)
    batch = batches_of(BATCH)[0]
    weight = objective.corrupt_by_number(draw_key(0, 0), numbered(batch)).weights.sum()
    got = nats(objective, flat(params), [batch])
    for name in ("one_pass", "two_pass"):
        np.testing.assert_allclose(got[name].mean, np.log(V - 1) * weight, rtol=1e-5)


def draw_key(seed, draw):
    return jax.random.fold_in(jax.random.key(seed), draw)


def numbered(batch):
    return {key: jnp.asarray(value) for key, value in {**batch, "number": np.arange(len(batch["tokens"]))}.items()}


def test_estimates_are_unbiased(objective, params):
    """With a flat head the NELBO is log(V - 1) times .999, which the intervals cover; the chain covers t evenly and
    varies less."""
    found = nats(objective, flat(params), batches_of(400), chain=8)
    for value in found.values():
        assert abs(value.mean - 0.999 * np.log(V - 1)) < 1.7 * value.interval
    assert found["carried"].interval < 0.7 * found["one_pass"].interval


def test_one_and_two_passes_by_hand(objective, params):
    batch = batches_of(BATCH)[0]
    example = objective.corrupt_by_number(draw_key(3, 0), numbered(batch))
    got = nats(objective, params, [batch], seed=3, chain=0)
    for name, coin in (("one_pass", False), ("two_pass", True)):
        # The training loss on these masks is already per token of the batch.
        wanted, _ = jax.jit(lambda p, c: objective(p, example, c, None))(params, coin)
        np.testing.assert_allclose(got[name].mean, wanted, rtol=1e-4)


def test_a_chain_of_one_sees_the_whole_range_of_t(objective, params):
    """One canvas, nothing carried yet: another estimate of one pass, with independent t."""
    got = nats(objective, flat(params), batches_of(400), chain=1)
    assert abs(got["carried"].mean - 0.999 * np.log(V - 1)) < 1.7 * got["carried"].interval


@dataclasses.dataclass(frozen=True)
class Recorded(Denoiser):
    """Reports each canvas and which positions remembered something."""

    calls: list = dataclasses.field(default_factory=list, hash=False, compare=False)

    def __call__(self, params, tokens, feedback=None, **options):
        active = jnp.zeros(tokens.shape, bool) if feedback is None else feedback.active
        jax.debug.callback(lambda *x: self.calls.append(x), tokens, active, ordered=True)
        return super().__call__(params, tokens, feedback, **options)


GIVEN = np.arange(L) < 3


class Told(Stages):
    """Has what is given told by the test."""

    def remembering(self, masked, given):
        return jnp.broadcast_to(~GIVEN, masked.shape)


class Forgetting(Stages):
    """Lets prompts remember."""

    def remembering(self, masked, given):
        return jnp.ones_like(masked)


def test_a_prompt_never_remembers_in_the_carried_bound(params):
    (batch,) = batches_of(4)
    batch = {**batch, "frozen": np.broadcast_to(GIVEN, (4, L))}

    def carried(operator):
        objective = SoftMaskedDiffusion(make_denoiser(operator(gate=SOFTMASK.gate)), READOUT, 0.8)
        return nats(objective, params, [batch])["carried"].mean

    assert carried(Stages) == carried(Told) != carried(Forgetting)


def test_carried_canvases_are_nested(objective, params):
    """Each unmasks part of the one before; what was masked there is remembered here; one t in each stratum."""
    recorded = Recorded(**vars(objective.denoiser))
    chain = 6
    batch = batches_of(BATCH)[0]
    watched = dataclasses.replace(objective, denoiser=recorded, times=TimeSampler(t_min=0.1, t_max=1.0))
    run(watched, params, [batch], chain=chain)
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


def steps_of(objective, params, batches, **fields):
    return DecodingSteps(**{"chain": 3, **fields}).run(Subject(objective, params, TOKEN_BYTES, lambda *_: batches))


def test_steps_of_decoding_are_those_of_the_carried_bound(objective, params):
    """Their weighted mean is that bound; without feedback they are what a model without soft-masking costs."""
    (batch,) = batches_of(BATCH)
    always = dataclasses.replace(objective, p_sm=1.0)
    found = steps_of(always, params, [batch])
    assert list(found) == [f"step_{i}_{name}" for i in (1, 2, 3) for name in ("nats", "gain")]
    t, nll, masked = along_chain(always, 3, True, params, draw_key(0, 0), numbered(batch))
    for i in range(3):
        assert found[f"step_{i + 1}_nats"].mean == pytest.approx(float(nll[i].sum() / masked[i].sum()), rel=1e-5)
    carried = nats(objective, params, [batch])["carried"].mean
    np.testing.assert_allclose(jnp.sum(nll / t) / 3 / (BATCH * L), carried, rtol=1e-5)
    assert np.all(np.diff(t, axis=0) < 0) and np.all(np.diff(masked, axis=0) <= 0)

    plain = SoftMaskedDiffusion(make_denoiser(None), READOUT, 0.0)
    alone = steps_of(plain, {**params, "softmask": {}}, [batch])
    assert list(alone) == ["step_1_nats", "step_2_nats", "step_3_nats"]
    assert found["step_1_gain"].mean == found["step_1_gain"].interval == 0  # nothing is remembered yet
    for i in (2, 3):
        gain = alone[f"step_{i}_nats"].mean - found[f"step_{i}_nats"].mean
        assert found[f"step_{i}_gain"].mean == pytest.approx(gain, abs=1e-5) != 0


def test_steps_of_decoding_need_a_chain_and_a_diffusion_model(objective, params, causal):
    for model, fields in (((objective, params), {"chain": 0}), (causal, {})):
        with pytest.raises(ValueError, match="got decoding_steps with eval.chain="):
            steps_of(*model, batches_of(4), **fields)


def test_intervals_cover():
    """95 % of them hold the true ratio, for nats and bits, with blocks of unequal bytes; nine times the blocks narrow
    them to a third."""
    rng = np.random.default_rng(0)

    def draw(blocks):
        size = rng.integers(10, 30, blocks).astype(np.float64)
        nll = 2.0 * size + rng.gamma(2.0, 5.0, blocks)
        return {"nats": ratio(nll, np.full(blocks, 8.0)), "bits": ratio(nll, size * np.log(2))}

    found = [draw(100) for _ in range(1000)]
    truth = {"nats": (2 * 19.5 + 10) / 8, "bits": (2 * 19.5 + 10) / 19.5 / np.log(2)}
    for name, wanted in truth.items():
        covered = np.mean([abs(one[name][0] - wanted) < one[name][1] for one in found])
        assert 0.93 < covered < 0.97, (name, covered)
    width = lambda blocks: np.mean([one["nats"][1] for one in blocks])
    assert 0.32 < width([draw(900) for _ in range(50)]) / width(found) < 0.35


def test_draws_are_averaged(objective, params):
    """Two draws are the mean of the two alone: those of the keys fold_in(key, 0) and fold_in(key, 1)."""
    batch = batches_of(BATCH)[0]
    binary = dataclasses.replace(objective, p_sm=0.0)
    loss = jax.jit(lambda p, example: binary(p, example, False, None)[0])
    alone = [loss(params, objective.corrupt_by_number(draw_key(0, d), numbered(batch))) for d in range(2)]
    got = nats(objective, params, [batch], draws=2, chain=0)["one_pass"]
    assert alone[0] != alone[1]
    np.testing.assert_allclose(got.mean, np.mean(alone), rtol=1e-5)


def test_more_draws_narrow_the_noise(objective, params):
    light = dataclasses.replace(objective, times=TimeSampler(t_min=0.3))  # weights up to 1000 would drown the effect
    few, many = (nats(light, flat(params), batches_of(40), draws=n, chain=0)["one_pass"] for n in (1, 9))
    assert many.interval < 0.5 * few.interval


def test_next_token_is_exact(causal):
    """No noise: the mean over all predicted tokens, the same for every seed; bytes of the predicted tokens only."""
    objective, params = causal
    batches = batches_of(6)
    got = run(objective, params, batches)
    assert run(objective, params, batches, seed=9) == got
    tokens = np.concatenate([b["tokens"][b["valid"]] for b in batches])
    denoiser = objective.denoiser
    log_probs = READOUT.log_probs(denoiser.head(params), jax.jit(denoiser)(params, tokens[:, :-1]))
    nll = -np.take_along_axis(np.asarray(log_probs, np.float64), tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(got[NATS + "next_token"].mean, nll.mean(), rtol=1e-5)
    np.testing.assert_allclose(got["perplexity_next_token"].mean, np.exp(nll.mean()), rtol=1e-4)
    size = TOKEN_BYTES[tokens[:, 1:]].sum()
    np.testing.assert_allclose(got["bits_per_byte_next_token"].mean, nll.sum() / np.log(2) / size, rtol=1e-5)
    # The interval is that of a mean over blocks (all of one length).
    wanted = 1.96 * nll.mean(1).std(ddof=1) / np.sqrt(6)
    np.testing.assert_allclose(got[NATS + "next_token"].interval, wanted, rtol=1e-4)


def test_one_block_is_enough_and_none_is_refused(objective, params, causal):
    assert np.isfinite(nats(*causal, batches_of(1))["next_token"].mean)
    with pytest.raises(ValueError, match="got no validation block"):
        run(objective, params, [])


def test_the_omega_of_an_evaluation(objective, params):
    """'ema' takes the average as it is, 'live' the last omega beside the averaged backbone; one pass knows no omega."""
    last = {**make_params(objective.denoiser, seed=2), "softmask": {k: v + 1 for k, v in params["softmask"].items()}}
    assert weights(params, last, "ema") is params
    mixed = weights(params, last, "live")
    assert mixed["backbone"] is params["backbone"] and mixed["softmask"] is last["softmask"]
    ema, live = (nats(objective, weights(params, last, omega), batches_of(7)) for omega in ("ema", "live"))
    assert ema["one_pass"] == live["one_pass"] and ema["two_pass"] != live["two_pass"]


def test_one_compilation_for_all_validations_of_a_run(objective, params):
    first, second = (_estimators(objective, 3) for _ in range(2))
    run(objective, params, batches_of(7))
    sizes = {name: fn._cache_size() for name, fn in first.items()}
    run(objective, params, batches_of(7), seed=4)
    assert {name: fn._cache_size() for name, fn in second.items()} == sizes


@pytest.mark.parametrize("wrong", [{"blocks": 0}, {"batch_size": 0}, {"draws": 0}, {"chain": -1}])
def test_fields_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="got .*, wanted"):
        Likelihood(**wrong)


def test_the_table_has_labels_down_and_units_across():
    values = {
        "a": Value(1.5, 0.25, "bits/byte", "one pass"),
        "b": Value(1.25, None, "perplexity", "one pass"),
        "c": Value(-0.5, 0.125, "bits/byte", "gain"),
    }
    head, one, gain = (line.split() for line in values_table(values).splitlines())
    assert head == ["validation", "bits/byte", "perplexity"]
    assert one == ["one", "pass", "1.5000", "±", "0.2500", "1.2500"] and gain == ["gain", "-0.5000", "±", "0.1250"]


def test_columns_keep_apart_however_large_a_value_is():
    values = {"a": Value(1e9, 1e8, "bits/byte", "one"), "b": Value(1e9, 1e8, "perplexity", "one")}
    head, one = values_table(values).splitlines()
    assert "  1000000000.0000 ± 100000000.0000  1000000000.0000 ± 100000000.0000" in one and len(head) == len(one)
