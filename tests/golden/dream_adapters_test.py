"""DoRA and LoRA: PEFT's folders beside the frozen weights, and merged into them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden.arrays import TOKENS, Group
from golden.dream import DREAM, Released, load_dream
from golden.generation import history, replayed, settings
from smdlm.convert import decoder, peft, streams

ADAPTED = Group("adapted logits", 3e-6, relative=True)
MERGED = Group("merged weights", 1e-6, relative=True)
KINDS = ("dora", "lora")


@pytest.fixture(scope="module", params=KINDS)
def adapted(request):
    """(stored arrays, the adapted model behind `Released`, with merged weights, adapters)."""
    name, dream = request.param, load_dream()
    lora, adapters = peft.load(DREAM.need(name), dream.model)
    adapters = jax.tree.map(jnp.asarray, adapters)
    beside = Released(lora.base, lora.join(dream.params, adapters), dream.config)
    merged = Released(lora.base, lora.merge(dream.params, adapters), dream.config)
    return DREAM.arrays(f"{name}.npz"), beside, merged, (lora, adapters)


def test_beside_the_base(adapted):
    stored, beside, _, _ = adapted
    forward = DREAM.arrays("forward.npz")
    stored.check(ADAPTED, "adapter_logits", beside.logits(beside.hidden(beside.embed(stored["input_ids"]))))
    mixed = beside.hidden(forward["mixed_inputs_embeds"])
    stored.check(ADAPTED, "adapter_mixed_embeds_logits", beside.logits(mixed))
    attended = forward["left_attention_mask"].astype(bool)
    x = beside.embed(forward["left_input_ids"])
    padded = beside.hidden(x, positions=forward["left_position_ids"], mask=attended[:, None])
    stored.check(ADAPTED, "adapter_left_padded_logits", beside.logits(padded), where=attended[..., None])


def test_merged(adapted):
    stored, _, merged, _ = adapted
    stored.check(ADAPTED, "merged_logits", merged.logits(merged.hidden(merged.embed(stored["input_ids"]))))
    tensors = streams.from_tree(merged.params, decoder.table(merged.model, merged.model.rows))
    names = stored.matches(r"merged__(.*)")
    assert names
    for match in names:
        stored.check(MERGED, match[0], tensors[match[1]])


def test_generation_with_merged_weights(adapted):
    """A run of generate.json with the merged weights, by the name of that run."""
    stored, _, merged, _ = adapted
    for match in stored.matches(r"merged_(?!_)(.*)__history"):
        run = settings("generate.json")[match[1]]
        stored.check(TOKENS, match[0], history(replayed(match[1], merged)[-1], run["steps"]))
        stored.no_result(f"merged_{match[1]}__float64_same")  # whether the public code gives the same in float64


def test_saved_again(adapted, tmp_path):
    """The tensors of PEFT's file bit for bit, and the soft mask's numbers."""
    stored, _, _, (lora, adapters) = adapted
    source = DREAM.need("dora" if lora.dora else "lora")
    gate = peft.load_gate(source)
    assert (gate is not None) == (source / peft.GATE).exists()
    values, k = gate or ({}, 1)
    peft.save(tmp_path / "again", lora, adapters, values, k, "../hf")
    wanted, got = (streams.read_header(folder / peft.WEIGHTS) for folder in (source, tmp_path / "again"))
    assert set(got) == set(wanted)
    for name, tensor in wanted.items():
        assert np.array_equal(got[name].read(), tensor.read()) and got[name].dtype == tensor.dtype, name
    for file in (peft.CONFIG, peft.GATE):
        if (source / file).exists():
            ours, theirs = (json.loads((folder / file).read_text()) for folder in (tmp_path / "again", source))
            for values in (ours, theirs):
                values.get("target_modules", []).sort()
            assert ours.items() <= theirs.items(), file
