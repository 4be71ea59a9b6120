"""Dream's soft mask by itself: entropies, distributions, gates, and what every position is embedded as."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden.arrays import Group, compare, largest
from golden.dream import DREAM
from golden.generation import Scheduled, operator, settings
from smdlm.feedback.gates import EntropyGate, Prediction
from smdlm.full_softmask import FullSoftMask
from smdlm.models.base import Head
from smdlm.softmask import Feedback, SoftMask, summarize

MIXED = Group("Dream soft mask", 1e-6)
FACTOR = Group("Dream schedules", 1e-6)


@pytest.fixture(scope="module")
def stored():
    return DREAM.arrays("softmask.npz")


def feedback_of(logits: np.ndarray, masked: np.ndarray, k: int, left: float = 1.0) -> Feedback:
    """What is remembered of logits [B, L, V] when a share of the masks is left; the logits are their own states."""
    feedback = summarize(jax.nn.log_softmax(logits), jnp.asarray(masked), k)
    return feedback.replace(hidden=jnp.asarray(logits), time=jnp.full(len(logits), left))


def identity(vocab: int) -> tuple[jax.Array, Head]:
    """(table, head) with which an embedding is the distribution that it is the mean of, and states are logits."""
    return jnp.eye(vocab), Head(jnp.eye(vocab), jnp.zeros(vocab))


def test_every_position(stored):
    """p of all cases: candidates, temperatures, gates and schedules."""
    canvas, logits, mask_id = stored["input_ids"], stored["logits"], int(stored["mask_token_id"])
    table, head = identity(logits.shape[-1])
    for case in settings("softmask.json")["cases"]:
        names = {"alg": "alg", "scale": "scale", "centre": "offset", "steepness": "steepness", "scheduling": "schedule"}
        sm = {f"transparency_{name}": case[theirs] for name, theirs in names.items()}
        made = operator(sm | {"mixinputs_k": case["k"], "mixture_temp": case["temp"]})
        left = case["num_mask_token"] / case["max_gen_length"]
        feedback = feedback_of(logits, canvas == mask_id, case["k"], left)
        got = made(made.init(), table, head, jnp.asarray(canvas), feedback, mask_id)
        stored.check(MIXED, f"case{case['case']}_p", got)


def test_distributions(stored):
    """Entropies and probabilities at a temperature; the renormalised candidates; lambda, which is 0 at tokens."""
    logits = stored["logits"]
    table, head = identity(logits.shape[-1])
    for match in stored.matches(r"probs_T(.*)"):
        full = FullSoftMask(temperature=float(match[1]) - 1e-6)
        probs, entropy = full.mix(full.init(), table, jax.nn.log_softmax(logits))
        stored.check(MIXED, match[0], probs)
        stored.check(MIXED, f"neg_entropy_T{match[1]}", entropy, size=max(1.0, largest(entropy)))
    everywhere = np.ones(logits.shape[:2], bool)
    for match in stored.matches(r"topk_probs_k(\d+)"):
        feedback = feedback_of(logits, everywhere, int(match[1]))
        stored.check(MIXED, match[0], SoftMask().look_up({}, table, head, stored["input_ids"], feedback)[1])
    gates = settings("softmask.json")["lambda_params"]
    seen = Prediction(feedback_of(logits, everywhere, 1).neg_entropy)
    for i, gate in enumerate(gates):
        made = EntropyGate(gate["scale"], gate["offset"] + 1e-6, gate["steepness"] - 1e-6)
        lam = np.where(stored["input_ids"] == stored["mask_token_id"], made(made.init(), seen), 0.0)
        stored.check(MIXED, f"lambda_{i}", lam[..., None])


def test_schedules(stored):
    """The scale at every stage, in the direction and with the threshold that generation uses."""
    rows = [row for row in settings("softmask.json")["time_dependence"] if row["sm_to_hm"] and row["threshold"] == 0.5]
    assert rows
    sure = jnp.zeros((1, 1))  # far above the centre: what is left of lambda is the scale
    for row in rows:
        left = row["num_mask_token"] / row["max_gen_length"] if row["max_gen_length"] else 1.0
        gate = Scheduled(row["scale"], -1.0, 100.0, row["schedule"])
        got = gate(gate.init(), Prediction(sure, time=jnp.full((1, 1), left)))
        compare(FACTOR, f"{row}", got[0, 0], row["out"])
