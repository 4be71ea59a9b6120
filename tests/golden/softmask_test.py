"""SUBS and the soft mask: what is remembered of a prediction, and how it is embedded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden.arrays import Group, compare, largest
from golden.forms import sparse_form
from golden.models import MDLM, subs
from smdlm.convert import mdlm
from smdlm.feedback.gates import EntropyGate, Prediction
from smdlm.full_softmask import FullSoftMask
from smdlm.models.base import Head
from smdlm.ops.vocab import neg_entropy
from smdlm.readout import exclude
from smdlm.softmask import Feedback, SoftMask, summarize

SUBS = Group("SUBS", 3e-7)  # as a share of the largest logit: two and a half of its ulps
SOFTMASK = Group("soft mask", 1e-6)
PARAMETERS = Group("soft-mask parameters", 1e-6)
EMBEDDINGS = Group("soft-mask embeddings", 3e-6, relative=True)


def test_subs(diffusion):
    stored = MDLM.arrays("subs.npz")
    assert int(stored["mask_index"]) == diffusion.denoiser.mask_id and stored["neg_infinity"] == -1e6
    # Logits as the product of hidden states and an identity: what remains is our exclusion and normalisation.
    vocab = diffusion.vocab
    head = exclude(Head(jnp.eye(vocab), jnp.zeros(vocab)), vocab, diffusion.denoiser.mask_id)
    tags = [m[1] for m in stored.matches("logits_(.*)")]
    cases = [(f"logits_{tag}", f"logp_{tag}", "xt") for tag in tags]
    cases += [("logits_sigma0", "logp_allmask", "xt_allmask"), ("logits_sigma0", "logp_nomask_x0", "x0")]
    for logits, log_probs, canvas in cases:
        got = subs(diffusion.readout.log_probs(head, jnp.asarray(stored[logits])), stored[canvas], diffusion)
        size = largest(stored[logits], stored[log_probs])
        stored.check(SUBS, log_probs, got, where=diffusion.not_mask, size=size)


@pytest.fixture(scope="module")
def omega():
    stored = MDLM.arrays("softmask.npz")
    return {ours: jnp.asarray(stored[name.split(".")[1]]) for name, ours in mdlm.OMEGA.items()}


def test_parameters(omega):
    """Raw and readable values: of the set, of a gate by default, of a gate that is told where to start."""
    stored = MDLM.arrays("softmask.npz")
    args = [float(x) for x in stored["init2_args"]]
    cases = {
        "": omega,
        "default_init_": FullSoftMask().init(),
        "init2_": FullSoftMask(gate=EntropyGate(*args[:3]), temperature=args[3]).init(),
    }
    for prefix, raw in cases.items():
        values = EntropyGate().values(raw)
        names = {"scale": values["omega_s"], "centre": values["omega_b"], "steepness": values["omega_a"]}
        names["temperature"] = jax.nn.softplus(raw["raw_temperature"]) + 1e-6
        if prefix:  # the raw values of the set are the inputs
            names |= {name.split(".")[1]: raw[ours] for name, ours in mdlm.OMEGA.items()}
        for name, value in names.items():
            stored.check(PARAMETERS, prefix + name, value, size=max(1.0, abs(float(value))))


def test_topk(diffusion, omega):
    stored = MDLM.arrays("softmask.npz")
    mask_id, canvas, table = int(stored["mask_index"]), stored["ids"], diffusion.table
    # Rows made by hand (ties, one-hot) are not normalised; what a readout gives is.
    log_p = jax.nn.log_softmax(jnp.asarray(stored["log_p"]))
    untied, masked = ~stored["tie_ambiguous"], canvas == mask_id
    entropy = neg_entropy(log_p)
    stored.check(SOFTMASK, "neg_entropy_T1", entropy, size=max(1.0, largest(entropy)))  # up to ln V
    lam = np.where(masked, EntropyGate()(omega, Prediction(entropy)), 0.0)
    stored.check(SOFTMASK, "lambda_T1", lam)

    def embed(canvas, feedback):
        return SoftMask(feedback.ids.shape[-1])(omega, table, None, jnp.asarray(canvas), feedback, mask_id)

    stored.check(EMBEDDINGS, "topk_emb_xt_only", embed(canvas, Feedback.none(*canvas.shape, 1)))
    sizes = [int(m[1]) for m in stored.matches(r"topk(\d+)_indices")]
    assert sizes
    for k in sizes:
        feedback = summarize(log_p, jnp.asarray(masked), k)
        indices, probs = sparse_form(feedback, lam, canvas, mask_id)
        dense = np.zeros(log_p.shape)
        rows, columns = np.indices(canvas.shape)
        np.add.at(dense, (rows[..., None], columns[..., None], indices), probs)  # an index may stand there twice
        stored.check(SOFTMASK, f"topk{k}_indices", indices, where=untied[..., None])
        stored.check(SOFTMASK, f"topk{k}_probs", probs)
        stored.check(SOFTMASK, f"topk{k}_dense", dense, where=untied[..., None])
        stored.check(EMBEDDINGS, f"topk{k}_embed", embed(canvas, feedback), where=untied[..., None])


def test_a_row_without_a_mask(diffusion, omega):
    """Alone: whatever is remembered, our embedding is that of the stored indices and probabilities."""
    stored = MDLM.arrays("softmask.npz")
    mask_id, canvas, log_p = int(stored["mask_index"]), stored["ids"], jnp.asarray(stored["log_p"])
    cases = stored.matches(r"topk(\d+)_nomask_indices")
    row = int(np.flatnonzero((canvas != mask_id).all(1))[0]) if cases else 0
    alone = jnp.asarray(canvas[row : row + 1])
    for case in cases:
        k = int(case[1])
        feedback = summarize(log_p[row : row + 1], jnp.ones(alone.shape, bool), k)
        got = SoftMask(k)(omega, diffusion.table, None, alone, feedback, mask_id)
        probs, rows = stored[f"topk{k}_nomask_probs"], diffusion.table[stored[case[0]]]
        wanted = jnp.einsum("blk,blkd->bld", probs, rows)
        compare(EMBEDDINGS, f"{stored.name} topk{k}_nomask", got, wanted)


def test_temperature(diffusion, omega):
    stored = MDLM.arrays("softmask.npz")
    mask_id, canvas = int(stored["mask_index"]), stored["ids"]
    log_p, masked = jnp.asarray(stored["log_p"]), canvas == mask_id
    operator, one = FullSoftMask(chunk=17), jnp.eye(diffusion.vocab)
    mixed, entropy = operator.mix(omega, one, log_p)
    lam = np.where(masked, operator.gate(omega, Prediction(entropy)), 0.0)
    stored.check(SOFTMASK, "neg_entropy_temp", entropy, size=max(1.0, largest(entropy)))
    stored.check(SOFTMASK, "lambda_temp", lam)
    stored.check(SOFTMASK, "temp_p_out", (1 - lam)[..., None] * one[canvas] + lam[..., None] * mixed)
    # The operator itself, whose logits are the product of the hidden states and the head.
    feedback = summarize(log_p, jnp.asarray(masked), 1).replace(hidden=log_p)
    head = Head(one, jnp.zeros(diffusion.vocab))
    embed = operator(omega, diffusion.table, head, jnp.asarray(canvas), feedback, mask_id)
    stored.check(EMBEDDINGS, "temp_embed", embed)
