"""GPT-2 against a NumPy forward pass in float64, its cache, and its folders."""

import dataclasses
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import READOUT, assert_close, make_batch, make_params, make_training
from flops_test import products
from safetensors.numpy import save_file

from smdlm.convert import __main__ as convert
from smdlm.convert import folders
from smdlm.convert.streams import read_folder, read_header
from smdlm.denoiser import Denoiser
from smdlm.models.gpt2 import GPT2
from smdlm.objective import NextToken

B, L, V = 2, 7, 24
MODEL = GPT2(V, 16, 2, heads=4, positions=12, vocab_multiple=1)
DENOISER = Denoiser(MODEL, V, V - 1)
CONFIG = {"model_type": "gpt2", "vocab_size": V - 1, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 12}


@pytest.fixture(scope="module")
def params():
    return make_params(DENOISER)


def tokens(seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V - 1, (B, L)), jnp.int32)


# An independent forward pass, of the tensors as Hugging Face names and stores them


def random_tensors(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"wte.weight": (V - 1, 16), "wpe.weight": (12, 16), "ln_f.weight": (16,), "ln_f.bias": (16,)}
    for i in range(2):
        for name, (inputs, outputs) in {
            "attn.c_attn": (16, 48),
            "attn.c_proj": (16, 16),
            "mlp.c_fc": (16, 64),
            "mlp.c_proj": (64, 16),
        }.items():
            shapes |= {f"h.{i}.{name}.weight": (inputs, outputs), f"h.{i}.{name}.bias": (outputs,)}
        shapes |= {f"h.{i}.{norm}.{part}": (16,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    is_norm = lambda name: "ln_" in name and name.endswith("weight")
    return {name: np.float32(is_norm(name) + 0.4 * rng.normal(size=shape)) for name, shape in shapes.items()}


def layer_norm(x, t, name):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * t[f"{name}.weight"] + t[f"{name}.bias"]


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def numpy_logits(tensors, ids, heads=4):
    """One sequence [L] -> [L, V]."""
    t = {name: value.astype(np.float64) for name, value in tensors.items()}
    conv = lambda x, name: x @ t[f"{name}.weight"] + t[f"{name}.bias"]
    x = t["wte.weight"][ids] + t["wpe.weight"][: len(ids)]
    for i in range(2):
        parts = np.split(conv(layer_norm(x, t, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, axis=1)
        seen = []
        for q, k, v in zip(*(np.split(part, heads, axis=1) for part in parts), strict=True):
            scores = np.where(np.tri(len(ids), dtype=bool), q @ k.T / np.sqrt(q.shape[1]), -np.inf)
            seen.append(softmax(scores) @ v)
        x = x + conv(np.concatenate(seen, axis=1), f"h.{i}.attn.c_proj")
        h = conv(layer_norm(x, t, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + conv(h, f"h.{i}.mlp.c_proj")
    return layer_norm(x, t, "ln_f") @ t["wte.weight"].T


def write(folder, tensors, prefix="", **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}, indent=2))
    save_file({prefix + name: value for name, value in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_folder_gives_the_references_logits(tmp_path, prefix):
    """With or without the prefix, and with what old files keep beside the weights."""
    tensors = random_tensors()
    old = {"h.0.attn.bias": np.tri(12, dtype=np.float32)[None, None]}
    folder = write(tmp_path / "gpt2", {**tensors, **old}, prefix)
    found = folders.find("gpt2", folder, *read_folder(folder), None)
    assert found.model == dataclasses.replace(MODEL, vocab_multiple=128) and found.meta["mask_id"] == V - 1
    whole = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf.whole()), tree, is_leaf=is_streamed)
    params = whole(found.tree)
    hidden = jax.jit(found.model.apply)(params, found.model.table(params)[tokens()])
    logits = found.model.head(params).logits(hidden)[..., : V - 1]
    for row, ids in zip(logits, tokens(), strict=True):
        wanted = numpy_logits(tensors, np.asarray(ids))
        np.testing.assert_allclose(row, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    # The mask behind the vocabulary is the mean of all rows.
    np.testing.assert_allclose(params["embed"][V - 1], tensors["wte.weight"].mean(0), rtol=1e-5, atol=1e-6)


def is_streamed(leaf):
    return hasattr(leaf, "whole")


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_there_and_back(tmp_path, prefix):
    folder = write(tmp_path / "gpt2", random_tensors(), prefix)
    assert convert.main(["import", "gpt2", str(folder), str(tmp_path / "run")]) == 0
    assert convert.main(["export", "gpt2", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    wanted, got = (read_header(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert set(got) == set(wanted)
    assert all(np.array_equal(got[name].read(), wanted[name].read()) for name in wanted)
    assert (tmp_path / "out" / "config.json").read_text() == (folder / "config.json").read_text()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "opt"}, "got model_type 'opt', wanted 'gpt2'"),
        ({"n_head": None}, "got no n_head, wanted all sizes"),
        ({"n_head": 3}, "got sizes that fit no model"),
        ({"activation_function": "relu"}, "got activation_function 'relu', wanted 'gelu_new'"),
        ({"n_inner": 32}, "got n_inner 32, wanted 64"),
        ({"n_layer": 3}, "h.2.attn.c_attn.weight: got nothing, wanted float32"),
    ],
)
def test_another_model_is_refused(tmp_path, capsys, changes, message):
    folder = write(tmp_path / "gpt2", random_tensors(), **changes)
    with pytest.raises(SystemExit):
        convert.main(["import", "gpt2", str(folder), str(tmp_path / "run")])
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_cache_is_the_whole_forward(params):
    step, cache, parts, start = jax.jit(DENOISER), MODEL.cache(B, L), [], 0
    for size in (3, 1, 3):
        hidden, cache = step(params, tokens()[:, start : start + size], cache=cache, start=start)
        parts.append(hidden)
        start += size
    np.testing.assert_allclose(jnp.concatenate(parts, 1), jax.jit(DENOISER)(params, tokens()), rtol=1e-4, atol=1e-5)


def test_a_padded_row_equals_the_lone_row(params):
    canvas = jnp.concatenate([jnp.full((B, 3), 5), tokens()[:, :4]], axis=1)
    attend = jnp.broadcast_to(jnp.arange(7) >= 3, (B, 7))
    positions = jnp.maximum(attend.cumsum(1) - 1, 0)
    got = jax.jit(DENOISER)(params, canvas, positions=positions, mask=attend[:, None])
    alone = jax.jit(DENOISER)(params, tokens()[:, :4])
    np.testing.assert_allclose(got[:, 3:], alone, rtol=1e-4, atol=1e-5)


def test_remat_and_kernel_change_nothing(params):
    def gradients(**changes):
        model = dataclasses.replace(MODEL, **changes)
        loss = lambda p: jnp.sin(model.apply(p, model.table(p)[tokens()])).sum()
        return jax.jit(jax.grad(loss))(params["backbone"])

    wanted = gradients(remat="none")
    for changes in ({"remat": "light"}, {"remat": "block"}, {"remat": "none", "attention": "xla"}, {"unroll": True}):
        assert_close(gradients(**changes), wanted, rtol=1e-4, atol=1e-4)


def test_it_learns():
    """A step of Muon and AdamW each, which know all of its parameters."""
    for name in ("adamw", "muon"):
        step, fresh = make_training(NextToken(DENOISER, READOUT), name=name)
        state, losses, batch = fresh(), [], make_batch(4, 8, V)
        for _ in range(5):
            state, metrics = step(state, batch)
            losses.append(float(metrics["train/loss"]))
        assert losses[-1] < losses[0]


def test_sizes():
    """GPT-2 small has 124,439,808 parameters; the products of the forward are counted one by one."""
    shapes = nn.meta.unbox(jax.eval_shape(GPT2(50_257, vocab_multiple=1).init, jax.random.key(0)))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == 124_439_808
    model = dataclasses.replace(MODEL, width=64, positions=96)
    backbone = make_params(Denoiser(model, V, V - 1))["backbone"]
    counted = products(jax.make_jaxpr(model.apply)(backbone, jnp.zeros((2, 96, 64))).jaxpr) / (2 * 96)
    assert model.flops(96) == pytest.approx(counted - 2 * model.depth * 96 * 64, rel=0.01)


def test_an_input_longer_than_the_table_is_refused(params):
    with pytest.raises(ValueError, match="model.positions: got an input of 13 positions for a table of 12"):
        MODEL.apply(params["backbone"], jnp.zeros((1, 13, 16)))
    with pytest.raises(ValueError, match="got 3, wanted a divisor of model.width, 16"):
        GPT2(V, 16, heads=3)
