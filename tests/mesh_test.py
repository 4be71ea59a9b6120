"""Eight devices against one: the loss curve, noise, checkpoints, evaluation and samples do not depend on the mesh.

Virtual CPU devices: shows that sharding changes neither noise nor sums beyond rounding, and that what should be split
is split. It proves nothing about speed, nor about the collectives of a real interconnect.

All meshes run in one child process (this file as a program), since jax's device count is fixed before it starts.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

MESHES = {
    "one": {},
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 4, "tensor": 2},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
}
STEPS = 20


def child(folder):
    import jax
    from conftest import READOUT, make_batch, make_denoiser, make_params, make_training

    from smdlm.evaluate.base import Subject
    from smdlm.evaluate.likelihood import Likelihood, _estimators
    from smdlm.io.checkpoint import Checkpointer
    from smdlm.mesh.arrays import fetch, local_rows, place, put
    from smdlm.mesh.rules import MeshConfig
    from smdlm.objective import SoftMaskedDiffusion
    from smdlm.sampling.loop import Sampler
    from smdlm.sampling.policies import Ancestral, linear_times

    assert jax.device_count() == 8
    # 23 tokens padded to 24, so that the vocabulary divides by the tensor axis.
    sizes = {"vocab": 23, "vocab_multiple": 8}
    meshes = {name: MeshConfig(**axes).make(jax.devices()[: 8 if axes else 1]) for name, axes in MESHES.items()}
    batches = [make_batch(8, vocab=23, seed=i) for i in range(STEPS)]
    result = {"curve": {}, "spread": {}, "restored": {}, "estimates": {}, "samples": {}, "compiled": {}}

    def digest(tree):
        leaves = jax.tree.leaves(jax.tree.map(lambda x: np.asarray(x).tobytes(), tree))
        return hashlib.sha256(b"".join(leaves)).hexdigest()

    for name, mesh in meshes.items():
        for dropout in (0.1, 0.0) if name in ("one", "mixed") else (0.1,):
            objective = SoftMaskedDiffusion(make_denoiser(dropout=dropout, **sizes), READOUT, 0.5)
            # A large eps: Adam turns rounding into steps of the full learning rate where a gradient is nearly zero.
            step, fresh = make_training(objective, mesh=mesh, eps=0.1, lr=3e-3)
            state, curve = fresh(), []
            with jax.set_mesh(mesh):
                for batch in batches:
                    rows = {key: np.asarray(value)[local_rows(mesh, 8)] for key, value in batch.items()}
                    state, metrics = step(state, put(mesh, rows, 8))
                    curve.append([float(metrics[key]) for key in ("train/loss", "train/masked", "train/feedback")])
            result["curve"][f"{name}, dropout {dropout}"] = curve
            result["compiled"][f"{name}, dropout {dropout}"] = step._cache_size()
            if dropout == 0:
                continue
            spread = {}
            for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.ema, state.opt_state)):
                key = jax.tree_util.keystr(path)
                if "mlp_in" in key and "kernel" in key or "embed']" in key or "raw_scale" in key:
                    spread[key] = [list(leaf.shape), list(leaf.addressable_shards[0].data.shape)]
            result["spread"][name] = spread
            # What another mesh saved comes back bit for bit, laid out for this one.
            saver = Checkpointer(folder / name)
            saver.save(STEPS, state, data={}, meta={})
            saver.close()
            before = digest(jax.device_get(state))
            for other, other_mesh in meshes.items():
                if "mixed" in (name, other):
                    wanted = make_training(objective, mesh=other_mesh, eps=0.1)[1]()
                    abstract = jax.tree.map(
                        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted
                    )
                    restored, _, _ = Checkpointer(folder / name).restore(abstract)
                    laid_out = jax.tree.map(lambda x, y: x.sharding == y.sharding, restored, wanted)
                    same = digest(jax.device_get(restored)) == before and all(jax.tree.leaves(laid_out))
                    result["restored"][f"{name} -> {other}"] = same

    denoiser = make_denoiser(**sizes)
    objective = SoftMaskedDiffusion(denoiser, READOUT, 0.5)
    sampler, metric = Sampler(denoiser, READOUT, Ancestral(), steps=6), Likelihood(chain=2)
    batch = {key: np.asarray(value) for key, value in make_batch(8, vocab=23).items()}
    for name in ("one", "mixed"):
        mesh = meshes[name]
        fresh = make_training(objective, mesh=mesh)[1]
        params = jax.device_put(make_params(denoiser), jax.tree.map(lambda x: x.sharding, fresh().params))
        with jax.set_mesh(mesh):
            for rows in (8, 3):  # 3 rows do not divide: replicated
                part = {key: value[:rows] for key, value in batch.items()}
                subject = Subject(
                    objective=objective,
                    params=params,
                    token_bytes=np.ones(23, np.int32),
                    batches=lambda blocks, size, part=part: [part, part],
                    place=lambda x, mesh=mesh: place(mesh, x),
                )
                for _ in range(2):
                    values = metric.run(subject)
                result["estimates"][f"{name}, {rows} rows"] = [
                    value.mean for value in values.values() if value.unit == "nats/token"
                ]
            slower = jax.tree.map(lambda x: x**2, linear_times(6))  # other values of the schedule
            for rows in (8, 8, 3):
                canvas = place(mesh, np.full((rows, 8), denoiser.mask_id, np.int32))
                samples = fetch(sampler(params, jax.random.key(1), canvas).tokens)
                result["samples"][f"{name}, {rows} rows"] = samples.tolist()
                sampler.run(params, jax.random.key(2), canvas, slower)
    result["compiled"]["sampler"] = Sampler.run._cache_size() / 4
    for name, estimator in _estimators(objective, metric.chain).items():
        result["compiled"][name] = estimator._cache_size() / 4
    print(json.dumps(result))


@pytest.fixture
def eight(eight_devices):
    """What the child printed."""
    return eight_devices[0]


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_every_mesh_gives_the_curve_of_one_device(eight, dropout):
    """Loss, masked share and coin: the noise (t, masks, coin, dropout) is the same, sums differ by rounding."""
    curves = {name: np.array(curve) for name, curve in eight["curve"].items() if name.endswith(str(dropout))}
    one = curves.pop(f"one, dropout {dropout}")
    assert np.ptp(one[:, 0]) > 1e-2 and set(one[:, 2]) == {0, 1}
    assert len(curves) == (4 if dropout else 1)
    for name, curve in curves.items():
        assert curve[:, 1:].tolist() == one[:, 1:].tolist(), name
        np.testing.assert_allclose(curve[:, 0], one[:, 0], rtol=1e-5, err_msg=name)


def test_dropout_changes_the_curve(eight):
    """Else the test above would say nothing about its noise."""
    one, without = (np.array(eight["curve"][f"one, dropout {d}"])[:, 0] for d in (0.1, 0.0))
    assert np.all(np.abs(one / without - 1) > 1e-4)


def test_parameters_ema_and_moments_are_split_alike(eight):
    split = {
        "one": ([24, 16], [2, 16, 64]),
        "data": ([24, 16], [2, 16, 64]),
        "fsdp": ([24, 2], [2, 2, 64]),
        "tensor": ([12, 16], [2, 16, 32]),
        "mixed": ([12, 8], [2, 8, 32]),
    }
    for name, (embed, kernel) in split.items():
        spread = eight["spread"][name]
        tables = [value for key, value in spread.items() if "embed']" in key]
        kernels = [value for key, value in spread.items() if "mlp_in" in key]
        omega = [value for key, value in spread.items() if "raw_scale" in key]
        assert tables == 4 * [[[24, 16], embed]] and kernels == 4 * [[[2, 16, 64], kernel]], name
        assert omega == 4 * [[[], []]], name


def test_a_checkpoint_of_one_mesh_restores_on_another(eight):
    assert len(eight["restored"]) == 9 and all(eight["restored"].values()), eight["restored"]


def test_evaluation_and_samples_do_not_depend_on_the_mesh(eight, eight_devices):
    for rows in (8, 3):
        one, mixed = (eight["estimates"][f"{name}, {rows} rows"] for name in ("one", "mixed"))
        assert len(one) == 4  # three estimates, and what the second pass gains
        np.testing.assert_allclose(mixed, one, rtol=1e-5, atol=1e-5)
        assert eight["samples"][f"mixed, {rows} rows"] == eight["samples"][f"one, {rows} rows"]
    assert eight["samples"]["one, 3 rows"] == eight["samples"]["one, 8 rows"][:3]
    assert eight_devices[1].count("got 3 rows for 4 parts of the mesh") == 1


def test_every_program_is_compiled_once(eight):
    """Twenty steps, one program; the sampler (whatever its schedule) and each estimate: one for each mesh and size."""
    assert len(eight["compiled"]) == 7 + 1 + 3
    assert set(eight["compiled"].values()) == {1}, eight["compiled"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        child(Path(folder))
