"""Validation likelihood with fixed noise: two checkpoints are compared on the same masks.

For a soft-masked model "the" likelihood is three different numbers, each an estimate of a NELBO in nats/token, always
labelled:

  one_pass: the model without feedback.
  two_pass: feedback from a first pass on the same canvas, as in training; two forwards.
  carried:  feedback carried down a chain of canvases with fewer and fewer masks, as in sampling; `chain` forwards.

The AR baseline has one exact number, `next_token`.

Shapes: B examples, L positions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smdlm.objective import NextToken, Objective, SoftMaskedDiffusion
from smdlm.partition import fetch
from smdlm.softmask import Feedback


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Attributes:
    blocks: validation blocks used (all if there are fewer), from the start of the split.
    batch_size: of evaluation.
    draws: (t, mask) draws per block and estimate.
    chain: canvases in the chain of the carried-feedback estimate; 0 leaves it out.
    seed: of masks and times; part of the protocol.
    omega: 'ema', or 'live': the last omega beside the averaged backbone (the reference's EMA leaves omega out).
    """

    blocks: int = 512
    batch_size: int = 64
    draws: int = 1
    chain: int = 8
    seed: int = 0
    omega: str = "ema"

    def __post_init__(self):
        for name in ("blocks", "batch_size", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"eval.{name}: got {getattr(self, name)}, wanted at least 1")
        if self.chain < 0:
            raise ValueError(f"eval.chain: got {self.chain}, wanted 0 (left out) or more forwards")
        check_omega("eval.omega", self.omega)


def check_omega(field: str, value: str) -> None:
    if value not in ("ema", "live"):
        raise ValueError(f"{field}: got {value!r}, wanted 'ema' or 'live'")


def weights(ema: Any, params: Any, omega: str) -> Any:
    """The averaged weights with the omega that is asked for."""
    return ema if omega == "ema" else {**ema, "softmask": params["softmask"]}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A likelihood over `blocks` blocks with the half-width of its 95 % confidence interval (over blocks).

    weights: what was evaluated.
    """

    nats_per_token: float
    nats_interval: float
    bits_per_byte: float
    bits_interval: float
    tokens: int
    blocks: int
    weights: str

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nats_per_token))


@functools.cache  # a run that validates every so often compiles once
def _estimators(objective: Objective, chain: int) -> dict[str, Callable[..., jax.Array]]:
    """{label: (params, key, batch) -> nll summed over each example's tokens [B], nats}."""
    if isinstance(objective, NextToken):
        return {"next_token": jax.jit(functools.partial(_objective_nll, objective, False))}
    plain = dataclasses.replace(objective, p_sm=0.0)
    labels = {"one_pass": jax.jit(functools.partial(_objective_nll, plain, False))}
    if objective.denoiser.softmask is not None:
        always = dataclasses.replace(objective, p_sm=1.0)
        labels["two_pass"] = jax.jit(functools.partial(_objective_nll, always, True))
        if chain:
            labels["carried"] = jax.jit(functools.partial(_carried_nll, always, chain))
    return labels


def _objective_nll(objective: Objective, feedback: bool, params: Any, key: jax.Array, batch: Any) -> jax.Array:
    example = objective.corrupt(key, batch)
    _, nll = objective(params, example, jnp.bool_(feedback), None)
    valid_tokens = batch["valid"].sum() * example.targets.shape[1]  # undo the division by the batch's tokens
    return jnp.sum(nll * example.weights, axis=1) * valid_tokens


def _carried_nll(objective: SoftMaskedDiffusion, chain: int, params: Any, key: jax.Array, batch: Any) -> jax.Array:
    """Nested canvases at t_1 > ... > t_chain, one per stratum of [t_min, t_max], feedback handed down like a sampler's.

    One uniform per token decides at which t it becomes visible, so each canvas unmasks part of the one before. Each t
    stands for its stratum: the NELBO's integral of (1/t) E[nll] becomes the mean over strata.
    """
    denoiser, readout, times = objective.denoiser, objective.readout, objective.times
    tokens = batch["tokens"]
    key_t, key_mask = jax.random.split(key)
    offset = jax.random.uniform(key_t, (len(tokens),))
    threshold = jax.random.uniform(key_mask, tokens.shape)
    head = denoiser.head(params)

    def body(feedback: Feedback, index: jax.Array) -> tuple[Feedback, jax.Array]:
        t = times.t_min + (times.t_max - times.t_min) * (chain - 1 - index + offset) / chain
        masked = threshold < (1 - objective.schedule.alpha(t))[:, None]
        canvas = jnp.where(masked, denoiser.mask_id, tokens)
        hidden = denoiser(params, canvas, feedback)
        weights = masked * objective.schedule.weight(t)[:, None]
        _, nll = readout.nll(head, hidden, tokens, weights)
        feedback = denoiser.softmask.attach(readout.feedback(head, hidden, masked), hidden)
        return feedback, jnp.sum(weights * nll, axis=1)

    none = Feedback.none(*tokens.shape, readout.k)
    none = denoiser.softmask.attach(none, jnp.zeros((*tokens.shape, denoiser.model.width), denoiser.model.dtype))
    _, nll = jax.lax.scan(body, none, jnp.arange(chain))
    return nll.mean(0)


def likelihood(
    objective: Objective,
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    token_bytes: np.ndarray,
    config: EvalConfig,
    put: Callable[[Any], Any] = lambda x: x,
) -> dict[str, Estimate]:
    """Evaluates every estimate on the same blocks and masks.

    Args:
      objective: gives model, schedule and range of t; its p_sm plays no role.
      params: `weights` of the config's omega.
      batches: {'tokens' [B, L], 'valid' [B]}, once through.
      token_bytes: [V] UTF-8 bytes per token, for bits per byte.
      config: number of draws, chain, seed.
      put: places a batch on the devices.
    """
    estimators = _estimators(objective, config.chain)
    sums: dict[str, list[np.ndarray]] = {name: [] for name in estimators}
    sizes, lengths = [], []
    for number, batch in enumerate(batches):
        real = np.asarray(batch["valid"])
        tokens = np.asarray(batch["tokens"])[real]
        # The AR model is given the first token of a block: it is neither predicted nor counted.
        counted = tokens[:, 1:] if isinstance(objective, NextToken) else tokens
        sizes.append(token_bytes[counted].sum(1))
        lengths.append(np.full(len(counted), counted.shape[1]))
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        placed = put(batch)
        for name, fn in estimators.items():
            draws = [fetch(fn(params, jax.random.fold_in(key, d), placed)) for d in range(config.draws)]
            sums[name].append(np.mean(draws, axis=0)[real])
    if not sizes:
        raise ValueError("evaluation: got no validation block, wanted at least one")
    size, length = np.concatenate(sizes).astype(np.float64), np.concatenate(lengths).astype(np.float64)
    label = "EMA weights" + (", live omega" if config.omega == "live" else "")
    return {n: _estimate(np.concatenate(v).astype(np.float64), size, length, label) for n, v in sums.items()}


def _estimate(nll: np.ndarray, size: np.ndarray, length: np.ndarray, weights: str) -> Estimate:
    def ratio(denominator: np.ndarray) -> tuple[float, float]:
        value = nll.sum() / denominator.sum()
        # Standard error of a ratio of sums (delta method) over independent blocks.
        residual = nll - value * denominator
        error = np.sqrt(np.sum(residual**2) / max(1, len(nll) - 1) * len(nll)) / denominator.sum()
        return float(value), float(1.96 * error)

    nats, nats_interval = ratio(length)
    bits, bits_interval = ratio(size * np.log(2))
    return Estimate(nats, nats_interval, bits, bits_interval, int(length.sum()), len(nll), weights)
