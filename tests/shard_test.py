"""Loss and gradients on meshes of eight forced CPU devices, and what the compiled program sends between them.

A CPU runs the collectives of one process as memory copies: this proves which there are and that the numbers agree,
nothing about their speed.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 2, 4), "mixed": (2, 2, 2)}
# No axis of a parameter is a multiple of the length, so that an array with such an axis is an activation.
BATCH, LENGTH, WIDTH, PADDED = 16, 20, 32, 384
SHAPE = re.compile(r"\w+\[([\d,]+)\]")


def measure():
    """{mesh: (loss, relative distance of the worst gradient leaf from one device's, compiled program)} as JSON."""
    import jax
    import numpy as np
    from conftest import make_batch, make_denoiser, make_params

    from smdlm.objective import SoftMaskedDiffusion
    from smdlm.partition import MeshConfig, batch_sharding, param_shardings
    from smdlm.readout import Readout

    denoiser = make_denoiser(vocab=300, width=WIDTH, heads=4, vocab_multiple=128, dropout=0.1)
    objective = SoftMaskedDiffusion(denoiser, Readout(k=3, chunk=16), p_sm=1.0)
    batch = make_batch(BATCH, LENGTH, vocab=300)

    def loss_and_gradients(params, batch):
        example = objective.corrupt(jax.random.key(0), batch)
        (loss, _), grads = jax.value_and_grad(objective, has_aux=True)(params, example, True, jax.random.key(1))
        return loss, grads

    out, single = {}, None
    for name, sizes in {"one": (1, 1, 1), **MESHES}.items():
        mesh = MeshConfig(*sizes).make(jax.devices()[: int(np.prod(sizes))])
        shardings = param_shardings(mesh, jax.eval_shape(denoiser.init_params, jax.random.key(0)))
        params = jax.device_put(make_params(denoiser), shardings)
        placed = jax.device_put(batch, batch_sharding(mesh))
        with jax.set_mesh(mesh):
            jitted = jax.jit(loss_and_gradients, out_shardings=(None, shardings))
            compiled = jitted.lower(params, placed).compile()
            loss, grads = jax.tree.map(np.asarray, compiled(params, placed))
        single = grads if single is None else single
        distance = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), grads, single)
        out[name] = float(loss), max(jax.tree.leaves(distance)), compiled.as_text()
    print(json.dumps(out))


@pytest.fixture(scope="module")
def measured():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def results(program, *operations):
    """Axes of the arrays that the named operations make."""
    for match in re.finditer(rf"= (.*?) (?:{'|'.join(operations)})\(", program):
        yield from ([int(n) for n in shape.split(",")] for shape in SHAPE.findall(match[1]))


def is_activation(axes):
    """At least one example's hidden states."""
    size = 1
    for n in axes:
        size *= n
    return any(n % LENGTH == 0 for n in axes) and size >= LENGTH * WIDTH


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_loss_and_gradients_are_those_of_one_device(measured, mesh):
    loss, distance, _ = measured[mesh]
    assert loss == pytest.approx(measured["one"][0], rel=1e-5)
    assert distance < 1e-4  # sharp attention: f32 scores of about 100 are known to 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_no_activation_is_gathered(measured, mesh):
    """Neither whole rows for the readout or the embeddings, nor one chip's activations on another."""
    program = measured[mesh][2]
    moved = list(results(program, "all-gather", "all-to-all", "collective-permute"))
    assert not [axes for axes in moved if is_activation(axes)]
    assert mesh == "data" or moved, "a mesh that splits parameters must gather some"


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["one", *MESHES])
def test_nothing_has_a_row_of_the_vocabulary_per_position(measured, mesh):
    """No one-hots for the embeddings, no logits but a chunk's."""
    parts = MESHES.get(mesh, (1, 1, 1))[2]
    arrays = list(results(measured[mesh][2], r"[\w\-]+"))
    assert not [axes for axes in arrays if is_activation(axes) and {PADDED, PADDED // parts} & set(axes)]
    assert [16, PADDED // parts] in arrays, "the chunk's logits: else the test looks at the wrong shapes"


def test_a_large_replicated_array_is_named():
    import jax
    from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

    from smdlm.partition import AXES, LARGE, assert_sharded

    def tree(mesh, **specs):
        leaf = lambda spec: jax.ShapeDtypeStruct((LARGE + 4, 1), "float32", sharding=NamedSharding(mesh, spec))
        small = jax.ShapeDtypeStruct((LARGE,), "float32", sharding=NamedSharding(mesh, PartitionSpec()))
        return {"ema": {name: leaf(spec) for name, spec in specs.items()}, "small": small}

    mesh = AbstractMesh((2, 2, 1), AXES)
    split, whole = PartitionSpec("fsdp"), PartitionSpec()
    assert_sharded(tree(mesh, table=split), mesh)
    with pytest.raises(ValueError, match=r"got 1 arrays.*\n  ema/cond: \(1048580, 1\)$"):
        assert_sharded(tree(mesh, table=split, cond=whole), mesh)
    data = AbstractMesh((4, 1, 1), AXES)
    assert_sharded(tree(data, cond=whole), data)  # nothing could split it


if __name__ == "__main__":
    measure()
