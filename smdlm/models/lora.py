"""LoRA and DoRA: a frozen model with trained products of low rank beside chosen matrices.

A matrix W becomes W + s A B with s = alpha / rank (LoRA), or m (W + s A B) / |W + s A B| with a learned length m of the
weights of each output (DoRA; no gradient flows through the norm). B starts at zero and m at |W|: the start is the base.

The adapters alone are the parameters of the wrapped model; the frozen base is a second tree that stays out of
optimizer, EMA, donation and checkpoints. `join` makes of both what `apply`, `table` and `head` take:

    loss = lambda adapters: objective({**params, "backbone": model.join(base, adapters)}, ...)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from smdlm.models.base import Frozen, MatrixAxes, Params
from smdlm.models.layers import logical, uniform_fan_in

KERNEL = "/kernel"


@dataclasses.dataclass(frozen=True)
class LoRA(Frozen):
    """A frozen model whose matrices are our `Linear`, with trained adapters.

    Attributes:
      base: the frozen model.
      targets: modules whose kernels are adapted, by the last part of their path ('q' is 'blocks/q/kernel').
      rank: r of A [inputs, r] and B [r, outputs], which are f32.
      alpha: s is alpha / rank.
      dora: DoRA instead of LoRA.
    """

    targets: tuple[str, ...] = ("q", "k", "v", "attention_out")
    rank: int = 16
    alpha: float = 16.0
    dora: bool = True

    def __post_init__(self):
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"adapter: got rank {self.rank}, alpha {self.alpha}, wanted rank >= 1 and alpha > 0")
        known = {_module(path) for path, axes in self.base.matrices().items() if axes and path.endswith(KERNEL)}
        if not self.targets or (unknown := sorted(set(self.targets) - known)):
            raise ValueError(
                f"adapter.targets: got {unknown if self.targets else 'none'}, wanted some of {', '.join(sorted(known))}"
            )

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def adapted(self) -> dict[str, MatrixAxes]:
        """{path of a kernel: its axes}, in order; what lies behind the inputs is output, q, k and v as one."""
        matrices = self.base.matrices()
        found = {path: axes for path, axes in matrices.items() if axes and _module(path) in self.targets}
        behind = lambda axes: tuple(range(axes.inputs[-1] + 1, axes.outputs[-1] + 1))
        return {path: MatrixAxes(axes.inputs, behind(axes)) for path, axes in found.items()}

    def init(self, key: jax.Array) -> Params:
        """Adapters {module: {'a', 'b', 'magnitude'}}; the magnitudes, which only the base knows, by `start`."""
        boxed = traverse_util.flatten_dict(jax.eval_shape(self.base.init, key), sep="/")
        out = {}
        for number, (path, axes) in enumerate(self.adapted().items()):
            shape, names = boxed[path].value.shape, boxed[path].names
            stack = range(axes.inputs[0])
            sizes = lambda of, shape=shape: tuple(shape[axis] for axis in of)
            named = lambda of, names=names: tuple(names[axis] for axis in of)
            name = path.removesuffix(KERNEL)
            draw = logical(uniform_fan_in(int(np.prod(sizes(axes.inputs)))), *named((*stack, *axes.inputs)), None)
            shape_a = (*sizes((*stack, *axes.inputs)), self.rank)
            out[f"{name}/a"] = draw(jax.random.fold_in(key, number), shape_a, jnp.float32)
            zeros = logical(nn.initializers.zeros, *named(stack), None, *named(axes.outputs))
            out[f"{name}/b"] = zeros(key, (*sizes(stack), self.rank, *sizes(axes.outputs)), jnp.float32)
            if self.dora:
                ones = logical(nn.initializers.ones, *named((*stack, *axes.outputs)))
                out[f"{name}/magnitude"] = ones(key, sizes((*stack, *axes.outputs)), jnp.float32)
        return traverse_util.unflatten_dict(out, sep="/")

    def start(self, base: Params, adapters: Params) -> Params:
        """Adapters as from `init` (unboxed), with the magnitudes at which the model is its base."""
        if not self.dora:
            return adapters
        kernels = traverse_util.flatten_dict(base, sep="/")
        out = dict(traverse_util.flatten_dict(adapters, sep="/"))
        for path, axes in self.adapted().items():
            squares = jnp.square(_kernel(kernels, path, axes)).sum(axes.inputs)
            out[f"{path.removesuffix(KERNEL)}/magnitude"] = jnp.sqrt(squares)
        return traverse_util.unflatten_dict(out, sep="/")

    def beside(self, base: Params, adapters: Params) -> Params:
        """The adapters of a module under 'adapter' beside its kernel."""
        out = dict(traverse_util.flatten_dict(base, sep="/"))
        for path, value in traverse_util.flatten_dict(adapters, sep="/").items():
            module, _, part = path.rpartition("/")
            out[f"{module}/adapter/{part}"] = value
        return traverse_util.unflatten_dict(out, sep="/")

    def join(self, base: Params, adapters: Params) -> Params:
        """The frozen base with its adapters beside the kernels, LoRA's scaling in B: what `apply` takes.

        No gradient flows to the base.
        """
        flat = traverse_util.flatten_dict(adapters, sep="/")
        scaled = {path: value * self.scaling if path.endswith("/b") else value for path, value in flat.items()}
        return self.beside(jax.lax.stop_gradient(base), traverse_util.unflatten_dict(scaled, sep="/"))

    # ---- merging ----

    def norms(self, base: Params, adapters: Params) -> dict[str, jax.Array]:
        """{path of a kernel: |W + s A B| of each output}: what `unmerge` needs of a DoRA."""
        kernels, flat = traverse_util.flatten_dict(base, sep="/"), traverse_util.flatten_dict(adapters, sep="/")
        return {path: _norm(self._sum(kernels, flat, path), axes) for path, axes in self.adapted().items()}

    def merge(self, base: Params, adapters: Params) -> Params:
        """The base with the adapters in its kernels, in the types of the base: parameters of `self.base`.

        ValueError for a base in int8, whose steps are wider than what adapters change.
        """
        out, flat = dict(traverse_util.flatten_dict(base, sep="/")), traverse_util.flatten_dict(adapters, sep="/")
        if any(out[path].dtype == jnp.int8 for path in self.adapted()):
            raise ValueError("merge: got a base in int8, wanted bfloat16 or float32: keep the adapters beside it")
        for path, axes in self.adapted().items():
            total = self._sum(out, flat, path)
            if self.dora:
                total = total * self._magnitude(flat, path) / _norm(total, axes)
            out[path] = total.astype(out[path].dtype)
        return traverse_util.unflatten_dict(out, sep="/")

    def unmerge(self, merged: Params, adapters: Params, norms: dict[str, jax.Array]) -> Params:
        """The base back from what `merge` made of it, up to rounding; norms: those from before merging."""
        out, flat = dict(traverse_util.flatten_dict(merged, sep="/")), traverse_util.flatten_dict(adapters, sep="/")
        for path in self.adapted():
            total = out[path].astype(jnp.float32)
            if self.dora:
                total = total * norms[path] / self._magnitude(flat, path)
            out[path] = (total - self._product(flat, path)).astype(out[path].dtype)
        return traverse_util.unflatten_dict(out, sep="/")

    def _magnitude(self, flat: dict[str, jax.Array], path: str) -> jax.Array:
        """Of each output, with axes of one in the places of the inputs."""
        return jnp.expand_dims(flat[f"{path.removesuffix(KERNEL)}/magnitude"], self.adapted()[path].inputs)

    def _sum(self, kernels: dict[str, jax.Array], flat: dict[str, jax.Array], path: str) -> jax.Array:
        """W + s A B in f32."""
        return _kernel(kernels, path, self.adapted()[path]) + self._product(flat, path)

    def _product(self, flat: dict[str, jax.Array], path: str) -> jax.Array:
        """s A B in the shape of the kernel: [layers, *inputs, *outputs]."""
        a, b = flat[f"{path.removesuffix(KERNEL)}/a"], flat[f"{path.removesuffix(KERNEL)}/b"]
        stacked = a.ndim - 1 - len(self.adapted()[path].inputs)
        stack = a.shape[:stacked]
        product = a.reshape(*stack, -1, self.rank) @ b.reshape(*stack, self.rank, -1)
        return self.scaling * product.reshape(*a.shape[:-1], *b.shape[stacked + 1 :])

    # ---- what an optimizer asks ----

    def matrices(self) -> dict[str, MatrixAxes | None]:
        """None of the adapters is orthogonalised: a product of low rank is no matrix of its own."""
        parts = ("a", "b", "magnitude") if self.dora else ("a", "b")
        return {f"{path.removesuffix(KERNEL)}/{part}": None for path in self.adapted() for part in parts}

    def flops(self, length: int) -> float:
        """Those of the base and, for each adapted matrix of D inputs and F outputs, r (D + F) products more."""
        shapes = traverse_util.flatten_dict(nn.meta.unbox(jax.eval_shape(self.init, jax.random.key(0))), sep="/")
        low_rank = sum(leaf.size for path, leaf in shapes.items() if not path.endswith("magnitude"))
        return self.base.flops(length) + 2.0 * low_rank


# config.adapter.kind: (base, targets, rank, alpha) -> the adapted model.
ADAPTERS: dict[str, Callable[..., Frozen]] = {
    "lora": functools.partial(LoRA, dora=False),
    "dora": functools.partial(LoRA, dora=True),
}


def _kernel(kernels: Mapping[str, jax.Array], path: str, axes: MatrixAxes) -> jax.Array:
    """A kernel of the base in f32, also one that is stored in int8 with a scale of each output."""
    kernel, scale = kernels[path].astype(jnp.float32), kernels.get(f"{path.removesuffix(KERNEL)}/scale")
    return kernel if scale is None else kernel * jnp.expand_dims(scale, axes.inputs)


def _norm(kernel: jax.Array, axes: MatrixAxes) -> jax.Array:
    """The length of the weights of each output, with axes of one in the places of the inputs."""
    return jnp.sqrt(jnp.square(kernel).sum(axes.inputs, keepdims=True))


def _module(path: str) -> str:
    return path.removesuffix(KERNEL).rpartition("/")[2]
