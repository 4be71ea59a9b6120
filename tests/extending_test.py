"""Every recipe of docs/extending.md works: its class trains or samples from a config, without a line elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes import TABLES, code, recipe

from smdlm import experiment
from smdlm.build import build
from smdlm.config import read
from smdlm.feedback.gates import Prediction
from smdlm.io.writer import read_metrics

SETTINGS = {
    "model": {"width": 16, "depth": 1, "heads": 2, "cond": 8, "dropout": 0.0, "vocab_multiple": 1},
    "data": {"tokenizer": "bytes", "seq_len": 16, "batch_size": 8},
    "softmask": {"p_sm": 1.0},
    "optimizer": {"warmup": 0, "lr": 1e-2, "lr_softmask": 1e-1},
    "train": {"steps": 4, "log_every": 2, "save_every": 4},
    "sampling": {"steps": 8, "count": 2, "prompt": "li"},
    "eval": {"blocks": 8, "batch_size": 4, "chain": 2},
}
TABLE_OF = {
    "policy": ("POLICIES",), "gate": ("GATES", "MIXERS"), "model": ("MODELS",), "source": ("SOURCES",),
    "metric": ("EVALUATORS",),
}  # fmt: skip


@pytest.fixture
def added(request, monkeypatch):
    """Names that a recipe defines, once its classes stand in our tables."""

    def add(kind):
        names = recipe(kind)
        for table in TABLE_OF[kind]:
            for name in names[table].keys() - TABLES[table].keys():
                monkeypatch.setitem(TABLES[table], name, names[table][name])
        return names

    return add


def trained(folder, **changes):
    """(summary, workdir) of a run of four updates; changes by section."""
    (folder / "corpus.txt").write_text("".join(f"line {i} of a small corpus\n" for i in range(40)))
    settings = {section: {**fields, **changes.get(section, {})} for section, fields in SETTINGS.items()}
    settings["data"].setdefault("source", f"text:{folder}/*.txt")
    made, workdir = build(read(settings), folder), folder / "run"
    with jax.set_mesh(made.mesh):
        checkpointer = experiment.checkpointer_of(workdir)
        summary = experiment.train(made, workdir, checkpointer, {"content_hash": made.data.content_hash})
        checkpointer.close()
    return summary, workdir


def test_a_policy(added, tmp_path):
    names = added("policy")
    summary, _ = trained(tmp_path, sampling={"policy": "left_to_right", "floor": 0.5})
    assert all(text.startswith("li") and "[MASK]" not in text for text in summary["samples"])
    with pytest.raises(ValueError, match="sampling.floor: got 0.0, wanted"):
        names["LeftToRight"](0.0)
    masked = jnp.array([[False, True, True, False, True, True, True]])
    feedback = type("F", (), {"probs": jnp.array([[[0.1], [0.2], [0.6], [0.1], [0.9], [0.3], [0.9]]])})
    draw = type("D", (), {"feedback": feedback})
    commit, remask, _ = names["LeftToRight"](0.5)(None, None, masked, draw, None, ())
    assert np.flatnonzero(commit[0]).tolist() == [1, 2, 4] and not remask.any()


def test_a_gate_and_a_mixer(added, tmp_path):
    """The gate's readable values are logged, drawn and in the table, by its own names and labels."""
    names = added("gate")
    summary, workdir = trained(tmp_path, softmask={"gate": "power", "mixer": "loudest", "scale": 0.25, "power": 2.0})
    rows = read_metrics(workdir / "metrics.jsonl")
    first, second = (row["train/omega_scale"] for row in rows[:2])
    assert abs(first - 0.25) < 0.2 and first != second
    assert set(summary["omega"]) == {"scale", "power"} and (workdir / "omega.png").stat().st_size > 0
    gate = names["PowerGate"](0.25, 2.0)
    np.testing.assert_allclose(
        gate(gate.init(), Prediction(jnp.array([[0.0, -0.5]]))), [[0.25, 0.25 * np.exp(-1)]], rtol=1e-5
    )


def test_a_source(added, tmp_path):
    names = added("source")
    (tmp_path / "table.csv").write_text(
        "id,body\n" + "".join(f'{i},"row {i} of a table, quoted"\n' for i in range(400))
    )
    summary, _ = trained(tmp_path, data={"source": f"csv:{tmp_path}/table.csv", "column": "body"})
    assert summary["steps"] == 4
    documents = list(names["Csv"](str(tmp_path / "table.csv"), "body").documents())
    assert documents[3].read() == "row 3 of a table, quoted" and len({d.key for d in documents}) == 400


def test_a_metric(added, tmp_path):
    added("metric")
    summary, workdir = trained(tmp_path, eval={"metrics": "likelihood,guess"})
    value = summary["values"]["guessed"]
    assert 0 <= value["mean"] <= 1 and value["interval"] >= 0 and summary["val_guessed"] == value["mean"]
    assert read_metrics(workdir / "metrics.jsonl")[-1]["val/guessed"] == value["mean"]


def test_the_model_of_the_page_is_short(added):
    """What it does is tested in toy_model_test.py."""
    body = code("model").partition('MODELS["toy"]')[0]
    assert len([line for line in body.splitlines() if line.strip()]) <= 60
    assert "toy" in added("model")["MODELS"]
