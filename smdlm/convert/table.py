"""What every key table shares: the names and layouts of a PyTorch code <-> our parameter trees, both directions.

A table is a list of `Leaf`, in the order of the reference's state_dict. It is bijective: every name of the one side
stands for one slice of one leaf of the other. A torch Linear weight (out, in) is our kernel [*in, *out] transposed and
reshaped. Blocks are stacked along a leading axis. Our vocabulary axis may be padded; the padding is zero here (the
readout excludes it) and does not exist there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from smdlm.convert.unpickle import shown

Tensors = Mapping[str, np.ndarray]

FLOATS = ("float32", "float16", "bfloat16")
# Parts of a name that stand for a wrapper around the module, not for a module: torch.compile, DDP and AveragedModel,
# Lightning, FSDP and activation checkpointing. No table has such a part of its own.
WRAPPERS = ("_orig_mod", "module", "model", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Single numbers that averages of weights keep beside them.
COUNTERS = ("n_averaged", "num_updates", "decay", "initted", "step")


class ConversionError(ValueError):
    """The weights do not fit; one line, and below it every tensor that is missing, superfluous or misshapen."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor of the reference and its place in our tree: `target`, or layer `layer` of it."""

    source: str
    target: str
    shape: tuple[int, ...]
    layer: int | None = None
    vocab: bool = False  # axis 0 is the vocabulary

    @property
    def matrix(self) -> bool:
        return self.target.endswith("kernel")


def linear(source: str, target: str, shape: tuple[int, int]) -> list[Leaf]:
    """Weight and bias of a torch Linear of shape (out, in)."""
    return [Leaf(f"{source}.weight", f"{target}/kernel", shape), Leaf(f"{source}.bias", f"{target}/bias", shape[:1])]


def to_tree(
    tensors: Tensors, leaves: Iterable[Leaf], shapes: Mapping[str, Any], padded_vocab: int
) -> dict[str, np.ndarray]:
    """Reference names -> our tree, f32 arrays. tensors must fit the leaves; shapes: our tree of things with a shape."""
    out = {name: np.zeros(x.shape, np.float32) for name, x in traverse_util.flatten_dict(shapes, sep="/").items()}
    for leaf in leaves:
        value = np.asarray(tensors[leaf.source]).astype(np.float32)
        if leaf.vocab:
            value = np.pad(value, [(0, padded_vocab - len(value))] + [(0, 0)] * (value.ndim - 1))
        slot = out[leaf.target] if leaf.layer is None else out[leaf.target][leaf.layer]
        slot[...] = (value.T if leaf.matrix else value).reshape(slot.shape)
    return traverse_util.unflatten_dict(out, sep="/")


def from_tree(tree: Mapping[str, Any], leaves: Iterable[Leaf]) -> dict[str, np.ndarray]:
    """Our tree (parameters, or gradients) -> reference names, in the order of the leaves."""
    flat = {name: np.asarray(x) for name, x in traverse_util.flatten_dict(tree, sep="/").items()}
    out = {}
    for leaf in leaves:
        value = flat[leaf.target] if leaf.layer is None else flat[leaf.target][leaf.layer]
        if leaf.matrix:
            value = value.reshape(leaf.shape[1], -1).T
        out[leaf.source] = np.require(value[: leaf.shape[0]].reshape(leaf.shape), requirements="C")
    return out


# ----------------------------------------------------------------------------------------------------------- names


@dataclasses.dataclass(frozen=True)
class Unwrapped:
    """Tensors by the names that they have without wrappers.

    Attributes:
      origin: name -> name in the file, for messages.
      note: what was stripped and left out, a line for the user; empty if nothing was.
    """

    tensors: dict[str, np.ndarray]
    origin: dict[str, str]
    note: str


def unwrap(tensors: Tensors, file: str) -> Unwrapped:
    """Strips the names of wrappers in any place and combination, and drops the counters of averages.

    Raises:
      ConversionError: two names would become one; both are listed.
    """
    origin: dict[str, str] = {}
    found, counters, collisions = set(), [], []
    for name, value in tensors.items():
        parts = name.split(".")
        if parts[-1] in COUNTERS and value.size == 1:
            counters.append(name)
            continue
        bare = ".".join(part for part in parts if part not in WRAPPERS)
        found.update(part for part in parts if part in WRAPPERS)
        if bare in origin:
            collisions.append(f"  {shown(name)}: got it beside {shown(origin[bare])}, wanted one of them")
        origin.setdefault(bare, name)
    wrappers = ", ".join(f"{part}." for part in WRAPPERS if part in found)
    if collisions:
        raise ConversionError(
            f"{file}: got {len(collisions)} names twice when {wrappers} is stripped, wanted one set of weights: save "
            "only one\n" + "\n".join(collisions)
        )
    lines = [f"stripped from the names: {wrappers}"] if found else []
    lines += [f"left out: {', '.join(map(shown, counters))}"] if counters else []
    return Unwrapped({bare: tensors[name] for bare, name in origin.items()}, origin, "; ".join(lines))


def differences(
    label: str, got: Tensors, wanted: Mapping[str, tuple[int, ...]], origin: Mapping[str, str]
) -> list[str]:
    """One line for each missing, superfluous, misshapen or mistyped tensor; origin: names as the file has them."""
    lines = []
    for name in [*wanted, *(n for n in got if n not in wanted)]:
        g = f"{got[name].dtype.name}{list(got[name].shape)}" if name in got else "nothing"
        w = f"float32{list(wanted[name])}" if name in wanted else "nothing"
        fits = name in got and name in wanted and got[name].shape == wanted[name] and got[name].dtype.name in FLOATS
        if not fits:
            lines.append(f"  {label}{shown(origin.get(name, name))}: got {g}, wanted {w}")
    return lines
