"""A frozen base in int8: how near it is, adapters beside it, and what it can not be used for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_convert_test import refused
from config_test import make_config, one_line
from conftest import READOUT, make_batch
from decoder_convert_test import ROWS, random_tensors, run, write
from decoder_test import MASK
from lora_test import TARGETS, adapters_of

from smdlm.convert import folders
from smdlm.denoiser import Denoiser
from smdlm.experiment import checkpointer_of
from smdlm.models.lora import LoRA
from smdlm.objective import SoftMaskedDiffusion

CANVAS = make_batch()["tokens"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    write(folder / "hf", "dream", random_tensors("dream", np.float32))
    for dtype in ("float32", "int8"):
        assert run("import", "decoder", folder / "hf", folder / dtype, f"--dtype={dtype}") == 0
    return folder


@pytest.fixture(scope="module")
def bases(folder):
    """{type: (model, weights)}."""
    found = {}
    for dtype in ("float32", "int8"):
        params, meta = checkpointer_of(folder / dtype).restore_params(None, "params")
        found[dtype] = folders.Decoder(**meta["model"]), params["backbone"]
    return found


def hidden(model, params):
    return np.asarray(jax.jit(model.apply)(params, model.table(params)[CANVAS].astype(jnp.float32)))


def test_every_output_is_rounded_by_itself(bases):
    whole, (model, params) = bases["float32"][1], bases["int8"]
    boxed = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), folders.nn.meta.unbox(boxed)
    )
    for name, inputs in (("q", (1,)), ("attention_out", (1, 2)), ("down", (1,))):
        part, wanted = params["blocks"][name], np.asarray(whole["blocks"][name]["kernel"])
        assert part["kernel"].dtype == jnp.int8 and np.all(np.abs(np.asarray(part["kernel"], int)).max(inputs) == 127)
        scale = np.expand_dims(part["scale"], inputs)
        assert np.all(np.abs(np.asarray(part["kernel"], np.float32) * scale - wanted) <= 0.501 * scale)
    assert params["embed"].dtype == params["blocks"]["q"]["bias"].dtype == jnp.bfloat16
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves} == set(model.matrices())


def test_it_is_nearly_the_same_network(bases):
    exact, near = hidden(*bases["float32"]), hidden(*bases["int8"])
    assert 0 < np.abs(near - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_beside_it(bases, dora):
    """They start as the base, and train."""
    model, base = bases["int8"]
    lora = LoRA(model, TARGETS, rank=2, alpha=4.0, dora=dora)
    adapters = adapters_of(lora, base)
    np.testing.assert_allclose(hidden(lora, lora.join(base, adapters)), hidden(model, base), rtol=1e-3, atol=1e-4)
    denoiser = Denoiser(lora, ROWS, MASK)
    objective = SoftMaskedDiffusion(denoiser, READOUT, 0.0)
    example = objective.corrupt(jax.random.key(0), make_batch(8, 8, ROWS - 6))

    @jax.jit
    def step(adapters):
        def loss(adapters):
            return objective(denoiser.whole({"backbone": adapters, "softmask": {}}, base), example, False, None)[0]

        value, gradient = jax.value_and_grad(loss)(adapters)
        return value, jax.tree.map(lambda x, g: x - 0.02 * g, adapters, gradient)

    losses = []
    for _ in range(12):
        value, adapters = step(adapters)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]


def test_what_it_can_not_do(folder, bases, tmp_path, capsys):
    model, base = bases["int8"]
    lora = LoRA(model, ("q",), rank=2)
    with pytest.raises(ValueError, match="merge: got a base in int8, wanted"):
        lora.merge(base, adapters_of(lora, base))
    assert "rounded to int8" in refused(capsys, "export", "decoder", folder / "int8", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    config = make_config(softmask__p_sm=0.0)
    config.model = dict(name="decoder", width=16, heads=4, key_heads=2, depth=1, param_dtype="int8")
    assert "model.param_dtype: got 'int8' with adapter.kind 'none'" in one_line(config)
