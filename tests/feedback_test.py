"""Gates, mixers and operators of the neighbouring ideas: each against its rule, and the limit in which it vanishes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MASK, B, L, V

from smdlm.feedback.committed import Doubt, Stages
from smdlm.feedback.conditioning import CarriedHidden, GatedFeedForward, Projection
from smdlm.feedback.gates import (
    Band,
    ConfidenceGate,
    ConstantGate,
    EntropyGate,
    NormalisedEntropy,
    Prediction,
    Schedule,
    StepRamp,
)
from smdlm.feedback.mixers import Add, NormLerp, Slerp
from smdlm.full_softmask import FullSoftMask
from smdlm.models.base import Head
from smdlm.readout import exclude
from smdlm.softmask import Feedback, SoftMask, summarize

D = 6
HALF = ConstantGate(0.5)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def scene():
    """Table, head, canvas with masks and tokens, hidden states, log-probabilities, positions that are given."""
    head = exclude(Head(jnp.asarray(normal(1, D, V)), jnp.asarray(normal(2, V))), V, MASK)
    hidden = jnp.asarray(normal(3, B, L, D))
    tokens = np.random.default_rng(4).integers(0, MASK, (B, L))
    tokens = jnp.asarray(np.where(normal(5, B, L) > 0, MASK, tokens), jnp.int32)
    given = (tokens != MASK) & (jnp.arange(L) < 2)
    return jnp.asarray(normal(6, V, D)), head, tokens, hidden, jax.nn.log_softmax(head.logits(hidden)), given


def embed(operator, scene, k=3, omega=None, active=None):
    """The canvas as the operator embeds it, with feedback wherever it remembers."""
    table, head, tokens, hidden, log_probs, given = scene
    active = operator.remembering(tokens == MASK, given) if active is None else active
    feedback = summarize(log_probs, active, k).replace(forwards=jnp.ones(B, jnp.int32), time=jnp.full(B, 0.5))
    omega = nn.meta.unbox(operator.init(jax.random.key(0), D)) if omega is None else omega
    return np.asarray(operator(omega, table, head, tokens, operator.attach(feedback, hidden), MASK))


# Gates


def seen(entropy=(0.0, 1.0), forwards=1, time=1.0, confidence=(0.9, 0.4)):
    return Prediction(
        -jnp.array([entropy]), jnp.array([confidence]), jnp.full((1, 1), forwards), jnp.full((1, 1), time), V
    )


def lam(gate, **what):
    return np.asarray(gate(gate.init(), seen(**what)))[0]


def test_the_ramp_follows_the_forwards():
    """dInfer: min(.15 + .02 n, .3), saturated from n = 8, whatever the entropy."""
    found = [lam(StepRamp(), forwards=n + 1) for n in range(12)]
    np.testing.assert_allclose(found, np.minimum(0.15 + 0.02 * np.arange(12), 0.3)[:, None].repeat(2, 1), rtol=1e-6)
    np.testing.assert_array_equal(lam(StepRamp(0.2, 0.0, 1.0), forwards=5), lam(ConstantGate(0.2)))


def test_normalised_entropy_of_either_sign():
    entropy = (0.0, 1.0, float(np.log(V)))
    unsure, sure = (lam(NormalisedEntropy(0.6, sign), entropy=entropy) for sign in ("unsure", "sure"))
    np.testing.assert_allclose(unsure, 0.6 * np.array([0, 1 / np.log(V), 1]), rtol=1e-6)
    np.testing.assert_allclose(unsure + sure, 0.6, rtol=1e-6)
    assert not np.any(lam(NormalisedEntropy(0.0), entropy=entropy))


def test_the_schedule_is_a_line_or_stairs():
    times = np.array([1.0, 0.75, 0.5, 0.25, 0.0])
    np.testing.assert_allclose([lam(Schedule(0.2, 1.0), time=t)[0] for t in times], 0.2 + 0.8 * (1 - times), rtol=1e-6)
    stairs = [lam(Schedule(0.0, 1.0, levels=3), time=t)[0] for t in (1.0, 0.7, 0.6, 0.4, 0.3, 0.0)]
    np.testing.assert_allclose(stairs, [0, 0, 0.5, 0.5, 1, 1])
    np.testing.assert_array_equal(lam(Schedule(0.3, 0.3), time=0.4), lam(ConstantGate(0.3)))


def test_a_band_is_the_entropy_gate_in_a_part_of_the_steps():
    gate = EntropyGate(0.7, -1.5, 2.0)
    band = Band(0.7, -1.5, 2.0, t_from=0.8, t_to=1.0)
    for t, inside in ((1.0, True), (0.81, True), (0.79, False), (0.0, False)):
        np.testing.assert_array_equal(lam(band, time=t), lam(gate) if inside else [0, 0])
    np.testing.assert_array_equal(lam(Band(0.7, -1.5, 2.0), time=0.3), lam(gate))


def test_confidence_is_the_weight_of_the_candidates():
    np.testing.assert_allclose(lam(ConfidenceGate(0.5)), [0.45, 0.2], rtol=1e-6)
    np.testing.assert_array_equal(lam(ConfidenceGate(1.0), confidence=(1.0 + 1e-6, 0.0)), [1, 0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: StepRamp(start=1.5),
        lambda: StepRamp(growth=-0.1),
        lambda: StepRamp(most=2.0),
        lambda: NormalisedEntropy(scale=2.0),
        lambda: NormalisedEntropy(most_if="maybe"),
        lambda: ConfidenceGate(scale=-1.0),
        lambda: Schedule(first=-0.1),
        lambda: Schedule(last=1.1),
        lambda: Schedule(levels=1),
        lambda: Band(t_from=0.5, t_to=0.5),
        lambda: Band(scale=2.0),
        lambda: NormLerp(norm="candidate"),
        lambda: Slerp(norm="none"),
        lambda: FullSoftMask(nucleus=0.0),
        lambda: GatedFeedForward(inner=0),
        lambda: Projection(mixer=Slerp()),
        lambda: CarriedHidden(mixer=Add()),
    ],
)
def test_values_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="softmask.*: got .*, wanted"):
        make()


# Mixers


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("mixer", [NormLerp("mask"), Slerp("mask")])
def test_the_masks_norm_can_be_kept(mixer):
    """Whatever lam; at 1 in the candidate's direction, at 0 the mask itself."""
    mask, candidate, weight = normal(0, D), 3 * normal(1, 4, D), np.linspace(0.0, 1.0, 4)[:, None]
    mixed = np.asarray(mixer(mask, candidate, weight))
    np.testing.assert_allclose(np.linalg.norm(mixed, axis=-1), np.linalg.norm(mask), rtol=1e-5)
    np.testing.assert_allclose(mixed[0], mask, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(unit(mixed[-1]), unit(candidate[-1]), atol=1e-5)
    wanted = type(mixer)()(mask, candidate, weight)  # the direction is that of the other norm
    np.testing.assert_allclose(unit(mixed), unit(np.asarray(wanted)), atol=1e-5)


def test_adding_keeps_the_masks_weight():
    mask, candidate = normal(0, D), normal(1, 4, D)
    np.testing.assert_allclose(Add()(mask, candidate, 0.3), mask + 0.3 * candidate, rtol=1e-6)
    np.testing.assert_array_equal(Add()(mask, candidate, 0.0), np.broadcast_to(mask, (4, D)))


# The whole vocabulary, or a nucleus of it


def test_a_fixed_temperature_has_no_parameter(scene):
    fixed, learned = FullSoftMask(gate=HALF, learn=False), FullSoftMask(gate=HALF)
    assert fixed.init() == {} and set(learned.init()) == {"raw_temperature"}
    np.testing.assert_allclose(embed(fixed, scene), embed(learned, scene), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_nucleus_is_the_mean_of_its_tokens(scene, share):
    table, _, tokens, _, log_probs, _ = scene
    got = embed(FullSoftMask(gate=ConstantGate(1.0), learn=False, nucleus=share), scene)
    wanted = np.asarray(table)[tokens]
    for b, i in np.argwhere(np.asarray(tokens) == MASK):
        p = np.exp(np.asarray(log_probs[b, i], np.float64))
        best = np.argsort(-p)
        kept = best[: np.searchsorted(np.cumsum(p[best]), share) + 1]
        wanted[b, i] = p[kept] @ np.asarray(table)[kept] / p[kept].sum()
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4)


def test_a_small_nucleus_is_the_best_token(scene):
    one = embed(SoftMask(k=1, gate=HALF), scene, k=1)
    np.testing.assert_allclose(embed(FullSoftMask(gate=HALF, learn=False, nucleus=1e-6), scene), one, rtol=1e-4)


# Committed positions


def test_stages(scene):
    """Masked: the mix; committed: the candidate alone; given: its row."""
    table, _, tokens, _, _, given = scene
    got = embed(Stages(gate=HALF), scene)
    masked, given = np.asarray(tokens == MASK), np.asarray(given)
    np.testing.assert_array_equal(got[masked], embed(SoftMask(gate=HALF), scene)[masked])
    candidate = embed(Stages(gate=ConstantGate(1.0)), scene)
    assert (~masked & ~given).any() and given.any()
    np.testing.assert_array_equal(got[~masked], candidate[~masked])
    np.testing.assert_array_equal(got[given], np.asarray(table)[tokens][given])
    assert np.abs(got - np.asarray(table)[tokens])[~masked & ~given].max(-1).min() > 1e-3


def test_doubt_mixes_committed_positions_with_the_mask(scene):
    """DMax at k = 1: sum p e + (1 - p) m, of norm p |e| + (1 - p) |m|; masked positions stay plain."""
    table, _, tokens, _, log_probs, given = scene
    table, masked, given = np.asarray(table), np.asarray(tokens == MASK), np.asarray(given)
    got = embed(Doubt(k=1, gate=ConfidenceGate(), mixer=NormLerp()), scene, k=1)
    np.testing.assert_array_equal(got[masked | given], table[tokens][masked | given])
    for b, i in np.argwhere(~masked & ~given):
        p, best = np.exp(log_probs[b, i].max()), table[log_probs[b, i].argmax()]
        wanted = p * best + (1 - p) * table[MASK]
        norm = p * np.linalg.norm(best) + (1 - p) * np.linalg.norm(table[MASK])
        np.testing.assert_allclose(got[b, i], wanted * norm / np.linalg.norm(wanted), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("operator", [SoftMask(gate=ConstantGate(0.0)), Doubt(gate=ConstantGate(1.0), k=1)])
def test_scale_zero_and_sure_tokens_are_no_feedback(scene, operator):
    """SoftMask at lam 0; Doubt at lam 1 where every prediction is the token itself: bit for bit the table."""
    table, head, tokens, _, _, _ = scene
    log_probs = jax.nn.log_softmax(1e4 * jax.nn.one_hot(tokens, V))
    feedback = summarize(log_probs, jnp.ones((B, L), bool), operator.k)
    np.testing.assert_array_equal(operator({}, table, head, tokens, feedback, MASK), table[tokens])


# Self-conditioning

CONDITIONING = [Projection(gate=HALF), GatedFeedForward(gate=HALF, inner=4), CarriedHidden(gate=HALF)]


@pytest.mark.parametrize("operator", CONDITIONING, ids=lambda o: type(o).__name__)
def test_self_conditioning_starts_at_the_binary_model(scene, operator):
    """Bit for bit the table; and every parameter that is zero gets a gradient, so that it leaves there."""
    table, head, tokens, hidden, log_probs, given = scene
    np.testing.assert_array_equal(embed(operator, scene), np.asarray(table)[tokens])
    omega = nn.meta.unbox(operator.init(jax.random.key(0), D))
    feedback = operator.attach(summarize(log_probs, operator.remembering(tokens == MASK, given), 3), hidden)
    grads = jax.grad(lambda w: jnp.sum(operator(w, table, head, tokens, feedback, MASK) * normal(7, D)))(omega)
    zero = [name for name, value in omega.items() if not np.any(value)]
    assert zero and all(np.abs(grads[name]).max() > 1e-4 for name in zero)
    assert set(omega) == set(operator.matrices())


@pytest.mark.parametrize("operator", CONDITIONING, ids=lambda o: type(o).__name__)
def test_self_conditioning_adds_everywhere_but_where_something_is_given(scene, operator):
    table, _, tokens, hidden, log_probs, given = scene
    table, given, p = np.asarray(table), np.asarray(given), np.exp(log_probs)
    rng = np.random.default_rng(8)
    shapes = jax.tree.map(jnp.shape, nn.meta.unbox(operator.init(jax.random.key(0), D)))
    omega = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    got = embed(operator, scene, omega=omega)
    expected = p @ table
    if isinstance(operator, CarriedHidden):
        h = np.asarray(hidden)
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
        added = h * omega["norm"] + omega["shift"]
    elif isinstance(operator, GatedFeedForward):
        x = expected / np.sqrt(np.mean(expected**2, -1, keepdims=True) + 1e-6) * omega["norm"]
        added = (np.asarray(jax.nn.gelu(x @ omega["gate"])) * (x @ omega["up"])) @ omega["down"]
    else:
        added = expected @ omega["project"]
    wanted = table[tokens] + np.where(given[..., None], 0, 0.5 * added)
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


def test_nothing_remembered_is_the_table(scene):
    table, head, tokens, hidden, _, _ = scene
    for operator in (Stages(gate=HALF), Doubt(gate=HALF), *CONDITIONING):
        shapes = jax.tree.map(jnp.shape, nn.meta.unbox(operator.init(jax.random.key(0), D)))
        omega = {name: jnp.ones(shape) for name, shape in shapes.items()}
        none = operator.attach(Feedback.none(B, L, 3), hidden)
        np.testing.assert_array_equal(operator(omega, table, head, tokens, none, MASK), table[tokens])
