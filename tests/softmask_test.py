"""The soft-mask operator against its equations written out in NumPy, and the limits in which it must vanish."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MASK, B, L, V, assert_close

from smdlm.feedback.gates import ConstantGate, EntropyGate, Prediction
from smdlm.feedback.mixers import Lerp, NormLerp, Slerp
from smdlm.full_softmask import FullSoftMask
from smdlm.models.base import Head
from smdlm.ops.vocab import neg_entropy, top_k
from smdlm.readout import exclude
from smdlm.softmask import Feedback, SoftMask, summarize

D = 6
GATE = EntropyGate(scale=0.7, centre=-1.5, steepness=2.0)
MIXERS = [Lerp(), NormLerp(), Slerp()]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def scene():
    """Table, head, canvas with masks and other tokens, hidden states, and the dense log-probabilities."""
    head = exclude(Head(normal(1, D, V), normal(2, V)), V, MASK)
    hidden = normal(3, B, L, D)
    tokens = jax.random.randint(jax.random.key(4), (B, L), 0, MASK)
    tokens = jnp.where(normal(5, B, L) > 0, MASK, tokens)
    log_probs = jax.nn.log_softmax(head.logits(hidden))
    return normal(6, V, D), head, tokens, hidden, log_probs


# Top-k


@pytest.mark.parametrize("vocab, k", [(10, 3), (768, 3), (769, 3), (1000, 3), (5000, 1), (5003, 4), (2500, 9)])
def test_top_k_is_lax_top_k(vocab, k):
    x = np.random.default_rng(vocab + k).normal(size=(5, 3, vocab)).astype(np.float32)
    x[1] = np.round(x[1])  # ties
    x[2] = 1.5
    x[3] = np.sort(x[3])
    x[4, :, k - 1 :] = -1e30  # fewer possible ids than k: SUBS and padding
    values, ids = jax.jit(top_k, static_argnums=1)(x, k)
    wanted_values, wanted_ids = jax.lax.top_k(x, k)
    np.testing.assert_array_equal(values, wanted_values)
    np.testing.assert_array_equal(ids, wanted_ids)


def test_top_k_in_small_blocks():
    x = np.round(np.random.default_rng(0).normal(size=(50, 70)) * 2).astype(np.float32)
    for got, wanted in zip(top_k(x, 3, block=8), jax.lax.top_k(x, 3), strict=True):
        np.testing.assert_array_equal(got, wanted)


# Entropy


def test_neg_entropy_in_nats():
    log_probs = jax.nn.log_softmax(normal(0, 5, V))
    p = np.exp(np.asarray(log_probs, np.float64))
    np.testing.assert_allclose(neg_entropy(log_probs), (p * np.log(p)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(neg_entropy(jnp.full(V, -jnp.log(V))), -np.log(V), rtol=1e-6)
    one_hot = jnp.where(jnp.arange(V) == 3, 0.0, -jnp.inf)
    assert neg_entropy(one_hot) == 0


@pytest.mark.parametrize("logits", [np.zeros(V), np.eye(V)[3] * 1e4, np.where(np.arange(V) > 4, -1e30, 0.0)])
def test_neg_entropy_gradient_is_finite(logits):
    grad = jax.grad(lambda x: neg_entropy(jax.nn.log_softmax(x)))(jnp.asarray(logits, jnp.float32))
    assert np.isfinite(grad).all()


# Gates


def test_entropy_gate_is_the_papers_formula():
    omega = GATE.init()
    h = np.linspace(0, 4, 30)
    wanted = 0.7 / (1 + np.exp(-2.0 * (-h + 1.5)))
    np.testing.assert_allclose(GATE(omega, Prediction(-h)), wanted, rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 0.3, 1.0])
@pytest.mark.parametrize("centre, steepness", [(-0.75, 6.66), (-2.0, 2.0), (-1e-3, 0.01)])
def test_entropy_gate_starts_where_it_is_told(scale, centre, steepness):
    gate = EntropyGate(scale, centre, steepness)
    values = {name: float(x) for name, x in gate.values(gate.init()).items()}
    # The reference's logit(eps=1e-6) keeps the scale off 0 and 1.
    np.testing.assert_allclose(values["omega_s"], min(max(scale, 1e-6), 1 - 1e-6), rtol=1e-3)
    np.testing.assert_allclose([values["omega_b"], values["omega_a"]], [centre, steepness], rtol=1e-3, atol=2e-6)
    assert all(x.dtype == jnp.float32 and x.shape == () for x in gate.init().values())


def test_entropy_gate_stays_in_its_range():
    """Whatever the optimizer makes of the raw values: scale in (0, 1), centre < 0, steepness > 0."""
    for raw in (-30.0, -5.0, 0.0, 5.0, 30.0):
        omega = {name: jnp.float32(raw) for name in GATE.init()}
        values = GATE.values(omega)
        assert 0 <= values["omega_s"] <= 1 and values["omega_b"] < 0 and values["omega_a"] > 0
        lam = GATE(omega, Prediction(jnp.linspace(-11, 0, 50)))
        assert np.all((lam >= 0) & (lam <= 1)) and np.all(np.diff(lam) >= 0)


def test_gate_defaults_are_the_papers():
    gate = EntropyGate()
    assert (gate.scale, gate.centre, gate.steepness) == (1e-6, -0.75, 6.66)
    np.testing.assert_allclose(gate.init()["raw_scale"], -13.8155, rtol=1e-5)


def test_constant_gate():
    gate = ConstantGate(0.3)
    lam = gate(gate.init(), Prediction(jnp.array([[-5.0, 0.0]])))
    np.testing.assert_array_equal(lam, np.full((1, 2), 0.3, np.float32))
    assert gate.init() == {} and float(gate.values({})["omega_s"]) == np.float32(0.3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: EntropyGate(scale=-0.1),
        lambda: EntropyGate(scale=1.1),
        lambda: EntropyGate(scale=float("nan")),
        lambda: EntropyGate(centre=0.0),
        lambda: EntropyGate(steepness=0.0),
        lambda: ConstantGate(scale=2.0),
        lambda: SoftMask(k=0),
        lambda: FullSoftMask(temperature=0.0),
    ],
)
def test_values_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="got .*, wanted"):
        make()


# Mixers


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def angle(a, b):
    return np.arccos(np.clip((unit(a) * unit(b)).sum(-1), -1, 1))


@pytest.mark.parametrize("mixer", MIXERS)
def test_mixer_endpoints(mixer):
    mask, candidate = normal(0, D), 3 * normal(1, 2, 5, D)
    assert_close(mixer(mask, candidate, jnp.zeros((2, 5, 1))), jnp.broadcast_to(mask, (2, 5, D)), atol=1e-5)
    assert_close(mixer(mask, candidate, jnp.ones((2, 5, 1))), candidate, atol=1e-5)


@pytest.mark.parametrize("mixer", [NormLerp(), Slerp()])
def test_norm_is_interpolated(mixer):
    mask, candidate = normal(0, D), 3 * normal(1, 2, 5, D)
    lam = jax.random.uniform(jax.random.key(2), (2, 5, 1))
    mixed = mixer(mask, candidate, lam)
    norms = [np.linalg.norm(x, axis=-1) for x in (mask, candidate, mixed)]
    np.testing.assert_allclose(norms[2], (1 - lam[..., 0]) * norms[0] + lam[..., 0] * norms[1], rtol=1e-5)
    assert np.all(np.linalg.norm(Lerp()(mask, candidate, lam), axis=-1) < norms[2])  # what plain lerp loses


def test_norm_lerp_keeps_the_direction_of_lerp():
    mask, candidate, lam = normal(0, D), normal(1, 2, 5, D), jnp.full((2, 5, 1), 0.3)
    np.testing.assert_allclose(unit(NormLerp()(mask, candidate, lam)), unit(Lerp()(mask, candidate, lam)), atol=1e-5)


def test_slerp_turns_at_constant_speed():
    mask, candidate = np.asarray(normal(0, D)), np.asarray(normal(1, 1, 5, D))
    whole = angle(mask, candidate)
    for share in (0.1, 0.5, 0.9):
        mixed = np.asarray(Slerp()(mask, candidate, jnp.full((1, 5, 1), share)))
        np.testing.assert_allclose(angle(mask, mixed), share * whole, rtol=1e-3)
        np.testing.assert_allclose(angle(mixed, candidate), (1 - share) * whole, rtol=1e-3)


@pytest.mark.parametrize("mixer", MIXERS)
def test_mixer_gradients_are_finite(mixer):
    """General position, equal, parallel, opposite, zero candidate, and both zero, at the ends of lam and between."""
    mask = normal(0, D)
    masks = [mask, mask, mask, mask, mask, 0 * mask]
    candidates = [normal(1, D), mask, 2 * mask, -mask, 0 * mask, 0 * mask]
    weighted = lambda m, c, lam: jnp.sum(mixer(m, c[None, None], lam[None, None, None]) * normal(2, D))
    gradients = jax.jit(jax.vmap(jax.grad(weighted, argnums=(0, 1, 2))))
    for lam in (0.0, 0.5, 1.0):
        for g in gradients(jnp.stack(masks), jnp.stack(candidates), jnp.full(6, lam)):
            assert np.isfinite(g).all()


# The operator


def test_soft_mask_is_the_papers_equation(scene):
    """x = (1 - lam) [MASK] + lam sum pi_i v_i over the top k, position by position in float64."""
    table, head, tokens, _, log_probs = scene
    softmask = SoftMask(k=3, gate=GATE)
    got = softmask(softmask.init(), table, head, tokens, summarize(log_probs, tokens == MASK, 3), MASK)
    rows, p = np.asarray(table, np.float64), np.exp(np.asarray(log_probs, np.float64))
    for b in range(B):
        for i in range(L):
            wanted = rows[tokens[b, i]]
            if tokens[b, i] == MASK:
                best = np.argsort(-p[b, i])[:3]
                pi = p[b, i, best] / p[b, i, best].sum()
                entropy = -sum(x * np.log(x) for x in p[b, i] if x > 0)
                lam = 0.7 / (1 + np.exp(-2.0 * (-entropy + 1.5)))
                assert lam > 0.01
                wanted = (1 - lam) * rows[MASK] + lam * pi @ rows[best]
            np.testing.assert_allclose(got[b, i], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_only_active_masks_change(scene, mixer):
    """Known tokens keep their row bit for bit even if feedback is marked active there; so do inactive masks."""
    table, head, tokens, _, log_probs = scene
    softmask = SoftMask(gate=GATE, mixer=mixer)
    active = jax.random.bernoulli(jax.random.key(9), 0.6, (B, L))
    got = softmask(softmask.init(), table, head, tokens, summarize(log_probs, active, 3), MASK)
    soft = np.asarray(active & (tokens == MASK))
    assert 3 < soft.sum() < B * L - 3
    np.testing.assert_array_equal(np.asarray(got)[~soft], np.asarray(table[tokens])[~soft])
    assert np.all(np.abs(np.asarray(got)[soft] - np.asarray(table[tokens])[soft]).max(-1) > 1e-3)


def test_no_feedback_is_the_table(scene):
    table, head, tokens, _, _ = scene
    softmask = SoftMask(gate=GATE)
    got = softmask(softmask.init(), table, head, tokens, Feedback.none(B, L, 3), MASK)
    np.testing.assert_array_equal(got, table[tokens])


@pytest.mark.parametrize("mixer", MIXERS)
def test_scale_to_zero_is_the_binary_mask(scene, mixer):
    table, head, tokens, _, log_probs = scene
    feedback = summarize(log_probs, tokens == MASK, 3)
    softmask = SoftMask(gate=EntropyGate(scale=0.0), mixer=mixer)  # 1e-6 in truth
    np.testing.assert_allclose(
        softmask(softmask.init(), table, head, tokens, feedback, MASK), table[tokens], rtol=1e-4, atol=2e-5
    )
    if isinstance(mixer, Lerp):
        softmask = SoftMask(gate=ConstantGate(0.0), mixer=mixer)
        np.testing.assert_array_equal(softmask(softmask.init(), table, head, tokens, feedback, MASK), table[tokens])


def test_lambda_one_and_k_one_is_the_best_token(scene):
    table, head, tokens, _, log_probs = scene
    softmask = SoftMask(k=1, gate=ConstantGate(1.0))
    got = softmask(softmask.init(), table, head, tokens, summarize(log_probs, tokens == MASK, 1), MASK)
    np.testing.assert_allclose(got, table[jnp.where(tokens == MASK, log_probs.argmax(-1), tokens)], rtol=1e-6)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("kind", ["one_hot", "uniform", "inactive"])
def test_gradients_are_finite_at_extreme_distributions(scene, mixer, kind):
    """One-hot: entropy 0 and probabilities 0; uniform: ties everywhere; inactive: all statistics 0."""
    table, head, _, _, _ = scene
    tokens = jnp.full((1, 2), MASK)
    logits = jnp.zeros((1, 2, V)) if kind == "uniform" else jnp.eye(V)[None, :2] * 1e4
    logits = logits.at[..., MASK].set(-1e30)
    feedback = summarize(jax.nn.log_softmax(logits), jnp.ones((1, 2), bool), 3)
    feedback = Feedback.none(1, 2, 3) if kind == "inactive" else feedback
    softmask = SoftMask(gate=GATE, mixer=mixer)

    @jax.jit
    @jax.grad
    def gradient(inputs):
        return jnp.sum(softmask(inputs["omega"], inputs["table"], head, tokens, feedback, MASK) * normal(7, D))

    grads = gradient({"omega": softmask.init(), "table": table})
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    if kind == "inactive":
        assert all(float(g) == 0 for g in grads["omega"].values())
    elif kind == "one_hot":
        assert all(float(g) != 0 for g in grads["omega"].values())


# The full-distribution variant


def full_feedback(softmask, scene):
    _, _, tokens, hidden, log_probs = scene
    return softmask.attach(summarize(log_probs, tokens == MASK, 3), hidden)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("chunk", [1, 7, 32, 1000])
def test_k_equal_to_the_vocabulary_is_the_full_distribution(scene, mixer, chunk):
    table, head, tokens, _, log_probs = scene
    dense = SoftMask(k=V, gate=GATE, mixer=mixer)
    wanted = dense(dense.init(), table, head, tokens, summarize(log_probs, tokens == MASK, V), MASK)
    full = FullSoftMask(gate=GATE, mixer=mixer, chunk=chunk)
    got = full(full.init(), table, head, tokens, full_feedback(full, scene), MASK)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_full_variant_uses_its_temperature(scene):
    """Candidate and entropy both at temperature T; T -> 0 takes the best token."""
    table, head, tokens, _, log_probs = scene
    full = FullSoftMask(gate=GATE, temperature=0.5)
    _, candidate, entropy = full.look_up(full.init(), table, head, tokens, full_feedback(full, scene))
    q = np.exp(2 * np.asarray(log_probs, np.float64))
    q /= q.sum(-1, keepdims=True)
    np.testing.assert_allclose(candidate, q @ np.asarray(table, np.float64), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        entropy, np.where(q > 0, q * np.log(np.maximum(q, 1e-300)), 0).sum(-1), rtol=1e-3, atol=1e-5
    )
    cold = FullSoftMask(gate=GATE, temperature=1e-3)
    _, candidate, entropy = cold.look_up(cold.init(), table, head, tokens, full_feedback(cold, scene))
    np.testing.assert_allclose(candidate, table[log_probs.argmax(-1)], atol=1e-2)


def test_full_variant_gradients(scene):
    """Temperature, gate and table learn; the head does not (its gradient belongs to the loss, not to the input)."""
    table, head, tokens, _, _ = scene
    full = FullSoftMask(gate=GATE, chunk=7)
    feedback = full_feedback(full, scene)

    @jax.jit
    @jax.grad
    def gradient(inputs):
        return jnp.sum(full(inputs["omega"], inputs["table"], inputs["head"], tokens, feedback, MASK) * normal(7, D))

    grads = gradient({"omega": full.init(), "table": table, "head": head})
    assert set(grads["omega"]) == {"raw_scale", "raw_centre", "raw_steepness", "raw_temperature"}
    assert all(np.isfinite(g) and abs(float(g)) > 1e-4 for g in grads["omega"].values())
    assert np.abs(grads["table"]).max() > 1e-3
    assert all(not np.any(g) for g in jax.tree.leaves(grads["head"]))
    # Against a central difference.
    step = 1e-2
    ends = []
    for sign in (1, -1):
        omega = {**full.init(), "raw_temperature": full.init()["raw_temperature"] + sign * step}
        ends.append(float(jnp.sum(full(omega, table, head, tokens, feedback, MASK) * normal(7, D))))
    np.testing.assert_allclose(grads["omega"]["raw_temperature"], (ends[0] - ends[1]) / (2 * step), rtol=2e-2)
