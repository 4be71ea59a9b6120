"""The masking process: schedule, the three samplers of t, masking."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smdlm.diffusion import LogLinear, TimeSampler, mask_tokens

KINDS = ["iid", "stratified", "weyl"]


@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.1])
def test_weight_is_that_of_the_nelbo(eps):
    """-alpha'(t) / (1 - alpha(t)) = 1 / t whatever eps; alpha falls from 1 to eps."""
    schedule = LogLinear(eps)
    t = jnp.linspace(0.01, 1, 50)
    slope = jax.vmap(jax.grad(schedule.alpha))(t)
    np.testing.assert_allclose(schedule.weight(t), -slope / (1 - schedule.alpha(t)), rtol=1e-4)
    np.testing.assert_allclose([schedule.alpha(0.0), schedule.alpha(1.0)], [1.0, eps], atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t_min, t_max", [(1e-3, 1.0), (0.2, 0.8)])
def test_times_stay_in_range_and_fill_it(kind, t_min, t_max):
    times = TimeSampler(kind, t_min, t_max)
    t = np.concatenate([times(jax.random.key(i), 64) for i in range(40)])
    assert t.dtype == np.float32 and t.min() >= t_min and t.max() <= t_max
    assert t.min() < t_min + 0.01 and t.max() > t_max - 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [0, 5])
def test_each_time_is_unbiased(kind, index):
    """Over keys, t_i (and not only the batch's mean) is uniform: Kolmogorov distance of 2000 draws.

    Stratified draws are uniform over the batch, each within its own stratum.
    """
    times = TimeSampler(kind, 0.001, 1.0)
    t = np.asarray(jax.jit(jax.vmap(lambda k: times(k, 7)))(jax.random.split(jax.random.key(0), 2000)))
    x = np.sort((t if kind == "stratified" else t[:, index]).ravel() - 0.001) / 0.999
    distance = np.abs(x - (np.arange(len(x)) + 0.5) / len(x)).max()
    assert distance < 0.045  # exceeded by chance once in 1000


def test_iid_times_are_independent():
    t = np.asarray(jax.vmap(lambda k: TimeSampler("iid")(k, 4))(jax.random.split(jax.random.key(0), 3000)))
    correlation = np.corrcoef(t.T) - np.eye(4)
    assert np.abs(correlation).max() < 0.08


@pytest.mark.parametrize("batch", [1, 4, 37])
def test_stratified_has_one_time_per_stratum(batch):
    for i in range(20):
        t = TimeSampler("stratified", 0.2, 0.8)(jax.random.key(i), batch)
        u = (np.asarray(t, np.float64) - 0.2) / 0.6 * batch
        assert np.all(u > np.arange(batch) - 1e-3) and np.all(u < np.arange(batch) + 1 + 1e-3)


def test_weyl_is_even_on_every_contiguous_part():
    """Any run of n consecutive examples (a shard, a micro-batch) holds n x +- 2.5 times below every x."""
    for seed in range(3):
        u = (np.asarray(TimeSampler("weyl")(jax.random.key(seed), 256)) - 1e-3) / 0.999
        for size in (4, 16, 37, 64, 256):
            for start in range(0, 257 - size, 7):
                part = np.sort(u[start : start + size])
                rank = np.arange(size)
                assert np.max(np.abs(rank + 0.5 - size * part)) < 2.5, (seed, size, start)
    # What the test would say of independent times.
    iid = np.sort((np.asarray(TimeSampler("iid")(jax.random.key(0), 256)) - 1e-3) / 0.999)
    assert np.max(np.abs(np.arange(256) + 0.5 - 256 * iid)) > 2.5


def test_weyl_does_not_depend_on_the_batch_size():
    key = jax.random.key(3)
    np.testing.assert_array_equal(TimeSampler("weyl")(key, 64)[:8], TimeSampler("weyl")(key, 8))


def test_weyl_keeps_its_precision_far_out():
    """The fractional parts of i * golden in f64; multiplied out in f32 they would be off by .01 at i = 1e5."""
    t = np.asarray(TimeSampler("weyl")(jax.random.key(0), 100_001), np.float64)
    u = (t - 1e-3) / 0.999
    steps = np.diff(u) % 1.0
    np.testing.assert_allclose(steps, 0.6180339887, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TimeSampler("uniform"),
        lambda: TimeSampler(t_min=0.0),
        lambda: TimeSampler(t_min=0.5, t_max=0.5),
        lambda: TimeSampler(t_max=1.1),
        lambda: TimeSampler(t_min=float("nan")),
        lambda: LogLinear(1.0),
        lambda: LogLinear(-0.1),
    ],
)
def test_values_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="got .*, wanted"):
        make()


# Masking


def canvas(batch=8, length=4000):
    return jax.random.randint(jax.random.key(1), (batch, length), 0, 9)


def test_masked_share_is_the_chance():
    tokens, chance = canvas(), jnp.linspace(0.0, 1.0, 8)
    x, masked = mask_tokens(jax.random.key(0), tokens, chance, 9)
    share = np.asarray(masked).mean(1)
    np.testing.assert_allclose(share, chance, atol=4 * np.sqrt(0.25 / 4000))
    assert share[0] == 0 and share[-1] == 1
    np.testing.assert_array_equal(np.asarray(x) == 9, masked)
    np.testing.assert_array_equal(np.asarray(x)[~masked], np.asarray(tokens)[~masked])


@pytest.mark.parametrize("kind", KINDS)
def test_mean_masked_share_of_training(kind):
    """alpha and t together: on average (1 - eps) * E[t] of the tokens are masked."""
    times, schedule = TimeSampler(kind), LogLinear()
    tokens = canvas(64, 64)
    shares = []
    for i in range(30):
        t = times(jax.random.key(i), 64)
        shares.append(np.asarray(mask_tokens(jax.random.key(i + 100), tokens, 1 - schedule.alpha(t), 9)[1]).mean())
    tolerance = 0.03 if kind == "iid" else 0.006
    np.testing.assert_allclose(np.mean(shares), 0.999 * 0.5005, atol=tolerance)


def test_masks_are_independent_between_rows():
    _, masked = mask_tokens(jax.random.key(0), canvas(2), jnp.full(2, 0.5), 9)
    assert 0.4 < np.mean(np.asarray(masked)[0] == np.asarray(masked)[1]) < 0.6


def test_frozen_positions_are_never_masked():
    tokens = canvas(4, 100)
    frozen = jax.random.bernoulli(jax.random.key(2), 0.3, tokens.shape)
    x, masked = mask_tokens(jax.random.key(0), tokens, jnp.ones(4), 9, frozen)
    np.testing.assert_array_equal(masked, ~frozen)
    np.testing.assert_array_equal(np.asarray(x)[frozen], np.asarray(tokens)[frozen])


def test_masks_at_smaller_chances_are_nested():
    key, tokens = jax.random.key(0), canvas(4, 200)
    masks = [np.asarray(mask_tokens(key, tokens, jnp.full(4, c), 9)[1]) for c in (0.2, 0.5, 0.9)]
    assert not np.any(masks[0] & ~masks[1]) and not np.any(masks[1] & ~masks[2])
    assert masks[0].sum() < masks[1].sum() < masks[2].sum()
