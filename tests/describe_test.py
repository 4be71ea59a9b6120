"""What a person reads of a run that is no result: amounts, estimates, commands to paste."""

import sys

import jax
import numpy as np
import pytest

from smdlm import command, describe
from smdlm.build import assemble
from smdlm.config import read
from smdlm.data.vocabulary import Vocabulary
from smdlm.meter import Meter


@pytest.mark.parametrize(
    "x, text", [(0.0, "0 "), (950, "950 "), (2.5e6, "2.5 M"), (3.21e12, "3.21 T"), (4e15, "4 P"), (1e20, "100 E")]
)
def test_amounts(x, text):
    assert describe.amount(x) == text


def test_flops_of_an_update_are_those_of_its_forwards():
    """By hand, for a model whose head dominates."""
    settings = {
        "model": {"width": 16, "depth": 1, "heads": 2, "cond": 8, "vocab_multiple": 1},
        "data": {"source": "text:x", "tokenizer": "bytes", "seq_len": 8, "batch_size": 4},
        "train": {"steps": 10},
    }

    def flops(vocab, **changes):
        made = {section: {**fields, **changes.get(section, {})} for section, fields in settings.items()}
        made |= {section: fields for section, fields in changes.items() if section not in made}
        config = read(made)
        return describe.training_flops(assemble(config, Vocabulary(vocab, vocab - 1, 0), config.mesh.make(), None))

    soft = flops(10**6)
    np.testing.assert_allclose(soft, 3.8 * 4 * 8 * 2 * 16 * 10**6 / 2, rtol=0.01)
    np.testing.assert_allclose(flops(10**6, softmask={"p_sm": 0.0}) / soft, 3 / 3.8, rtol=1e-6)
    causal = {"model": {"causal": True}, "softmask": {"p_sm": 0.0}}
    np.testing.assert_allclose(flops(10**6, **causal) / soft, 2 * 3 / 3.8, rtol=0.01)
    np.testing.assert_allclose(flops(10**6, data={"batch_size": 8}) / soft, 2, rtol=1e-6)


def test_a_command_again_keeps_what_is_not_changed(monkeypatch):
    given = [
        "main",
        "--config=c.py",
        "--config.a.b=x y",
        "--overwrite",
        "--mode",
        "train",
        "--workdir",
        "old",
        "--flag",
    ]
    monkeypatch.setattr(sys, "argv", given)
    wanted = "python -m smdlm.main --config=c.py '--config.a.b=x y' --flag --workdir=new --mode=eval"
    assert command.again("--workdir=new", "--mode=eval") == wanted


def test_time_is_estimated_once_from_timed_steps(monkeypatch):
    now = iter([0.0, 0.0, 10.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Meter(100)
    assert clock.estimate(50) == ""  # nothing was timed yet
    for _ in range(6):
        clock.step(jax.numpy.zeros(()))  # the first compiles
    clock.stop()
    assert clock.estimate(3600).startswith("about 2.0 hours for the 3,600 updates left")
    assert clock.estimate(3600) == ""
    for left, said in ((0, ""), (60, "about 2.0 minutes"), (20, "about 40.0 seconds"), (1800, "about 1.0 hours")):
        clock._estimated = False
        assert clock.estimate(left)[: len(said) or None] == said
