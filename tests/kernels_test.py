"""Kernels for TPUs and GPUs against the XLA forms, interpreted on the CPU, and which is chosen where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

from smdlm import kernels, shard
from smdlm.models.layers import Head, attention
from smdlm.readout import Readout, _statistics, exclude

SHAPE = (2, 256, 2, 64)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("causal", [False, True])
def test_splash_attention_is_xla_attention(causal, monkeypatch):
    """Values and gradients, over several blocks."""
    monkeypatch.setattr(kernels, "BLOCK", 128)
    query, key, value, cotangent = (normal(i, *SHAPE) for i in range(4))

    def gradients(fn):
        return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(cotangent * fn(q, k, v)), (0, 1, 2)))

    got = gradients(functools.partial(kernels.splash, causal=causal, interpret=True))(query, key, value)
    wanted = gradients(functools.partial(jax.nn.dot_product_attention, is_causal=causal))(query, key, value)
    assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def chosen(shape=SHAPE, dtype=jnp.bfloat16, mask=None):
    """Names of the primitives in attention's trace."""
    query = jax.ShapeDtypeStruct(shape, dtype)
    return str(jax.make_jaxpr(lambda q: attention(q, q, q, mask))(query))


def test_kernels_follow_the_platform_compiled_for(monkeypatch):
    assert "pallas_call" not in chosen()
    monkeypatch.setattr(shard, "platform", lambda: "tpu")
    assert "pallas_call" in chosen()
    assert "pallas_call" in chosen(dtype=jnp.float32)
    # Lengths, head widths and masks that it has no form for.
    assert "pallas_call" not in chosen((2, 200, 2, 64))
    assert "pallas_call" not in chosen((2, 256, 2, 48))
    assert "pallas_call" not in chosen(mask=jnp.ones((256, 256), bool))


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [
        (SHAPE, jnp.bfloat16, True),
        (SHAPE, jnp.float32, False),  # XLA's attention instead
        ((2, 255, 2, 64), jnp.bfloat16, False),
        ((2, 256, 2, 60), jnp.bfloat16, False),
        ((2, 256, 2, 256), jnp.bfloat16, False),
    ],
)
def test_cudnn_is_for_half_precision(shape, dtype, fits):
    query = jax.ShapeDtypeStruct(shape, dtype)
    assert kernels.cudnn_fits(query, query, None) == fits
    assert not kernels.cudnn_fits(query, query, jnp.ones((shape[1], shape[1]), bool))


def test_saving_attention_repeats_nothing_of_it(monkeypatch):
    """Under a policy that saves the name: one forward kernel and the backward pair, none twice."""
    monkeypatch.setattr(shard, "platform", lambda: "tpu")
    saved = jax.checkpoint_policies.save_only_these_names("attention")
    loss = lambda policy: (
        lambda q: jnp.sum(jax.checkpoint(lambda q: attention(q, q, q), policy=policy)(jnp.sin(q)) ** 2)
    )
    count = lambda policy: str(jax.make_jaxpr(jax.grad(loss(policy)))(jnp.zeros(SHAPE))).count("pallas_call[")
    assert (count(saved), count(None)) == (3, 4)


def test_heads_and_batch_are_split_by_hand_only_on_a_mesh():
    assert shard.used() == () and shard.splits(8, "data", "tensor") == ()
    x = normal(0, 4, 3)
    assert shard.split_batch(x) is x
    assert shard.per_shard(np.sum, (), None, None) is np.sum


@pytest.mark.parametrize("padded", [300, 384])
@pytest.mark.parametrize("count", [0, 1, 50, 70])
def test_statistics_kernel_is_the_xla_form(padded, count, monkeypatch):
    """Tiles that divide neither rows nor vocabulary, ties, padding and excluded ids, rows that are not wanted."""
    monkeypatch.setattr(kernels, "ROWS", 32)
    monkeypatch.setattr(kernels, "COLUMNS", 128)
    hidden = normal(0, 70, 128).astype(jnp.bfloat16)
    kernel = (0.1 * normal(1, 128, padded)).astype(jnp.bfloat16)
    # Equal logits in the same tile and in another one, above all others.
    best = jnp.asarray(hidden[0] * 0.1, jnp.bfloat16)[:, None]
    kernel = kernel.at[:, jnp.array([10, 40, 200, 250])].set(best)
    head = exclude(Head(kernel, normal(2, padded).at[jnp.array([10, 40, 200, 250])].set(0.0)), 299, 0, 298)
    got = statistics_interpreted(hidden, head.kernel, head.bias, jnp.int32(count))
    wanted = _statistics(head.logits(hidden), 3)
    assert np.asarray(wanted[0][0]).tolist() == [10, 40, 200], "the ties this test is about"
    assert_close([x[:count] for x in got], [x[:count] for x in wanted], rtol=1e-5, atol=1e-6)
    assert all(np.isfinite(x).all() for x in got)


statistics_interpreted = jax.jit(functools.partial(kernels.statistics, k=3, interpret=True))


def test_feedback_takes_the_kernel_where_no_axis_is_left_to_the_compiler(monkeypatch):
    head = Head(jnp.zeros((128, 256)), jnp.zeros(256))
    trace = lambda dtype: str(
        jax.make_jaxpr(Readout(k=3).feedback)(head, jnp.zeros((2, 8, 128), dtype), jnp.ones((2, 8), bool))
    )
    assert "readout_statistics" not in trace(jnp.bfloat16)
    monkeypatch.setattr(shard, "platform", lambda: "tpu")
    assert "readout_statistics" in trace(jnp.bfloat16) and "readout_statistics" not in trace(jnp.float32)
    monkeypatch.setattr(shard, "used", lambda: ("tensor",))
    assert "readout_statistics" not in trace(jnp.bfloat16)
