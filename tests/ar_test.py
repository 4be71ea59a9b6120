"""The sampler of the AR baseline: its KV cache against whole forwards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MASK, READOUT, make_denoiser, make_params

from smdlm.feedback.committed import Stages
from smdlm.feedback.gates import ConstantGate
from smdlm.ops.filters import Filters, inverse_cdf
from smdlm.sampling.ar import ARSampler

B, L = 3, 8
BLANK = jnp.full((B, L), MASK, jnp.int32)


def canvas_with_prompts():
    """About a third of the positions given, in the middle too (infilling)."""
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((B, L)) < 0.35, rng.integers(0, MASK, (B, L)), MASK)
    return jnp.asarray(tokens, jnp.int32)


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


@pytest.mark.parametrize("k", [1, 3])
def test_soft_thinking_feeds_the_mean_of_the_candidates(causal, k):
    """k = 1 at temperature 0 is the hard sampler: the candidate is the token drawn. k = 3 writes something else."""
    denoiser, params = causal
    operator = Stages(k=k, gate=ConstantGate(1.0))
    soft = dataclasses.replace(denoiser, softmask=operator)
    readout, filters = dataclasses.replace(READOUT, k=k), Filters(temperature=0.0)
    canvas = canvas_with_prompts()
    hard = ARSampler(denoiser, readout, 2, filters)(params, jax.random.key(0), canvas).tokens
    got = ARSampler(soft, readout, 2, filters)(params, jax.random.key(0), canvas).tokens
    given = np.asarray(canvas != MASK)
    np.testing.assert_array_equal(np.asarray(got)[given], np.asarray(canvas)[given])
    assert np.array_equal(got, hard) == (k == 1)
