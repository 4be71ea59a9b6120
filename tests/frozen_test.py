"""Training beside a frozen base: what is trained, what a checkpoint holds, and that the base must be the same one."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from config_test import make_config, one_line
from conftest import assert_close, assert_identical, make_params

from smdlm import experiment, identity
from smdlm.build import build
from smdlm.config import read
from smdlm.io.checkpoint import CheckpointMismatch
from smdlm.optimizer import TrainState


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, and the workdir of a base whose weights are not those of any fresh start."""
    folder = tmp_path_factory.mktemp("frozen")
    for i in range(20):
        (folder / f"{i:02d}.txt").write_text(f"line {i} of a small corpus " * 5, "utf-8")
    made = build(read(make_config(f"text:{folder}/*.txt")), folder)
    params = {**make_params(made.denoiser), "softmask": {}}
    for name, scale in (("base", 1.0), ("other", 1.25)):
        backbone = jax.tree.map(lambda x, scale=scale: scale * x, params["backbone"])
        both = {**params, "backbone": backbone}
        checkpointer = experiment.checkpointer_of(folder / name)
        checkpointer.save(7, TrainState(jnp.int32(7), both, both, {}), data={}, meta={})
        checkpointer.close()
    return folder


def settings(folder, kind="dora", **changes):
    own = {"adapter__kind": kind, "adapter__targets": "qkv,mlp_out", "adapter__rank": 2, "adapter__alpha": 4.0}
    start = {
        "train__init_from": str(folder / "base"),
        "optimizer__lr": 0.01,
        "optimizer__ema_decay": 0.5,
        "optimizer__decay": "constant",
    }
    short = {"train__steps": 4, "eval__blocks": 4, "eval__batch_size": 4, "eval__chain": 0, "sampling__count": 1}
    short |= {"optimizer__ema_decay": 0.5}
    return make_config(f"text:{folder}/*.txt", **{**own, **start, **short, **changes})


def make(folder, kind="dora", **changes):
    return build(read(settings(folder, kind, **changes)), folder)


def begin(made):
    """(fresh state, the base)."""
    source = experiment.init_source(made.config.train)
    loaded = experiment.load_weights(made, source)
    return made.start_from(loaded.params), loaded.params["backbone"]


def updates(made, count):
    """(state after so many updates, losses, the base)."""
    step, (state, base), batches, losses = made.train_step(), begin(made), made.train_batches(0), []
    for _ in range(count):
        state, metrics = step(state, made.put(next(batches)), base)
        losses.append(float(metrics["train/loss"]))
    return state, losses, base


def names(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.fixture(scope="module")
def trained(folder):
    made = make(folder)
    return made, *updates(made, 4)


def test_only_the_adapters_and_omega_are_trained(folder, trained):
    made, state, losses, base = trained
    fresh, untouched = begin(made)
    assert_identical(base, untouched)  # also: its buffers were not donated
    omega = {f"softmask/{name}" for name in made.denoiser.softmask.init()}
    parts = {f"backbone/{name}" for name in made.denoiser.model.matrices()}
    assert names(state.params) == names(state.ema) == omega | parts and len(parts) == 6
    assert not any("kernel" in name or "embed" in name for name in names(state))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), fresh.params, state.params)
    assert all(jax.tree.leaves(moved))
    assert losses[3] != losses[0]


def test_the_start_is_the_base(folder, trained):
    """DoRA's magnitudes are the norms of the base's weights, so that nothing changes before the first update."""
    made = trained[0]
    state, base = begin(made)
    whole = make(folder, "none")
    canvas = np.arange(32, dtype=np.int32).reshape(2, 16)
    wanted = whole.denoiser({"backbone": base, "softmask": state.params["softmask"]}, canvas)
    assert_close(made.denoiser(made.denoiser.whole(state.params, base), canvas), wanted, 1e-5, 1e-5)


def test_the_abstract_whole_is_what_is_sampled_from(trained):
    made, state, _, base = trained
    whole = made.denoiser.whole(state.params, base)
    wanted = jax.tree.map(lambda x: (x.shape, x.dtype), whole)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made.abstract_whole()) == wanted


def test_micro_batches_change_nothing(folder, trained):
    state, losses, _ = updates(make(folder, train__accumulate=2), 2)
    assert losses == pytest.approx(trained[2][:2], rel=1e-5)


def test_omega_alone(folder):
    made = make(folder, "softmask", softmask__p_sm=1.0)
    fresh, _ = begin(made)
    state, _, _ = updates(made, 3)
    assert names(state.params) == {f"softmask/{name}" for name in made.denoiser.softmask.init()}
    moved = jax.tree.map(lambda a, b: bool(a != b), (fresh.params, fresh.ema), (state.params, state.ema))
    assert all(jax.tree.leaves(moved))


CHANGES = {
    "adapter__kind": "lora",
    "adapter__targets": "qkv",
    "adapter__rank": 3,
    "adapter__alpha": 8.0,
}


@pytest.mark.parametrize("name", CHANGES)
def test_fields_change_the_step(folder, name):
    def program(**changes):
        made = make(folder, **changes)
        state = made.abstract_state()
        batch = jax.eval_shape(lambda: {"tokens": jnp.zeros((4, 16), jnp.int32), "valid": jnp.ones(4, bool)})
        return str(jax.make_jaxpr(made.train_step())(state, batch, made.abstract_base()[0]))

    assert program(**{name: CHANGES[name]}) != program()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train__init_from": ""}, "train.init_from: got '' with adapter.kind 'dora'"),
        ({"adapter__targets": "qkv, up"}, "adapter.targets: got .' up'., wanted some of"),
        ({"adapter__rank": 0}, "got rank 0"),
        ({"adapter__alpha": 0.0}, "alpha 0.0"),
        ({"adapter__kind": "full"}, "adapter.kind: got 'full', wanted one of 'none', 'lora', 'dora', 'softmask'"),
        ({"adapter__kind": "softmask", "softmask__p_sm": 0.0}, "softmask.p_sm: got 0 with adapter.kind 'softmask'"),
        ({"adapter__kind": "softmask", "softmask__gate": "constant"}, "softmask.gate: got one without parameters"),
    ],
)
def test_what_is_refused(folder, changes, message):
    assert re.search(message, one_line(settings(folder, **changes)))


# ---------------------------------------------------------------------------------------------------------- whole runs


def run(made, workdir):
    checkpointer = experiment.checkpointer_of(workdir, keep=2)
    with jax.set_mesh(made.mesh):
        summary = experiment.train(made, workdir, checkpointer, {})
    checkpointer.close()
    return summary


def restored(made, workdir):
    return experiment.restore(made, experiment.checkpointer_of(workdir), "ema")[0]


@pytest.fixture(scope="module")
def runs(folder):
    """A run of four updates; one of two, continued to four."""
    run(make(folder, train__save_every=2), folder / "straight")
    run(make(folder, train__steps=2, train__save_every=2), folder / "resumed")
    run(make(folder, train__save_every=2), folder / "resumed")
    return folder


def test_a_continued_run_is_the_straight_one(runs):
    trees = [
        experiment.checkpointer_of(runs / name).restore_params(None, which)[0]
        for which in ("params", "ema")
        for name in ("straight", "resumed")
    ]
    assert_identical(trees[1], trees[0])
    assert_identical(trees[3], trees[2])
    assert set(trees[0]["backbone"]["blocks"]) == {"qkv", "mlp_out"} and "embed" not in trees[0]["backbone"]


def test_evaluation_loads_the_base_and_its_adapters(runs):
    made = make(runs)
    whole = restored(made, runs / "straight")
    ema, meta = experiment.checkpointer_of(runs / "straight").restore_params(None, "ema")
    base = begin(made)[1]
    assert meta["base"]["hash"] == identity.weights_hash(base) and meta["model"]["width"] == 16
    assert_identical(whole, made.denoiser.whole(ema, base))


def test_another_base_or_rank_is_refused(runs):
    other = make(runs, train__init_from=str(runs / "other"))
    with pytest.raises(ValueError, match=r"got .*other with weights \w{12} for a .* trained beside weights \w{12}"):
        restored(other, runs / "straight")
    with pytest.raises(CheckpointMismatch, match=r"ema/backbone/blocks/qkv/a: got .*,2\], wanted .*,3\]"):
        restored(make(runs, adapter__rank=3), runs / "straight")
    shutil.copytree(runs / "straight", runs / "alone")
    with pytest.raises(FileNotFoundError, match="train.init_from: got no checkpoint in .*nowhere"):
        restored(make(runs, train__init_from=str(runs / "nowhere")), runs / "alone")
    with pytest.raises(ValueError, match="trained beside no frozen base"):
        identity.check_same_base(None, {"workdir": "x", "hash": "0" * 64})


def test_the_hash_sees_every_bit_and_place():
    tree = {"a": jnp.arange(6, dtype=jnp.float32).reshape(2, 3), "b": jnp.zeros(4, jnp.bfloat16)}
    hashes = [identity.weights_hash(tree)]
    for changed in (
        {**tree, "a": tree["a"].T.reshape(2, 3)},
        {**tree, "a": tree["a"].at[0, 0].set(-0.0)},
        {**tree, "b": jnp.zeros(4, jnp.float16)},
        {"a": tree["a"], "c": tree["b"]},
        {**tree, "a": tree["a"].at[1, 2].add(1e-6)},
    ):
        hashes.append(identity.weights_hash(changed))
    assert len(set(hashes)) == len(hashes)
    assert identity.weights_hash(dict(tree)) == hashes[0]
