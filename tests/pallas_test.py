"""The readout's kernels for TPUs against the XLA forms, interpreted on the CPU, and where they are chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

from smdlm.mesh import traced
from smdlm.models.base import Head
from smdlm.ops import pallas
from smdlm.readout import Readout, exclude


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


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
    matrix = (0.1 * normal(1, 128, 384)).at[:, TIED].set(best).astype(jnp.bfloat16)
    return Head(matrix, (0.1 * normal(2, 384)).at[TIED].set(0.0))


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
