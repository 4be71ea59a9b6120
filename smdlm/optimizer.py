"""The optimizer, and the training state: parameters, their moving average, the optimizer's own."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from smdlm.models.base import MatrixAxes


class TrainState(flax.struct.PyTreeNode):
    """step [] i32 (updates done), params and ema ({'backbone', 'softmask'}), opt_state. Noise is f(seed, step)."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Defaults are the paper's (reference config.yaml and training scripts).

    Attributes:
      name: 'adamw', or 'muon' (Muon for the matrices of the blocks, AdamW for everything else).
      lr: AdamW's learning rate; muon_lr: Muon's; lr_softmask: omega's.
      warmup: updates of linear warm-up from 0 (the first update has rate 0, as in the reference).
      decay: after it 'constant', or 'cosine' / 'linear' down to final_lr * rate at the last update.
      clip: one global norm over all gradients.
      ema_decay: EMA with the warm-up min(ema_decay, (1 + n) / (10 + n)) at update n = 1, 2, ...
    """

    name: str = "adamw"
    lr: float = 3e-4
    muon_lr: float = 0.02
    lr_softmask: float = 1e-2
    warmup: int = 2500
    decay: str = "constant"
    final_lr: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    ema_decay: float = 0.9999

    def __post_init__(self):
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"optimizer.name: got {self.name!r}, wanted 'adamw' or 'muon'")
        if self.decay not in ("constant", "cosine", "linear"):
            raise ValueError(f"optimizer.decay: got {self.decay!r}, wanted 'constant', 'cosine' or 'linear'")
        for name in ("lr", "muon_lr", "lr_softmask", "warmup", "weight_decay", "final_lr"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name}: got {getattr(self, name)}, wanted a number >= 0")
        for name in ("clip", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name}: got {getattr(self, name)}, wanted > 0")
        for name in ("b1", "b2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}: got {getattr(self, name)}, wanted 0 <= value < 1")

    def rate(self, peak: float, steps: int) -> optax.Schedule:
        """Learning rate at update n = 0 .. steps - 1."""
        after = max(1, steps - self.warmup)
        decayed = {
            "constant": optax.constant_schedule(peak),
            "cosine": optax.cosine_decay_schedule(peak, after, alpha=self.final_lr),
            "linear": optax.linear_schedule(peak, self.final_lr * peak, after),
        }[self.decay]
        if not self.warmup:
            return decayed
        return optax.join_schedules([optax.linear_schedule(0.0, peak, self.warmup), decayed], [self.warmup])


def _muon_axes(matrices: Mapping[str, MatrixAxes | None], params: Any) -> Any:
    """What Muon treats as a matrix in each parameter, None where AdamW takes it."""

    def axes(path: Any, leaf: Any) -> MuonDimensionNumbers | None:
        found = matrices[jax.tree_util.keystr(path, simple=True, separator="/").removeprefix("backbone/")]
        return found and MuonDimensionNumbers(found.inputs, found.outputs)

    return jax.tree_util.tree_map_with_path(axes, params)


def _check_known(matrices: Mapping[str, MatrixAxes | None], params: Any) -> None:
    """ValueError that lists what `matrices` lack or name too much: never silently AdamW."""
    groups = jax.tree_util.tree_leaves_with_path(_groups(params))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, group in groups if group == "backbone"]
    names = {path.removeprefix("backbone/") for path in paths}
    if differing := sorted(names ^ set(matrices)):
        raise ValueError(
            f"optimizer: got parameters {sorted(names - set(matrices))} that the model's `matrices` do not list, and "
            f"{sorted(set(matrices) - names)} that are none, wanted all {len(names)} ({len(differing)} differ)"
        )


def _groups(params: Any) -> Any:
    """'softmask' for the scalars of gate and operator, 'backbone' for all else: an operator's matrices too."""

    def group(path: Any, leaf: Any) -> str:
        return "softmask" if path[0].key == "softmask" and leaf.ndim == 0 else "backbone"

    return jax.tree_util.tree_map_with_path(group, params)


def _clip(limit: float) -> optax.GradientTransformation:
    """torch's clip_grad_norm_: gradients times min(1, limit / (norm + 1e-6)); optax's own leaves out the 1e-6."""

    def scaled(grads: Any, _: Any) -> Any:
        factor = jnp.minimum(1.0, limit / (optax.global_norm(grads) + 1e-6))
        return jax.tree.map(lambda g: factor * g, grads)

    return optax.stateless(scaled)


def make_optimizer(
    config: OptimizerConfig, steps: int, matrices: Mapping[str, MatrixAxes | None]
) -> optax.GradientTransformationExtraArgs:
    """optax transformation over {'backbone', 'softmask'}; `update(..., feedback=coin)` with coin [] bool.

    matrices: as from `Denoiser.matrices`; `init` refuses a parameter that it does not list, scalars of omega apart.

    On a step without feedback omega and its moments stay bit for bit the same: zero gradients would decay the moments
    and still move omega (torch skips parameters without gradient). Its schedule follows the global step all the same.
    """
    adam = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    rate = config.rate(config.lr, steps)
    if config.name == "muon":
        backbone = muon(
            config.rate(config.muon_lr, steps),
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            eps=config.eps,
            adam_weight_decay=config.weight_decay,
            adam_learning_rate=rate,
            muon_weight_dimension_numbers=functools.partial(_muon_axes, matrices),
        )
    else:
        backbone = optax.adamw(rate, **adam, weight_decay=config.weight_decay)
    softmask = optax.chain(
        optax.conditionally_mask(
            optax.scale_by_adam(**adam), lambda step, *, feedback, **_: feedback, forward_extra_args=True
        ),
        optax.scale_by_learning_rate(config.rate(config.lr_softmask, steps)),
    )

    whole = optax.chain(
        _clip(config.clip),
        optax.partition({"backbone": backbone, "softmask": softmask}, _groups),
    )

    def init(params: Any) -> Any:
        _check_known(matrices, params)
        return whole.init(params)

    return optax.GradientTransformationExtraArgs(init, whole.update)


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Fresh state; the EMA starts at the parameters. params unboxed."""
    # Copies, because the state is donated and a buffer can be donated only once.
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def update_ema(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """shadow + (1 - d) (param - shadow), d = min(decay, (1 + n) / (10 + n)); step is the number n of updates done."""
    n = step.astype(jnp.float32)
    d = jnp.minimum(decay, (1 + n) / (10 + n))
    return jax.tree.map(lambda s, p: s + (1 - d) * (p - s), ema, params)
