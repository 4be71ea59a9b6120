"""Checkpoints: bit-for-bit round trips, every kind of damage, killed and failed saves, lists of differing leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from conftest import environment

from smdlm.io import checkpoint
from smdlm.io.checkpoint import CheckpointDamaged, Checkpointer, CheckpointMismatch


@flax.struct.dataclass
class TrainState:
    step: jax.Array
    params: dict
    ema: dict
    opt_state: tuple


def make_state(step=0, width=16):
    """A state with everything awkward: partitions, MaskedNode, EmptyState, NamedTuples, scalars, bf16."""
    keys = jax.random.split(jax.random.key(step), 4)
    params = {
        "blocks": {"w": jax.random.normal(keys[0], (width, 64)), "b": jax.random.normal(keys[1], (8,), jnp.bfloat16)},
        "omega": {"s": jnp.float32(-13.8)},
    }
    labels = {"blocks": {"w": "matrix", "b": "matrix"}, "omega": {"s": "omega"}}
    adamw = optax.adamw(
        optax.cosine_decay_schedule(1e-3, 100), mask={"blocks": {"w": True, "b": False}, "omega": False}
    )
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition({"matrix": adamw, "omega": optax.inject_hyperparams(optax.adam)(1e-2)}, labels),
    )
    grads = jax.tree.map(jnp.ones_like, params)
    _, opt_state = tx.update(grads, tx.init(params), params)
    return TrainState(jnp.int32(step), params, jax.tree.map(lambda x: x * 3, params), opt_state)


def abstract(tree):
    return jax.eval_shape(lambda x: x, tree)


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.fixture
def warnings(monkeypatch):
    """The warnings logged so far, formatted."""
    lines = []
    monkeypatch.setattr(logging, "warning", lambda message, *args: lines.append(message % args))
    return lines


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A directory with sound checkpoints 1, 2, 3; tests copy it."""
    directory = tmp_path_factory.mktemp("template")
    saver = Checkpointer(directory, keep=3)
    for step in (1, 2, 3):
        saver.save(step, make_state(step), data={"next_index": 10 * step}, meta={"width": 16})
    saver.close()
    return directory


@pytest.fixture
def directory(template, tmp_path):
    return Path(shutil.copytree(template, tmp_path / "checkpoints"))


def test_round_trip_is_bit_for_bit(directory):
    reader = Checkpointer(directory)
    state, data, meta = reader.restore(abstract(make_state()))
    assert_same(state, make_state(3))
    assert data == {"next_index": 30} and meta == {"width": 16, "step": 3}
    manifest = json.loads((directory / "3" / checkpoint.MANIFEST).read_text())
    on_disk = {p.relative_to(directory / "3").as_posix() for p in (directory / "3").rglob("*") if p.is_file()}
    assert on_disk - set(manifest) == {checkpoint.MANIFEST, checkpoint.COMMIT_MARKER, "_CHECKPOINT_METADATA"}
    assert reader.read_meta(1) == {"width": 16, "step": 1}
    older, data, _ = reader.restore(abstract(make_state()), step=1)
    assert_same(older, make_state(1))
    assert data == {"next_index": 10}


def test_evaluation_reads_one_set_of_weights(directory):
    reader = Checkpointer(directory)
    wanted = make_state(3)
    ema, meta = reader.restore_params(abstract(wanted.params))
    assert_same(ema, wanted.ema)
    assert meta["step"] == 3
    assert_same(reader.restore_params(abstract(wanted.params), which="params")[0], wanted.params)
    assert_same(reader.restore_params(None, which="params")[0], wanted.params)  # as saved
    with pytest.raises(ValueError, match="got which='opt'"):
        reader.restore_params(None, which="opt")


def test_donating_the_state_right_after_save_does_not_change_the_checkpoint(tmp_path):
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    saver = Checkpointer(tmp_path)
    state = make_state(5, width=40_000)  # 40 MB over params, ema and moments: the write outlasts the next lines
    wanted = jax.tree.map(np.array, state)
    saver.save(5, state, data={}, meta={})
    for _ in range(3):
        state = overwrite(state)
    jax.block_until_ready(state)
    got, _, _ = saver.restore(abstract(state))
    assert_same(got, wanted)


def test_keeps_the_newest_and_a_step_on_disk_is_not_written_again(tmp_path):
    saver = Checkpointer(tmp_path / "new", keep=2)
    assert saver.all_steps() == [] and saver.latest_step() is None and not (tmp_path / "new").exists()
    for step in (1, 2, 3):
        saver.save(step, make_state(step), data={"next_index": step}, meta={})
    saver.save(3, make_state(99), data={"next_index": 99}, meta={})
    saver.wait()
    assert saver.all_steps() == [2, 3] and saver.latest_step() == 3
    assert saver.restore(abstract(make_state()))[1] == {"next_index": 3}
    with pytest.raises(ValueError, match="keep=0"):
        Checkpointer(tmp_path, keep=0)
    with pytest.raises(TypeError, match="JSON"):
        saver.save(4, make_state(4), data={"bad": object()}, meta={})


# ---- damage ----


def biggest_file(step_directory, item="*"):
    """The biggest array file (the manifest of so small a state is bigger)."""
    return max(step_directory.glob(f"{item}/ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size)


def truncate(step_directory):
    file = biggest_file(step_directory)
    os.truncate(file, file.stat().st_size // 2)


def flip_bytes(step_directory):
    file = biggest_file(step_directory)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def change_json(step_directory):
    file = step_directory / "data" / "metadata"
    file.write_text(file.read_text().replace("30", "31"))


def empty_directory(step_directory):
    shutil.rmtree(step_directory)
    step_directory.mkdir()


DAMAGES = {
    "truncated": (truncate, "bytes instead of"),
    "flipped byte": (flip_bytes, "another sha256"),
    "data position changed": (change_json, "another sha256"),
    "file deleted": (lambda d: biggest_file(d).unlink(), "FileNotFoundError"),
    "item deleted": (lambda d: shutil.rmtree(d / "opt"), "FileNotFoundError"),
    "empty orbax metadata": (lambda d: (d / "params" / "_METADATA").write_text(""), "0 bytes instead of"),
    "empty manifest": (lambda d: (d / checkpoint.MANIFEST).write_text(""), "JSONDecodeError"),
    "manifest without entries": (lambda d: (d / checkpoint.MANIFEST).write_text("{}"), "lists no file of"),
    "no manifest": (lambda d: (d / checkpoint.MANIFEST).unlink(), "FileNotFoundError"),
    "no commit marker": (lambda d: (d / checkpoint.COMMIT_MARKER).unlink(), "not finished"),
    "empty directory": (empty_directory, "not finished"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_said_in_one_line_and_the_checkpoint_before_is_taken(directory, warnings, damage):
    do, reason = DAMAGES[damage]
    do(directory / "3")
    runner = Checkpointer(directory, keep=2)
    state, data, meta = runner.restore(abstract(make_state()))
    assert_same(state, make_state(2))
    assert data == {"next_index": 20} and meta["step"] == 2
    (line,) = warnings
    assert "\n" not in line and "step 3 is damaged" in line and reason in line and "trying step 2" in line
    # the run reaches step 3 again: the damaged one must not stand in its way
    runner.save(3, make_state(33), data={"next_index": 33}, meta={})
    runner.close()
    assert len(warnings) == 1 and runner.all_steps() == [2, 3]
    assert_same(Checkpointer(directory).restore(abstract(make_state()))[0], make_state(33))


def test_two_damaged_checkpoints_fall_back_twice_and_evaluation_leaves_them_alone(directory, warnings):
    biggest_file(directory / "3", "ema").write_bytes(b"")
    (directory / "2" / "ema" / "_METADATA").unlink()
    reader = Checkpointer(directory)
    assert_same(reader.restore_params(None, which="params")[0], make_state(3).params)  # only what is read must be sound
    ema, meta = reader.restore_params(abstract(make_state().params))
    assert_same(ema, make_state(1).ema)
    assert meta["step"] == 1 and len(warnings) == 2
    assert reader.all_steps() == [1, 2, 3]


def test_orbax_step_metadata_is_not_needed(directory):
    (directory / "3" / "_CHECKPOINT_METADATA").write_text("")
    runner = Checkpointer(directory)
    assert_same(runner.restore(abstract(make_state()))[0], make_state(3))
    runner.save(4, make_state(4), data={}, meta={})
    runner.close()
    assert runner.all_steps() == [2, 3, 4]


def test_nothing_usable_is_a_clear_error(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got steps \[\] .* wanted a checkpoint"):
        Checkpointer(tmp_path / "elsewhere").read_meta()
    with pytest.raises(FileNotFoundError, match=r"got steps \[1, 2, 3\] .* wanted step 7"):
        Checkpointer(directory).restore(abstract(make_state()), step=7)
    truncate(directory / "3")
    with pytest.raises(CheckpointDamaged, match="at step 3"):  # a named step is taken or refused
        Checkpointer(directory).restore(abstract(make_state()), step=3)
    for step in (1, 2):
        truncate(directory / str(step))
    with pytest.raises(CheckpointDamaged, match=r"damaged: \[3, 2, 1\]"):
        Checkpointer(directory).restore(abstract(make_state()))
    assert sorted(os.listdir(directory)) == ["1", "2", "3"]


def test_going_back_drops_the_later_steps_at_the_next_save(directory):
    runner = Checkpointer(directory, keep=5)
    runner.restore(abstract(make_state()), step=1)
    assert runner.all_steps() == [1, 2, 3]
    runner.save(2, make_state(22), data={}, meta={})
    runner.wait()
    assert runner.all_steps() == [1, 2]
    assert_same(runner.restore(abstract(make_state()))[0], make_state(22))


# ---- another model ----


def test_mismatch_lists_every_leaf_and_is_not_damage(directory, warnings):
    other = make_state()
    params = {
        "blocks": {"w": jnp.zeros((4, 4)), "c": jnp.zeros((2,), jnp.int32)},
        "omega": {"s": jnp.zeros((), jnp.bfloat16)},
    }
    runner = Checkpointer(directory)
    with pytest.raises(CheckpointMismatch) as error:
        runner.restore(abstract(other.replace(params=params, step=jnp.float32(0))))
    head, *lines = str(error.value).splitlines()
    assert "5 leaves differ" in head and "step 3" in head
    assert [line.strip() for line in lines] == [
        "params/blocks/b: got bfloat16[8], wanted nothing",
        "params/blocks/c: got nothing, wanted int32[2]",
        "params/blocks/w: got float32[16,64], wanted float32[4,4]",
        "params/omega/s: got float32[], wanted bfloat16[]",
        "opt/step: got int32[], wanted float32[]",
    ]
    with pytest.raises(CheckpointMismatch, match="ema/blocks/c"):
        runner.restore_params(abstract(params))
    assert warnings == [] and runner.all_steps() == [1, 2, 3]


def test_another_optimizer_is_a_mismatch(directory):
    state = make_state()
    sgd = optax.sgd(0.1, momentum=0.9).init(state.params)
    with pytest.raises(CheckpointMismatch, match="opt/state/.*got nothing, wanted float32"):
        Checkpointer(directory).restore(abstract(state.replace(opt_state=sgd)))


# ---- failed and killed saves ----


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # writes orbax does not wait for
def test_full_disk_does_not_end_the_run(directory, warnings):
    resource = pytest.importorskip("resource")
    runner = Checkpointer(directory, keep=1)
    runner.restore(abstract(make_state()))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # no file may exceed 100 kB: the writes themselves fail, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        runner.save(4, make_state(4, width=4000), data={}, meta={})
        runner.save(5, make_state(5, width=4000), data={}, meta={})  # reports 4, fails in turn
        runner.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [line.split(":")[0] for line in warnings] == ["checkpoint at step 4 failed", "checkpoint at step 5 failed"]
    assert all("\n" not in line and line.endswith("last good checkpoint is step 3") for line in warnings)
    assert Checkpointer(directory).all_steps() == [1, 2, 3]  # nothing half-written is listed, nothing good deleted
    assert_same(Checkpointer(directory).restore(abstract(make_state()))[0], make_state(3))
    runner.save(6, make_state(6), data={}, meta={})  # space again
    runner.wait()
    assert len(warnings) == 2 and runner.all_steps() == [6]


@pytest.mark.parametrize("first", [True, False])
def test_unwritable_directory_does_not_end_the_run(tmp_path, warnings, first):
    directory = tmp_path / "checkpoints"
    runner = Checkpointer(directory)
    if not first:
        runner.save(1, make_state(1), data={}, meta={})
        runner.wait()
        directory.rename(tmp_path / "gone")
    directory.write_text("a file where the folder should be")
    runner.save(2, make_state(2), data={}, meta={})
    runner.close()
    (line,) = warnings
    assert line.startswith("checkpoint at step 2 failed: ") and line.endswith("there is no good checkpoint yet")


def test_a_failing_manifest_leaves_no_checkpoint_behind(directory, warnings, monkeypatch):
    runner = Checkpointer(directory)
    monkeypatch.setattr(checkpoint, "_digests", lambda *_: 1 / 0)
    runner.save(4, make_state(4), data={}, meta={})
    runner.wait()
    (line,) = warnings
    assert "step 4 failed: ZeroDivisionError" in line and line.endswith("last good checkpoint is step 3")
    assert sorted(os.listdir(directory)) == ["1", "2", "3"]


def run_python(code, *args, devices=1):
    code = "import os, signal, sys, jax\nfrom checkpoint_test import *\n" + code
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, env=environment(devices), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("moment", ["after save returned", "before the rename"])
def test_kill_in_a_save_leaves_the_checkpoint_before(directory, warnings, moment):
    code = """
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
runner = Checkpointer(sys.argv[1], keep=1)
runner.restore(abstract(make_state()))
if sys.argv[2] == "before the rename":
    checkpoint._digests = kill
runner.save(4, make_state(4, width=20_000), data={}, meta={})
if sys.argv[2] == "after save returned":
    kill()
runner.wait()
"""
    result = run_python(code, directory, moment)
    assert result.returncode == -signal.SIGKILL, result.stderr
    left = sorted(os.listdir(directory))
    assert left[:3] == ["1", "2", "3"] and "4" not in left
    runner = Checkpointer(directory, keep=3)
    state, data, _ = runner.restore(abstract(make_state()))
    assert_same(state, make_state(3))
    assert data == {"next_index": 30} and warnings == []
    runner.save(4, make_state(44), data={}, meta={})
    runner.close()
    assert sorted(os.listdir(directory)) == ["2", "3", "4"]  # the leftovers of the killed save are gone
    assert_same(Checkpointer(directory).restore(abstract(make_state()))[0], make_state(44))


def test_sharded_state_comes_back_under_another_sharding(tmp_path):
    """Four CPU devices in one process: shows resharding, not several hosts."""
    code = """
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
def sharding(x, axis):
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*[None] * axis, "data") if x.ndim == 2 else
                                      jax.sharding.PartitionSpec())
state = make_state(3)
saver = Checkpointer(sys.argv[1])
saver.save(3, jax.tree.map(lambda x: jax.device_put(x, sharding(x, 0)), state), data={}, meta={})
wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x, 1)), state)
got, _, _ = saver.restore(wanted)
assert_same(got, state)
assert jax.tree.all(jax.tree.map(lambda x, w: x.sharding.is_equivalent_to(w.sharding, x.ndim), got, wanted))
assert got.params["blocks"]["w"].addressable_shards[0].data.shape == (16, 16)
"""
    result = run_python(code, tmp_path, devices=4)
    assert result.returncode == 0, result.stderr
    assert_same(
        Checkpointer(tmp_path).restore(abstract(make_state()))[0], make_state(3)
    )  # one device, no sharding given


def test_paths_that_would_collide_are_refused():
    with pytest.raises(ValueError, match="must not contain '/'"):
        checkpoint._named({"a/b": 1, "a": {"b": 2}})
    assert list(checkpoint._named({"a": (1, {"b": 2})})) == ["a/0", "a/1/b"]
