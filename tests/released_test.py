"""Released models: a run becomes a small folder that loads by itself, and the package's are what their records say."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from library_test import train, write_corpus

import smdlm
from smdlm.data.text import ArrayBlocks, batches
from smdlm.evaluate.base import Subject
from smdlm.evaluate.likelihood import Likelihood
from smdlm.io import released
from smdlm.tools import release

MIB = 2**20


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run of a few updates, its corpus beside it."""
    folder = tmp_path_factory.mktemp("released")
    workdir = train(folder, "run-seed0")
    write_corpus(folder)
    return workdir


@pytest.fixture(scope="module")
def folder(run):
    cells = run.parent / "cells"
    cells.mkdir()
    for name, seed in (("run", 0), ("run", 1), ("other", 0)):
        (cells / f"{name}-seed{seed}-steps8-x.json").write_text(json.dumps({"run": name, "seed": seed}))
    release.main([str(run), str(run.parent / "mine")])
    return run.parent / "mine"


def measured(model, blocks):
    """Likelihoods of one and two passes on blocks, as a run's end measures them."""
    likelihood = next(m for m in model.experiment.config.eval.metrics if isinstance(m, Likelihood))
    objective, place = model.experiment.objective, model.experiment.place

    def first(count, size):
        return batches(ArrayBlocks(blocks[:count]), batch_size=size, seed=0, shuffle=False, repeat=False)

    subject = Subject(objective, model.params, model.tokenizer.token_bytes, first, place)
    with jax.set_mesh(model.experiment.mesh):
        return Likelihood(likelihood.blocks, likelihood.batch_size, likelihood.draws, 0, likelihood.seed).run(subject)


def test_a_released_run_is_the_run(run, folder):
    """In half of the bytes, without checkpoint and corpus."""
    before, after = smdlm.load(run), smdlm.load(folder)
    assert after.step == before.step == 12 and after.tokenizer.fingerprint == before.tokenizer.fingerprint
    for (path, x), y in zip(jax.tree.leaves_with_path(before.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-3, atol=1e-6, err_msg=jax.tree_util.keystr(path))
    omega = before.params["softmask"]
    assert omega and all(float(after.params["softmask"][name]) == float(omega[name]) for name in omega)
    assert len(set(after.sample("Doc", count=2, seed=1))) == 2
    size = (folder / released.WEIGHTS).stat().st_size
    assert size < 0.7 * sum(x.nbytes for x in jax.tree.leaves(before.params))
    about = released.about(folder)
    assert [(record["run"], record["seed"]) for record in about["results"]["study"]] == [("run", 0)]
    values = measured(after, released.validation_blocks(folder))
    wanted = about["results"]["validation"]["bits_per_byte_two_pass"]
    assert abs(values["bits_per_byte_two_pass"].mean - wanted["mean"]) < 2e-3


def test_what_can_not_be_released_or_loaded_is_one_line(run, folder, tmp_path, capsys):
    for given, message in (
        ([run, folder], "which exists, wanted a new folder"),
        ([tmp_path, tmp_path / "x"], "without summary.json, wanted a finished run"),
    ):
        with pytest.raises(SystemExit):
            release.main([str(word) for word in given])
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    with pytest.raises(ValueError, match="wanted none: it has its own"):
        smdlm.load(folder, config="configs/tiny.py")
    copy = shutil.copytree(folder, tmp_path / "copy")
    about = json.loads((copy / released.RUN).read_text())
    about["config"]["model"]["depth"] = 3
    (copy / released.RUN).write_text(json.dumps(about))
    with pytest.raises(ValueError, match="got other backbone/blocks/.* than its config wants: copy the folder again"):
        smdlm.load(copy)
    (copy / released.WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="weights.safetensors: got an unreadable file .*wanted weights"):
        smdlm.load(copy)
    for content, cause in (("{", "JSONDecodeError"), ("{}", "no config, step, tokenizer"), ("[]", "no object")):
        (copy / released.RUN).write_text(content)
        with pytest.raises(ValueError, match=f"run.json: got an unreadable file .*{cause}"):
            smdlm.load(copy)


@pytest.mark.skipif(not released.names(), reason="no model stands in smdlm/released")
def test_the_miniature_is_what_its_record_says():
    """One published number of each model, measured again on the blocks that lie beside it; weights below 4 MiB."""
    for name in released.names():
        model, folder = smdlm.load(name), released.find(Path(name))
        values = measured(model, released.validation_blocks(folder))
        published = released.about(folder)["results"]["validation"]
        for key in values.keys() & published.keys():
            assert abs(values[key].mean - published[key]["mean"]) < 2e-3 * max(1, published[key]["mean"]), (name, key)
        assert any(key.startswith("bits_per_byte") for key in values)
    assert sum(path.stat().st_size for path in released.HERE.rglob(released.WEIGHTS)) < 4 * MIB
