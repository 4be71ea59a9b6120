"""Arrays that a checkpoint writes part by part."""

import weakref

import jax.numpy as jnp
import numpy as np

from smdlm.io.checkpoint import Checkpointer
from smdlm.io.streamed import Streamed
from smdlm.optimizer import TrainState

PARTS = 30


def test_few_parts_are_in_memory_at_a_time(tmp_path):
    """Two trees of two leaves of 30 parts each, beside a plain array; what is read is what was written."""
    alive, most = set(), []

    def parts():
        for number in range(PARTS):
            part = np.full((64, 32), number, np.float32)
            alive.add(id(part))
            weakref.finalize(part, alive.discard, id(part))
            most.append(len(alive))
            yield part

    shape, dtype = (PARTS, 64, 32), np.dtype(np.float32)
    single = Streamed((3,), dtype, False, lambda: iter([np.arange(3, dtype=np.float32)]))
    tree = {"a": Streamed(shape, dtype, True, parts), "b": {"c": Streamed(shape, dtype, True, parts), "d": single}}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(0, TrainState(jnp.int32(0), {**tree, "e": jnp.ones(2)}, tree, {}), data={}, meta={})
    checkpointer.wait()
    assert len(most) == 4 * PARTS and max(most) <= 6  # both trees are written at the same time, two parts of each
    got, _ = checkpointer.restore_params(None, "params")
    checkpointer.close()
    wanted = np.broadcast_to(np.arange(PARTS, dtype=np.float32)[:, None, None], shape)
    assert np.array_equal(got["a"], wanted) and np.array_equal(got["b"]["c"], wanted)
    assert np.array_equal(got["b"]["d"], [0, 1, 2]) and np.array_equal(got["e"], [1, 1])


def test_whole():
    parts = lambda: (np.full(2, i, np.float32) for i in range(3))
    assert np.array_equal(Streamed((3, 2), np.dtype(np.float32), True, parts).whole(), [[0, 0], [1, 1], [2, 2]])
