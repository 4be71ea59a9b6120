"""Prompts to answers: what may be asked, the canvases it becomes, what ends an answer, and that no row sees another."""

import dataclasses
import json

import numpy as np
import pytest
from chat_test import END, EOS, write_folder
from conftest import make_params

from smdlm.data.tokenizer import make_tokenizer
from smdlm.denoiser import Denoiser
from smdlm.feedback.gates import ConstantGate
from smdlm.generation import read_prompts
from smdlm.models.decoder import Decoder
from smdlm.ops.filters import Filters
from smdlm.readout import Readout
from smdlm.sampling.blocks import BlockDecoder
from smdlm.sampling.generate import GenerateConfig, Generator, parse
from smdlm.sampling.policies import MaxProbability
from smdlm.sampling.verify import verify
from smdlm.softmask import SoftMask

NEW, LENGTH, STEPS = 8, 48, 8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(f"hf:{write_folder(tmp_path_factory.mktemp('generate'))}")


@pytest.fixture(scope="module")
def generator(tokenizer):
    model = Decoder(tokenizer.model_vocab_size, 260, 16, 2, heads=4, key_heads=2, hidden=24, shift=True)
    denoiser = Denoiser(model, model.vocab_size, tokenizer.mask_id, SoftMask(k=2, gate=ConstantGate(0.5)))
    decoder = BlockDecoder(denoiser, Readout(k=2, chunk=16), MaxProbability(0.1), Filters(0.9, 0.9), 4, "dual")
    config = GenerateConfig(new_tokens=NEW, batch_size=3, bucket=16, block=4, cache="dual")
    return Generator(decoder, tokenizer, config, LENGTH, STEPS)


@pytest.fixture(scope="module")
def params(generator):
    return make_params(generator.decoder.denoiser, noise=0.5)


def asked(tokenizer, *records, seed=0):
    return [parse(record, tokenizer, seed + i, f"prompt {i + 1}") for i, record in enumerate(records)]


# What may be asked


def test_prompts_holes_suffixes_and_chats(tokenizer):
    text, hole, suffix, chat = asked(
        tokenizer,
        {"prompt": "ab", "seed": 7, "stop": ["x"], "id": "first"},
        {"prompt": "a[MASK]b[MASK]", "tokens": 2},
        {"prompt": "a", "suffix": "b", "tokens": 3},
        {"messages": [{"role": "user", "content": "hi"}], "prefix": "It"},
    )
    a, b = tokenizer.encode("ab").tolist()
    m = tokenizer.mask_id
    assert (text.ids.tolist(), text.infill, text.seed, text.stop, text.ends) == ([a, b], False, 7, ("x",), (256,))
    assert (hole.ids.tolist(), hole.infill, hole.seed) == ([a, m, m, b, m, m], True, 1)
    assert (suffix.ids.tolist(), suffix.infill) == ([a, m, m, m, b], True)
    assert not chat.infill and chat.ids.tolist()[-2:] == tokenizer.encode("It").tolist()
    assert [tokenizer.backend.tokenizer.id_to_token(i) for i in chat.ends] == [EOS, END]


@pytest.mark.parametrize(
    "record, message",
    [
        ("ab", "wanted an object"),
        ({}, "wanted either 'prompt' or 'messages'"),
        ({"prompt": "a", "messages": []}, "wanted either"),
        ({"prompt": ""}, "got an empty prompt, wanted at least one character"),
        ({"prompt": 5}, "got 'prompt': 5, wanted a text"),
        ({"prompt": "a", "stop": "b"}, "got 'stop': 'b', wanted a list"),
        ({"prompt": "a", "id": []}, "got 'id': .., wanted a text or a whole number"),
        ({"prompt": "a", "token": 5}, "got 'token': 5, wanted fields of prompt, suffix"),
        ({"prompt": "a", "tokens": 5}, r"got 'tokens' without \[MASK\] or 'suffix'"),
        ({"prompt": "a", "suffix": "b"}, "wanted 'tokens' for what lies before it"),
        ({"prompt": "a[MASK]", "suffix": "b", "tokens": 1}, "wanted 'tokens' for what lies before it"),
        ({"prompt": "[MASK]", "tokens": 0}, "got 'tokens': 0, wanted 1 to"),
        ({"prompt": "a", "seed": -1}, "got 'seed': -1, wanted 0 to"),
        ({"prompt": "a", "seed": True}, "got 'seed': True, wanted a whole number"),
        ({"prompt": "a", "stop": [""]}, "wanted a list of texts"),
        ({"prompt": "a", "prefix": "b"}, "wanted it in the prompt itself"),
        ({"prompt": "a\ud800"}, "wanted Unicode text"),
        ({"messages": []}, "got .*, wanted a list of messages"),
        ({"messages": [{"role": "user", "content": "a"}], "suffix": "b"}, "got .'suffix'. for a chat"),
    ],
)
def test_what_can_not_be_asked_is_one_line(tokenizer, record, message):
    with pytest.raises(ValueError, match=f"^prompt 1: .*{message}") as error:
        asked(tokenizer, record)
    assert "\n" not in str(error.value)


def test_a_template_that_runs_code_is_told_with_its_line(tmp_path):
    folder = write_folder(tmp_path / "code", chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl:1: chat template: got SecurityError.*, wanted") as error:
        read_prompts(str(file), make_tokenizer(f"hf:{folder}"), 0)
    assert "\n" not in str(error.value)


def test_a_file_of_prompts(tokenizer, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "ä"}\n\n{"prompt": "b", "seed": 9}\n{"prompt": "c"}\n', "utf-8")
    assert [prompt.seed for prompt in read_prompts(str(file), tokenizer, 5)] == [5, 9, 7]
    for content, message in (
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"prompts.jsonl:2: got UnicodeDecodeError.*, wanted UTF-8"),
        (b'{"prompt": \n', r"prompts.jsonl:1: got JSONDecodeError"),
        (b'{"prompt": ""}\n', r"prompts.jsonl:1: got an empty prompt"),
        (b"\n", r"^--prompts: got nothing in .*, wanted at least one line"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_prompts(str(file), tokenizer, 0)
    for file, message in ((None, "--prompts: got nothing"), (str(tmp_path / "no"), "--prompts: got an unreadable")):
        with pytest.raises(ValueError, match=message):
            read_prompts(file, tokenizer, 0)


# Canvases


def test_canvases(generator, tokenizer):
    """Padded on the left to a multiple of the bucket, as far as the canvas allows; what has a shape shares a batch."""
    records = [{"prompt": "a" * n} for n in (3, 16, 17, 40, 2)] + [{"prompt": "a[MASK]b"}]
    batches = generator.batches(asked(tokenizer, *records))
    shapes = [(batch.numbers, batch.canvas.shape, batch.first, batch.steps) for batch in batches]
    assert shapes == [
        ([0, 1, 4], (3, 24), 16, 8),
        ([2], (3, 40), 32, 8),
        ([3], (3, 48), 40, 8),
        ([5], (3, 16), 0, 1),
    ]
    first = batches[0]
    assert first.seen.sum(1).tolist() == [3 + NEW, 16 + NEW, 2 + NEW]
    assert (first.canvas[:, 16:] == tokenizer.mask_id).all() and (first.canvas[:, :16] != tokenizer.mask_id).all()
    assert (batches[1].canvas == batches[1].canvas[0]).all()  # rows that stand still
    for record in ({"prompt": "a" * 41}, {"prompt": "[MASK]" * 49}):
        with pytest.raises(ValueError, match=r"^prompt 1: got \d+ tokens and \d new ones, wanted at most 48 together"):
            generator.batches(asked(tokenizer, record))


# Answers


def test_an_answer_does_not_depend_on_its_batch(generator, params, tokenizer):
    """Four prompts of one shape in two batches, among others; each alone, with its seed: the same tokens."""
    records = [
        {"prompt": "one"},
        {"prompt": "two and"},
        {"prompt": "a[MASK]b[MASK]c", "tokens": 3},
        {"prompt": "three"},
    ]
    records += [{"prompt": "a longer prompt than those"}, {"prompt": "four"}]
    prompts = [dataclasses.replace(prompt, ends=()) for prompt in asked(tokenizer, *records)]  # whatever it draws
    together = generator(params, prompts)
    assert [len(answer.ids) for answer in together.answers] == [NEW, NEW, 6, NEW, NEW, NEW]
    assert len({answer.text for answer in together.answers}) == 6
    for prompt, answer in zip(prompts, together.answers, strict=True):
        alone = generator(params, [prompt]).answers[0]
        assert answer.text == alone.text and answer.forwards == alone.forwards == (6 if prompt.infill else STEPS)
    infilled = together.answers[2]
    assert infilled.text.startswith("a") and infilled.text.endswith("c") and "[MASK]" not in infilled.text
    again = generator(params, [dataclasses.replace(prompts[0], seed=99)]).answers[0]
    assert again.text != together.answers[0].text


def test_what_it_took(generator, params, tokenizer):
    prompts = asked(tokenizer, *[{"prompt": "a"}] * 4)
    generated = generator(params, [dataclasses.replace(prompt, ends=()) for prompt in prompts])
    summary = generated.summary()
    assert generated.tokens == 4 * NEW and generated.forwards == 2 * STEPS  # two batches
    assert summary["tokens_per_forward"] == 1.0 and summary["tokens_per_s"] > 0
    model, batch = generator.decoder.denoiser.model, 3
    # A block of 4: a full pass over 24 positions, and three over the block and the position before it.
    positions = 2 * batch * 2 * (24 + 3 * 5)
    read = 4 * ((8 + 3 + 2 + 1) + (4 + 3 + 2 + 1))  # the second block remembers from the first full pass on
    wanted = positions * (model.flops(24) + 2 * 16 * 4) + 2 * 16 * model.vocab_size * read
    assert generated.flops == pytest.approx(wanted)
    assert summary["flops_per_token"] == pytest.approx(wanted / 32)


def test_what_ends_an_answer(generator, tokenizer):
    eos, mask = tokenizer.eos_id, tokenizer.mask_id
    (plain, stops) = asked(tokenizer, {"prompt": "a"}, {"prompt": "a", "stop": ["lo!", "w"]})
    before = np.concatenate([tokenizer.encode("a"), np.full(NEW, mask)])

    def answer(prompt, *parts):
        new = np.concatenate([[part] if isinstance(part, int) else tokenizer.encode(part) for part in parts])
        after = np.concatenate([tokenizer.encode("a"), new])
        found = generator.answer(prompt, before, after, 1, 3)
        return found.text, len(found.ids), found.finish, generator.has_ended(prompt, new)

    assert answer(plain, "hello wo") == ("hello wo", 8, "length", False)
    assert answer(plain, "hell", eos, "xyz") == ("hell", 4, "end", True)
    assert answer(plain, "he", mask, "o", eos, "xyz") == ("he", 2, "length", False)  # it is not known what comes before
    assert answer(stops, "hello wo") == ("hello ", 7, "stop", True)
    assert answer(stops, "hello! w") == ("hel", 6, "stop", True)
    assert answer(stops, "hel", eos, "wxyz") == ("hel", 3, "end", True)


def test_rows_stop_when_they_have_ended(generator, params, tokenizer):
    """Every token ends the first prompt: it is done once its first position is known, the others go on."""
    prompts = asked(tokenizer, {"prompt": "a"}, {"prompt": "b"})
    short, long = dataclasses.replace(prompts[0], ends=tuple(range(260))), dataclasses.replace(prompts[1], ends=())
    answers = generator(params, [short, long]).answers
    assert answers[0].finish == "end" and len(answers[0].ids) == 0 and answers[0].forwards <= 4
    assert answers[1].forwards == STEPS and answers[1].text == generator(params, [long]).answers[0].text
    assert generator(params, [short]).forwards == answers[0].forwards < STEPS  # the batch ends with its last row


def test_what_a_cache_changes(generator, params, tokenizer):
    prompts = asked(tokenizer, {"prompt": "one"}, {"prompt": "two"}, {"prompt": "a[MASK]"})
    prompts = [dataclasses.replace(prompt, ends=()) for prompt in prompts]
    found = verify(generator, params, prompts)
    assert found.largest_logit_difference > 1e-3 and 0 <= found.differing < 1
    assert found.forwards == (STEPS, STEPS)
    assert found.summary()["flops_saved"] == pytest.approx(1 - found.flops[0] / found.flops[1]) and 0 < found.flops[0]
    # With nothing but full passes a cache changes nothing.
    full = verify(dataclasses.replace(generator, steps=2), params, prompts)
    assert full.largest_logit_difference < 1e-4 and full.differing == 0
    plain = dataclasses.replace(generator, decoder=dataclasses.replace(generator.decoder, cache="none"))
    for made, some in ((plain, prompts), (generator, prompts[2:])):
        with pytest.raises(ValueError, match="^--verify_cache: got .*, wanted 'prefix' or 'dual' and at least 1"):
            verify(made, params, some)


@pytest.mark.parametrize("wrong", [{"new_tokens": 0}, {"batch_size": 0}, {"bucket": 0}, {"block": 3}, {"cache": "x"}])
def test_config_out_of_range(wrong):
    with pytest.raises(ValueError, match=rf"^generate\.{next(iter(wrong))}: got "):
        GenerateConfig(**{"new_tokens": NEW} | wrong)


def test_prompts_are_json(tokenizer):
    """What was asked is written beside the answer as it stood in the file."""
    record = {"prompt": "a", "id": 3, "stop": ["b"]}
    assert json.loads(json.dumps(dict(asked(tokenizer, record)[0].given))) == record
