"""A run goes on only as itself, and says it is finished only when its weights are on disk."""

import json
import os
import signal
import types

import jax
import jax.numpy as jnp
import pytest

from smdlm import experiment, identity
from smdlm.build import build
from smdlm.config import read
from smdlm.io.checkpoint import Checkpointer
from smdlm.stop import StopSignal
from smdlm.train import NonFinite, NotSaved, non_finite

SETTINGS = {
    "model": {"width": 16, "depth": 1, "heads": 2, "cond": 8, "dropout": 0.0, "vocab_multiple": 1},
    "data": {"tokenizer": "bytes", "seq_len": 16, "batch_size": 8},
    "optimizer": {"warmup": 0},
    "train": {"steps": 4, "log_every": 1, "save_every": 2},
    "sampling": {"steps": 4, "count": 2},
    "eval": {"blocks": 4, "batch_size": 4, "chain": 0},
}


def settings_of(folder, **changes):
    found = {section: {**fields, **changes.get(section, {})} for section, fields in SETTINGS.items()}
    found |= {section: fields for section, fields in changes.items() if section not in found}
    found["data"].setdefault("source", f"text:{folder}/*.txt")
    return found


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "corpus.txt").write_text("".join(f"line {i} of a small corpus\n" for i in range(80)))
    return tmp_path


def train(folder, **changes):
    """What `smdlm.main` does with a workdir, in this process."""
    settings, workdir = settings_of(folder, **changes), folder / "run"
    config, checkpointer = read(settings), experiment.checkpointer_of(workdir, keep=3)
    identity.check_same_run(workdir, checkpointer, config)
    made = build(config, folder)
    identity.check_same_data(workdir, checkpointer, made.data.content_hash)
    with jax.set_mesh(made.mesh):
        facts = {"config": settings, "content_hash": made.data.content_hash}
        summary = experiment.train(made, workdir, checkpointer, facts)
    checkpointer.close()
    return summary


DIFFERENT = {
    "data.batch_size": 16, "data.seed": 3, "data.seq_len": 12, "optimizer.lr": 0.5, "model.width": 32,
    "softmask.k": 2, "softmask.scale": 0.2, "train.seed": 1, "noise.eps": 0.1, "times.kind": "iid",
    "optimizer.name": "muon", "softmask.gate": "constant",
}  # fmt: skip
FREE = {
    "train.steps": 9, "train.log_every": 2, "train.save_every": 4, "train.eval_every": 2, "train.keep": 7,
    "train.profile": "1:2", "train.wandb": "x",
    "model.remat": "block", "model.unroll": True, "model.attention": "xla",
    "train.accumulate": 2, "sampling.steps": 9, "eval.blocks": 2, "mesh.fsdp": 1,
}  # fmt: skip


def changed(folder, fields):
    changes = {}
    for name, value in fields.items():
        section, _, field = name.partition(".")
        changes.setdefault(section, {})[field] = value
    return read(settings_of(folder, **changes))


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_field_that_shapes_training_makes_another_run(folder, name):
    (found, *_) = identity.differences(settings_of(folder), changed(folder, {name: DIFFERENT[name]}))
    assert found.startswith(f"{name} (") and str(DIFFERENT[name])[:4] in found.lower().replace("gate", "")


def test_every_differing_field_is_listed_and_free_ones_are_not(folder):
    both = {"optimizer.lr": 0.5, "data.seed": 3, "train.seed": 1}
    found = identity.differences(settings_of(folder), changed(folder, {**both, **FREE}))
    assert sorted(line.partition(" ")[0] for line in found) == sorted(both)
    assert identity.differences(settings_of(folder), changed(folder, FREE)) == []
    # A default that is spelled out is the same run, and so is a field of another version at its default.
    assert identity.differences(settings_of(folder), changed(folder, {"softmask.k": 3, "optimizer.clip": 1.0})) == []


def test_another_run_in_the_same_workdir_is_refused(folder):
    train(folder)
    with pytest.raises(ValueError, match=r"another optimizer.lr \(0.0003, now 0.5\), wanted the same"):
        train(folder, optimizer={"lr": 0.5}, train={"steps": 8})
    with pytest.raises(ValueError, match="train.steps: got 2 updates for .*, which has done 4, wanted at least 4"):
        train(folder, train={"steps": 2})
    assert train(folder, train={"steps": 6})["steps"] == 6
    (folder / "corpus.txt").write_text("other lines behind the same name\n" * 60)
    with pytest.raises(ValueError, match="got a run with other content behind the same data.source"):
        train(folder, train={"steps": 8})


def test_a_prompt_that_is_too_long_is_found_before_training(folder):
    with pytest.raises(ValueError, match="sampling.prompt: got 20 tokens, wanted fewer than data.seq_len = 16"):
        train(folder, sampling={"prompt": "x" * 20})
    assert not (folder / "run").exists()


def test_more_candidates_than_tokens_are_refused(folder):
    with pytest.raises(ValueError, match="softmask.k: got 1000, wanted at most model.vocab_size = 258"):
        train(folder, softmask={"k": 1000})


def test_weights_that_are_not_on_disk_are_no_finished_run(folder, monkeypatch):
    """One warning a failure, an error that names the newest weights, and no summary."""
    save = Checkpointer.save

    def full_disk(self, step, *args, **kwargs):
        if step == 4:
            self.wait()
            return self._report(step, OSError("no space left on device"))
        return save(self, step, *args, **kwargs)

    monkeypatch.setattr(Checkpointer, "save", full_disk)
    with pytest.raises(NotSaved, match=r"the weights of step 4 were not saved \(newest: 2\)"):
        train(folder)
    assert not (folder / "run" / "summary.json").exists()
    monkeypatch.undo()
    assert train(folder)["steps"] == 4


def test_nothing_that_is_not_finite_is_saved(folder):
    """A rate that overflows in one update: the loss of that update is still fine, its weights are not."""
    with pytest.raises(NonFinite, match="got non-finite parameters, non-finite EMA after step 1, .*no checkpoint yet"):
        train(folder, optimizer={"lr": 1e39}, train={"save_every": 1})
    assert not list((folder / "run").glob("checkpoints/*"))
    summary = train(folder)  # with a sane rate the same workdir trains to its end
    assert summary["steps"] == 4 and not (folder / "run" / identity.DIVERGED).exists()


def test_after_diverging_the_optimizer_may_change_and_nothing_else(folder):
    train(folder)
    (folder / "run" / identity.DIVERGED).touch()
    with pytest.raises(ValueError, match="another data.seed"):
        train(folder, optimizer={"lr": 1e-4}, data={"seed": 3}, train={"steps": 6})
    assert train(folder, optimizer={"lr": 1e-4}, train={"steps": 6})["steps"] == 6


@pytest.mark.parametrize("part", ["params", "ema", "opt_state"])
def test_every_part_of_a_state_is_looked_at(part):
    trees = {name: {"a": jnp.ones(3), "count": jnp.int32(2)} for name in ("params", "ema", "opt_state")}
    assert non_finite(types.SimpleNamespace(**trees)) == ""
    trees[part] = {"a": jnp.array([1.0, jnp.inf, 0.0]), "count": jnp.int32(2)}
    names = {"params": "parameters", "ema": "EMA", "opt_state": "optimizer state"}
    assert non_finite(types.SimpleNamespace(**trees)) == f"non-finite {names[part]}"


def test_the_first_interrupt_is_a_stop_and_handlers_come_back(capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.reached(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reached(2) and "Ctrl-C again ends at once" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_run_is_sampled_without_its_corpus(folder):
    """The tokenizer is kept with the run; samples of other occasions are not written over."""
    from smdlm.data.kept import load_tokenizer
    from smdlm.io.writer import unused_name

    train(folder, data={"tokenizer": "bpe:270"})
    (folder / "corpus.txt").unlink()
    tokenizer = load_tokenizer(folder / "run" / "tokenizer")
    assert tokenizer.decode(tokenizer.encode("line 7")) == "line 7" and tokenizer.vocab_size == 270
    samples = folder / "run" / "samples"
    rows = [json.loads(line) for line in (samples / "step_00000004.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[1]["number"] == 1 and rows[0]["settings"]["steps"] == 4
    assert tokenizer.decode(rows[0]["ids"]) == rows[0]["text"]
    assert unused_name(samples, "step_00000004_sample") == "step_00000004_sample_1"
    (samples / "step_00000004_sample_1.txt").touch()
    assert unused_name(samples, "step_00000004_sample") == "step_00000004_sample_2"


def test_64_bits_are_refused_where_a_program_can_not_turn_them_off(folder):
    with jax.enable_x64(True), pytest.raises(ValueError, match="JAX_ENABLE_X64: got 64 bits, wanted 32"):
        build(read(settings_of(folder)), folder)
