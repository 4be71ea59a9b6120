"""What only a GPU can show; skipped without one. On such a machine:

pip install -e '.[cuda,test]' && JAX_PLATFORMS=cuda,cpu pytest tests/gpu_test.py
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import L, V, make_batch, make_denoiser, make_params, make_training

from smdlm.models.attention import attention, cudnn_fits
from smdlm.objective import SoftMaskedDiffusion
from smdlm.ops.filters import Filters
from smdlm.readout import Readout
from smdlm.sampling.loop import Sampler
from smdlm.sampling.policies import Ancestral


def gpus():
    try:
        return jax.devices("gpu")
    except RuntimeError:
        return []


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpus(), reason="no GPU, or JAX_PLATFORMS leaves it out: JAX_PLATFORMS=cuda,cpu"),
]
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2}  # of the largest entry; f32 products with TF32 off


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def near(got, wanted, dtype):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.abs(g - w).max(initial=0) <= TOLERANCE[dtype] * max(np.abs(w).max(initial=0), 1e-3)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_forward_loss_and_gradients_are_those_of_the_cpu(dtype):
    """The CPU's are compared with the public code by tests/golden."""
    objective = SoftMaskedDiffusion(make_denoiser(dtype=dtype), Readout(k=3, chunk=5), 1.0)
    reference = SoftMaskedDiffusion(make_denoiser(), Readout(k=3, chunk=5), 1.0)
    params, batch = make_params(objective.denoiser), make_batch()

    def results(objective, device):
        with jax.default_device(device):
            example = objective.corrupt(jax.random.key(0), jax.device_put(batch, device))
            value = jax.jit(jax.value_and_grad(lambda p: objective(p, example, True, None)[0]))
            hidden = jax.jit(objective.denoiser)(jax.device_put(params, device), example.canvas)
            return jax.device_get((hidden, value(jax.device_put(params, device))))

    near(results(objective, gpus()[0]), results(reference, jax.devices("cpu")[0]), dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [8, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_cudnn_attention_is_xlas(causal, heads, padded):
    """Values and gradients; fewer key heads; padding."""
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (2, 256, 8, 64), jnp.bfloat16)
    key, value = (jax.random.normal(k, (2, 256, heads, 64), jnp.bfloat16) for k in keys[1:])
    mask = (jnp.arange(256) < jnp.array([[256], [200]]))[:, None] if padded else None
    assert cudnn_fits(query, key)
    real = jnp.ones((2, 256)) if mask is None else mask[:, 0]  # what padding computes means nothing

    def gradients(implementation):
        def total(q, k, v):
            out = attention(q, k, v, mask, causal=causal, implementation=implementation)
            return jnp.sum(jnp.sin(out.astype(jnp.float32)) * real[:, :, None, None])

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(query, key, value)

    near(gradients("auto"), gradients("xla"), "bfloat16")


def test_a_resumed_run_is_the_straight_run():
    """Bit for bit on the GPU: three steps, the state to the host and back, three more."""
    step, fresh = make_training(SoftMaskedDiffusion(make_denoiser(), Readout(k=3, chunk=5), 0.5))
    straight, resumed = fresh(), fresh()
    for i in range(6):
        straight, _ = step(straight, make_batch(seed=i))
    for i in range(6):
        if i == 3:
            shardings = jax.tree.map(lambda x: x.sharding, resumed)
            resumed = jax.device_put(jax.device_get(resumed), shardings)
        resumed, _ = step(resumed, make_batch(seed=i))
    for one, two in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_sample_does_not_depend_on_its_batch_nor_on_the_platform():
    denoiser = make_denoiser()
    sampler = Sampler(denoiser, Readout(k=3, chunk=5), Ancestral(), Filters(top_p=0.9), steps=6)
    params = make_params(denoiser)

    def tokens(device, rows):
        with jax.default_device(device):
            placed = jax.device_put(params, device)
            return np.asarray(sampler(placed, jax.random.key(1), jnp.full((rows, L), V - 1)).tokens)

    on_gpu = tokens(gpus()[0], 4)
    np.testing.assert_array_equal(tokens(gpus()[0], 2), on_gpu[:2])
    np.testing.assert_array_equal(tokens(jax.devices("cpu")[0], 4), on_gpu)


def test_memory_of_a_step_is_what_the_compiler_said():
    """169M parameters at 32 x 1024 in bf16: the peak of three steps, within a tenth of arguments and temporaries."""
    from smdlm.mesh.rules import MeshConfig
    from smdlm.tools.bench import SIZES, training

    size = dataclasses.replace(SIZES["169m"], batch=32, dtype="bfloat16")
    make, state, batch = training(size, MeshConfig().make(gpus()[:1]))
    step = make(1.0)
    said = step.lower(state, batch).compile().memory_analysis()
    for _ in range(3):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    peak = gpus()[0].memory_stats()["peak_bytes_in_use"]
    wanted = said.argument_size_in_bytes + said.temp_size_in_bytes
    assert peak < 1.1 * wanted, f"{peak / 2**30:.2f} GiB against {wanted / 2**30:.2f}"
