"""Large products of rounded operands on a CPU: what is rounded, what is summed in float32, and what stays as it is.

Shapes are small, so that speed is not to be seen here: `python -m smdlm.tools.bench --products=bfloat16`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import READOUT, assert_close, assert_identical, make_batch, make_denoiser, make_params

from configs import products
from smdlm.mesh import traced
from smdlm.models.base import Head
from smdlm.models.decoder import Decoder
from smdlm.models.dit import DiT
from smdlm.models.gpt2 import GPT2
from smdlm.models.lora import LoRA
from smdlm.objective import SoftMaskedDiffusion
from smdlm.ops import cpu
from smdlm.readout import Readout
from smdlm.study.plan import read_study

HALF = jnp.dtype(jnp.bfloat16)
# Rows, inputs, outputs; of the wide map the input is the wider operand, of the narrow one the output.
SHAPES = {
    "one row": (1, 6, 5),
    "wide": (9, 24, 4),
    "narrow": (9, 4, 24),
    "one output": (7, 5, 1),
    "large": (64, 96, 48),
}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def exact(x):
    """What is multiplied: x rounded to bfloat16, in float64."""
    return np.asarray(x.astype(HALF), np.float64)


def product_and_gradients(x, w, d_out, of):
    out, pullback = jax.vjp(lambda x, w: cpu.matmul(x, w, of), x, w)
    return out, *pullback(d_out)


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_rounded_operands(shape):
    """Up to the rounding of float32, so the sums are no coarser; results are float32."""
    rows, inputs, outputs = SHAPES[shape]
    x, w, d_out = normal(1, rows, inputs), normal(2, inputs, outputs), normal(3, rows, outputs)
    got = jax.jit(product_and_gradients, static_argnums=3)(x, w, d_out, HALF)
    wanted = exact(x) @ exact(w), exact(d_out) @ exact(w).T, exact(x).T @ exact(d_out)
    for g, e in zip(got, wanted, strict=True):
        assert g.dtype == jnp.float32
        np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-5)


def test_a_long_sum_keeps_its_small_terms():
    """1025 ones: in bfloat16, whose integers end at 256, the sum would stay there, and 1025 itself would be 1024."""
    ones = lambda *shape: jnp.ones(shape)
    run = jax.jit(product_and_gradients, static_argnums=3)
    out, d_x, _ = run(ones(2, 1025), ones(1025, 3), ones(2, 3), HALF)
    assert np.all(out == 1025) and np.all(d_x == 3)
    _, d_x, d_w = run(ones(1025, 4), ones(4, 1025), ones(1025, 1025), HALF)
    assert np.all(d_x == 1025) and np.all(d_w == 1025)


def test_the_gradient_of_the_head_is_summed_in_float32_over_chunks():
    """Of a uniform distribution over four ids each of 1025 tokens adds a quarter, in chunks of 41."""
    head = Head(jnp.zeros((1, 4)), jnp.zeros(4), "bfloat16")
    hidden, targets = jnp.ones((1, 1025, 1)), jnp.zeros((1, 1025), jnp.int32)
    loss = lambda head: Readout(chunk=41).nll(head, hidden, targets, jnp.ones((1, 1025)))[0]
    found = jax.jit(jax.grad(loss))(head)
    assert found.matrix.dtype == jnp.float32
    np.testing.assert_array_equal(found.matrix, [[-0.75 * 1025, *3 * [0.25 * 1025]]])


def test_float32_is_bit_for_bit_what_it_was():
    """The plain product, and gradients of the plain product's form."""
    x, w, d_out = normal(1, 9, 24), normal(2, 24, 5), normal(3, 9, 5)
    got = jax.jit(product_and_gradients, static_argnums=3)(x, w, d_out, jnp.dtype(jnp.float32))
    assert_identical(got[0], jax.jit(jnp.matmul)(x, w))
    assert_close(got, (x @ w, d_out @ w.T, x.T @ d_out), rtol=1e-6)


# Models: every large product, and nothing else

MODELS = {
    "dit": DiT(24, width=16, depth=2, heads=2, cond=4, vocab_multiple=1),
    "causal dit": DiT(24, width=16, depth=2, heads=2, causal=True, vocab_multiple=1),
    "decoder": Decoder(24, width=16, depth=2, heads=4, key_heads=2, hidden=24, vocab_multiple=1),
    "gpt2": GPT2(24, width=16, depth=2, heads=2, positions=8, vocab_multiple=1),
}


def dot_products(jaxpr):
    """(types of the operands, of the result) of every product of two arrays of more than 100 entries together."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general" and sum(x.aval.size for x in eqn.invars) > 100:
            yield *(x.aval.dtype.name for x in eqn.invars), eqn.outvars[0].aval.dtype.name
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            body = getattr(value, "jaxpr", value)
            if hasattr(body, "eqns"):
                yield from dot_products(body)


def traced_products(model):
    """Of a forward pass, the loss and the backward pass."""
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0)))
    targets, weights = jax.ShapeDtypeStruct((2, 8), jnp.int32), jax.ShapeDtypeStruct((2, 8), jnp.float32)

    def loss(params, x, targets, weights):
        hidden = model.apply(params, x)
        return Readout(chunk=4).nll(model.head(params), hidden, targets, weights)[0]

    x = jax.ShapeDtypeStruct((2, 8, model.width), jnp.float32)
    return list(dot_products(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, x, targets, weights).jaxpr))


@pytest.mark.parametrize("name", MODELS)
def test_every_large_product_of_a_model_is_rounded_and_summed_in_float32(name):
    plain = traced_products(MODELS[name])
    assert set(plain) == {("float32", "float32", "float32")}
    rounded = traced_products(dataclasses.replace(MODELS[name], products="bfloat16"))
    assert len(rounded) == len(plain)
    # Only the maps of the one conditioning vector are left.
    left = [kinds for kinds in rounded if kinds != ("bfloat16", "bfloat16", "float32")]
    assert set(left) <= {("float32", "float32", "float32")} and bool(left) == (name == "dit")


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_accelerators_take_no_notice(platform, monkeypatch):
    monkeypatch.setattr(traced, "platform", lambda: platform)
    assert cpu.operands(jnp.float32, "bfloat16") == jnp.float32
    rounded = traced_products(dataclasses.replace(MODELS["decoder"], products="bfloat16", attention="auto"))
    assert rounded == traced_products(MODELS["decoder"])


def test_a_mesh_that_splits_heads_is_refused(monkeypatch):
    """Its maps are multiplied in dtype, and the curve would hang on the mesh."""
    monkeypatch.setattr(traced, "used", lambda: ("tensor",))
    with pytest.raises(
        ValueError, match=r"model.products: got 'bfloat16' on CPUs with mesh.tensor > 1, wanted 'dtype'"
    ):
        traced_products(dataclasses.replace(MODELS["gpt2"], products="bfloat16"))


def test_adapters_multiply_as_their_base_does():
    base = dataclasses.replace(MODELS["decoder"], products="bfloat16")
    assert (
        LoRA(base, ("q",), 2, 2.0).products == "bfloat16"
        and LoRA(MODELS["decoder"], ("q",), 2, 2.0).products == "dtype"
    )


def test_a_step_is_that_of_float32_within_the_rounding():
    """Loss and gradients of a soft-masked step, whose parameters, gradients and hidden states stay float32."""
    found = {}
    for kind in cpu.PRODUCTS:
        denoiser = make_denoiser(products=kind)
        objective = SoftMaskedDiffusion(denoiser, READOUT, 1.0)
        example = objective.corrupt(jax.random.key(0), make_batch())
        step = jax.jit(jax.value_and_grad(objective, has_aux=True), static_argnums=(2, 3))
        (loss, _), gradients = step(make_params(denoiser, noise=0.2), example, True, None)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(gradients))
        found[kind] = loss, gradients
    (loss, gradients), (rounded_loss, rounded) = found.values()
    assert 0 < abs(float(rounded_loss / loss) - 1) < 0.01
    square = lambda tree: sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(tree))
    difference = jax.tree.map(jnp.subtract, rounded["backbone"], gradients["backbone"])
    assert 0 < square(difference) < 0.05**2 * square(gradients["backbone"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"products": "float16"}, "model.products: got 'float16', wanted 'dtype' or 'bfloat16'"),
        ({"products": "bfloat16", "attention": "xla"}, "got 'bfloat16' with attention 'xla'.*wanted attention 'auto'"),
    ],
)
def test_what_is_refused(changes, message):
    for model in MODELS.values():
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(model, **changes)


def test_the_study_compares_two_runs_that_differ_in_the_products_alone():
    study, cells = read_study(products.get_config())
    assert study.seeds == 5 and {cell.trained.updates for cell in cells} == {1000}
    of = {(cell.run, cell.seed): cell.trained for cell in cells}
    for seed in range(5):
        rounded = dataclasses.replace(of["float32", seed].model, products="bfloat16")
        assert of["bfloat16", seed] == dataclasses.replace(of["float32", seed], model=rounded)
