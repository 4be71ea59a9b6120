"""The Llama and Qwen2 family against a NumPy forward pass in float64, and the properties that its users rely on.

Eight forced CPU devices (this file as a program) prove that no mesh changes a loss and that the parameters are split.
"""

import dataclasses
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import READOUT, SOFTMASK, assert_close, make_batch, make_params, make_training
from flops_test import products

from smdlm.denoiser import Denoiser
from smdlm.mesh.arrays import place
from smdlm.mesh.rules import MeshConfig
from smdlm.models.decoder import Decoder
from smdlm.objective import NextToken, SoftMaskedDiffusion

B, L, V, MASK = 2, 7, 24, 20

LLAMA = Decoder(V, 26, 16, 2, heads=4, key_heads=2, hidden=24, rope_base=500.0, causal=True)
DREAM = dataclasses.replace(LLAMA, qkv_bias=True, tied=False, causal=False, shift=True, eps=1e-2)
MODELS = {"llama": LLAMA, "dream": DREAM}


def made(model):
    denoiser = Denoiser(model, V, MASK, None if model.causal else SOFTMASK)
    return denoiser, make_params(denoiser)


def tokens(batch=B, length=L, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, (batch, length)), jnp.int32)


# An independent forward pass


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def rotate(x, base):
    """[L, E]: pair (i, i + E/2) turned by position * base^(-2i/E)."""
    half = x.shape[1] // 2
    angle = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1)


def numpy_forward(model, p, ids):
    """One sequence, loops over layers and heads, from the facts of the released models; predictions in place."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
    x = p["embed"][ids]
    for n in range(model.depth):
        b = jax.tree.map(lambda y, n=n: y[n], p["blocks"])
        h = rms_norm(x, b["norm1"]["scale"], model.eps)
        heads = []
        for head in range(model.heads):
            group = head // (model.heads // model.key_heads)
            q, k, v = (
                h @ b[name]["kernel"][:, i] + (b[name]["bias"][i] if model.qkv_bias else 0)
                for name, i in (("q", head), ("k", group), ("v", group))
            )
            scores = rotate(q, model.rope_base) @ rotate(k, model.rope_base).T / np.sqrt(q.shape[1])
            if model.causal:
                scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
            heads.append(softmax(scores) @ v)
        x = x + np.einsum("hle,hed->ld", np.stack(heads), b["attention_out"]["kernel"])
        h = rms_norm(x, b["norm2"]["scale"], model.eps)
        gate = h @ b["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ b["up"]["kernel"])) @ b["down"]["kernel"]
    x = rms_norm(x, p["norm"]["scale"], model.eps)
    return np.concatenate([x[:1], x[:-1]]) if model.shift else x


@pytest.mark.parametrize("name", MODELS)
def test_forward_is_the_references(name):
    denoiser, params = made(MODELS[name])
    got = jax.jit(denoiser)(params, tokens())
    for row, ids in zip(got, tokens(), strict=True):
        wanted = numpy_forward(denoiser.model, params["backbone"], np.asarray(ids))
        np.testing.assert_allclose(row, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_a_tied_head_is_the_table():
    for model in MODELS.values():
        _, params = made(model)
        head, table = model.head(params["backbone"]), model.table(params["backbone"])
        assert np.array_equal(head.matrix.T, table) == model.tied and head.matrix.shape == (16, 26)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_equals_the_lone_row(name, side):
    """With positions that count tokens; also its first position, whose state would be shifted in from the padding."""
    denoiser, params = made(MODELS[name])
    alone = jax.jit(denoiser)(params, tokens(1, 4))
    pad = jnp.full((1, 3), 5)
    row = [pad, tokens(1, 4)] if side == "left" else [tokens(1, 4), pad]
    canvas = jnp.concatenate([jnp.concatenate(row, axis=1), tokens(1)])
    at = np.arange(3, 7) if side == "left" else np.arange(4)
    attend = np.ones((2, 7), bool)
    attend[0] = np.isin(np.arange(7), at)
    positions = np.maximum(attend.cumsum(1) - 1, 0)
    got = jax.jit(denoiser)(params, canvas, positions=positions, mask=attend[:, None])
    np.testing.assert_allclose(got[0, at], alone[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], jax.jit(denoiser)(params, tokens(1))[0], rtol=1e-4, atol=1e-5)
    assert np.isfinite(got).all()


def test_a_cache_is_the_whole_forward():
    """Causal, in parts of 3, 1 and 3 positions."""
    denoiser, params = made(LLAMA)
    step, cache, parts, start = jax.jit(denoiser), LLAMA.cache(B, L), [], 0
    assert cache.keys.shape == (2, B, L, 2, 4)
    for size in (3, 1, 3):
        part = tokens()[:, start : start + size]
        hidden, cache = step(params, part, cache=cache, start=start)
        parts.append(hidden)
        start += size
    whole = jax.jit(denoiser)(params, tokens())
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-5)


def test_a_bidirectional_cache_computes_a_block_again():
    """All slots filled by one pass, then the last positions alone: the same, but for the first one's own state."""
    denoiser, params = made(DREAM)
    whole, cache = jax.jit(denoiser)(params, tokens(), cache=DREAM.cache(B, L))
    block, _ = jax.jit(denoiser)(params, tokens()[:, 4:], cache=cache, start=4)
    np.testing.assert_allclose(block[:, 1:], whole[:, 5:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(block[:, 0], whole[:, 5], rtol=1e-4, atol=1e-5)  # that of 4 predicts 5


@pytest.mark.parametrize("name", MODELS)
def test_remat_and_kernel_change_nothing(name):
    denoiser, params = made(MODELS[name])

    def gradients(**changes):
        model = dataclasses.replace(denoiser.model, **changes)
        loss = lambda p: jnp.sin(model.apply(p, model.table(p)[tokens()])).sum()
        return jax.jit(jax.grad(loss))(params["backbone"])

    wanted = gradients(remat="none")
    for changes in ({"remat": "light"}, {"remat": "block"}, {"remat": "none", "attention": "xla"}, {"unroll": True}):
        assert_close(gradients(**changes), wanted, rtol=1e-4, atol=1e-4)


def test_half_precision():
    """Computed in bf16 it is near; kept in bf16 the parameters are, too."""
    denoiser, _ = made(DREAM)
    params = make_params(denoiser, noise=0.1)  # larger ones make the softmax sharp, and rounding them is seen more
    half = dataclasses.replace(denoiser, model=dataclasses.replace(DREAM, dtype="bfloat16", param_dtype="bfloat16"))
    shapes = nn.meta.unbox(jax.eval_shape(half.init, jax.random.key(0)))["backbone"]
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["backbone"])
    got = jax.jit(half)({**params, "backbone": stored}, tokens())
    assert got.dtype == jnp.bfloat16
    wanted = jax.jit(denoiser)(params, tokens())
    assert 0 < np.std(np.asarray(got, np.float32) - wanted) < 0.02 * np.std(wanted)


def test_an_id_without_a_token_is_never_predicted_nor_remembered():
    """The tables have 26 rows for 24 ids, and the mask is in their midst."""
    denoiser, params = made(DREAM)
    hidden = jax.jit(denoiser)(params, tokens())
    head = denoiser.head(params)
    plain = denoiser.model.head(params["backbone"]).logits(hidden)
    best = np.asarray(plain.argmax(-1))
    # Rows that would win everywhere.
    head = head.replace(matrix=head.matrix.at[:, [MASK, 24, 25]].set(100 * hidden[0, 0, :, None]))
    feedback = READOUT.feedback(head, hidden, jnp.ones((B, L), bool))
    assert not np.isin(feedback.ids, [MASK, 24, 25]).any()
    assert np.isin(best, np.arange(26)).all() and np.isfinite(feedback.probs).all()


def test_parameters_of_the_released_models():
    """Dream-7B's shards are 15,231,233,024 bytes of bf16; SmolLM2-135M has 134,515,008 parameters."""
    dream = Decoder(152_064, 0, 3584, 28, 28, 4, 18944, 1e6, 1e-6, qkv_bias=True, tied=False, shift=True)
    for model, count in ((dream, 15_231_233_024 // 2), (Decoder(49_152), 134_515_008)):
        shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0)))
        assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_the_forward(name):
    length, model = 96, dataclasses.replace(MODELS[name], width=64, hidden=96)
    _, params = made(model)
    forward = jax.make_jaxpr(model.apply)(params["backbone"], jnp.zeros((2, length, 64)))
    masked_away = 2 * model.depth * length * model.width if model.causal else 0
    assert model.flops(length) == pytest.approx(products(forward.jaxpr) / (2 * length) - masked_away, rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_listed(name):
    _, params = made(MODELS[name])
    leaves = jax.tree_util.tree_leaves_with_path(params["backbone"])
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
    matrices = MODELS[name].matrices()
    assert set(shapes) == set(matrices)
    assert {path for path, axes in matrices.items() if axes} == {p for p in shapes if p.endswith("l") and "blocks" in p}
    for path, axes in matrices.items():
        assert axes is None or sorted((0, *axes.inputs, *axes.outputs)) == list(range(len(shapes[path])))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 3}, "model.heads: got 3 for width 16"),
        ({"key_heads": 3}, "model.key_heads: got 3, wanted a divisor of model.heads, 4"),
        ({"table_rows": 23}, "model.table_rows: got 23, wanted at least 24"),
        ({"shift": True}, "model.shift: got True for a causal model"),
        ({"eps": 0.0}, "model.eps: got 0.0, wanted > 0"),
        ({"depth": 0}, "model.depth: got 0, wanted at least 1"),
        ({"param_dtype": "float16"}, "model.param_dtype: got 'float16', wanted 'float32', 'bfloat16' or 'int8'"),
        ({"remat": "all"}, "model.remat: got 'all', wanted 'none', 'light' or 'block'"),
    ],
)
def test_fields_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **changes)


def test_rows_are_padded_to_a_multiple():
    assert [Decoder(v).rows for v in (128, 129)] == [128, 256] and Decoder(129, 130).rows == 130


# ----------------------------------------------------------------------------------------------------- eight devices


def objective(name):
    denoiser, _ = made(MODELS[name])
    return NextToken(denoiser, READOUT) if name == "llama" else SoftMaskedDiffusion(denoiser, READOUT, 0.5)


def child():
    """{model: {mesh: losses, shapes of the shards}} as JSON."""
    out = {}
    for name in MODELS:
        for label, sizes in {"one": (1, 1, 1), "fsdp": (2, 4, 1), "mixed": (2, 2, 2)}.items():
            mesh = MeshConfig(*sizes).make(jax.devices()[: math.prod(sizes)])
            with jax.set_mesh(mesh):
                step, fresh = make_training(objective(name), mesh=mesh, eps=0.1)
                state, losses = fresh(), []
                for i in range(5):
                    state, metrics = step(state, place(mesh, make_batch(8, 8, V - 4, seed=i)))
                    losses.append(float(metrics["train/loss"]))
            backbone = state.params["backbone"]
            shards = {k: backbone["blocks"][k]["kernel"].addressable_shards[0].data.shape for k in ("q", "k", "down")}
            out[f"{name} {label}"] = {"losses": losses, "shards": {**shards}}
    print(json.dumps(out))


@pytest.mark.parametrize("name", MODELS)
def test_no_mesh_changes_a_loss(eight_devices, name):
    measured, _ = eight_devices
    one, fsdp, mixed = (measured[f"{name} {label}"] for label in ("one", "fsdp", "mixed"))
    assert np.ptp(one["losses"]) > 1e-2
    np.testing.assert_allclose([fsdp["losses"], mixed["losses"]], [one["losses"]] * 2, rtol=1e-5)
    assert fsdp["shards"] == {"q": [2, 4, 4, 4], "k": [2, 4, 2, 4], "down": [2, 24, 4]}
    assert mixed["shards"] == {"q": [2, 8, 2, 4], "k": [2, 8, 1, 4], "down": [2, 12, 8]}


if __name__ == "__main__":
    child()
