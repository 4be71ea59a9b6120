"""The DiT against a NumPy forward pass in float64, and the properties that sampling and training rely on."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import V, assert_close, make_denoiser, make_params

from smdlm.denoiser import Denoiser
from smdlm.models.dit import DiT
from smdlm.models.layers import Dropout, rotary

B, L = 2, 6


def tokens(batch=B, length=L, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, (batch, length)), jnp.int32)


@pytest.fixture(scope="module")
def bidirectional():
    denoiser = make_denoiser()
    return denoiser, make_params(denoiser), jax.jit(denoiser)


@pytest.fixture(scope="module")
def causal():
    denoiser = make_denoiser(None, causal=True)
    return denoiser, make_params(denoiser), jax.jit(denoiser)


# An independent forward pass


def layer_norm(x, scale):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def rotate(x):
    """[L, E]: pair (i, i + E/2) turned by position * 10000^(-2i/E)."""
    half = x.shape[1] // 2
    angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1)


def numpy_forward(p, ids, causal, sigma=0.0):
    """One sequence, loops over layers and heads, from the facts of the public MDLM code."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
    x = p["embed"][ids]
    width = x.shape[1]
    if not causal:
        angle = sigma * np.exp(-math.log(10000) * np.arange(128) / 128)
        c = np.concatenate([np.cos(angle), np.sin(angle)])
        c = silu(c @ p["sigma_map"]["in"]["kernel"] + p["sigma_map"]["in"]["bias"])
        c = silu(c @ p["sigma_map"]["out"]["kernel"] + p["sigma_map"]["out"]["bias"])
    for n in range(p["blocks"]["norm1"]["scale"].shape[0]):
        b = jax.tree.map(lambda y, n=n: y[n], p["blocks"])
        modulation = np.zeros((6, width))
        modulation[[2, 5]] = 1  # gates
        if not causal:
            modulation = np.einsum("c,csd->sd", c, b["adaln"]["kernel"]) + b["adaln"]["bias"]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        h = layer_norm(x, b["norm1"]["scale"]) * (1 + scale1) + shift1
        heads = []
        for head in range(b["qkv"]["kernel"].shape[2]):
            q, k, v = (h @ b["qkv"]["kernel"][:, i, head] for i in range(3))
            scores = rotate(q) @ rotate(k).T / np.sqrt(q.shape[1])
            if causal:
                scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
            heads.append(softmax(scores) @ v)
        x = x + gate1 * np.einsum("hle,hed->ld", np.stack(heads), b["attention_out"]["kernel"])
        h = layer_norm(x, b["norm2"]["scale"]) * (1 + scale2) + shift2
        h = gelu(h @ b["mlp_in"]["kernel"] + b["mlp_in"]["bias"])
        x = x + gate2 * (h @ b["mlp_out"]["kernel"] + b["mlp_out"]["bias"])
    x = layer_norm(x, p["final"]["norm"]["scale"])
    if not causal:
        shift, scale = np.einsum("c,csd->sd", c, p["final"]["adaln"]["kernel"]) + p["final"]["adaln"]["bias"]
        x = x * (1 + scale) + shift
    return x


@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
def test_forward_is_the_references(kind, request):
    _, params, forward = request.getfixturevalue(kind)
    got = forward(params, tokens())
    for row, ids in zip(got, tokens(), strict=True):
        wanted = numpy_forward(params["backbone"], np.asarray(ids), kind == "causal")
        np.testing.assert_allclose(row, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())


def test_sigma_conditions_each_row(bidirectional):
    denoiser, params, forward = bidirectional
    got = jax.jit(lambda p, x, s: denoiser(p, x, cond=s))(params, tokens(), jnp.array([0.0, 0.7]))
    np.testing.assert_allclose(got[0], forward(params, tokens())[0], rtol=1e-4, atol=1e-4)  # None is 0
    wanted = numpy_forward(params["backbone"], np.asarray(tokens()[1]), False, 0.7)
    np.testing.assert_allclose(got[1], wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())


def test_parameters_of_the_paper():
    """The reference's counts at V = 50258: 169,627,218 for the DiT, 162,246,482 for its AR baseline."""
    for causal, count in ((False, 169_627_218), (True, 162_246_482)):
        model = DiT(50258, causal=causal, vocab_multiple=1)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == count


def test_start():
    """Head and adaLN start at zero: all logits 0 and each block the identity; the rest as torch draws it."""
    denoiser = make_denoiser()
    params = nn.meta.unbox(jax.jit(denoiser.init)(jax.random.key(0)))
    zero = {jax.tree_util.keystr(k) for k, x in jax.tree_util.tree_leaves_with_path(params) if not np.any(x)}
    assert len(zero) == 6 and all("adaln" in name or "head" in name for name in zero)
    hidden = jax.jit(denoiser)(params, tokens())
    assert not np.any(denoiser.model.head(params["backbone"]).logits(hidden))
    rows = np.asarray(params["backbone"]["embed"])[np.asarray(tokens())]
    np.testing.assert_allclose(hidden, layer_norm(rows, 1.0), atol=1e-4)
    for name, fan_in in (("mlp_in", 16), ("mlp_out", 64), ("attention_out", 16)):
        kernel = np.asarray(params["backbone"]["blocks"][name]["kernel"])
        assert 0.9 * fan_in**-0.5 < np.abs(kernel).max() <= fan_in**-0.5
        assert np.any(kernel[0] != kernel[1])  # layers start apart


# Structure


def test_layers_are_stacked_and_ordered(bidirectional):
    """That they are applied in order is in the NumPy forward; here, that order matters at all."""
    denoiser, params, forward = bidirectional
    blocks = params["backbone"]["blocks"]
    assert all(x.shape[0] == denoiser.model.depth for x in jax.tree.leaves(blocks))
    flipped = {**params, "backbone": {**params["backbone"], "blocks": jax.tree.map(lambda x: x[::-1], blocks)}}
    assert np.abs(forward(flipped, tokens()) - forward(params, tokens())).max() > 0.1


def test_remat_changes_nothing(bidirectional):
    denoiser, params, _ = bidirectional
    x = tokens()

    def grads(**changes):
        model = dataclasses.replace(denoiser.model, **changes)
        other = dataclasses.replace(denoiser, model=model)
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(other(p, x)))))(params)

    wanted = grads()
    for changes in ({"remat": "light"}, {"remat": "block"}, {"unroll": True}, {"remat": "none", "unroll": True}):
        assert_close(grads(**changes), wanted, rtol=1e-3, atol=1e-3)  # of gradients up to 50


def test_remat_recomputes(bidirectional):
    """The backward pass holds fewer saved arrays: what `jax.vjp` keeps of the forward pass."""
    denoiser, params, _ = bidirectional

    def saved(remat):
        model = dataclasses.replace(denoiser.model, remat=remat)
        other = dataclasses.replace(denoiser, model=model)
        # The pullback is a pytree whose leaves are the residuals.
        pullback = jax.eval_shape(lambda p: jax.vjp(lambda q: other(q, tokens(4, 64)), p)[1], params)
        return sum(math.prod(x.shape) for x in jax.tree.leaves(pullback))

    sizes = [saved(remat) for remat in ("none", "light", "block")]
    assert sizes[0] > 1.3 * sizes[1] > 1.3**2 * sizes[2]


def test_padding_of_the_vocabulary_changes_nothing(bidirectional):
    denoiser, params, forward = bidirectional
    model = dataclasses.replace(denoiser.model, vocab_multiple=64)
    padded = Denoiser(model, V, V - 1, denoiser.softmask)
    big = make_params(padded, seed=9)  # noise in the padding
    p, q = params["backbone"], big["backbone"]
    backbone = {
        **p,
        "embed": q["embed"].at[:V].set(p["embed"]),
        "head": {
            "kernel": q["head"]["kernel"].at[:, :V].set(p["head"]["kernel"]),
            "bias": q["head"]["bias"].at[:V].set(p["head"]["bias"]),
        },
    }
    big = {**big, "backbone": backbone}
    hidden = jax.jit(padded)(big, tokens())
    np.testing.assert_array_equal(hidden, forward(params, tokens()))
    probs = jax.nn.softmax(padded.head(big).logits(hidden))
    assert probs.shape[-1] == 64 and not np.any(probs[..., V - 1 :])
    wanted = jax.nn.softmax(denoiser.head(params).logits(hidden))
    np.testing.assert_allclose(probs[..., :V], wanted, rtol=1e-4, atol=1e-7)


def test_dropout(bidirectional):
    """Off without a key, whatever the rate; on with one; another key, another result."""
    denoiser, params, forward = bidirectional
    model = dataclasses.replace(denoiser.model, dropout=0.5)
    noisy = dataclasses.replace(denoiser, model=model)
    np.testing.assert_allclose(jax.jit(noisy)(params, tokens()), forward(params, tokens()), rtol=1e-4, atol=1e-4)
    draw = jax.jit(lambda k: noisy(params, tokens(), dropout_key=k))
    one, two = draw(jax.random.key(0)), draw(jax.random.key(1))
    np.testing.assert_array_equal(one, draw(jax.random.key(0)))
    assert np.abs(one - two).max() > 0.1 and np.abs(one - forward(params, tokens())).max() > 0.1


def test_bidirectional_model_sees_everything(bidirectional):
    _, params, forward = bidirectional
    x = tokens()
    for changed in (0, L - 1):
        other = x.at[:, changed].set((x[:, changed] + 1) % V)
        moved = np.abs(forward(params, x) - forward(params, other)).max(-1)
        assert np.all(moved > 1e-5)


def test_rows_do_not_mix(bidirectional):
    _, params, forward = bidirectional
    x = tokens()
    other = x.at[1].set((x[1] + 1) % V)
    np.testing.assert_array_equal(forward(params, x)[0], forward(params, other)[0])


# Causal


def test_causal_model_ignores_the_future(causal):
    _, params, forward = causal
    x = tokens()
    for cut in range(1, L):
        other = x.at[:, cut:].set((x[:, cut:] + 3) % V)
        one, two = forward(params, x), forward(params, other)
        np.testing.assert_array_equal(one[:, :cut], two[:, :cut])
        assert np.abs(one[:, cut:] - two[:, cut:]).max() > 1e-3


@pytest.mark.parametrize("parts", [[1] * L, [3, 1, 2], [L]])
def test_kv_cache_is_the_full_forward(causal, parts):
    """In any pieces, with one program for all pieces of a size: where a piece starts is a value."""
    denoiser, params, forward = causal
    decode = jax.jit(lambda params, ids, cache, start: denoiser(params, ids, cache=cache, start=start))
    cache, start, hidden = denoiser.model.cache(B, L + 2), 0, []  # a cache longer than what is in it
    for size in parts:
        part, cache = decode(params, tokens()[:, start : start + size], cache, start)
        hidden.append(part)
        start += size
    np.testing.assert_allclose(jnp.concatenate(hidden, 1), forward(params, tokens()), rtol=1e-4, atol=1e-4)
    assert decode._cache_size() == len(set(parts))


# Masks and padding


def test_kv_cache_takes_any_mask(bidirectional):
    """A block that is denoised behind a finished one: two pieces through the cache are one forward with their mask.

    What a piece had written is written anew when it comes again, so that a block can be denoised step by step.
    """
    denoiser, params, _ = bidirectional
    first, slots = 4, L + 2
    mask = (jnp.arange(L) < jnp.where(jnp.arange(L) < first, first, L)[:, None])[None]
    wanted = jax.jit(lambda p, x: denoiser(p, x, mask=mask))(params, tokens())
    cached = jax.jit(lambda p, x, cache, start, mask: denoiser(p, x, cache=cache, start=start, mask=mask))
    written = lambda count: (jnp.arange(slots) < count)[None, None]
    one, cache = cached(params, tokens()[:, :first], denoiser.model.cache(B, slots), 0, written(first))
    for seed in (1, 0):
        two, cache = cached(params, tokens(seed=seed)[:, first:], cache, first, written(L))
    np.testing.assert_allclose(jnp.concatenate([one, two], 1), wanted, rtol=1e-4, atol=1e-4)
    plain = jax.jit(denoiser)(params, tokens())
    assert np.abs(plain - wanted)[:, :first].max() > 1e-2, "the mask says nothing"


def left_padded(ids, padding):
    """(rows moved right by `padding` [B], with junk before them; positions [B, L]; mask [B, 1, L])."""
    columns = jnp.arange(ids.shape[1])[None]
    moved = jnp.stack([jnp.roll(row, n) for row, n in zip(ids, padding, strict=True)])
    start = jnp.asarray(padding)[:, None]
    return moved, columns - start, (columns >= start)[:, None]


@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
def test_left_padded_rows_are_the_rows_alone(kind, request):
    denoiser, params, forward = request.getfixturevalue(kind)
    ids, positions, mask = left_padded(tokens(), [0, 2])
    got = jax.jit(lambda p, *xs: denoiser(p, xs[0], positions=xs[1], mask=xs[2]))(params, ids, positions, mask)
    for row, n in ((0, 0), (1, 2)):
        alone = forward(params, ids[row : row + 1, n:])[0]
        np.testing.assert_allclose(got[row, n:], alone, rtol=1e-4, atol=1e-4)


def test_left_padded_rows_through_the_cache(causal):
    """The padding of prompts of several lengths stays hidden while one token after another is added."""
    denoiser, params, forward = causal
    ids, positions, mask = left_padded(tokens(), [0, 2])
    cache, hidden = denoiser.model.cache(B, L), []
    step = jax.jit(lambda p, x, at, cache, start: denoiser(p, x, positions=at, mask=mask, cache=cache, start=start))
    for piece in (slice(0, 3), *(slice(i, i + 1) for i in range(3, L))):
        part, cache = step(params, ids[:, piece], positions[:, piece], cache, piece.start)
        hidden.append(part)
    got = jnp.concatenate(hidden, 1)
    for row, n in ((0, 0), (1, 2)):
        np.testing.assert_allclose(got[row, n:], forward(params, ids[row : row + 1, n:])[0], rtol=1e-4, atol=1e-4)


# Rotary embedding


def test_rotary_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))
    at = lambda x, position: rotary(x, jnp.array([position]))
    product = lambda i, j: float(jnp.sum(at(q, i) * at(k, j)))
    np.testing.assert_allclose([product(7, 3), product(1004, 1000)], product(4, 0), rtol=1e-3)
    assert abs(product(4, 0) - product(5, 0)) > 1e-3


def test_rotary_angles_are_f32_for_bf16_inputs():
    """At position 1000 a bf16 angle is off by radians."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 1, 8)), jnp.float32)
    positions = jnp.array([999, 1000])
    exact = rotary(x, positions)
    got = rotary(x.astype(jnp.bfloat16), positions)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 15},
        {"heads": 3},
        {"width": 6, "heads": 2},
        {"depth": 0},
        {"dropout": 1.0},
        {"dtype": "float16"},
        {"remat": "all"},
        {"vocab_size": 0},
        {"vocab_multiple": 0},
        {"cond": 0},
    ],
)
def test_fields_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="got .*, wanted"):
        DiT(**{"vocab_size": V, "width": 16, "heads": 2, **wrong})


# Blocks


def test_dropout_keeps_the_mean_and_has_no_visible_correlation():
    """Counts and neighbours (keys, rows, columns, also at distances that are powers of two) within 4.5 deviations."""
    layer = Dropout(0.1)
    draw = jax.jit(lambda key: layer.apply({}, jnp.ones((4, 64, 96)), rngs={"dropout": key}))
    out = np.stack([np.asarray(draw(jax.random.fold_in(jax.random.key(0), i))) for i in range(40)])
    assert set(np.unique(out).round(6)) == {0.0, np.float32(1 / 0.9).round(6)}
    noise = (out > 0) - 0.9
    assert abs(noise.sum()) < 4.5 * np.sqrt(noise.size * 0.09)
    pairs = {f"axis {a}": (np.delete(noise, 0, a), np.delete(noise, -1, a)) for a in range(4)}
    for distance in (2, 4, 8, 16, 32):
        pairs |= {f"rows {distance}": (noise[:, :, distance:], noise[:, :, :-distance])}
        pairs |= {f"columns {distance}": (noise[..., distance:], noise[..., :-distance])}
    for name, (a, b) in pairs.items():
        assert abs((a * b).sum()) < 4.5 * 0.09 * np.sqrt(a.size), name
