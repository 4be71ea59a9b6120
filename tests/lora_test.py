"""LoRA and DoRA: they start as their base, train alone, merge and unmerge, and PEFT's folders hold them."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import READOUT, assert_close, assert_identical, make_batch, make_denoiser, make_params
from decoder_test import DREAM, MASK, V
from flops_test import products

from smdlm.convert import peft
from smdlm.convert.files import FileError
from smdlm.convert.table import ConversionError
from smdlm.denoiser import Denoiser
from smdlm.models.lora import LoRA
from smdlm.objective import SoftMaskedDiffusion

CANVAS = make_batch()["tokens"]
TARGETS = ("q", "k", "v", "attention_out", "gate", "up", "down")


def decoder_base():
    return DREAM, make_params(Denoiser(DREAM, V, MASK))["backbone"]


def dit_base():
    denoiser = make_denoiser(None)
    return denoiser.model, make_params(denoiser)["backbone"]


def adapters_of(lora, base, noise=0.0):
    """Those at the start; noise moves every one of them away from it."""
    made = lora.start(base, nn.meta.unbox(jax.jit(lora.init)(jax.random.key(1))))
    leaves, structure = jax.tree.flatten(made)
    rng = np.random.default_rng(2)
    moved = [jnp.asarray(leaf + noise * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(structure, moved)


def hidden(model, params):
    return jax.jit(model.apply)(params, model.table(params)[CANVAS])


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("make, targets", [(decoder_base, TARGETS), (dit_base, ("qkv", "attention_out", "mlp_out"))])
def test_the_start_is_the_base_and_merging_is_the_same_function(make, targets, dora):
    base_model, base = make()
    lora = LoRA(base_model, targets, rank=3, alpha=6.0, dora=dora)
    start = adapters_of(lora, base)
    assert_close(hidden(lora, lora.join(base, start)), hidden(base_model, base), rtol=1e-5, atol=1e-5)
    moved = adapters_of(lora, base, noise=0.2)
    beside, merged = hidden(lora, lora.join(base, moved)), lora.merge(base, moved)
    assert np.abs(beside - hidden(base_model, base)).max() > 0.1
    assert_close(hidden(base_model, merged), beside, rtol=1e-4, atol=1e-4)
    assert_close(lora.unmerge(merged, moved, lora.norms(base, moved)), base, rtol=1e-4, atol=1e-5)


def test_merged_weights_by_hand():
    base_model, base = decoder_base()
    for dora in (False, True):
        lora = LoRA(base_model, ("k", "attention_out"), rank=2, alpha=3.0, dora=dora)
        adapters = adapters_of(lora, base, noise=0.3)
        merged = lora.merge(base, adapters)["blocks"]
        for name, outputs in (("k", 8), ("attention_out", 16)):
            for layer in range(2):
                part = {key: np.asarray(leaf[layer], np.float64) for key, leaf in adapters["blocks"][name].items()}
                kernel = np.asarray(base["blocks"][name]["kernel"][layer], np.float64).reshape(-1, outputs)
                wanted = kernel + 1.5 * part["a"].reshape(-1, 2) @ part["b"].reshape(2, -1)
                if dora:
                    wanted *= part["magnitude"].reshape(-1) / np.linalg.norm(wanted, axis=0)
                np.testing.assert_allclose(
                    merged[name]["kernel"][layer].reshape(-1, outputs), wanted, rtol=1e-4, atol=1e-5
                )
        for name in ("q", "gate", "norm1"):
            assert_identical(merged[name], base["blocks"][name])


def test_only_adapters_and_the_soft_mask_are_trained():
    """Through the objective: the frozen base gets no gradient, the loss falls, and one of seven matrices is enough."""
    base_model, base = decoder_base()
    lora = LoRA(base_model, ("up",), rank=2, alpha=4.0)
    denoiser = Denoiser(lora, V, MASK)
    objective = SoftMaskedDiffusion(denoiser, READOUT, 0.0)
    example = objective.corrupt(jax.random.key(0), make_batch(8, 8, V - 4))

    def loss(adapters, base):
        params = {"backbone": lora.join(base, adapters), "softmask": {}}
        return objective(params, example, jnp.bool_(False), None)[0]

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    adapters = adapters_of(lora, base)
    first, (for_adapters, for_base) = gradient(adapters, base)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(for_base))
    moving = {name: bool(np.any(leaf)) for name, leaf in for_adapters["blocks"]["up"].items()}
    assert moving == {"a": False, "b": True, "magnitude": True}  # b is zero at the start
    for _ in range(20):
        _, (step, _) = gradient(adapters, base)
        adapters = jax.tree.map(lambda x, g: x - 0.05 * g, adapters, step)
    assert gradient(adapters, base)[0] < 0.9 * first


def test_doras_norm_takes_no_gradient():
    """d loss / d magnitude of a frozen norm: the derivative of m c for a constant c, so it is that of a plain scale."""
    base_model, base = decoder_base()
    lora = LoRA(base_model, ("down",), rank=2, alpha=2.0)
    adapters = adapters_of(lora, base, noise=0.2)
    outputs = lambda p: jnp.sin(lora.apply(p, base_model.table(base)[CANVAS])).sum()
    got = jax.grad(lambda a: outputs(lora.join(base, a)))(adapters)["blocks"]["down"]
    norm = lora.norms(base, adapters)["blocks/down/kernel"]

    def with_constant_norm(a):
        total = base["blocks"]["down"]["kernel"] + a["a"] @ a["b"]
        kernel = total * a["magnitude"][:, None] / norm
        blocks = {**base["blocks"], "down": {"kernel": kernel}}
        return outputs({**base, "blocks": blocks})

    assert_close(got, jax.grad(with_constant_norm)(adapters["blocks"]["down"]), rtol=1e-3, atol=1e-4)


def test_a_frozen_base_in_half_precision():
    """Kept and computed in bf16, with adapters in f32."""
    half = dataclasses.replace(DREAM, dtype="bfloat16", param_dtype="bfloat16")
    _, base = decoder_base()
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    lora = LoRA(half, TARGETS, rank=2)
    adapters = adapters_of(lora, base)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    assert hidden(lora, lora.join(base, adapters)).dtype == jnp.bfloat16
    merged = lora.merge(base, adapters)
    assert jax.tree.map(lambda x: x.dtype, merged) == jax.tree.map(lambda x: x.dtype, base)


def test_every_parameter_is_listed_and_named():
    lora = LoRA(DREAM, TARGETS, rank=3)
    boxed = jax.eval_shape(lora.init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(boxed))
    assert {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves} == set(lora.matrices())
    q, out = boxed["blocks"]["q"], boxed["blocks"]["attention_out"]
    assert (q["a"].value.shape, q["b"].value.shape, q["magnitude"].value.shape) == ((2, 16, 3), (2, 3, 4, 4), (2, 4, 4))
    assert q["a"].names == ("layers", "embed", None) and q["b"].names == ("layers", None, "heads", "head")
    assert out["a"].names == ("layers", "heads", "head", None) and out["b"].names == ("layers", None, "embed")


def test_flops_are_those_of_the_forward():
    length, model = 96, dataclasses.replace(DREAM, width=64, hidden=96)
    base = make_params(Denoiser(model, V, MASK))["backbone"]
    lora = LoRA(model, TARGETS, rank=8, dora=False)
    params = lora.join(base, adapters_of(lora, base))
    counted = products(jax.make_jaxpr(lora.apply)(params, jnp.zeros((2, length, 64))).jaxpr) / (2 * length)
    assert lora.flops(length) == pytest.approx(counted, rel=0.01) and lora.flops(length) > 1.1 * model.flops(length)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"targets": ("q", "qkv")}, "adapter.targets: got .'qkv'., wanted some of attention_out, down, gate"),
        ({"targets": ()}, "adapter.targets: got none"),
        ({"rank": 0}, "adapter: got rank 0"),
        ({"alpha": 0.0}, "alpha 0.0, wanted rank >= 1 and alpha > 0"),
    ],
)
def test_fields_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        LoRA(DREAM, **changes)


# ------------------------------------------------------------------------------------------------------ PEFT's folders


@pytest.fixture
def saved(tmp_path):
    _, base = decoder_base()
    lora = LoRA(DREAM, ("q", "attention_out", "down"), rank=2, alpha=3.0)
    adapters = adapters_of(lora, base, noise=0.1)
    gate = {"omega_s": np.float32(0.1), "omega_a": np.float32(6.66), "omega_b": np.float32(-0.7)}
    peft.save(tmp_path / "adapter", lora, adapters, gate, 3, "base")
    return tmp_path / "adapter", lora, adapters, gate


def test_a_folder_comes_back_bit_for_bit(saved):
    folder, lora, adapters, gate = saved
    again, got = peft.load(folder, DREAM)
    assert again == lora
    assert_identical(got, jax.tree.map(np.asarray, adapters))
    values, k = peft.load_gate(folder)
    assert k == 3 and {name: np.float32(value) for name, value in values.items()} == gate
    names = peft.read_header(folder / peft.WEIGHTS)
    key = "base_model.model.model.layers.1.self_attn.o_proj.lora_magnitude_vector"
    assert names[key].shape == (16,) and len(names) == 2 * 3 * 3


def test_an_adapter_of_another_rank_or_base_is_refused(saved):
    folder = saved[0]
    config = json.loads((folder / peft.CONFIG).read_text())
    with pytest.raises(
        ConversionError, match=r"16 differences, wanted one of rank 2.*\n.*layers.0.self_attn.q_proj.lora_A"
    ):
        peft.load(folder, dataclasses.replace(DREAM, width=32, heads=8, key_heads=4, hidden=24))
    with pytest.raises(ConversionError, match="9 differences"):
        peft.load(folder, dataclasses.replace(DREAM, depth=1))

    def with_config(**changes):
        (folder / peft.CONFIG).write_text(json.dumps({**config, **changes}))
        return peft.load(folder, DREAM)

    with pytest.raises(ConversionError, match="12 differences, wanted one of rank 4"):
        with_config(r=4)
    for changes, message in (
        ({"use_rslora": True}, "got use_rslora True, wanted False"),
        ({"target_modules": ["lm_head"]}, "got target_modules .'lm_head'., wanted a list of q_proj"),
        ({"target_modules": "all-linear"}, "got target_modules 'all-linear'"),
        ({"r": 0}, "got adapter: got rank 0"),
    ):
        with pytest.raises(FileError, match=message):
            with_config(**changes)
    (folder / peft.CONFIG).unlink()
    with pytest.raises(FileError, match="got no readable JSON"):
        peft.load(folder, DREAM)
