"""The training example of the set, with its stored noise."""

from __future__ import annotations

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from golden.models import MDLM, Reference
from smdlm.objective import Example, SoftMaskedDiffusion


def stored_times(key: Any, batch: int) -> jax.Array:
    return jnp.asarray(MDLM.arrays("loss.npz")["t"])


def example(reference: Reference, valid: np.ndarray) -> tuple[SoftMaskedDiffusion, Example]:
    """(objective, its corrupted batch) with the stored t and the stored uniforms in place of random ones."""
    stored = MDLM.arrays("loss.npz")
    objective = SoftMaskedDiffusion(reference.denoiser, reference.readout, p_sm=0.5, times=stored_times)
    with mock.patch("jax.random.uniform", lambda *args, **kwargs: jnp.asarray(stored["uniform_noise"])):
        batch = {"tokens": jnp.asarray(stored["x0"]), "valid": jnp.asarray(valid)}
        return objective, objective.corrupt(jax.random.key(0), batch)
