"""Cached blocks from the front door: a binary model with feedback that needs no training, and an answer to look at."""

import jax
from lmeval_test import random_model
from viewer_test import data_of

from smdlm.io.viewer import words_of

FIELDS = {
    **{"new_tokens": 8, "block": 4, "cache": "dual", "bucket": 16, "batch_size": 1},
    **{"policy": "threshold", "threshold": 0.05, "start": 1.0, "decay": 0.3, "steps": 8, "temperature": 0.0},
}


def test_a_softened_binary_model_answers_and_is_watched(tmp_path):
    """dInfer's ramp on weights without omega; the page plays the answer with its cache, and beside it without."""
    model = random_model(softmask={"p_sm": 0.0, "soften": True, "gate": "ramp", "mixer": "add"})
    assert not jax.tree.leaves(model.params["softmask"])
    answer = model.generate(["Document"], seed=3, **FIELDS).answers[0]
    page = model.watch(tmp_path / "run.html", "Document", seed=3, **FIELDS)
    assert (tmp_path / "run.html").read_text("utf-8") == page.html
    data = data_of(page.html)
    cached, plain = data["runs"]
    assert [run["name"] for run in data["runs"]] == ["dual cache", "no cache"] and cached["soft"] and plain["soft"]
    length = len("Document") + 8
    assert cached["computed"][1] == [0, length] and [7, 12] in cached["computed"]
    assert all(span == [0, length] for span in plain["computed"])
    assert cached["forwards"][-1] == answer.forwards
    written = [data["words"][word] for word in cached["tokens"][-1][len("Document") :]]
    assert written[: len(answer.ids)] == [words_of(model.tokenizer)(token) for token in answer.ids]
