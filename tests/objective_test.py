"""The two-pass loss against the same loss written densely, and what the coin may and may not do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    MASK,
    READOUT,
    SOFTMASK,
    B,
    L,
    V,
    assert_close,
    assert_identical,
    make_batch,
    make_denoiser,
    make_params,
)

from smdlm.denoiser import Denoiser
from smdlm.diffusion import LogLinear, TimeSampler
from smdlm.feedback.committed import Stages
from smdlm.feedback.gates import ConstantGate
from smdlm.full_softmask import FullSoftMask
from smdlm.objective import Example, NextToken, SoftMaskedDiffusion
from smdlm.softmask import Feedback, SoftMask, summarize

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def denoiser():
    return make_denoiser()


@pytest.fixture(scope="module")
def params(denoiser):
    return make_params(denoiser)


@pytest.fixture(scope="module")
def objective(denoiser):
    return SoftMaskedDiffusion(denoiser, READOUT, 0.8)


@pytest.fixture(scope="module")
def example(objective):
    return jax.jit(objective.corrupt)(KEY, make_batch())


@pytest.fixture(scope="module")
def loss_and_grads(objective):
    """jit (params, example, coin) -> ((loss, nll), gradients)."""
    fn = jax.value_and_grad(lambda p, e, coin: objective(p, e, coin, None), has_aux=True)
    return jax.jit(fn)


def dense_loss(denoiser, params, example, feedback=None):
    """Log-softmax over [B, L, V], gathered, weighted."""
    hidden = denoiser(params, example.canvas, feedback)
    log_probs = jax.nn.log_softmax(denoiser.head(params).logits(hidden))
    nll = -jnp.take_along_axis(log_probs, example.targets[..., None], -1)[..., 0]
    return jnp.sum(example.weights * nll)


dense_loss_and_grads = jax.jit(jax.value_and_grad(dense_loss, argnums=1), static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def dense_feedback(denoiser, params, example):
    """Pass one written out."""
    log_probs = jax.nn.log_softmax(denoiser.head(params).logits(denoiser(params, example.canvas)))
    return summarize(log_probs, example.canvas == MASK, 3)


# Corruption


def test_canvas_and_weights(objective):
    """Masked tokens weigh 1/t over the number of all valid tokens; nothing else weighs."""
    batch = make_batch(valid=[True, True, False, True])
    example = objective.corrupt(KEY, batch)
    masked = np.asarray(example.canvas == MASK)
    np.testing.assert_array_equal(example.targets, batch["tokens"])
    np.testing.assert_array_equal(np.asarray(example.canvas)[~masked], np.asarray(batch["tokens"])[~masked])
    t = objective.times(jax.random.split(KEY)[0], B)
    wanted = masked / np.asarray(t)[:, None] / (3 * L)
    wanted[2] = 0
    np.testing.assert_allclose(example.weights, wanted, rtol=1e-5)
    assert masked[2].any() and masked.any(1).all()


def test_token_validity_by_position(objective):
    valid = np.random.default_rng(0).random((B, L)) < 0.5
    example = objective.corrupt(KEY, {**make_batch(), "valid": jnp.asarray(valid)})
    t = objective.times(jax.random.split(KEY)[0], B)
    masked = np.asarray(example.canvas == MASK)
    np.testing.assert_allclose(example.weights, masked * valid / np.asarray(t)[:, None] / valid.sum(), rtol=1e-5)


def test_no_valid_row_is_no_loss(objective):
    example = objective.corrupt(KEY, make_batch(valid=[False] * B))
    assert not np.any(example.weights)


def test_weights_are_unbiased(objective):
    """The expected weight of a valid token is (1 - eps) / (all valid tokens), so the loss estimates nats/token."""
    fn = jax.jit(jax.vmap(lambda k: objective.corrupt(k, make_batch(batch=32)).weights.sum()))
    total = np.asarray(fn(jax.random.split(jax.random.key(1), 400)))
    np.testing.assert_allclose(total.mean(), 0.999, atol=5 * total.std() / 20)
    assert total.std() < 0.5


def test_frozen_positions_are_neither_masked_nor_counted(objective):
    frozen = jnp.broadcast_to(jnp.arange(L) < 3, (B, L))
    example = objective.corrupt(KEY, {**make_batch(), "frozen": frozen})
    assert not np.any(example.weights[:, :3]) and not np.any(example.canvas[:, :3] == MASK)
    np.testing.assert_array_equal(example.canvas[:, 3:], objective.corrupt(KEY, make_batch()).canvas[:, 3:])


def test_bounded_range_of_t(denoiser):
    objective = SoftMaskedDiffusion(denoiser, READOUT, 0.8, times=TimeSampler(t_min=0.4, t_max=0.5))
    weights = np.asarray(objective.corrupt(KEY, make_batch(32, 32)).weights) * 32 * 32
    assert np.all((weights == 0) | ((weights >= 2.0 - 1e-4) & (weights <= 2.5 + 1e-4)))
    np.testing.assert_allclose(np.mean(weights > 0), 0.45, atol=0.06)


# The loss


def test_without_soft_masking_it_is_the_mdlm_loss():
    denoiser = make_denoiser(None)
    params, objective = make_params(denoiser), SoftMaskedDiffusion(denoiser, READOUT, 0.0)
    example = objective.corrupt(KEY, make_batch(valid=[True, False, True, True]))
    loss, _ = jax.jit(objective)(params, example, jnp.bool_(False), None)
    np.testing.assert_allclose(loss, jax.jit(dense_loss, static_argnums=0)(denoiser, params, example), rtol=1e-4)


def test_two_passes_are_algorithm_1(denoiser, params, example, loss_and_grads):
    """Loss and gradients of pass two with pass one's feedback as a constant: nothing flows through pass one."""
    feedback = dense_feedback(denoiser, params, example)
    (loss, nll), grads = loss_and_grads(params, example, True)
    wanted = dense_loss_and_grads(denoiser, params, example, feedback)
    assert_close((loss, grads), wanted, rtol=1e-3, atol=3e-5)  # weights 1/t reach hundreds
    assert all(abs(float(g)) > 1e-6 for g in grads["softmask"].values())
    np.testing.assert_allclose(np.sum(nll * example.weights), loss, rtol=1e-5)


def test_without_the_coin_it_is_the_mdlm_loss(denoiser, params, example, loss_and_grads):
    """The loss of the binary embedding (nothing remembered), and omega gets exactly nothing."""
    (loss, _), grads = loss_and_grads(params, example, False)
    wanted = dense_loss_and_grads(denoiser, params, example, Feedback.none(B, L, 3))
    assert_close((loss, grads), wanted, rtol=1e-3, atol=3e-5)
    assert all(float(g) == 0 for g in grads["softmask"].values())
    (other, _), _ = loss_and_grads(params, example, True)
    assert abs(float(loss) - float(other)) > 1e-3  # the gate of these tests is open: feedback matters


def test_p_sm_one_needs_no_coin(denoiser, params, example, loss_and_grads):
    always = SoftMaskedDiffusion(denoiser, READOUT, 1.0)
    got = jax.jit(lambda p: always(p, example, jnp.bool_(False), None))(params)
    assert_close(got, loss_and_grads(params, example, True)[0], rtol=1e-5)


def test_a_constant_gate_of_zero_is_mdlm(params, example):
    denoiser = make_denoiser(SoftMask(gate=ConstantGate(0.0)))
    objective = SoftMaskedDiffusion(denoiser, READOUT, 1.0)
    shut = {**params, "softmask": {}}
    got = jax.jit(lambda p: objective(p, example, jnp.bool_(True), None)[0])(shut)
    np.testing.assert_allclose(got, dense_loss(denoiser, shut, example), rtol=1e-4)


def test_full_variant_learns_its_temperature(params, example):
    """The gradient reaches temperature, gate, table and backbone, but not pass one."""
    full = FullSoftMask(k=3, gate=SOFTMASK.gate, chunk=5)
    denoiser = make_denoiser(full)
    objective = SoftMaskedDiffusion(denoiser, READOUT, 0.8)
    params = {**params, "softmask": full.init()}

    feedback = full.attach(dense_feedback(denoiser, params, example), jax.jit(denoiser)(params, example.canvas))
    wanted = dense_loss_and_grads(denoiser, params, example, feedback)
    got = jax.jit(jax.value_and_grad(lambda p: objective(p, example, jnp.bool_(True), None)[0]))(params)
    assert_close(got, wanted, rtol=1e-3, atol=3e-4)  # of gradients up to 50
    assert abs(float(got[1]["softmask"]["raw_temperature"])) > 1e-5


def test_losses_of_parts_add_up(objective, params, example, loss_and_grads):
    part = lambda rows: jax.tree.map(lambda x: x[rows], example)
    whole = loss_and_grads(params, example, True)
    one, two = (loss_and_grads(params, part(rows), True) for rows in (slice(0, 2), slice(2, 4)))
    assert_close(whole[0][0], one[0][0] + two[0][0], rtol=1e-4)
    assert_close(whole[1], jax.tree.map(jnp.add, one[1], two[1]), rtol=1e-3, atol=3e-5)


def test_rows_that_are_not_valid_do_not_count(objective, params, loss_and_grads):
    """Whatever they hold."""
    valid = [True, True, False, True]
    batch = make_batch(valid=valid)
    other = {**batch, "tokens": batch["tokens"].at[2].set(5)}
    one, two = (loss_and_grads(params, objective.corrupt(KEY, x), True) for x in (batch, other))
    assert_identical((one[0][0], one[1]), (two[0][0], two[1]))


def test_both_passes_see_dropout(example):
    denoiser = make_denoiser(dropout=0.5)
    params, objective = make_params(denoiser), SoftMaskedDiffusion(denoiser, READOUT, 0.8)
    fn = jax.jit(lambda key, coin: objective(params, example, coin, key)[0])
    losses = [float(fn(jax.random.key(i), coin)) for i in (0, 1) for coin in (True, False)]
    assert len({round(x, 6) for x in losses}) == 4
    assert losses[0] == float(fn(jax.random.key(0), True))


@dataclasses.dataclass(frozen=True)
class Counted(Denoiser):
    """A denoiser that reports each forward that really runs, and whether it had feedback."""

    calls: list = dataclasses.field(default_factory=list, hash=False, compare=False)

    def __call__(self, params, tokens, feedback=None, **options):
        jax.debug.callback(lambda: self.calls.append(feedback is not None))
        return super().__call__(params, tokens, feedback, **options)


def test_the_coin_really_skips_pass_one(denoiser, params, example):
    counted = Counted(**vars(denoiser))
    objective = SoftMaskedDiffusion(counted, READOUT, 0.8)
    grad = jax.jit(jax.grad(lambda p, coin: objective(p, example, coin, None)[0]))
    for coin, forwards in ((True, [False, True]), (False, [True]), (True, [False, True])):
        counted.calls.clear()
        jax.block_until_ready(grad(params, coin))
        jax.effects_barrier()
        assert sorted(counted.calls) == forwards, coin


def test_impossible_combinations_are_refused(denoiser):
    for p_sm in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="p_sm: got .*, wanted"):
            SoftMaskedDiffusion(denoiser, READOUT, p_sm)
    with pytest.raises(ValueError, match="without soft-masking"):
        SoftMaskedDiffusion(make_denoiser(None), READOUT, 0.5)


# Other forms of training


def test_a_coin_for_each_example(denoiser, params):
    """Each example is that of a step with or without feedback; over many draws p_sm of them have it."""
    objective = SoftMaskedDiffusion(denoiser, READOUT, 0.5, coin="example")
    assert objective.p_step == 1 and SoftMaskedDiffusion(denoiser, READOUT, 0.5).p_step == 0.5
    corrupt = jax.jit(objective.corrupt)
    coins = np.concatenate([corrupt(jax.random.key(i), make_batch()).coins for i in range(100)])
    assert abs(coins.mean() - 0.5) < 0.1
    example = corrupt(KEY, make_batch())
    np.testing.assert_array_equal(
        example.canvas, SoftMaskedDiffusion(denoiser, READOUT, 0.5).corrupt(KEY, make_batch()).canvas
    )
    coins = jnp.arange(B) % 2 == 0
    _, nll = jax.jit(objective)(params, example.replace(coins=coins), jnp.bool_(False), None)
    _, with_feedback = jax.jit(objective)(params, example.replace(coins=None), jnp.bool_(True), None)
    _, without = jax.jit(dataclasses.replace(objective, p_sm=0.0))(params, example, jnp.bool_(False), None)
    wanted = np.where(coins[:, None], with_feedback, without)
    np.testing.assert_allclose(nll, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(with_feedback) - np.asarray(without)).max() > 1e-3


def test_a_gradient_through_pass_one(denoiser, params, example, loss_and_grads):
    """The loss is the same; the gradient is that of both passes, as autodiff finds it with dense logits."""
    through = SoftMaskedDiffusion(denoiser, READOUT, 1.0, through=True)
    (loss, _), grads = jax.jit(jax.value_and_grad(lambda p: through(p, example, True, None), has_aux=True))(params)
    (wanted_loss, _), stopped = loss_and_grads(params, example, True)
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)

    def dense(params):
        feedback = dense_feedback(denoiser, params, example)
        return dense_loss(denoiser, params, example, feedback)

    wanted = jax.jit(jax.grad(dense))(params)
    assert_close(grads, wanted, rtol=2e-3, atol=1e-4)
    kernel = lambda tree: np.asarray(tree["backbone"]["embed"])
    assert np.abs(kernel(grads) - kernel(stopped)).max() > 1e-3


def test_replaced_tokens_count_in_the_loss(denoiser):
    """Visible tokens become others at the given rate, never the mask; all visible ones weigh 1, prompts nothing."""
    noise = LogLinear(replace=0.25)
    objective, plain = (SoftMaskedDiffusion(denoiser, READOUT, 0.0, schedule=s) for s in (noise, LogLinear()))
    batch = {**make_batch(64, 32), "frozen": jnp.broadcast_to(jnp.arange(32) < 4, (64, 32))}
    example, before = (jax.jit(o.corrupt)(KEY, batch) for o in (objective, plain))
    masked, prompt = np.asarray(before.canvas == MASK), np.asarray(batch["frozen"])
    np.testing.assert_array_equal(example.canvas == MASK, masked)
    changed = np.asarray(example.canvas != batch["tokens"]) & ~masked
    visible = ~masked & ~prompt
    assert not changed[prompt].any() and abs(changed[visible].mean() - 0.25 * (V - 2) / (V - 1)) < 0.05
    assert len(np.unique(np.asarray(example.canvas)[changed])) == V - 1
    np.testing.assert_allclose(example.weights, before.weights + visible / (~prompt).sum(), rtol=1e-5)
    np.testing.assert_array_equal(example.targets, batch["tokens"])
    numbered = {**batch, "number": jnp.arange(64)}
    one, two = (o.corrupt_by_number(KEY, numbered) for o in (objective, plain))
    np.testing.assert_array_equal(one.canvas, two.canvas)  # the likelihood is that of masks alone


def test_an_operator_that_wants_everything_learns_from_visible_positions(params, example):
    """Pass one is read at every position but a prompt's."""
    denoiser = make_denoiser(Stages(gate=SOFTMASK.gate))
    objective = SoftMaskedDiffusion(denoiser, READOUT, 1.0)
    given = jnp.broadcast_to(jnp.arange(L) < 2, (B, L))
    loss = jax.jit(lambda e: objective(params, e, True, None)[0])
    log_probs = jax.nn.log_softmax(denoiser.head(params).logits(jax.jit(denoiser)(params, example.canvas)))
    feedback = summarize(log_probs, ~given, 3)
    wanted = jax.jit(dense_loss, static_argnums=0)(denoiser, params, example, feedback)
    np.testing.assert_allclose(loss(example.replace(given=given)), wanted, rtol=1e-4)
    assert abs(float(loss(example)) - float(wanted)) > 1e-3


# The AR baseline


@pytest.mark.parametrize("valid", [[True, True, False, True], "by position"])
def test_next_token_loss(valid):
    """Position i predicts i + 1; the first token is given; the mask id is never predicted."""
    denoiser = make_denoiser(None, causal=True)
    params, objective = make_params(denoiser), NextToken(denoiser, READOUT)
    batch = make_batch()
    if valid == "by position":
        valid = np.random.default_rng(0).random((B, L)) < 0.7
        counted = valid[:, 1:]
    else:
        counted = np.repeat(np.asarray(valid)[:, None], L - 1, 1)
    example = objective.corrupt(KEY, {**batch, "valid": jnp.asarray(valid)})
    loss, nll = jax.jit(lambda p: objective(p, example, jnp.bool_(False), None))(params)
    logits = np.array(denoiser.model.head(params["backbone"]).logits(jax.jit(denoiser)(params, batch["tokens"])))
    logits = logits[:, :-1, : V - 1].astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = -np.take_along_axis(log_probs, np.asarray(batch["tokens"])[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(loss, (wanted * counted).sum() / counted.sum(), rtol=1e-4)
    np.testing.assert_allclose(nll, np.where(counted, wanted, 0), rtol=1e-3, atol=1e-4)


def test_example_shapes_must_agree(objective, params, example):
    with pytest.raises(AssertionError):
        objective(params, Example(example.canvas, example.targets, example.weights[:, 1:]), jnp.bool_(True), None)
