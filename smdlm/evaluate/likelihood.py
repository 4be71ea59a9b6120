"""Validation likelihood with fixed noise: two checkpoints are compared on the same masks.

The noise of block i is a function of (eval.seed, draw, i) alone: batch size, mesh and number of blocks change nothing.

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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smdlm.diffusion import uniforms_by_number
from smdlm.evaluate.base import Subject, Value
from smdlm.evaluate.samples import Ratio
from smdlm.mesh.arrays import fetch
from smdlm.objective import NextToken, Objective, SoftMaskedDiffusion, counted
from smdlm.softmask import Feedback

LABELS = {
    "one_pass": "one pass (no feedback)",
    "two_pass": "two passes (feedback)",
    "carried": "carried feedback",
    "next_token": "next token (exact)",
}


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Every estimate on the same blocks and masks, and what feedback gains, from the differences of the pairs.

    Attributes:
      blocks: validation blocks used (all if there are fewer), from the start of the split.
      batch_size: of evaluation.
      draws: (t, mask) draws per block and estimate.
      chain: canvases in the chain of the carried-feedback estimate; 0 leaves it out.
      seed: of masks and times; part of the protocol.
    """

    blocks: int = 512
    batch_size: int = 64
    draws: int = 1
    chain: int = 8
    seed: int = 0

    def __post_init__(self):
        for name in ("blocks", "batch_size", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"eval.{name}: got {getattr(self, name)}, wanted at least 1")
        if self.chain < 0:
            raise ValueError(f"eval.chain: got {self.chain}, wanted 0 (left out) or more forwards")

    def run(self, subject: Subject) -> dict[str, Value]:
        """bits_per_byte_NAME, nats_per_token_NAME and perplexity_NAME of every estimate; gain_... of two passes."""
        nll, sizes, lengths = self.blockwise(subject)
        values = {}
        for name, nll_N in nll.items():
            label = LABELS[name]
            values[f"bits_per_byte_{name}"] = Ratio.of(nll_N, sizes * np.log(2), "bits/byte", label)
            values[f"nats_per_token_{name}"] = Ratio.of(nll_N, lengths, "nats/token", label)
            values[f"perplexity_{name}"] = Ratio.of(nll_N, lengths, "perplexity", label, exp=True)
        if "two_pass" in nll:
            gain, label = nll["one_pass"] - nll["two_pass"], "gain of the second pass (paired)"
            values["gain_bits_per_byte"] = Ratio.of(gain, sizes * np.log(2), "bits/byte", label)
            values["gain_nats_per_token"] = Ratio.of(gain, lengths, "nats/token", label)
        return values

    @property
    def keys(self) -> list[jax.Array]:
        """Of the noise, one for each draw."""
        return [jax.random.fold_in(jax.random.key(self.seed), draw) for draw in range(self.draws)]

    def numbered(self, subject: Subject) -> Iterator[tuple[Mapping[str, np.ndarray], np.ndarray, Any]]:
        """(batch, which of its rows are blocks [B] bool, the batch on the devices with the 'number' of each block).

        A block's noise belongs to its number: it is the same in every batch size.
        """
        seen = 0
        for batch in subject.batches(self.blocks, self.batch_size):
            numbers = np.arange(seen, seen + len(batch["valid"]), dtype=np.int32)
            seen += len(numbers)
            yield batch, np.asarray(batch["valid"]), subject.place({**batch, "number": numbers})

    def blockwise(self, subject: Subject) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """({estimate: nll [N], nats}, bytes [N], tokens [N]) of N validation blocks, f64."""
        objective = subject.objective
        if isinstance(objective, SoftMaskedDiffusion):
            objective = objective.bound
        estimators = _estimators(objective, self.chain)
        sums: dict[str, list[np.ndarray]] = {name: [] for name in estimators}
        sizes, lengths = [], []
        for batch, real, placed in self.numbered(subject):
            # The AR model is given the first token of a block: it is neither predicted nor counted.
            scored = objective.predicted(batch) if isinstance(objective, NextToken) else batch
            counts = np.asarray(counted(scored))[real]
            sizes.append((subject.token_bytes[scored["tokens"][real]] * counts).sum(1))
            lengths.append(counts.sum(1))
            for name, fn in estimators.items():
                draws = [fetch(fn(subject.params, key, placed)) for key in self.keys]
                sums[name].append(np.mean(draws, axis=0)[real])
        if not sizes:
            raise ValueError("evaluation: got no validation block, wanted at least one")

        def join(parts: list[np.ndarray]) -> np.ndarray:
            return np.concatenate(parts).astype(np.float64)

        return {name: join(parts) for name, parts in sums.items()}, join(sizes), join(lengths)


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
    example = objective.corrupt_by_number(key, batch)
    _, nll = objective(params, example, jnp.bool_(feedback), None)
    scored = objective.predicted(batch) if isinstance(objective, NextToken) else batch
    return jnp.sum(nll * example.weights, axis=1) * counted(scored).sum()  # the batch's tokens are divided out again


def _carried_nll(objective: SoftMaskedDiffusion, chain: int, params: Any, key: jax.Array, batch: Any) -> jax.Array:
    """Each t of the chain stands for its stratum: the NELBO's integral of (1/t) E[nll] becomes the mean over strata."""
    t, nll, _ = along_chain(objective, chain, True, params, key, batch)
    return jnp.mean(objective.schedule.weight(t) * nll, axis=0)


def along_chain(
    objective: SoftMaskedDiffusion, chain: int, carry: bool, params: Any, key: jax.Array, batch: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Nested canvases at t_1 > ... > t_chain, one per stratum of [t_min, t_max], read as a sampler reads its own.

    One uniform per token decides at which t it becomes visible, so each canvas unmasks part of the one before.

    Args:
      carry: feedback is handed down from canvas to canvas; else every canvas is read without any.
    Returns:
      (t, nll summed over the masked tokens in nats, number of masked tokens that count), each [chain, B].
    """
    denoiser, readout, times = objective.denoiser, objective.readout, objective.times
    tokens = batch["tokens"]
    key_t, key_mask = jax.random.split(key)
    offset = uniforms_by_number(key_t, batch["number"], 1)[:, 0]
    threshold = uniforms_by_number(key_mask, batch["number"], tokens.shape[1])
    head, counts = denoiser.head(params), counted(batch)
    attend = batch["attend"][:, None] if "attend" in batch else None

    def body(feedback: Feedback | None, index: jax.Array) -> tuple[Feedback | None, tuple[jax.Array, ...]]:
        t = times.t_min + (times.t_max - times.t_min) * (chain - 1 - index + offset) / chain
        masked = threshold < (1 - objective.schedule.alpha(t))[:, None]
        if "frozen" in batch:
            masked &= ~batch["frozen"]
        canvas = jnp.where(masked, denoiser.mask_id, tokens)
        hidden = denoiser(params, canvas, feedback, mask=attend)
        weights = masked * counts
        _, nll = readout.nll(head, hidden, tokens, weights)
        found = (t, jnp.sum(weights * nll, axis=1), jnp.sum(weights, axis=1))
        if feedback is None:
            return None, found
        given = batch.get("frozen", jnp.zeros_like(masked))
        remembering = denoiser.softmask.remembering(masked, given)
        feedback = readout.feedback(head, hidden, remembering).replace(
            forwards=feedback.forwards + 1, time=t - (times.t_max - times.t_min) / chain
        )
        return denoiser.softmask.attach(feedback, hidden), found

    nothing = None
    if carry:
        nothing = Feedback.none(*tokens.shape, readout.k)
        hidden = jnp.zeros((*tokens.shape, denoiser.model.width), denoiser.model.dtype)
        nothing = denoiser.softmask.attach(nothing, hidden)
    return jax.lax.scan(body, nothing, jnp.arange(chain))[1]
