"""The mesh and its rules: which axis of which array is split over which devices.

One mesh with the axes (data, fsdp, tensor). The batch is split over data and fsdp, parameters over fsdp and tensor by
the logical names that the layers give their axes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from smdlm.mesh.traced import BATCH_AXES

AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter -> mesh axis. A name missing here would silently be replicated: `shardings` refuses it.
RULES = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "head": None,
    "cond": "tensor",
    "layers": None,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1 for "the rest of the devices"."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = [self.data, self.fsdp, self.tensor]
        if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
            raise ValueError(f"mesh: got (data, fsdp, tensor) = {tuple(sizes)}, wanted sizes >= 1, at most one -1")

    def make(self, devices: Any = None) -> Mesh:
        devices = jax.devices() if devices is None else devices
        sizes = [self.data, self.fsdp, self.tensor]
        known = int(np.prod([s for s in sizes if s != -1]))
        sizes = [len(devices) // known if s == -1 else s for s in sizes]
        if int(np.prod(sizes)) != len(devices):
            raise ValueError(
                f"mesh: got (data, fsdp, tensor) = {tuple(sizes)} for {len(devices)} devices, wanted a product of "
                f"{len(devices)}: set config.mesh.data=-1"
            )
        # Auto axes: the Explicit default of jax.make_mesh breaks Linen's partitioned init.
        return jax.make_mesh(tuple(sizes), AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Parts into which a batch is split."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def param_shardings(mesh: Mesh, boxed: Any) -> Any:
    """NamedShardings for a boxed (nn.meta) parameter tree, concrete or abstract; structure of the unboxed tree.

    Raises:
      ValueError: a logical axis without a rule; axes that do not divide by the mesh, every leaf listed.
    """
    uneven = []

    def sharding(path, leaf):
        names = leaf.names if _is_boxed(leaf) else ()
        unknown = [n for n in names if n is not None and n not in RULES]
        if unknown:
            raise ValueError(f"mesh: no rule for the logical axes {unknown}; add them to mesh.rules.RULES")
        axes = [RULES[n] if n else None for n in names]
        for name, axis, size in zip(names, axes, leaf.value.shape if names else (), strict=True):
            if axis and size % mesh.shape[axis]:
                uneven.append(f"  {'/'.join(_names(path))}: {name} {size}, {axis} {mesh.shape[axis]}")
        return NamedSharding(mesh, PartitionSpec(*axes))

    shardings = jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=_is_boxed)
    if uneven:
        raise ValueError(
            f"mesh: got {len(uneven)} parameters with axes that the mesh does not divide, wanted multiples: change "
            "config.mesh, model.width, model.heads or model.vocab_multiple\n" + "\n".join(uneven)
        )
    return shardings


def state_shardings(mesh: Mesh, abstract_state: Any, params: Any) -> Any:
    """Shardings of a TrainState: EMA and optimizer leaves take the sharding of the parameter whose path they end with.

    Matched by path and shape, because optax wraps parameter trees in its own containers; scalars are replicated.
    """
    by_path = {_names(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(params)}

    def sharding(path, leaf):
        names = _names(path)
        for start in range(len(names)):
            found = by_path.get(names[start:])
            if found is not None and len(found.spec) <= len(leaf.shape):
                return found
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, abstract_state)


LARGE = 2**20  # elements; what may be replicated without a word


def assert_sharded(tree: Any, mesh: Mesh) -> None:
    """Refuses large arrays that every chip holds whole, on a mesh that could split them.

    Args:
      tree: arrays or shapes with NamedShardings (`Experiment.abstract_state`).

    Raises:
      ValueError: the mesh has fsdp or tensor > 1; every such array is listed.
    """
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    whole = [
        f"  {'/'.join(_names(path))}: {leaf.shape}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if parts > 1 and leaf.size > LARGE and leaf.sharding.is_fully_replicated
    ]
    if whole:
        raise ValueError(
            f"mesh: got {len(whole)} arrays of more than {LARGE} elements on every chip of (data, fsdp, tensor) = "
            f"{tuple(mesh.shape.values())}, wanted them split: name their axes in the model and in mesh.rules.RULES\n"
            + "\n".join(whole)
        )
