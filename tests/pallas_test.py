"""Kernels for TPUs and GPUs against the XLA forms, interpreted on the CPU, and which is chosen where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

from smdlm.mesh import traced
from smdlm.models.attention import attention
from smdlm.models.base import Head
from smdlm.readout import Readout, exclude

SHAPE = (2, 256, 2, 64)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("causal", [False, True])
def test_splash_attention_is_xla_attention(causal, monkeypatch):
    """Values and gradients, over several blocks."""
    monkeypatch.setattr(pallas, "BLOCK", 128)
    query, key, value, cotangent = (normal(i, *SHAPE) for i in range(4))

    def gradients(fn):
        return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(cotangent * fn(q, k, v)), (0, 1, 2)))

    got = gradients(functools.partial(pallas.splash, causal=causal, interpret=True))(query, key, value)
    wanted = gradients(functools.partial(jax.nn.dot_product_attention, is_causal=causal))(query, key, value)
    assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def chosen(shape=SHAPE, dtype=jnp.bfloat16, mask=None):
    """Names of the primitives in attention's trace."""
    query = jax.ShapeDtypeStruct(shape, dtype)
    return str(jax.make_jaxpr(lambda q: attention(q, q, q, mask))(query))


def test_kernels_follow_the_platform_compiled_for(monkeypatch):
    assert "pallas_call" not in chosen()
    monkeypatch.setattr(traced, "platform", lambda: "tpu")
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
    assert pallas.cudnn_fits(query, query, None) == fits
    assert not pallas.cudnn_fits(query, query, jnp.ones((shape[1], shape[1]), bool))


def pallas_calls(jaxpr):
    """How many, without those in calls that have no result: jax 0.10 leaves dead calls to the compiler."""
    count = 0
    for eqn in jaxpr.eqns:
        inner = eqn.params.get("jaxpr")
        if eqn.primitive.name == "pallas_call":
            count += 1
        elif inner is not None and eqn.outvars:
            count += pallas_calls(getattr(inner, "jaxpr", inner))
    return count


def test_saving_attention_repeats_nothing_of_it(monkeypatch):
    """Under a policy that saves the name: one forward kernel and the backward pair, none twice."""
    monkeypatch.setattr(traced, "platform", lambda: "tpu")
    saved = jax.checkpoint_policies.save_only_these_names("attention")

    def count(policy):
        block = jax.checkpoint(lambda q: attention(q, q, q), policy=policy)
        return pallas_calls(jax.make_jaxpr(jax.grad(lambda q: jnp.sum(block(jnp.sin(q)) ** 2)))(jnp.zeros(SHAPE)).jaxpr)

    assert (count(saved), count(None)) == (3, 4)


def test_heads_and_batch_are_split_by_hand_only_on_a_mesh():
    assert traced.used() == () and traced.splits(8, "data", "tensor") == ()
    x = normal(0, 4, 3)
    assert traced.split_batch(x) is x
    assert traced.per_shard(np.sum, (), None, None) is np.sum


@pytest.fixture
def interpreted(monkeypatch):
    """The readout takes its kernels, in small tiles: several of them by rows and by columns."""
    monkeypatch.setattr(pallas, "ROWS", 32)
    monkeypatch.setattr(pallas, "COLUMNS", 128)
    for name in ("statistics", "nll"):
        monkeypatch.setattr(pallas, name, functools.partial(getattr(pallas, name), interpret=True))
    return lambda: monkeypatch.setattr(traced, "platform", lambda: "tpu")


HIDDEN = (5, 14, 128)  # 70 rows: no multiple of a tile
TIED = jnp.array([10, 40, 200, 250])  # in one tile of columns, and in others


def tied_head():
    """bf16; the columns TIED are equal, and the best of the first row."""
    best = 0.1 * normal(0, *HIDDEN)[0, 0, :, None]
    kernel = (0.1 * normal(1, 128, 384)).at[:, TIED].set(best).astype(jnp.bfloat16)
    return Head(kernel, (0.1 * normal(2, 384)).at[TIED].set(0.0))


@pytest.mark.parametrize("count", [0, 1, 33, 70])
def test_feedback_kernel_is_the_xla_form(interpreted, count):
    """With ties, padding and excluded ids, and rows that are not wanted."""
    hidden = normal(0, *HIDDEN).astype(jnp.bfloat16)
    masked = (jnp.arange(70) < count).reshape(5, 14)
    run = lambda: jax.jit(lambda *xs: Readout(k=3, chunk=16).feedback(*xs))(
        exclude(tied_head(), 299, 298), hidden, masked
    )
    wanted = run()
    interpreted()
    got = run()
    if count:
        assert got.ids[0, 0].tolist() == TIED[:3].tolist()
    np.testing.assert_array_equal(got.ids, wanted.ids)
    assert_close(got, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("count", [0, 33, 70])
def test_nll_kernel_is_the_xla_form(interpreted, count):
    """Values per token and all gradients."""
    hidden, head = normal(0, *HIDDEN).astype(jnp.bfloat16), tied_head()
    targets = jax.random.randint(jax.random.key(3), HIDDEN[:2], 0, 298)
    weights = jnp.where(jax.random.permutation(jax.random.key(4), 70) < count, 0.5, 0.0).reshape(HIDDEN[:2])
    loss = lambda head, hidden: Readout(k=3, chunk=16).nll(exclude(head, 299, 298), hidden, targets, weights)
    run = lambda: jax.jit(jax.value_and_grad(lambda *xs: loss(*xs), (0, 1), has_aux=True))(head, hidden)
    wanted = run()
    interpreted()
    got = run()
    assert (float(jnp.abs(got[1][1]).max()) > 0) == (count > 0)
    close = lambda x: jax.tree.map(lambda x: x.astype(jnp.float32), x)
    assert_close(close(got), close(wanted), rtol=1e-2, atol=1e-5)  # gradients are rounded to bf16 at the end


def test_feedback_takes_the_kernel_where_no_axis_is_left_to_the_compiler(monkeypatch):
    head = Head(jnp.zeros((128, 256)), jnp.zeros(256))
    trace = lambda dtype: str(
        jax.make_jaxpr(Readout(k=3).feedback)(head, jnp.zeros((2, 8, 128), dtype), jnp.ones((2, 8), bool))
    )
    assert "readout_statistics" not in trace(jnp.bfloat16)
    monkeypatch.setattr(traced, "platform", lambda: "tpu")
    assert "readout_statistics" in trace(jnp.bfloat16) and "readout_statistics" not in trace(jnp.float32)
    monkeypatch.setattr(traced, "used", lambda: ("tensor",))
    assert "readout_statistics" not in trace(jnp.bfloat16)
