"""The adapter for lm-eval: likelihoods of continuations and texts, by itself and, if it is there, under lm-eval."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from library_test import SETTINGS, train

import smdlm
from smdlm.build import assemble
from smdlm.config import read
from smdlm.data.tokenizer import make_tokenizer
from smdlm.library import Trained
from smdlm.mesh.rules import MeshConfig
from smdlm.sampling.generate import continued
from smdlm.tools import lmeval
from smdlm.tools.lmeval import Harness

PAIRS = [
    ("Document", " 3"),
    ("", "says hello"),
    ("Document 3 says hello, and ", "then"),
    ("Doc ", "ument 3"),
    ("a", "b"),
]


def requests(*args):
    return [types.SimpleNamespace(args=pair) for pair in args]


def random_model(**changes):
    """A model with random weights: the likelihoods of a trained one are no other arithmetic."""
    settings = {**SETTINGS, "data": {**SETTINGS["data"], "source": "stdlib:docstrings"}, **changes}
    config = read(settings)
    made = assemble(config, make_tokenizer("bytes"), MeshConfig(data=1).make(jax.devices()[:1]), None)

    @jax.jit
    def weights():
        params = nn.meta.unbox(made.denoiser.init(jax.random.key(0)))
        leaves, tree = jax.tree.flatten(params["backbone"])
        keys = jax.random.split(jax.random.key(1), len(leaves))
        noisy = [x + 0.2 * jax.random.normal(key, x.shape, x.dtype) for x, key in zip(leaves, keys, strict=True)]
        return {**params, "backbone": jax.tree.unflatten(tree, noisy)}

    return Trained(made, weights(), 0, settings)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("lmeval")


@pytest.fixture(scope="module")
def harness(workdir):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smdlm, "load", lambda workdir: random_model())
        return Harness(workdir=str(workdir), batch_size=1, draws=4)


def test_likelihoods_do_not_depend_on_the_batch_size(harness, workdir):
    found = harness.loglikelihood(requests(*PAIRS))
    assert all(value < 0 and greedy is False for value, greedy in found)
    harness.batch = 3
    try:
        again = harness.loglikelihood(requests(*PAIRS))
    finally:
        harness.batch = 1
    np.testing.assert_allclose([a for a, _ in found], [b for b, _ in again], rtol=1e-4)


def test_standard_errors_are_kept(harness, workdir):
    path = workdir / "results" / "lmeval.jsonl"
    path.unlink(missing_ok=True)
    found = harness.loglikelihood(requests(*PAIRS[:2]))
    rows = [json.loads(line) for line in path.open()]
    assert [row["loglikelihood"] for row in rows] == [value for value, _ in found]
    assert [(row["context"], row["continuation"]) for row in rows] == PAIRS[:2]
    assert all(row["standard_error"] > 0 and row["draws"] == 4 and row["estimate"] == "two_pass" for row in rows)


def test_more_draws_extend_fewer(harness):
    """The mean of the first two draws and that of all four differ by what draws three and four say."""

    def nll(draws, seed=0):
        harness.draws, harness.seed = draws, seed
        try:
            return harness.loglikelihood(requests(PAIRS[2]))[0][0]
        finally:
            harness.draws, harness.seed = 4, 0

    assert 4 * nll(4) == pytest.approx(2 * nll(2) + 2 * nll(2, seed=2), rel=1e-5)


def test_only_the_continuation_is_scored(harness):
    """One token: whichever t, its mask is drawn with chance t and weighs 1/t, so the mean is its log-probability."""
    context, continuation = "Document 3 says hell", "o"
    model = harness.model
    canvas = np.zeros((1, 32), np.int32)
    ids = model.tokenizer.encode(context)
    canvas[0, : len(ids)], canvas[0, len(ids)] = ids, model.denoiser.mask_id
    attend = jnp.asarray(np.arange(32) <= len(ids))[None, None]
    readout, masked = model.experiment.objective.readout, canvas == model.denoiser.mask_id

    @jax.jit
    def log_probs(params):
        head, hidden = model.denoiser.head(params), model.denoiser(params, canvas, mask=attend)
        feedback = model.denoiser.softmask.attach(readout.feedback(head, hidden, masked), hidden)
        return readout.log_probs(head, model.denoiser(params, canvas, feedback, mask=attend))

    with jax.set_mesh(model.experiment.mesh):
        wanted = log_probs(model.params)[0, len(ids), model.tokenizer.encode(continuation)[0]]
    harness.draws = 200
    try:
        means, errors = harness._scored([harness._row(context, continuation)], [(context, continuation)])
    finally:
        harness.draws = 4
    assert abs(means[0] - float(wanted)) < 4 * errors[0]
    assert errors[0] < abs(float(wanted)) / 3


def test_texts_longer_than_the_canvas(harness):
    text = ("Document 3 says hello, and then 9 more things. " * 3).rstrip()
    length = harness.model.length
    short, long = harness.loglikelihood_rolling(requests((text[:20],), (text,)))
    assert long < short < 0
    row, given = harness._row(text, " end")
    assert len(row) == length and given == length - 4  # the end of the context is kept
    assert harness.model.tokenizer.decode(row).endswith("things. end")
    with pytest.raises(ValueError, match="got a continuation of"):
        harness.loglikelihood(requests(("", text)))


def test_generation(harness):
    given = {"max_gen_toks": 8, "until": ["\n"]}
    first, second = harness.generate_until(requests(("Document 3", given), ("Document 3", given)))
    assert first != second  # each has noise of its own
    assert harness.generate_until(requests(("Document 3", given)))[0] == first
    sharp = {**given, "do_sample": False, "until": []}
    texts = harness.generate_until(requests(("Document 3", sharp), ("Document 3", sharp)))
    assert len(texts[0].encode("utf-8", "replace")) > 0
    stop = texts[0][2]
    assert stop not in harness.generate_until(requests(("Document 3", {**sharp, "until": stop})))[0]


def test_contexts_are_text_and_an_empty_one_begins_a_document(harness):
    """A literal [MASK] is not a mask, and nothing before a text is the start of a document."""
    tokenizer, asked = harness.model.tokenizer, []
    with pytest.MonkeyPatch.context() as patch:
        answers = lambda prompts, **fields: asked.extend(prompts) or types.SimpleNamespace(answers=[])
        patch.setattr(Trained, "answer", lambda model, prompts, **fields: answers(prompts))
        harness._answers([continued(text, tokenizer, 3) for text in ("", "a [MASK] b", "x" * 99)], 8, True)
    assert [prompt.infill for prompt in asked] == [False] * 3
    assert asked[0].ids.tolist() == [tokenizer.bos_id]
    assert asked[1].ids.tolist() == tokenizer.encode("a [MASK] b").tolist() and tokenizer.mask_id not in asked[1].ids
    assert len(asked[2].ids) == harness.model.length - 8  # the end of what is too long
    row, given = harness._row("", "ab")
    assert row.tolist() == [tokenizer.bos_id, *tokenizer.encode("ab")] and given == 1
    row, given = harness._row("[MASK]", "ab")
    assert tokenizer.mask_id not in row and given == 6
    given = {"max_gen_toks": 8, "until": []}
    texts = harness.generate_until(requests(("", given), ("a [MASK]", given)))
    assert all(texts) and all("[MASK]" not in text for text in texts)


def test_greedy(harness, monkeypatch):
    """By tokens; what is decoded at temperature 0 behind a context is what is greedy there."""
    prompt = continued("Document", harness.model.tokenizer, 0)
    (answer,) = harness._answers([dataclasses.replace(prompt, ends=())], 8, True)
    row = np.concatenate([prompt.ids, answer.ids])
    monkeypatch.setattr(harness, "_row", lambda context, continuation: (row, len(prompt.ids)))
    assert not harness._is_greedy("Document", "x")  # it is not asked for
    monkeypatch.setattr(harness, "greedy", True)
    assert harness._is_greedy("Document", "x")
    row[-1] = (row[-1] + 1) % 256
    assert not harness._is_greedy("Document", "x")


def test_an_autoregressive_model_is_exact(workdir, monkeypatch):
    changes = {"model": {**SETTINGS["model"], "causal": True}, "softmask": {"p_sm": 0.0}, "sampling": {"steps": 6}}
    monkeypatch.setattr(smdlm, "load", lambda workdir: random_model(**changes))
    causal = Harness(str(workdir), draws=2)
    means, errors = causal._scored([causal._row("Doc", "ument"), causal._row("", "Document")], PAIRS[:2])
    assert np.all(errors < 1e-5)
    whole, first = causal._scored([causal._row("", "Doc"), causal._row("", "Document")], PAIRS[:2])[0]
    assert means[1] == pytest.approx(first, rel=1e-5)
    assert means[0] + whole == pytest.approx(first, rel=1e-4)  # the chain rule


@pytest.mark.parametrize(
    "given, line", [({"draws": 1}, "draws: got 1"), ({"batch_size": "auto"}, "batch_size: got 'auto'")]
)
def test_wrong_arguments(given, line):
    with pytest.raises(ValueError, match=line):
        Harness("nowhere", **given)


def test_without_lm_eval(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit):
        lmeval.main()
    assert "pip install 'smdlm[lmeval]'" in capsys.readouterr().err


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{rest}
"""


@pytest.mark.slow
def test_lm_eval_itself(tmp_path):
    """Its command, offline, on a small local task of each kind."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("pip install 'smdlm[lmeval]'")
    workdir = train(tmp_path, "run")
    rows = [{"question": f"Document {i} says", "choices": [" hello", " zebra"], "gold": 0} for i in range(3)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = tmp_path / "data.jsonl"
    choice = TASK.format(
        name="own_choice", data=data, kind="multiple_choice", target="gold", rest='doc_to_choice: "{{choices}}"\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]",
    )  # fmt: skip
    text = TASK.format(
        name="own_text", data=data, kind="generate_until", target='"{{choices[0]}}"',
        rest='generation_kwargs: {until: ["."], max_gen_toks: 8, do_sample: false}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]",
    )  # fmt: skip
    (tmp_path / "own_choice.yaml").write_text(choice)
    (tmp_path / "own_text.yaml").write_text(text)
    words = f"run --model smdlm --model_args workdir={workdir},draws=4 --tasks own_choice,own_text --batch_size 2"
    words += f" --include_path {tmp_path} --output_path {tmp_path / 'out'}"
    done = subprocess.run(
        [sys.executable, "-m", "smdlm.tools.lmeval", *words.split()], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "own_choice" in done.stdout and "own_text" in done.stdout
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    assert 0 <= results["own_choice"]["acc,none"] <= 1 and 0 <= results["own_text"]["exact_match,none"] <= 1
