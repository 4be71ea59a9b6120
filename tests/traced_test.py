"""Loss and gradients on meshes of eight forced CPU devices, and what the compiled program sends between them.

A CPU runs the collectives of one process as memory copies: this proves which there are and that the numbers agree,
nothing about their speed.
"""

import json
import re

import pytest

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 2, 4), "mixed": (2, 2, 2)}
CASES = [*MESHES, "full mixed", "gated mixed"]  # the soft mask of the whole vocabulary, and an operator with matrices
# No axis of a parameter is a multiple of the length, so that an array with such an axis is an activation.
BATCH, LENGTH, WIDTH, PADDED = 16, 20, 32, 384
SHAPE = re.compile(r"\w+\[([\d,]+)\]")


def measure():
    """{case: (loss, relative distance of the worst gradient leaf from one device's, compiled program)} as JSON."""
    import jax
    import numpy as np
    from conftest import SOFTMASK, make_batch, make_denoiser, make_params

    from smdlm.feedback.conditioning import GatedFeedForward
    from smdlm.full_softmask import FullSoftMask
    from smdlm.mesh.rules import MeshConfig, batch_sharding, param_shardings
    from smdlm.objective import SoftMaskedDiffusion
    from smdlm.readout import Readout

    sizes = {"vocab": 300, "width": WIDTH, "heads": 4, "vocab_multiple": 128, "dropout": 0.1}
    batch, out = make_batch(BATCH, LENGTH, vocab=300), {}

    def run(softmask, sizes_of_mesh):
        denoiser = make_denoiser(softmask, **sizes)
        objective = SoftMaskedDiffusion(denoiser, Readout(k=3, chunk=16), p_sm=1.0)

        def loss_and_gradients(params, batch):
            example = objective.corrupt(jax.random.key(0), batch)
            (loss, _), grads = jax.value_and_grad(objective, has_aux=True)(params, example, True, jax.random.key(1))
            return loss, grads

        mesh = MeshConfig(*sizes_of_mesh).make(jax.devices()[: int(np.prod(sizes_of_mesh))])
        shardings = param_shardings(mesh, jax.eval_shape(denoiser.init, jax.random.key(0)))
        # Little noise: attention is so sharp otherwise that gradients are known to 1e-3 only.
        params = jax.device_put(make_params(denoiser, noise=0.15), shardings)
        placed = jax.device_put(batch, batch_sharding(mesh))
        with jax.set_mesh(mesh):
            compiled = jax.jit(loss_and_gradients, out_shardings=(None, shardings)).lower(params, placed).compile()
            loss, grads = jax.tree.map(np.asarray, compiled(params, placed))
        return float(loss), grads, compiled.as_text()

    for prefix, softmask, meshes in (
        ("", SOFTMASK, MESHES),
        ("full ", FullSoftMask(k=3, gate=SOFTMASK.gate, chunk=16), {"mixed": MESHES["mixed"]}),
        ("gated ", GatedFeedForward(k=3, gate=SOFTMASK.gate, chunk=16, inner=24), {"mixed": MESHES["mixed"]}),
    ):
        for name, mesh in {"one": (1, 1, 1), **meshes}.items():  # one device first
            loss, grads, program = run(softmask, mesh)
            if name == "one":
                single = grads
            distance = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), grads, single)
            out[prefix + name] = loss, max(jax.tree.leaves(distance)), program
    print(json.dumps(out))


@pytest.fixture
def measured(eight_devices):
    return eight_devices[0]


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


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_one_device(measured, case):
    loss, distance, _ = measured[case]
    alone = " ".join([*case.split()[:-1], "one"])
    assert loss == pytest.approx(measured[alone][0], rel=1e-5)
    assert distance < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_no_activation_is_gathered(measured, case):
    """Neither whole rows for the readout or the embeddings, nor one chip's activations on another."""
    program = measured[case][2]
    moved = list(results(program, "all-gather", "all-to-all", "collective-permute"))
    assert not [axes for axes in moved if is_activation(axes)]
    assert case == "data" or moved, "a mesh that splits parameters must gather some"


@pytest.mark.parametrize("case", ["one", "full one", "gated one", *CASES])
def test_nothing_has_a_row_of_the_vocabulary_per_position(measured, case):
    """No one-hots for the embeddings, no logits but a chunk's."""
    parts = MESHES.get(case.split()[-1], (1, 1, 1))[2]
    arrays = list(results(measured[case][2], r"[\w\-]+"))
    assert not [axes for axes in arrays if is_activation(axes) and {PADDED, PADDED // parts} & set(axes)]
    assert [16, PADDED // parts] in arrays, "the chunk's logits: else the test looks at the wrong shapes"


def test_a_large_replicated_array_is_named():
    import jax
    from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

    from smdlm.mesh.rules import AXES, LARGE, assert_sharded

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
