"""The DiT: embeddings, conditioning, every block, logits; of hard, sparse and dense inputs."""

import jax
import jax.numpy as jnp
import pytest

from golden.arrays import Group
from golden.models import MDLM, check_blocks, denoise
from smdlm.models.dit import SigmaMap

LOGITS = Group("logits", 3e-6, relative=True)
ACTIVATIONS = Group("activations", 3e-6, relative=True)


@pytest.mark.parametrize("tag", ["sigma0", "sigma"])
def test_backbone(diffusion, tag):
    stored = MDLM.arrays("backbone.npz")
    assert int(stored["mask_index"]) == diffusion.denoiser.mask_id
    sigma, tokens = stored[tag], stored["xt"]
    stored.no_result("x0")  # the text that xt was made of
    ids = diffusion.table[tokens]
    sparse = jnp.einsum("blk,blkd->bld", stored["sparse_probs"], diffusion.table[stored["sparse_indices"]])
    dense = stored["dense_probs"] @ diffusion.table
    stored.check(LOGITS, f"logits_{tag}", diffusion.run(ids, sigma))
    stored.check(LOGITS, f"logits_sparse_{tag}", diffusion.run(sparse, sigma))
    stored.check(LOGITS, f"logits_dense_{tag}", diffusion.run(dense, sigma))
    stored.check(ACTIVATIONS, "embed_sparse", sparse)
    stored.check(ACTIVATIONS, "embed_dense", dense)
    stored.check(ACTIVATIONS, f"act_{tag}_embed", ids)

    sigma_map = SigmaMap(diffusion.model.cond, jnp.float32)
    cond = sigma_map.apply({"params": diffusion.backbone["sigma_map"]}, sigma)
    stored.check(ACTIVATIONS, f"act_{tag}_sigma_map", cond)
    check_blocks(stored, ACTIVATIONS, f"act_{tag}_block", diffusion, ids, jax.nn.silu(cond))


def test_without_sigma_and_shorter(diffusion):
    """The denoiser itself, for which no sigma stands for 0; and an input of another length."""
    stored = MDLM.arrays("backbone.npz")
    hidden = denoise(diffusion.denoiser, diffusion.params, stored["xt"])
    stored.check(LOGITS, "logits_sigma0", diffusion.logits(hidden))
    stored.check(LOGITS, "logits_short_sigma0", diffusion.run(diffusion.table[stored["xt_short"]]))
