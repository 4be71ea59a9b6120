"""The library: what `smdlm.load` gives. Samples, infills, scores, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chat_test import write_folder
from safetensors.numpy import save_file

import smdlm
from smdlm import experiment
from smdlm.build import build
from smdlm.config import read
from smdlm.convert import decoder
from smdlm.convert.folders import import_weights
from smdlm.io.viewer import Page
from smdlm.models.decoder import Decoder
from smdlm.objective import Example

SETTINGS = {
    "model": {"width": 32, "depth": 2, "heads": 2, "cond": 8, "dropout": 0.0, "vocab_multiple": 1},
    "data": {"tokenizer": "bytes", "seq_len": 48, "batch_size": 8},
    "softmask": {"p_sm": 0.8, "scale": 0.4, "centre": -2.0, "steepness": 2.0},
    "optimizer": {"warmup": 0, "lr": 3e-3},
    "train": {"steps": 12, "log_every": 4, "save_every": 12},
    "sampling": {"steps": 6, "policy": "remdm_cap", "eta": 0.1, "count": 2, "prompt": "Ab"},
    "eval": {"blocks": 4, "batch_size": 4},
}


def write_corpus(folder):
    (folder / "corpus").mkdir(exist_ok=True)
    for i in range(12):
        (folder / "corpus" / f"{i}.txt").write_text(f"Document {i} says hello, and then {i * i} more things. " * 8)


def train(folder, name, **changes):
    """A workdir with a run of a few updates."""
    write_corpus(folder)
    settings = {section: {**fields, **changes.get(section, {})} for section, fields in SETTINGS.items()}
    settings["data"]["source"] = f"text:{folder}/corpus/*.txt"
    made, workdir = build(read(settings), folder), folder / name
    facts = {"tokenizer": made.vocabulary.fingerprint, "content_hash": made.data.content_hash}
    with jax.set_mesh(made.mesh):
        checkpointer = experiment.checkpointer_of(workdir)
        experiment.train(made, workdir, checkpointer, {"config": settings, **facts})
        checkpointer.close()
    for file in (folder / "corpus").iterdir():
        file.unlink()  # nothing below may need it
    return workdir


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return smdlm.load(train(tmp_path_factory.mktemp("library"), "run"))


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    changes = {"model": {"causal": True}, "softmask": {"p_sm": 0.0}, "sampling": {}}
    folder = tmp_path_factory.mktemp("library_ar")
    for name in ("policy", "eta"):
        SETTINGS["sampling"].pop(name)
    try:
        return smdlm.load(train(folder, "run", **changes))
    finally:
        SETTINGS["sampling"] |= {"policy": "remdm_cap", "eta": 0.1}


def test_samples_begin_with_the_prompt_and_belong_to_the_seed(model):
    texts = model.sample("Doc", count=3, seed=1)
    assert len(texts) == 3 and len(set(texts)) > 1 and all(text.startswith("Doc") for text in texts)
    assert model.sample("Doc", count=3, seed=1) == texts != model.sample("Doc", count=3, seed=2)
    assert model.sample("Doc", count=1, seed=1) == texts[:1]  # a sample does not depend on its neighbours
    assert not model.sample(seed=1)[0].startswith("Ab")  # the config's prompt is not the library's


def test_settings_are_fields_of_the_section(model):
    assert model.sample(seed=1, steps=3) != model.sample(seed=1)
    assert model.sample(seed=1, policy="entropy", order_temperature=0.5) != model.sample(seed=1, policy="entropy")
    with pytest.raises(ValueError, match="config.sampling: got unknown field step, wanted one of policy"):
        model.sample(step=3)
    with pytest.raises(ValueError, match="got eta .a field of policy remdm_cap"):
        model.sample(policy="entropy", eta=0.1)
    with pytest.raises(ValueError, match="sampling.prompt: got 60 tokens, wanted fewer than data.seq_len = 48"):
        model.sample("x" * 60)


def test_infill_fills_the_blanks_alone(model):
    texts = model.infill("one ____ two ____!", tokens=4, count=2, seed=3)
    assert len(texts) == 2
    for text in texts:
        ids = model.tokenizer.encode("one ____ two ____!".replace("____", "....")).tolist()
        assert text.startswith("one ") and text.endswith("!") and len(ids) == 18
        assert "____" not in text and "[MASK]" not in text
    assert model.infill("one ____ two ____!", tokens=4, count=2, seed=3) == texts
    assert model.infill("a <b> c", blank="<b>", tokens=2, seed=1)[0].startswith("a ")
    for text, tokens, message in (
        ("no blank", 4, "got no '____' in the text"),
        ("____", 49, "got 49 tokens, wanted at most 48"),
        ("____", 0, "got tokens=0, wanted a whole number, at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            model.infill(text, tokens=tokens)


def test_a_watched_run_is_the_sampled_one(model, tmp_path):
    page = model.watch(tmp_path / "out.html", "Doc", seed=1, steps=4)
    assert (tmp_path / "out.html").read_text("utf-8") == page.html
    assert "remdm_cap, 4 steps, seed 1, temperature 1" in page.html
    made = model._sampling(prompt="Doc", seed=1, steps=4)
    with jax.set_mesh(made.mesh):
        runs, sampled = experiment.watch(made, model.params), experiment.sample(made, model.params)
    np.testing.assert_array_equal(runs["soft-masked"].tokens[-1], sampled.ids[0])
    assert list(runs) == ["soft-masked", "binary"] and not runs["binary"].lam.any()
    model.sample("Doc", seed=1, steps=4, viewer=str(tmp_path / "again.html"))  # the config's way
    assert (tmp_path / "again.html").read_text("utf-8") == page.html
    both = model.watch(tmp_path / "out.svg", "Doc", against=model, seed=1, steps=4).html
    assert '"name":"soft-masked, against"' in both and (tmp_path / "out.svg").read_text("utf-8").startswith("<svg")
    assert '"name":"soft-masked"' not in model.watch(None, "Doc", seed=1, steps=4, use_feedback=False).html


def test_what_cannot_be_watched_is_one_line(model, causal):
    config = model.experiment.config
    data = dataclasses.replace(config.data, seq_len=64)
    longer = dataclasses.replace(model.experiment, config=dataclasses.replace(config, data=data))
    for call, message in (
        (lambda: model.watch("out.gif"), "watch: got 'out.gif', wanted a file that ends in .html or .svg"),
        (lambda: model.watch(against=dataclasses.replace(model, experiment=longer)), "another vocabulary or canvas"),
        (lambda: causal.watch(), "watch: got a causal .AR. model, wanted a diffusion model"),
        (lambda: causal.sample(viewer="x.html"), "sampling.viewer: got 'x.html' for the causal .AR. model, wanted ''"),
        (lambda: model.sample(viewer="x.png"), "sampling.viewer: got 'x.png', wanted a file that ends in"),
        (lambda: model.infill("a ____", viewer="x.html"), "infill: got viewer, wanted none"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_answers_and_every_field_of_generate(model):
    """Each field changes the answers, or what they take."""
    base = {"new_tokens": 8, "steps": 4, "block": 4, "cache": "dual", "policy": "max_prob", "temperature": 1.0}
    base |= {"batch_size": 2, "bucket": 16, "top_p": 1.0}
    prompts = ["Doc", {"prompt": "more things", "seed": 3}]

    def generate(**fields):
        found = model.generate(prompts, seed=1, **base | fields)
        return [answer.ids.tolist() for answer in found.answers], found.forwards, found.flops

    wanted = generate()
    assert list(map(len, wanted[0])) == [8, 8] and list(map(len, generate(new_tokens=4, steps=2)[0])) == [4, 4]
    assert generate() == wanted and wanted[1] == 4
    assert generate(bucket=8)[1] == generate(batch_size=1)[1] == 8  # two shapes, two batches
    for changed in ({"block": 0}, {"cache": "prefix"}, {"ahead": 0}, {"parity": True}, {"top_k": 1}):
        ids, _, flops = generate(**changed)
        assert (ids, flops) != (wanted[0], wanted[2]), changed
    assert model.generate(["a[MASK]c"], steps=4, batch_size=2).answers[0].text[::2] == "ac"


def test_what_can_not_be_generated(model, causal):
    for call, message in (
        (lambda: model.generate("abc"), "generate: got 'abc', wanted a list of prompts"),
        (lambda: model.generate([]), "generate: got no prompts"),
        (lambda: model.generate(["a", ""]), "prompt 2: got an empty prompt"),
        (lambda: model.generate(["a" * 48], new_tokens=1), "prompt 1: got 48 tokens and 1 new ones"),
        (lambda: model.generate(["a"], new_tokens=8, block=3), "generate.block: got 3 for generate.new_tokens = 8"),
        (lambda: model.generate(["a"], new_tokens=8, block=4, steps=3), "sampling.steps: got 3 for 2 blocks"),
        (lambda: model.generate(["a"], cache="full"), "generate.cache: got 'full'"),
        (lambda: model.chat("hello"), "prompt 1: chat template: got none with the tokenizer 'bytes'"),
        (lambda: causal.generate(["a"]), "generate: got a causal"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


def test_wrong_kinds_of_arguments_are_one_line(model):
    for call, message in (
        (lambda: model.score("abc"), "score: got 'abc', wanted a list of strings"),
        (lambda: model.score([5]), "wanted a list of strings"),
        (lambda: model.score(["x"], draws=2.5), "score: got draws=2.5, wanted at least 2"),
        (lambda: model.infill(None), "infill: got text None"),
        (lambda: model.infill("a ____", blank=""), "wanted two strings"),
        (lambda: model.infill("a ____", tokens="3"), "infill: got tokens='3', wanted a whole number"),
        (lambda: model.infill("a ____", tokens=True), "infill: got tokens=True, wanted a whole number"),
        (lambda: model.infill("a ____", prompt="b"), "infill: got prompt, wanted it in the text itself"),
        (lambda: model.infill("a ____", new_tokens=4), "infill: got new_tokens, wanted generate"),
        (lambda: model.sample("a", new_tokens=4), "sample: got new_tokens, wanted generate"),
        (lambda: model.sample("a\ud800"), "got 'a.ud800', wanted Unicode text"),
        (lambda: model.sample(seed=2**32), "sampling.seed: got 4294967296, wanted 0 <= seed"),
        (lambda: model.generate(["a"], prompt="b"), "generate: got prompt, wanted it in the list"),
        (lambda: model.generate(["a"], count=2), "generate: got count, wanted a prompt in the list for each"),
        (lambda: model.generate(None), "generate: got None, wanted a list of prompts"),
        (lambda: model.generate(["a"], seed="1"), "generate: seed: got '1', wanted 0 <= seed"),
        (lambda: model.chat(3), "chat: got 3, wanted a text, or a list of messages"),
        (lambda: model.chat({"role": "user"}), "chat: got {'role': 'user'}, wanted a text"),
        (lambda: model.score(None), "score: got None, wanted a list of strings"),
        (lambda: model.score(["x"], seed=-1), "score: seed: got -1, wanted 0 <= seed"),
        (lambda: model.watch(against="runs/binary"), "watch: got against='runs/binary', wanted a model"),
        (lambda: model.tokenizer.encode(3), "got 3, wanted a text"),
        (lambda: smdlm.load("miniature", changes="data.seq_len=2"), "load: got changes 'data.seq_len=2', wanted {"),
        (lambda: model.infill("a ____", seed="a"), "config.sampling.seed: got 'a', wanted int"),
        (lambda: smdlm.load(None), "workdir: got None, wanted a path"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_model_and_a_page_are_shown_in_a_line(model):
    """A notebook and a shell print what the last line of a cell gives: not a million weights, not a page of HTML."""
    assert repr(model) == "Trained(step=12)" and repr(Page("<html>")) == "Page()"


def test_scores_are_labelled_and_belong_to_the_text(model):
    """Bounds of a text alone: neither its neighbours nor the padding of its block change them."""
    short, long = "hello", "Document 3 says hello, and then 9 more things. " * 2
    scores = model.score([short, long], draws=4)
    names = {f"{unit}_{name}" for unit in ("bits_per_byte", "nats_per_token") for name in ("one_pass", "two_pass")}
    assert names <= set(scores[0]) and scores[0]["bits_per_byte_one_pass"].label == "one pass (no feedback)"
    assert model.score((text for text in [short]), draws=4)[0] == scores[0]
    for value in scores[1].values():
        assert 0 < value.mean and 0 < value.interval
    for texts, draws in (([""], 4), (["x"], 1)):
        with pytest.raises(ValueError, match="score: got .*, wanted at least"):
            model.score(texts, draws=draws)


def test_padding_is_not_seen(model):
    """Both passes on a padded canvas give the likelihoods of the canvas alone."""
    objective = dataclasses.replace(model.experiment.objective, p_sm=1.0)
    tokens = jnp.asarray(model.tokenizer.encode("hello, there")[None])
    masked = jnp.arange(12)[None] % 3 == 1
    canvas, weights = jnp.where(masked, model.denoiser.mask_id, tokens), masked.astype(jnp.float32)
    alone = Example(canvas, tokens, weights)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 20)), constant_values=3)
    beside = jnp.arange(32)[None] < 12
    padded = Example(pad(canvas), pad(tokens), jnp.where(beside, pad(weights), 0), beside)
    _, wanted = objective(model.params, alone, True, None)
    _, got = objective(model.params, padded, True, None)
    np.testing.assert_allclose(got[:, :12], wanted, rtol=1e-4)
    _, seen = objective(model.params, padded.replace(attend=None), True, None)
    assert np.max(np.abs(seen[:, :12] - wanted)) > 1e-3  # padding that may be seen changes them


def test_a_causal_model_samples_and_scores_exactly(causal):
    assert causal.sample("Do", seed=1)[0].startswith("Do")
    one, two = causal.score(["hello there"], draws=2)[0], causal.score(["hello there"], draws=2, seed=9)[0]
    assert one == two and one["nats_per_token_next_token"].interval == 0
    with pytest.raises(ValueError, match="infill: got a causal"):
        causal.infill("a ____")


def test_denoiser_and_params_go_on_in_jax(model):
    hidden = model.denoiser(model.params, np.zeros((1, 5), np.int32))
    assert hidden.shape == (1, 5, 32) and model.denoiser.head(model.params).logits(hidden).shape == (1, 5, 258)


@pytest.mark.parametrize("softmask", [None, "full", "none"])
def test_a_converted_decoder_describes_itself(tmp_path, softmask):
    """Also with the omega that the import has made, which samples nothing until it is asked for."""
    folder = write_folder(tmp_path / "hf")  # 260 ids
    rng, rows = np.random.default_rng(0), 264
    network = Decoder(
        vocab_size=260, table_rows=rows, width=16, depth=1, heads=2, key_heads=1, hidden=32, qkv_bias=True, tied=False,
        shift=True,
    )  # fmt: skip
    tensors = {leaf.source: rng.normal(size=leaf.shape).astype(np.float32) for leaf in decoder.table(network, rows)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**decoder.config_of(network, rows), "mask_token_id": 259}))
    import_weights("decoder", folder, tmp_path / "run", softmask)
    found = smdlm.load(tmp_path / "run" / "checkpoints")  # or the workdir itself
    assert found.denoiser.mask_id == 259 and len(found.params["softmask"]) == {None: 3, "full": 4, "none": 0}[softmask]
    assert not found.experiment.sampler.use_feedback
    assert found.denoiser(found.params, found.tokenizer.encode("abc")[None]).shape == (1, 3, 16)


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="got no checkpoint in .*wanted a trained run"):
        smdlm.load(tmp_path)
    with pytest.raises(ValueError, match="workdir: got the URL az://bucket/run"):
        smdlm.load("az://bucket/run")
