"""`Model.flops` against the matrix products of the traced forward pass, counted one by one."""

import math

import jax
import jax.numpy as jnp
import pytest
from conftest import make_denoiser, make_params


def products(jaxpr, times=1):
    """FLOPs of all matrix products of a jaxpr [2 per multiply-add], those of a scan's body as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            total += 2 * times * out.size * math.prod(left.shape[axis] for axis in contracted)
        repeated = times * equation.params["length"] if equation.primitive.name == "scan" else times
        total += sum(products(inner, repeated) for inner in jaxprs_inside(equation))
    return total


def jaxprs_inside(equation):
    """Of a scan, a rematerialised block, a function with a derivative of its own."""
    values = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns"))
    return [getattr(value, "jaxpr", value) for value in values if hasattr(value, "eqns")]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes, batch, length", [((64, 3, 4, 16), 4, 96), ((96, 2, 6, 32), 2, 192)])
def test_flops_are_those_of_the_forward(causal, sizes, batch, length):
    """Within a tenth: the conditioning, once per forward, is left out of the formula and small."""
    width, depth, heads, cond = sizes
    denoiser = make_denoiser(None, width=width, depth=depth, heads=heads, cond=cond, causal=causal)
    model, backbone = denoiser.model, make_params(denoiser)["backbone"]
    forward = jax.make_jaxpr(model.apply)(backbone, jnp.zeros((batch, length, width)))
    counted = products(forward.jaxpr) / (batch * length)
    # Half of a causal model's scores are masked away: a CPU computes them all the same.
    masked_away = 2 * depth * length * width if causal else 0
    assert model.flops(length) == pytest.approx(counted - masked_away, rel=0.1)
