"""Attention on three platforms against the formula: grouped heads, masks, gradients, and which form is chosen where.

Splash attention is interpreted on the CPU. Of cuDNN's there is no more to see here than that it is chosen where it fits
and that programs with it lower for GPUs. Eight forced CPU devices (this file as a program) show that heads and examples
are split without changing the result; they prove nothing about speed.
"""

import functools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.export import DisabledSafetyCheck, export

from smdlm.mesh import traced
from smdlm.models import attention as module
from smdlm.models.attention import attention, cudnn_fits, splash
from smdlm.models.dit import DiT

HEADS = 4


def formula(query, key, value, mask=None, causal=False):
    """As one would write it: keys repeated for the heads that share them, f32 throughout."""
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    shared = [h // (query.shape[2] // key.shape[2]) for h in range(query.shape[2])]
    scores = jnp.einsum("blhe,bmhe->bhlm", query, key[:, :, shared]) / query.shape[-1] ** 0.5
    seen = jnp.ones(scores.shape[2:], bool)[None] if mask is None else mask
    if causal:
        seen = seen & jnp.tri(query.shape[1], dtype=bool)
    return jnp.einsum("bhlm,bmhe->blhe", jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30)), value[:, :, shared])


def inputs(groups, *, batch=2, length=6, keys=None, width=8, dtype=jnp.float32):
    """query, key, value and the cotangent of the result."""
    k = jax.random.split(jax.random.key(groups), 4)
    queries, shared = (batch, length, HEADS, width), (batch, keys or length, groups, width)
    shapes = (queries, shared, shared, queries)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(k, shapes, strict=True)]


def value_and_gradients(fn, query, key, value, d_out):
    @jax.jit
    def run(query, key, value, d_out):
        out, pullback = jax.vjp(fn, query, key, value)
        return out, *pullback(d_out.astype(out.dtype))

    return run(query, key, value, d_out)


def distance(got, wanted):
    """The largest difference of each array, relative to its largest magnitude."""
    pairs = [(np.asarray(g, np.float32), np.asarray(w, np.float32)) for g, w in zip(got, wanted, strict=True)]
    return [float(np.abs(g - w).max() / np.abs(w).max()) for g, w in pairs]


def padding(length, *starts):
    """[B, 1, M]: the first `start` keys of each row hidden."""
    return jnp.stack([jnp.arange(length) >= start for start in starts])[:, None]


def full(batch, length, keys):
    """A mask of its own for every example and position, each with at least one key."""
    mask = jax.random.bernoulli(jax.random.key(9), 0.5, (batch, length, keys))
    return mask.at[..., 0].set(True)


MASKS = {
    "no mask": {},
    "padding": {"mask": padding(6, 0, 4)},
    "one padding for all": {"mask": padding(6, 2)},
    "one mask for all": {"mask": full(1, 6, 6)},
    "a mask each": {"mask": full(2, 6, 6)},
    "causal": {"causal": True},
    "causal, padding at the end": {"causal": True, "mask": padding(6, 0, 3)[..., ::-1]},
    "cache": {"mask": (jnp.arange(9) <= 3 + jnp.arange(6)[:, None])[None]},
    "cache, a mask each": {"mask": full(2, 6, 9)},
}
CASES = [(name, 2) for name in MASKS] + [(name, groups) for name in ("no mask", "a mask each") for groups in (4, 1)]


@pytest.mark.parametrize("masks, groups", CASES)
def test_attention_is_the_formula(masks, groups):
    """Values and gradients of a CPU's form ('auto' here) and of XLA's."""
    changes = MASKS[masks]
    arrays = inputs(groups, keys=changes["mask"].shape[2] if "mask" in changes else 6)
    wanted = value_and_gradients(functools.partial(formula, **changes), *arrays)
    for implementation in ("auto", "xla"):
        got = value_and_gradients(functools.partial(attention, implementation=implementation, **changes), *arrays)
        assert max(distance(got, wanted)) < 1e-5, implementation


@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_half_precision(implementation):
    arrays, mask = inputs(2, dtype=jnp.bfloat16), padding(6, 0, 4)
    got = value_and_gradients(functools.partial(attention, mask=mask, implementation=implementation), *arrays)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    assert max(distance(got, value_and_gradients(functools.partial(formula, mask=mask), *arrays))) < 0.02


@pytest.mark.parametrize("masks, groups", [("a mask each", 2), ("causal", 4), ("cache", 1)])
def test_rounded_operands(masks, groups):
    """A CPU rounds what it multiplies; results and gradients stay float32, and near those of the formula."""
    changes = MASKS[masks]
    arrays = inputs(groups, keys=changes["mask"].shape[2] if "mask" in changes else 6)
    got = value_and_gradients(functools.partial(attention, products="bfloat16", **changes), *arrays)
    assert all(x.dtype == jnp.float32 for x in got)
    assert 1e-5 < max(distance(got, value_and_gradients(functools.partial(formula, **changes), *arrays))) < 0.02


def test_rounded_weights_have_the_sum_one():
    """They are divided by the sum of what they were rounded to: the mean of ones is one."""
    query, key, value, _ = inputs(4, length=50)
    out = attention(query, key, jnp.ones_like(value), products="bfloat16")
    np.testing.assert_allclose(out, 1, rtol=1e-6)


SPLASH = {
    "4 no mask": (4, {}),
    "4 causal": (4, {"causal": True}),
    "2 no mask": (2, {}),
    "2 padding": (2, {"mask": padding(256, 0, 100)}),
    "1 causal, padding at the end": (1, {"causal": True, "mask": padding(256, 0, 100)[..., ::-1]}),
}


@pytest.mark.parametrize("case", SPLASH)
def test_splash_attention_is_the_formula(case, monkeypatch):
    """Values and gradients, over several blocks."""
    monkeypatch.setattr(module, "BLOCK", 128)
    groups, changes = SPLASH[case]
    arrays = inputs(groups, length=256, width=64)
    got = value_and_gradients(functools.partial(splash, interpret=True, **changes), *arrays)
    assert max(distance(got, value_and_gradients(functools.partial(formula, **changes), *arrays))) < 1e-5


def test_a_position_without_keys_is_finite_and_changes_no_other():
    """Padding at the start of a causal row: the first positions see nothing, and nothing comes of it."""
    *arrays, d_out = inputs(2, length=128, width=64)
    changes = {"causal": True, "mask": padding(128, 0, 5)}
    d_out = d_out.at[1, :5].set(0)  # the loss does not count them
    got = {
        "cpu": functools.partial(attention, **changes),
        "xla": functools.partial(attention, implementation="xla", **changes),
        "splash": functools.partial(splash, interpret=True, **changes),
    }
    *alone, d_alone = (x[1:, 5:] for x in (*arrays, d_out))
    wanted = value_and_gradients(functools.partial(formula, causal=True), *alone, d_alone)
    for name, fn in got.items():
        found = value_and_gradients(fn, *arrays, d_out)
        assert all(np.isfinite(x).all() for x in found), name
        assert max(distance([x[1:, 5:] for x in found], wanted)) < 1e-5, name


# Which form is chosen


def shapes(groups=4, *, length=256, keys=None, width=64, dtype=jnp.bfloat16):
    query = jax.ShapeDtypeStruct((2, length, HEADS, width), dtype)
    key = jax.ShapeDtypeStruct((2, keys or length, groups, width), dtype)
    return query, key, key


def chosen(*arrays, **options):
    """Names of the primitives in attention's trace."""
    return str(jax.make_jaxpr(functools.partial(attention, **options))(*arrays))


def test_the_form_follows_the_platform_compiled_for(monkeypatch):
    assert "pallas_call" not in chosen(*shapes())
    monkeypatch.setattr(traced, "platform", lambda: "tpu")
    for groups in (4, 2, 1):
        assert "pallas_call" in chosen(*shapes(groups))
    assert "pallas_call" in chosen(*shapes(dtype=jnp.float32))
    assert "pallas_call" in chosen(*shapes(2), mask=padding(256, 0, 3))
    assert "pallas_call" in chosen(*shapes(2), mask=padding(256, 3), causal=True)
    # Lengths, head widths and masks that it has no form for; and where XLA's is asked for.
    assert "pallas_call" not in chosen(*shapes(length=200))
    assert "pallas_call" not in chosen(*shapes(width=48))
    assert "pallas_call" not in chosen(*shapes(length=128, keys=256))
    assert "pallas_call" not in chosen(*shapes(), mask=full(2, 256, 256))
    assert "pallas_call" not in chosen(*shapes(), implementation="xla")


CUDNN = {
    "half precision": ({}, True),
    "grouped heads": ({"groups": 2}, True),
    "f32": ({"dtype": jnp.float32}, False),
    "odd length": ({"length": 255}, False),
    "width no multiple of 8": ({"width": 60}, False),
    "wide heads": ({"width": 256}, False),
    "cache": ({"length": 128, "keys": 256}, False),
}


@pytest.mark.parametrize("case", CUDNN)
def test_cudnn_is_chosen_where_it_fits(case, monkeypatch):
    changes, fits = CUDNN[case]
    query, key, value = shapes(**changes)
    assert cudnn_fits(query, key) == fits
    monkeypatch.setattr(traced, "platform", lambda: "gpu")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    assert ("dot_product_attention_fwd" in chosen(query, key, value)) == fits


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(
    "mask, causal, wanted",
    [
        (None, False, "fmhaSoftmax"),
        (None, True, "fmhaSoftmax"),
        ((2, 1, 64), False, "fmhaScaleBiasSoftmax"),
        ((1, 1, 64), True, "fmhaScaleBiasSoftmax"),
        ((2, 64, 64), False, "fmhaScaleBiasSoftmax"),
    ],
)
def test_cudnn_lowers_for_gpus(mask, causal, wanted, groups, monkeypatch):
    """Forward and backward kernels are called, and gradients have the shapes of what they belong to."""
    monkeypatch.setattr(traced, "platform", lambda: "gpu")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    loss = lambda q, k, v, *mask: jnp.sum(attention(q, k, v, *mask, causal=causal).astype(jnp.float32))
    names = [f"__cudnn${wanted}", f"__cudnn${wanted}Backward"]
    arrays = *shapes(groups, length=64), *([] if mask is None else [jax.ShapeDtypeStruct(mask, bool)])
    checks = [DisabledSafetyCheck.custom_call(name) for name in names]
    lowered = export(jax.jit(jax.grad(loss, (0, 1, 2))), platforms=["cuda"], disabled_checks=checks)(*arrays)
    assert sorted(set(re.findall(r"__cudnn\$\w+", lowered.mlir_module()))) == names
    assert [x.shape for x in lowered.out_avals] == [x.shape for x in arrays[:3]]


# Rematerialisation


def calls(jaxpr, name):
    """How many of a primitive, without those in calls that have no result: jax 0.10 leaves these to the compiler."""
    count = sum(eqn.primitive.name.startswith(name) for eqn in jaxpr.eqns)
    for eqn in jaxpr.eqns:
        if eqn.outvars and not eqn.primitive.name.startswith(name):
            inner = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
            count += sum(calls(body, name) for body in inner if hasattr(body, "eqns"))
    return count


@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize(
    "platform, primitive, counts",
    [
        ("tpu", "pallas_call", (3, 4)),  # one forward kernel and the backward pair, none twice
        ("cpu", "dot_general", (7, 9)),  # two products, five backwards
    ],
)
def test_saving_attention_repeats_nothing_of_it(platform, primitive, counts, groups, monkeypatch):
    """Under a policy that saves the name, and without it."""
    monkeypatch.setattr(traced, "platform", lambda: platform)
    saved = jax.checkpoint_policies.save_only_these_names("attention")

    def count(policy):
        block = jax.checkpoint(lambda q, k, v: attention(q, k, v), policy=policy)  # new: jax keeps traces of functions
        loss = lambda q, k, v: jnp.sum(block(jnp.sin(q), jnp.sin(k), jnp.sin(v)) ** 2)
        return calls(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*shapes(groups, dtype=jnp.float32)).jaxpr, primitive)

    assert (count(saved), count(None)) == counts


def test_a_light_model_keeps_what_cudnn_saves(monkeypatch):
    """Its logsumexp has no name: the kernel's results are kept as they are, and it is called once."""
    monkeypatch.setattr(traced, "platform", lambda: "gpu")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)

    def count(remat):
        model = DiT(8, width=16, depth=1, heads=2, cond=4, dtype="bfloat16", remat=remat)
        params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0)))
        loss = lambda params, x: jnp.sum(model.apply(params, x).astype(jnp.float32))
        x = jax.ShapeDtypeStruct((2, 4, 16), jnp.float32)
        return calls(jax.make_jaxpr(jax.grad(loss))(params, x).jaxpr, "dot_product_attention_fwd")

    assert [count(remat) for remat in ("none", "light", "block")] == [1, 1, 2]


def test_a_program_is_for_the_default_device(monkeypatch):
    """On a machine with a GPU, beside which a user asks for the CPU."""
    cpu = jax.devices("cpu")[0]
    monkeypatch.setattr(jax, "default_backend", lambda: "cuda")
    assert traced.platform() == "gpu"
    for device in ("cpu", cpu):
        with jax.default_device(device):
            assert traced.platform() == "cpu"


# Meshes


def child():
    """{case: distance from one device} as JSON: a CPU's form split by the compiler, splash attention by hand."""
    from smdlm.mesh.rules import MeshConfig

    out = {}
    for platform, length, width in (("cpu", 6, 8), ("tpu", 128, 64)):
        traced.platform = lambda platform=platform: platform
        module.splash = functools.partial(splash, interpret=True)
        for groups in (4, 2, 1):
            for name, mask in (("no mask", None), ("padding", padding(length, *range(4)))):
                arrays = inputs(groups, batch=4, length=length, width=width)
                fn = functools.partial(attention, mask=mask)
                wanted = value_and_gradients(functools.partial(formula, mask=mask), *arrays)
                with jax.set_mesh(MeshConfig(2, 2, 2).make()):
                    got = value_and_gradients(fn, *arrays)
                    shards = {s.data.shape for s in got[0].addressable_shards}
                out[f"{platform}, {groups} groups, {name}"] = max(distance(got, wanted)), sorted(shards)
    print(json.dumps(out))


def test_heads_and_examples_are_split_without_a_change(eight_devices):
    measured, _ = eight_devices
    assert len(measured) == 12
    for case, (distance, shards) in measured.items():
        assert distance < 1e-5, case
        if case.startswith("tpu"):  # one of four rows each; half of the heads where two key heads can be split
            heads = HEADS if "1 groups" in case else HEADS // 2
            assert shards == [[1, 128, heads, 64]], case


if __name__ == "__main__":
    child()
