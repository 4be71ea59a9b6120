"""Fine-tuning on conversations: which rows are made of which records, their batches, and the loss on the responses."""

import bz2
import gzip
import json
import lzma
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chat_test import END, START, write_folder
from config_test import make_config, one_line
from conftest import MASK, READOUT, B, L, assert_close, make_batch, make_denoiser, make_params

from smdlm import identity
from smdlm.build import build
from smdlm.config import read
from smdlm.data import text
from smdlm.data.chat import ChatTemplate
from smdlm.data.config import DataConfig
from smdlm.data.conversations import Chat
from smdlm.data.tokenizer import make_tokenizer
from smdlm.diffusion import TimeSampler
from smdlm.objective import ResponseDiffusion, SoftMaskedDiffusion


def turns(answer, question="hi", **more):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]


def answers(count, lengths=(8, 20, 50)):
    """So many conversations, their responses of these lengths in turn."""
    return [turns(f"{i:03d}" + "x" * (lengths[i % len(lengths)] - 3)) for i in range(count)]


def write_lines(file, conversations, field="messages"):
    file.write_text("".join(json.dumps({field: found}) + "\n" for found in conversations), "utf-8")
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the tokenizer of all conversations."""
    folder = tmp_path_factory.mktemp("sft")
    write_folder(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return make_tokenizer(f"hf:{folder}/tokenizer")


def config(folder, path, seq_len=128, batch_size=4, **fields):
    own = {name: fields.pop(name) for name in ("val_documents", "val_fraction", "seed") if name in fields}
    own = {"val_documents": 1, **own}
    return DataConfig(Chat(str(path), **fields), f"hf:{folder}/tokenizer", seq_len, batch_size, **own)


def load(folder, path, **fields):
    return text.load(config(folder, path, **fields))


def test_the_last_answer_is_the_response(folder, tokenizer):
    """Its turn is learned to its end; what the template spells becomes special ids, what a message spells is text."""
    long = [*turns("first"), *turns(f"one {END} two"), {"role": "user", "content": "left out"}]
    data = load(folder, write_lines(folder / "last.jsonl", [turns("other one"), long, turns("validation")]))
    ids, prompt = data.train[1]
    special = ChatTemplate.of(tokenizer).special
    first = f"{START}user\nhi{END}\n{START}assistant\nfirst{END}\n{START}user\nhi{END}\n{START}assistant\n"
    spelled = re.split(r"(<\|im_start\|>|<\|im_end\|>)", first)
    wanted = [[special[part]] if part in special else tokenizer.encode(part) for part in spelled]
    assert ids[:prompt].tolist() == np.concatenate(wanted).tolist()
    response = [*tokenizer.encode(f"one {END} two"), special[END], *tokenizer.encode("\n")]
    assert ids[prompt:].tolist() == response
    assert len(data.train) == 2 and tokenizer.decode(data.val[0][0]).count("validation") == 1


def test_what_is_left_out_is_said(folder, caplog):
    tool = [
        turns("called" * 2, tool_calls=[{"name": "f"}]),
        [*turns("a tool"), {"role": "tool", "content": "1"}, *turns("yes, it is")],
    ]
    odd = [[], [{"role": "user", "content": "no answer"}], [{"role": "assistant", "content": "no question"}]]
    short, long = turns("ab"), turns("x" * 200)
    parts = [{"role": "user", "content": [{"type": "text"}]}, {"role": "assistant", "content": "an answer"}]
    kept = answers(3)
    data = load(folder, write_lines(folder / "odd.jsonl", [*odd, *tool, short, long, parts, *kept]))
    assert len(data.train) + len(data.val) == 3
    warned = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert [line.split(";")[0] for line in warned] == [
        "data: left out 5 conversations (no response to learn)",
        "data: left out 1 conversations (too short)",
        "data: left out 1 conversations (too long)",
        "data: left out 1 conversations (the template does not take them)",
    ]
    assert "a response of 4 tokens at odd.jsonl:6, wanted at least 5 (data.min_response)" in warned[1]
    assert len(load(folder, folder / "odd.jsonl", min_response=4).train) == 3  # of four, one validates
    assert len(load(folder, folder / "odd.jsonl", seq_len=256).train) == 3


def test_all_kinds_of_files_hold_the_same(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    found = answers(7)
    plain = write_lines(folder / "plain.jsonl", found)
    for module in (gzip, lzma, bz2):
        ending = {gzip: "gz", lzma: "xz", bz2: "bz2"}[module]
        (folder / f"packed.jsonl.{ending}").write_bytes(module.compress(plain.read_bytes()))
    table = pyarrow.table({"messages": found, "id": list(range(7))})
    parquet.write_table(table, folder / "rows.parquet")
    (folder / "saved").mkdir()
    (folder / "saved" / "state.json").write_text("{}")
    for number, part in enumerate((table.slice(0, 4), table.slice(4))):
        with ipc.new_stream(folder / "saved" / f"data-{number:05d}-of-00002.arrow", table.schema) as stream:
            stream.write_table(part)
    with ipc.new_file(folder / "file.arrow", table.schema) as file:
        file.write_table(table)
    write_lines(folder / "other.jsonl", found, field="chat")
    wanted = load(folder, plain)
    assert len(wanted.train) == 6
    for name in ("packed.jsonl.gz", "packed.jsonl.xz", "packed.jsonl.bz2", "rows.parquet", "saved", "file.arrow"):
        got = load(folder, folder / name)
        assert np.array_equal(got.train.ids, wanted.train.ids) and np.array_equal(got.val.ids, wanted.val.ids), name
    assert np.array_equal(load(folder, folder / "other.jsonl", field="chat").train.ids, wanted.train.ids)


def test_a_batch_is_of_one_bucket(folder):
    """Every row once in an epoch, but for what fills up the last batch; a batch depends on its number alone."""
    data = load(folder, write_lines(folder / "many.jsonl", answers(23)), buckets="40,56,128")
    batches = data.train_batches(batch_size=4, seed=0, start=0, rows=np.arange(4))
    epochs = [[next(batches) for _ in range(6)] for _ in range(2)]  # 22 rows train
    for epoch in epochs:
        rows = [tuple(row[row != data.tokenizer.eos_id].tolist()) for batch in epoch for row in batch["tokens"]]
        assert len(set(rows)) == 22 and len(rows) == 24
        assert {batch["tokens"].shape[1] for batch in epoch} == {40, 56, 128}
        for batch in epoch:
            longest = (batch["tokens"] != data.tokenizer.eos_id).sum(1).max()
            assert longest <= batch["tokens"].shape[1] and batch["valid"].all()
    assert not np.array_equal(epochs[0][0]["tokens"], epochs[1][0]["tokens"])
    assert data.row_tokens == pytest.approx((8 * 40 + 7 * 56 + 7 * 128) / 22)
    resumed = data.train_batches(batch_size=4, seed=0, start=7, rows=np.array([1, 3]))
    assert_close(next(resumed), {name: value[[1, 3]] for name, value in epochs[1][1].items()})
    other = data.train_batches(batch_size=4, seed=1, start=0, rows=np.arange(4))
    assert any(not np.array_equal(next(other)["tokens"], batch["tokens"]) for batch in epochs[0])


def test_prompt_and_padding(folder):
    found = write_lines(folder / "pads.jsonl", answers(9))
    batches = list(load(folder, found, val_documents=3).eval_batches(8, 2))
    assert [batch["valid"].tolist() for batch in batches] == [[True, True], [True, False]]
    assert batches[1]["frozen"][1].all()
    data, learned = load(folder, found, val_documents=3, supervise_pads=False), batches[0]
    batch = next(iter(data.eval_batches(8, 2)))
    assert set(learned) == {"tokens", "valid", "frozen"}
    (ids, prompt), at = data.val[0], np.arange(128)
    assert np.array_equal(learned["tokens"], batch["tokens"]) and np.array_equal(learned["tokens"][0, : len(ids)], ids)
    assert (batch["tokens"][0, len(ids) :] == data.tokenizer.eos_id).all()
    assert np.array_equal(learned["frozen"][0], at < prompt)
    assert np.array_equal(batch["frozen"][0], (at < prompt) | (at >= len(ids)))
    assert np.array_equal(batch["attend"][0], at < len(ids))


def refused(folder, path, **fields):
    with pytest.raises(ValueError) as error:
        load(folder, path, **fields)
    assert "\n" not in str(error.value) and "wanted" in str(error.value)
    return str(error.value)


def test_files_that_are_none(folder, tmp_path):
    assert "no file that matches" in refused(folder, tmp_path / "nothing.jsonl")
    assert "1 conversations" in refused(folder, write_lines(tmp_path / "one.jsonl", answers(1)))
    assert "no conversation to train on" in refused(
        folder, write_lines(tmp_path / "long.jsonl", [turns("x" * 200)] * 3)
    )
    assert "got fields {'chat': 'list'}" in refused(folder, write_lines(tmp_path / "f.jsonl", answers(3), field="chat"))
    asked = [[{"role": "user", "content": "no answer"}]] * 3
    message = refused(folder, write_lines(tmp_path / "asked.jsonl", asked))
    assert "no conversation to train on" in message and "got no turn of the assistant" in message
    (tmp_path / "broken.jsonl").write_bytes(b'{"messages": [\n{"messages": []}\n')
    assert "no JSON at broken.jsonl:1" in refused(folder, tmp_path / "broken.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps({"messages": []}).encode() + b'\n{"messages": "\xe9"}\n')
    assert "no JSON at latin.jsonl:2" in refused(folder, tmp_path / "latin.jsonl")
    (tmp_path / "words.txt").write_text("text")
    assert "wanted files of conversations" in refused(folder, tmp_path / "words.txt")
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "dataset_dict.json").write_text("{}")
    assert "holds several splits" in refused(folder, tmp_path / "several")
    write_folder(tmp_path / "bare", chat_template=None)
    with pytest.raises(ValueError, match="chat template: got none"):
        text.load(DataConfig(Chat(str(tmp_path / "f.jsonl")), f"hf:{tmp_path}/bare", 128, 4))
    write_folder(tmp_path / "code", chat_template="{{ ''.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="no conversation to train on .*SecurityError"):
        text.load(DataConfig(Chat(str(write_lines(tmp_path / "x.jsonl", answers(4)))), f"hf:{tmp_path}/code", 128, 4))


@pytest.mark.parametrize("name", ["bad.parquet", "bad.arrow"])
def test_files_of_pyarrow(folder, tmp_path, monkeypatch, name):
    """Damaged ones, and any without that package."""
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "pyarrow", None)
        assert "without pyarrow" in refused(folder, tmp_path / name)
    pytest.importorskip("pyarrow")
    assert f"unreadable {tmp_path / name}" in refused(folder, tmp_path / name)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data__buckets": "64,32"}, "data.buckets: got '64,32', wanted ascending"),
        ({"data__buckets": "8,32"}, "the last of them data.seq_len = 16"),
        ({"data__buckets": "a,16"}, "data.buckets"),
        ({"data__min_response": 0}, "data.min_response: got 0"),
        ({"data__field": ""}, "data.field: got ''"),
        ({"data__framing": "bos_eos"}, "data.framing: got 'bos_eos' for conversations"),
        ({"train__accumulation": "last"}, "train.accumulation: got 'last'"),
        ({"model__causal": True, "softmask__p_sm": 0.0}, "conversations for a causal"),
    ],
)
def test_fields_are_checked(changes, message):
    assert message in one_line(make_config("chat:x.jsonl", **changes))


def test_the_sum_of_means_is_for_conversations():
    assert "train.accumulation: got 'sum' for a text" in one_line(make_config(train__accumulation="sum"))


@pytest.mark.parametrize("accumulation, different", [("mean", []), ("sum", ["train.accumulate (2, now 4)"])])
def test_micro_batches_of_a_sum_belong_to_the_run(accumulation, different):
    one, two = (make_config("chat:x", train__accumulate=n, train__accumulation=accumulation) for n in (2, 4))
    assert identity.differences(one.to_dict(), read(two)) == different


# ----------------------------------------------------------------------------------------------------------- objective

KEY = jax.random.key(0)
PROMPTS = {"frozen": jnp.arange(L) < jnp.array([[1], [3], [5], [7]])}
RESPONSES = ~np.asarray(PROMPTS["frozen"])


@pytest.fixture(scope="module")
def denoiser():
    return make_denoiser()


def respond(denoiser, parts=1, t=(0.2, 0.8)):
    times = TimeSampler("iid", *t)
    return ResponseDiffusion(denoiser, READOUT, 0.8, times=times, parts=parts)


def test_only_responses_are_masked_and_every_row_is(denoiser):
    objective, batch = respond(denoiser, t=(0.001, 0.002)), {**make_batch(), **PROMPTS}
    for seed in range(8):
        example = objective.corrupt(jax.random.key(seed), batch)
        masked = np.asarray(example.canvas == MASK)
        assert masked.any(1).all() and not masked[~RESPONSES].any()
        assert np.array_equal(masked, np.asarray(example.weights) > 0)
        assert np.array_equal(np.where(masked, example.targets, example.canvas), batch["tokens"])
    none = objective.corrupt(KEY, {**batch, "valid": jnp.array([True, True, False, True])})
    assert not np.any(none.weights[2]) and not np.any(none.canvas[2] == MASK)


def test_weights_are_those_of_a_mean_over_masked_tokens(denoiser):
    """1/t over the masked tokens of the batch, or of each micro-batch: rows 0, 2 and rows 1, 3 of two."""
    t = 0.5 * np.ones(B)
    for parts in (1, 2):
        objective = respond(denoiser, parts, (0.5, 0.500001))
        example = objective.corrupt(KEY, {**make_batch(), **PROMPTS})
        masked = np.asarray(example.weights) > 0
        for part in range(parts):
            rows = slice(part, None, parts)
            np.testing.assert_allclose(example.weights[rows][masked[rows]], 1 / t[0] / masked[rows].sum(), rtol=1e-5)
        np.testing.assert_allclose(np.sum(example.weights), 2 * parts, rtol=1e-5)


def test_the_chance_of_a_mask(denoiser):
    """(1 - eps) t + eps, as in the reference."""
    objective = respond(denoiser, t=(0.3, 0.300001))
    batch = make_batch(64, 64)
    masked = np.asarray(objective.corrupt(KEY, batch).weights) > 0
    assert masked.mean() == pytest.approx(0.3 * 0.999 + 0.001, abs=4 * (0.21 / 4096) ** 0.5)


def test_the_loss_of_parts_adds_up(denoiser):
    """With `parts`, each micro-batch is the loss that it has alone: what the reference's accumulation sums."""
    params, batch = make_params(denoiser), {**make_batch(), **PROMPTS}
    t, u = jnp.linspace(0.3, 0.7, B), jax.random.uniform(KEY, (B, L))
    summed, mean = (respond(denoiser, parts) for parts in (2, 1))
    loss = jax.jit(lambda example: mean(params, example, jnp.bool_(True), None)[0])
    alone = [mean._masked(*jax.tree.map(lambda x, i=i: x[i::2], (batch, t, u))) for i in range(2)]
    whole = float(loss(summed._masked(batch, t, u)))
    assert whole == pytest.approx(sum(float(loss(example)) for example in alone), rel=1e-5)
    assert whole > 1.5 * float(loss(mean._masked(batch, t, u)))


def test_padding_that_is_not_learned_changes_nothing(denoiser):
    params, batch = make_params(denoiser), {**make_batch(), **PROMPTS}
    attend = jnp.broadcast_to(jnp.arange(L) < L - 2, (B, L))
    batch |= {"attend": attend, "frozen": batch["frozen"] | ~attend}
    objective = respond(denoiser)
    example = objective.corrupt(KEY, batch)
    loss = jax.jit(lambda example: objective(params, example, jnp.bool_(True), None)[0])
    other = example.replace(canvas=jnp.where(attend, example.canvas, 1))
    assert float(loss(other)) == pytest.approx(float(loss(example)), rel=1e-6)
    everywhere = other.replace(attend=None)
    assert float(loss(everywhere)) != pytest.approx(float(loss(example)), rel=1e-4)


def test_evaluation_takes_the_bound(denoiser):
    """Masks of every share, weights 1/t over the tokens of responses, and prompts are given."""
    bound = respond(denoiser).bound
    assert type(bound) is SoftMaskedDiffusion and (bound.times.t_min, bound.times.t_max) == (1e-3, 1.0)
    batch = {**make_batch(), **PROMPTS, "number": jnp.arange(B)}
    draw = jax.jit(jax.vmap(lambda key: bound.corrupt_by_number(key, batch).weights))
    weights = np.asarray(draw(jax.random.split(KEY, 400)))
    assert not weights[:, ~RESPONSES].any()
    total = weights.sum((1, 2))
    assert total.mean() == pytest.approx(0.999, abs=float(5 * total.std() / 20))


# ---------------------------------------------------------------------------------------------------------- experiment


def chat_config(folder, **changes):
    small = {"data__tokenizer": f"hf:{folder}/tokenizer", "data__seq_len": 64, "data__val_documents": 4}
    short = {"eval__blocks": 4, "eval__batch_size": 4, "eval__chain": 2, "softmask__k": 1, "train__accumulate": 2}
    return make_config(f"chat:{folder}/run.jsonl", **{**small, **short, **changes})


def test_training_on_two_buckets(folder):
    """The loss falls, one program per bucket is enough, and the likelihood of responses is evaluated."""
    from smdlm import experiment

    write_lines(folder / "run.jsonl", answers(24, lengths=(8, 30)))
    changes = {"data__buckets": "48,64", "optimizer__name": "adamw", "optimizer__lr": 0.01, "times__t_min": 0.2}
    made = build(read(chat_config(folder, **changes, times__t_max=0.8)), folder)
    assert isinstance(made.objective, ResponseDiffusion)
    step, state, batches, losses = made.train_step(), made.init_state(), made.train_batches(0), []
    for _ in range(30):
        batch = next(batches)
        state, metrics = step(state, made.put(batch))
        losses.append(float(metrics["train/loss"]))
    assert step._cache_size() == 2
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    values = experiment.evaluate(made, state.params)
    assert {"nats_per_token_one_pass", "nats_per_token_two_pass", "nats_per_token_carried"} <= set(values)
    assert 0 < values["nats_per_token_two_pass"].mean < 6


REACH = {"train__accumulation": "sum", "data__supervise_pads": False}


@pytest.mark.parametrize("name", REACH)
def test_fields_change_the_step(folder, name):
    write_lines(folder / "run.jsonl", answers(24, lengths=(8, 30)))

    def program(**changes):
        made = build(read(chat_config(folder, **changes)), folder)
        batch = jax.tree.map(jnp.asarray, next(made.train_batches(0)))
        return str(jax.make_jaxpr(made.train_step())(made.abstract_state(), batch))

    assert program(**{name: REACH[name]}) != program()


@pytest.mark.parametrize("changes", [{}, {"data__supervise_pads": False}])
def test_the_abstract_batch_is_that_of_the_longest_bucket(folder, changes):
    write_lines(folder / "run.jsonl", answers(24, lengths=(30,)))
    made = build(read(chat_config(folder, **changes)), folder)
    wanted = jax.tree.map(lambda x: (x.shape, x.dtype), made.put(next(made.train_batches(0))))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made.abstract_batch()) == wanted
