"""The way of arrays from the host to the devices and back; the same calls for one process and for many."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from smdlm.mesh.rules import batch_sharding, batch_shards, replicated


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Numbers of the rows of a global batch that this process's devices hold, ascending.

    Read from the mesh: a mesh may order its devices by their wiring, and a tensor axis may span processes, which then
    hold the same rows. batch_size must be a multiple of `batch_shards`.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held.values()]))


def put(mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """This process's `local_rows` of a batch -> global arrays, split over the batch axes."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
        for name, rows in batch.items()
    }


def place(mesh: Mesh, tree: Any) -> Any:
    """Host arrays that every process holds whole -> global arrays, split over the batch axes where the rows divide.

    Where they do not, every device gets (and computes) all of them: said once, in one warning.
    """

    def leaf(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        split = len(x) % batch_shards(mesh) == 0
        if not split:
            _warn_of_copies(len(x), batch_shards(mesh))
        sharding = batch_sharding(mesh) if split else replicated(mesh)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(leaf, tree)


@functools.cache
def _warn_of_copies(rows: int, shards: int) -> None:
    logging.warning(
        "got %d rows for %d parts of the mesh (data x fsdp), wanted a multiple: every device computes all of them "
        "(eval.batch_size, sampling.count)",
        rows,
        shards,
    )


def fetch(x: jax.Array) -> np.ndarray:
    """A whole global array on every host; all processes must call it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)
