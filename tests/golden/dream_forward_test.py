"""Dream's network: full, padded and offset canvases, embeddings as input, layers, the rotary table, bf16 shards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden.arrays import Group
from golden.dream import DREAM, load_dream
from smdlm.models.decoder import Block
from smdlm.models.layers import rotary

LOGITS = Group("Dream logits", 3e-6, relative=True)
HIDDEN = Group("Dream hidden states", 3e-6, relative=True)
ROTARY = Group("rotary", 3e-6, relative=True)
PADDING = ("left", "right")


@pytest.fixture(scope="module")
def dream():
    return load_dream()


@pytest.fixture(scope="module")
def stored():
    return DREAM.arrays("forward.npz")


def test_full(dream, stored):
    x = dream.embed(stored["full_input_ids"])
    hidden = dream.hidden(x)
    stored.check(HIDDEN, "full_final_hidden", hidden)
    for name in ("full_logits", "full_embeds_logits", "full_logits_f64"):
        stored.check(LOGITS, name, dream.logits(hidden))
    # The logits of a shifted state are the shifted logits, bit for bit.
    stored.check(LOGITS, "full_shifted_logits", dream.logits(dream.hidden(x, shift=True)))


def test_mixed_embeddings_and_offset_positions(dream, stored):
    mixed = dream.hidden(stored["mixed_inputs_embeds"])
    stored.check(LOGITS, "mixed_embeds_logits", dream.logits(mixed))
    x = dream.embed(stored["full_input_ids"])
    offset = dream.hidden(x, positions=stored["offset_position_ids"])
    stored.check(LOGITS, "offset_position_logits", dream.logits(offset))


@pytest.mark.parametrize("side", PADDING)
def test_padded(dream, stored, side):
    """At tokens: what padding gets means nothing, there as here. Behind padding on the left ours is its own."""
    attended = stored[f"{side}_attention_mask"].astype(bool)
    assert np.array_equal(stored[f"{side}_mask4d"][:, 0], attended[:, None] & attended[:, :, None])
    positions = np.where(attended, attended.cumsum(1) - 1, 1)
    assert np.array_equal(stored[f"{side}_position_ids"], positions)
    stored.no_result(f"{side}_nan_rows")  # of another version of torch
    x = dream.embed(stored[f"{side}_input_ids"])
    options = {"positions": positions, "mask": attended[:, None]}
    token = attended[..., None]
    for name in ("logits", "embeds_logits"):
        stored.check(LOGITS, f"{side}_{name}", dream.logits(dream.hidden(x, **options)), where=token)
    after_token = np.concatenate([token[:, :1], token[:, :-1]], axis=1)
    shifted = dream.logits(dream.hidden(x, shift=True, **options))
    stored.check(LOGITS, f"{side}_shifted_logits", shifted, where=token & after_token)


def test_every_layer(dream, stored):
    """hidden_0 is the embedding; the last one is behind the final norm."""
    x = dream.embed(stored["full_input_ids"])
    stored.check(HIDDEN, "hidden_0", x)
    positions = jnp.arange(x.shape[1])
    for i in range(dream.model.depth - 1):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], dream.params["blocks"])
        x = Block(dream.model).apply({"params": layer}, x, positions, None, 0, None)[0]
        stored.check(HIDDEN, f"hidden_{i + 1}", x)
    stored.check(HIDDEN, f"hidden_{dream.model.depth}", dream.hidden(dream.embed(stored["full_input_ids"])))


def test_rotary(dream, stored):
    """Of one-hot vectors: the first half of the axes turns into cosines and sines."""
    width, positions = dream.model.head_width, jnp.arange(stored["rope_cos"].shape[1])
    first = jnp.concatenate([jnp.ones(width // 2), jnp.zeros(width // 2)])
    turned = rotary(jnp.broadcast_to(first, (1, len(positions), 1, width)), positions, dream.model.rope_base)[:, :, 0]
    cos, sin = jnp.split(turned, 2, axis=-1)
    stored.check(ROTARY, "rope_cos", jnp.concatenate([cos, cos], axis=-1))
    stored.check(ROTARY, "rope_sin", jnp.concatenate([sin, sin], axis=-1))


def test_sharded_in_half_precision():
    """Weights stored as bf16 in several files, computed in f32."""
    released, stored = load_dream("hf_sharded_bf16"), DREAM.arrays("sharded_bf16.npz")
    logits = released.logits(released.hidden(released.embed(stored["input_ids"])))
    stored.check(LOGITS, "logits_weights_bf16_compute_f32", logits)
