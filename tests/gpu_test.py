"""What only a GPU can show; skipped without one. On such a machine:

pip install -e '.[cuda,test]' && JAX_PLATFORMS=cuda,cpu pytest tests/gpu_test.py
"""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import L, V, assert_identical, environment, make_batch, make_denoiser, make_params, make_training

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
# ||difference|| / ||reference|| of a leaf. f32: products with TF32 off. bf16: the CPU's own result is up to .07 from
# its f32 at these parameters.
TOLERANCE = {"float32": 2e-4, "bfloat16": 0.15}


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def near(got, wanted, tolerance):
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        off = np.linalg.norm(g - w) / max(np.linalg.norm(w), 1e-3)
        assert off <= tolerance, f"{jax.tree_util.keystr(path)}: off by {off:.2g}"


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_forward_loss_and_gradients_are_those_of_the_cpu(dtype):
    """Of the CPU in f32, which tests/golden compares with the public code, and in the same precision."""

    def results(device, dtype):
        objective = SoftMaskedDiffusion(make_denoiser(dtype=dtype), Readout(k=3, chunk=5), 1.0)
        with jax.default_device(device):
            params, batch = jax.device_put((make_params(objective.denoiser, noise=0.2), make_batch()), device)
            example = objective.corrupt(jax.random.key(0), batch)
            hidden = jax.jit(objective.denoiser)(params, example.canvas)
            loss, grads = jax.jit(jax.value_and_grad(lambda p: objective(p, example, True, None)[0]))(params)
        # The gradient of omega is a small difference of large sums: in bf16 the CPU's is .4 from its f32.
        return jax.device_get((hidden, loss, grads if dtype == "float32" else grads["backbone"]))

    got, cpu = results(gpus()[0], dtype), jax.devices("cpu")[0]
    near(got, results(cpu, dtype), TOLERANCE[dtype])
    if dtype == "bfloat16":
        hidden, loss, grads = results(cpu, "float32")
        near(got, (hidden, loss, grads["backbone"]), TOLERANCE[dtype])


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

    near(gradients("auto"), gradients("xla"), 0.03)


def test_a_resumed_run_is_the_straight_run():
    """Bit for bit, where XLA is told to add in a fixed order; in a process of its own, as flags are read once."""
    flags = environment(1)
    flags["XLA_FLAGS"] += " --xla_gpu_deterministic_ops=true"
    flags["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # this process has most of the memory
    done = subprocess.run([sys.executable, __file__], env=flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def resume():
    """Six steps, and three, the state to the host and back, and three more."""
    step, fresh = make_training(SoftMaskedDiffusion(make_denoiser(), Readout(k=3, chunk=5), 0.5))
    straight, resumed = fresh(), fresh()
    for i in range(6):
        straight, _ = step(straight, make_batch(seed=i))
    for i in range(6):
        if i == 3:
            shardings = jax.tree.map(lambda x: x.sharding, resumed)
            resumed = jax.device_put(jax.device_get(resumed), shardings)
        resumed, _ = step(resumed, make_batch(seed=i))
    assert_identical(resumed, straight)


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


if __name__ == "__main__":
    resume()
