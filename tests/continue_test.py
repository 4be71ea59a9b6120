"""Continued pretraining: a converted checkpoint becomes the start of a run, or is refused before anything compiles."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from conftest import assert_identical
from tokenizers import models, pre_tokenizers

from configs import owt_continue
from smdlm.build import build
from smdlm.config import read
from smdlm.convert import __main__ as convert
from smdlm.convert import files, mdlm
from smdlm.experiment import continue_from
from smdlm.io.checkpoint import Checkpointer, CheckpointMismatch

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "tests" / "golden" / "mdlm.ckpt"
VOCAB = files.load(CHECKPOINT).tensors["backbone.vocab_embed.embedding"].shape[0]  # with the mask
SMALL = {
    "model": {"width": 64, "depth": 2, "heads": 4, "cond": 32, "dtype": "float32"},
    "data": {"seq_len": 24, "batch_size": 4, "framing": "stream"},
    "sampling": {"steps": 4, "count": 2},
    "eval": {"blocks": 4, "batch_size": 4},
    "readout": {"chunk": 32},
    "train": {"steps": 4, "log_every": 2, "save_every": 4, "eval_every": 0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus, a vocabulary of the checkpoint's size and one of one token less, three converted checkpoints."""
    folder = tmp_path_factory.mktemp("continue")
    for size in (VOCAB - 1, VOCAB - 2):
        words = {f"w{i}": i for i in range(size - 1)} | {"<|endoftext|>": size - 1}
        tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        (folder / f"words{size + 1}").mkdir()
        tokenizer.save(str(folder / f"words{size + 1}" / "tokenizer.json"))
    rng = np.random.default_rng(0)
    for i in range(12):
        (folder / f"{i}.txt").write_text(" ".join(f"w{j}" for j in rng.integers(0, VOCAB - 2, 90)))
    whole = files.load(CHECKPOINT)
    binary = {name: value for name, value in whole.tensors.items() if name not in mdlm.OMEGA}
    files.save(folder / "binary.ckpt", files.Source("binary", binary, whole.shadow, whole.ema))
    for source, name, flags in (
        (CHECKPOINT, "soft", []),
        (folder / "binary.ckpt", "binary", []),
        (folder / "binary.ckpt", "bare", ["--softmask=none"]),
    ):
        assert convert.main(["import", "mdlm", str(source), str(folder / name), *flags]) == 0
    return folder


def experiment(folder, tmp_path, source="soft", vocab=VOCAB, **changes):
    config = owt_continue.get_config()
    for section, fields in SMALL.items():
        config[section].update(fields)
    config.data.update({"source": f"text:{folder}/*.txt", "tokenizer": f"hf:{folder}/words{vocab}"})
    config.train.init_from = str(folder / source)
    for name, value in changes.items():
        section, _, field = name.partition("__")
        config[section][field] = value
    return build(read(config), tmp_path)


def start(made, folder, source):
    return continue_from(made, Checkpointer(folder / source / "checkpoints"))


def test_raw_weights_and_their_own_omega(folder, tmp_path):
    """A soft-masked checkpoint: raw weights, not its EMA; the new EMA begins there; fresh moments, step 0."""
    state, line = start(experiment(folder, tmp_path), folder, "soft")
    checkpointer = Checkpointer(folder / "soft" / "checkpoints")
    raw, ema = (checkpointer.restore_params(None, which)[0] for which in ("params", "ema"))
    assert_identical(state.params, raw)
    assert_identical(state.ema, raw)
    assert np.any(raw["backbone"]["embed"] != ema["backbone"]["embed"])
    assert int(state.step) == 0 and all(not np.any(x) for x in jax.tree.leaves(state.opt_state))
    assert "raw weights; omega from the checkpoint: softmask/raw_centre" in line


@pytest.mark.parametrize("source", ["binary", "bare"])
def test_a_binary_checkpoint_gets_a_new_omega(folder, tmp_path, source):
    """That of the config, not the one a conversion made up; named in the line."""
    made = experiment(folder, tmp_path, source, softmask__scale=0.12, softmask__centre=-2.0)
    state, line = start(made, folder, source)
    assert_identical(state.params["softmask"], made.denoiser.softmask.init())
    assert abs(float(jax.nn.sigmoid(state.params["softmask"]["raw_scale"])) - 0.12) < 1e-6
    names = ("raw_scale", "raw_centre", "raw_steepness")
    assert "omega newly initialised" in line and all(f"softmask/{name}" in line for name in names)


@pytest.mark.parametrize("source", ["soft", "binary", "bare"])
def test_the_binary_control_is_one_flag(folder, tmp_path, source):
    made = experiment(folder, tmp_path, source, softmask__p_sm=0.0)
    state, line = start(made, folder, source)
    assert state.params["softmask"] == {} and line.endswith("omega none")
    raw, _ = Checkpointer(folder / source / "checkpoints").restore_params(None, "params")
    assert_identical(state.params["backbone"], raw["backbone"])


def test_budgets_are_one_flag():
    config = owt_continue.get_config()
    assert read(config).train.updates(0.8) == 100_000
    config.train.update_budget = "iso_compute"
    assert read(config).train.updates(0.8) == 50_000 and read(config).train.updates(0.0) == 100_000


def test_another_size_lists_every_leaf(folder, tmp_path):
    made = experiment(folder, tmp_path, model__width=32, model__vocab_multiple=1)
    with pytest.raises(CheckpointMismatch) as error:
        start(made, folder, "soft")
    lines = str(error.value).splitlines()[1:]
    rows = Checkpointer(folder / "soft" / "checkpoints").shapes("params")[0]["backbone"]["embed"].shape[0]
    assert f"  params/backbone/embed: got float32[{rows},64], wanted float32[{VOCAB},32]" in lines
    same = {"sigma_map/in/kernel", "sigma_map/in/bias", "sigma_map/out/kernel", "sigma_map/out/bias"}
    leaves = jax.tree_util.tree_leaves_with_path(made.abstract_params()[0]["backbone"])
    named = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}
    assert {line.split(":")[0].removeprefix("  params/backbone/") for line in lines} == named - same


def test_another_vocabulary_of_equal_padded_size_is_refused(folder, tmp_path):
    made = experiment(folder, tmp_path, vocab=VOCAB - 1)
    with pytest.raises(ValueError, match=f"got model.vocab_size {VOCAB}, .*wanted model.vocab_size {VOCAB - 1}, "):
        start(made, folder, "soft")


@pytest.mark.long
def test_from_a_released_file_to_samples_and_back(folder, tmp_path):
    """import -> continue -> sample -> export, as commands; and what is refused of them."""

    def run(module, *arguments, status=0):
        done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    small = [f"--config.{s}.{name}={value}" for s, fields in SMALL.items() for name, value in fields.items()]
    small += [f"--config.data.source=text:{folder}/*.txt", f"--config.data.tokenizer=hf:{folder}/words{VOCAB}"]
    base = ["--config=configs/owt_continue.py", f"--workdir={tmp_path}/run", *small]
    refused = run("smdlm.main", *base, f"--config.train.init_from={tmp_path}/none", status=2)
    assert "train.init_from: got no checkpoint" in refused and not (tmp_path / "run").exists()
    output = run("smdlm.main", *base, f"--config.train.init_from={folder}/binary")
    assert "starting from step 0" in output and "newly initialised: softmask/raw_centre" in output
    output = run(
        "smdlm.main", *base, "--mode=sample", "--config.sampling.policy=remdm_loop", "--config.sampling.eta=.02"
    )
    assert "checkpoint of step 4" in output and "--- sample 2" in output
    refused = run("smdlm.main", *base, "--mode=sample", "--config.sampling.eta=.02", status=2)
    assert "got eta (a field of policy remdm_cap, remdm_rescale, remdm_loop), wanted one of" in refused
    for mode in ("eval", "sample"):
        output = run("smdlm.main", *base, f"--mode={mode}", f"--config.{mode.replace('sample', 'sampling')}.omega=live")
        assert "EMA weights, live omega" in output
    run("smdlm.convert", "export", "mdlm", f"{tmp_path}/run", f"{tmp_path}/out.ckpt")
    made, before = files.load(tmp_path / "out.ckpt"), files.load(CHECKPOINT)
    assert list(made.tensors) == list(before.tensors) and len(made.shadow) == len(before.shadow)
    saved, _ = Checkpointer(tmp_path / "run" / "checkpoints").restore_params(None, "params")
    np.testing.assert_array_equal(made.tensors["tran_head.raw_scale"], saved["softmask"]["raw_scale"])
    embedding = "backbone.vocab_embed.embedding"
    np.testing.assert_array_equal(made.tensors[embedding], saved["backbone"]["embed"][:VOCAB])
    assert np.any(made.tensors[embedding] != before.tensors[embedding])
