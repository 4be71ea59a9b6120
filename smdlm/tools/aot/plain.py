"""The step as one would write it first, for comparison: all logits of all positions, autodiff, nothing recomputed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from smdlm.build import Experiment
from smdlm.models.base import Head
from smdlm.softmask import Feedback, summarize


@dataclasses.dataclass(frozen=True)
class PlainReadout:
    """`Readout` with logits [B, L, V] in memory; the same results."""

    k: int

    def feedback(self, head: Head, hidden: jax.Array, masked: jax.Array) -> Feedback:
        return summarize(jax.nn.log_softmax(head.logits(hidden)), masked, self.k)

    feedback_with_gradient = feedback

    def nll(self, head: Head, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_probs = jax.nn.log_softmax(head.logits(hidden))
        nll = -jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
        return jnp.sum(weights * nll), jax.lax.stop_gradient(nll)


def plain(experiment: Experiment) -> Experiment:
    """The same experiment with full logits, XLA's attention and no rematerialisation."""
    old = experiment.denoiser
    model = dataclasses.replace(old.model, remat="none", attention="xla")
    denoiser = dataclasses.replace(old, model=model)
    objective = dataclasses.replace(
        experiment.objective, denoiser=denoiser, readout=PlainReadout(experiment.config.readout.k)
    )
    return dataclasses.replace(experiment, denoiser=denoiser, objective=objective)
