"""What feedback is worth at each step of decoding, on canvases whose true tokens are known.

The canvases are those of the carried likelihood: nested, one for each of `chain` strata of t, from nearly all masked to
nearly all visible. A model with feedback reads them with what it remembers of the canvases before, and without it; a
binary model reads the same ones. The difference of two models at a step is the gain of that step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from smdlm.evaluate.base import Subject, Value, ratio
from smdlm.evaluate.likelihood import Likelihood, along_chain
from smdlm.mesh.arrays import fetch
from smdlm.objective import NextToken, Objective


@dataclasses.dataclass(frozen=True)
class DecodingSteps(Likelihood):
    """Nats per masked token at each canvas of the chain, and what carried feedback gains there. Fields as of
    `Likelihood`; one draw."""

    def run(self, subject: Subject) -> dict[str, Value]:
        """step_I_nats and, for a model with feedback, step_I_gain (paired), I from 1 (nearly all masked) to `chain`."""
        if isinstance(subject.objective, NextToken) or not self.chain:
            kind = type(subject.objective).__name__
            raise ValueError(
                f"eval.metrics: got decoding_steps with eval.chain={self.chain} for {kind}, wanted a diffusion model "
                "and at least one canvas in the chain"
            )
        readings = _readings(subject.objective.bound, self.chain)
        sums: dict[str, list[np.ndarray]] = {name: [] for name in readings}
        masked = []
        for _, real, placed in self.numbered(subject):
            for name, read in readings.items():
                _, nll, count = map(fetch, read(subject.params, self.keys[0], placed))
                sums[name].append(nll[:, real])
            masked.append(count[:, real])
        nll = {name: np.concatenate(parts, axis=1).astype(np.float64) for name, parts in sums.items()}
        sizes, values = np.concatenate(masked, axis=1).astype(np.float64), {}
        for i in range(self.chain):
            label = f"step {i + 1} of {self.chain}"
            read = nll.get("carried", nll["alone"])[i]
            values[f"step_{i + 1}_nats"] = Value(*ratio(read, sizes[i]), "nats/masked token", label)
            if "carried" in nll:
                gain = ratio(nll["alone"][i] - read, sizes[i])
                values[f"step_{i + 1}_gain"] = Value(*gain, "gain of feedback", label)
        return values


@functools.cache
def _readings(objective: Objective, chain: int) -> dict[str, Callable[..., Any]]:
    """{'alone', 'carried': (params, key, batch) -> what `along_chain` returns}."""
    ways = {"alone": False} | ({"carried": True} if objective.denoiser.softmask is not None else {})
    return {name: jax.jit(functools.partial(along_chain, objective, chain, carry)) for name, carry in ways.items()}
