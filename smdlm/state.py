"""Training state: parameters, their moving average, the optimizer."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon


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
            if not getattr(self, name) >= 0:
                raise ValueError(f"optimizer.{name}: got {getattr(self, name)}, wanted >= 0")
        for name in ("clip", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name}: got {getattr(self, name)}, wanted > 0")
        for name in ("b1", "b2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}: got {getattr(self, name)}, wanted 0 <= value < 1")

    def rate(self, peak: float, steps: int) -> optax.Schedule:
        """Learning rate at update n = 0 .. steps - 1."""

        def schedule(n: jax.Array) -> jax.Array:
            n = jnp.asarray(n, jnp.float32)
            rate = jnp.minimum(1.0, n / self.warmup) if self.warmup else jnp.float32(1)
            if self.decay != "constant":
                done = jnp.clip((n - self.warmup) / max(1, steps - self.warmup), 0, 1)
                left = (1 + jnp.cos(jnp.pi * done)) / 2 if self.decay == "cosine" else 1 - done
                rate = rate * (self.final_lr + (1 - self.final_lr) * left)
            return peak * rate

        return schedule


def _muon_axes(params: Any) -> Any:
    """Which axes of the stacked block matrices Muon treats as a matrix; None elsewhere (AdamW).

    Layers, and q, k and v among themselves, are separate matrices. adaLN is left to AdamW: its input is one vector, so
    its gradient has rank one, which orthogonalisation would blow up.
    """
    table = {
        "qkv": MuonDimensionNumbers(1, (3, 4)),  # [N, D, 3, H, E]
        "attention_out": MuonDimensionNumbers((1, 2), 3),  # [N, H, E, D]
        "mlp_in": MuonDimensionNumbers(1, 2),  # [N, D, 4D]
        "mlp_out": MuonDimensionNumbers(1, 2),
    }

    def axes(path, leaf):
        names = [p.key for p in path]
        return table.get(names[-2]) if "blocks" in names and names[-1] == "kernel" else None

    return jax.tree_util.tree_map_with_path(axes, params)


def _clip(limit: float) -> optax.GradientTransformation:
    """torch's clip_grad_norm_: gradients times min(1, limit / (norm + 1e-6)); optax's own leaves out the 1e-6."""

    def scaled(grads: Any, _: Any) -> Any:
        factor = jnp.minimum(1.0, limit / (optax.global_norm(grads) + 1e-6))
        return jax.tree.map(lambda g: factor * g, grads)

    return optax.stateless(scaled)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """optax transformation over {'backbone', 'softmask'}; `update(..., feedback=coin)` with coin [] bool.

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
            muon_weight_dimension_numbers=_muon_axes,
        )
    else:
        backbone = optax.adamw(rate, **adam, weight_decay=config.weight_decay)
    softmask = optax.chain(
        optax.conditionally_mask(
            optax.scale_by_adam(**adam), lambda step, *, feedback, **_: feedback, forward_extra_args=True
        ),
        optax.scale_by_learning_rate(config.rate(config.lr_softmask, steps)),
    )
    labels = lambda params: {name: jax.tree.map(lambda _, name=name: name, tree) for name, tree in params.items()}
    return optax.chain(
        _clip(config.clip),
        optax.partition({"backbone": backbone, "softmask": softmask}, labels),
    )


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
