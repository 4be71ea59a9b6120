"""A model that nobody knows: one class in one file, and it trains, samples, evaluates, restores, shards and compiles.

Eight forced CPU devices (this file as a program) prove that sharding changes no loss and that what should be split is.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from smdlm import experiment
from smdlm.build import assemble, build
from smdlm.config import read
from smdlm.data.text import load
from smdlm.io.writer import read_metrics
from smdlm.models import MODELS
from smdlm.models.attention import attention, not_after
from smdlm.models.base import Head, KVCache, MatrixAxes, Model
from smdlm.models.layers import logical, rotary
from smdlm.tools.aot.chips import Topology
from smdlm.tools.aot.measure import compile_sampler, compile_train

# ------------------------------------------------------------------------------------------------------- the new model


@dataclasses.dataclass(frozen=True)
class Toy(Model):
    """Rounds of attention whose query heads share key heads, nothing between them, and the table as its own head."""

    vocab_size: int
    width: int = 16
    rounds: int = 2
    heads: int = 4
    key_heads: int = 2
    causal: bool = False
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    tied = True

    def init(self, key):
        normal, width = nn.initializers.normal(0.3), self.width // self.heads
        key_table, key_in, key_out = jax.random.split(key, 3)
        matrix = logical(normal, "layers", "embed", "heads", "head")
        return {
            "table": logical(normal, "vocab", "embed")(key_table, (self.vocab_size, self.width)),
            "in": matrix(key_in, (self.rounds, self.width, self.heads + 2 * self.key_heads, width)),
            "out": matrix(key_out, (self.rounds, self.width, self.heads, width)),
        }

    def apply(self, params, x, *, cond=None, positions=None, mask=None, cache=None, start=0, dropout_key=None):
        slots, filled = start + jnp.arange(x.shape[1]), []
        positions = slots if positions is None else positions
        if self.causal and cache is not None:
            mask = not_after(slots, cache.keys.shape[2], mask)
        causal = self.causal and cache is None
        for i in range(self.rounds):
            h = x / (1e-3 + jnp.abs(x).mean(-1, keepdims=True))
            qkv = jnp.einsum("bld,dhe->blhe", h, params["in"][i].astype(x.dtype))
            query, key, value = jnp.split(qkv, [self.heads, self.heads + self.key_heads], axis=2)
            query, key = rotary(query, positions), rotary(key, positions)
            if cache is not None:
                filled.append(KVCache(cache.keys[i], cache.values[i]).write(key, value, start))
                key, value = filled[i].keys, filled[i].values
            seen = attention(query, key, value, mask, causal=causal, implementation=self.attention)
            x = x + jnp.einsum("blhe,dhe->bld", seen, params["out"][i].astype(x.dtype))
        return x if cache is None else (x, jax.tree.map(lambda *layers: jnp.stack(layers), *filled))

    def table(self, params):
        return params["table"]

    def head(self, params):
        return Head(params["table"].T, jnp.zeros(self.vocab_size))

    def cache(self, batch, length):
        return KVCache.zeros(self.rounds, batch, length, self.key_heads, self.width // self.heads, self.dtype)

    def matrices(self):
        return {"table": None, "in": MatrixAxes((1,), (2, 3)), "out": MatrixAxes((2, 3), (1,))}

    def flops(self, length):
        return 2.0 * self.rounds * self.width * (2 * self.width * (1 + self.key_heads / self.heads) + 2 * length)


# ---------------------------------------------------------------------------------------- all that is done with a model


def make_config(folder, **changes):
    """A micro run on a text of a few lines; `model__rounds=1` sets config.model.rounds."""
    (folder / "corpus.txt").write_text("".join(f"line {i} of a small corpus of lines\n" for i in range(60)), "utf-8")
    config = ml_collections.ConfigDict()
    config.model = dict(name="toy", width=16, rounds=2)
    config.data = dict(source=f"text:{folder}/*.txt", tokenizer="bytes", seq_len=16, batch_size=8)
    config.softmask = dict(p_sm=0.5, scale=0.5)
    config.readout = dict(chunk=16)
    config.optimizer = dict(name="muon", lr=0.01, warmup=0)
    config.train = dict(steps=30, log_every=10, save_every=10)
    config.sampling = dict(steps=4, count=2, prompt="line ")
    config.eval = dict(blocks=8, batch_size=4, chain=2)
    config.mesh = dict(data=-1)
    for name, value in changes.items():
        section, _, field = name.partition("__")
        config[section][field] = value
    return read(config)


CAUSAL = {"model__causal": True, "softmask__p_sm": 0.0}


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(MODELS, "toy", Toy)


@pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["diffusion", "causal"])
def test_it_trains_evaluates_samples_and_restores(toy, tmp_path, changes):
    config = make_config(tmp_path, **changes)
    made, checkpointer = build(config, tmp_path), experiment.checkpointer_of(tmp_path / "run")
    assert made.denoiser.model == Toy(made.vocabulary.model_vocab_size, causal=bool(changes))
    with jax.set_mesh(made.mesh):
        meta = {"tokenizer": made.vocabulary.fingerprint}
        summary = experiment.train(made, tmp_path / "run", checkpointer, meta)
        checkpointer.close()
        losses = [row["train/loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in row]
        assert len(losses) == 3 and losses[2] < 0.9 * losses[0]
        assert all(text.startswith("line ") for text in summary["samples"])
        # A new process would do this.
        again = build(config, tmp_path)
        params, step = experiment.restore(again, experiment.checkpointer_of(tmp_path / "run"), "ema")
        values = experiment.evaluate(again, params)
        assert step == 30 and {f"val_{name}": v.mean for name, v in values.items()}.items() <= summary.items()
        assert experiment.sample(again, params).texts == summary["samples"]


@pytest.mark.parametrize("changes", [{}, CAUSAL], ids=["diffusion", "causal"])
def test_it_compiles_ahead_of_time(toy, tmp_path, monkeypatch, changes):
    """On this machine's CPU in the place of a topology's chips."""
    monkeypatch.setattr(Topology, "devices", lambda self: jax.devices()[:1])
    config = make_config(tmp_path, data__seq_len=64, model__width=64, optimizer__name="adamw", **changes)
    for report in (compile_train(config, Topology("v5e:1x1")), compile_sampler(config, Topology("v5e:1x1"))):
        assert report.fits and 0.5 < sum(w.flops for w in report.work) / report.model_flops < 2, report.program


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_parameter_that_is_not_listed_is_named(monkeypatch, tmp_path, optimizer):
    """Never silently AdamW, nor anything else; likewise a name that is no parameter."""

    class Forgetful(Toy):
        def matrices(self):
            return {**{name: axes for name, axes in super().matrices().items() if name != "out"}, "outt": None}

    monkeypatch.setitem(MODELS, "toy", Forgetful)
    made = build(make_config(tmp_path, optimizer__name=optimizer), tmp_path)
    with pytest.raises(ValueError, match=r"got parameters \['out'\] that .*`matrices` do not list, and \['outt'\]"):
        made.init_state()


def child(folder):
    """{mesh: losses, shapes of the parameters' shards, how often the step was compiled, chips of aot} as JSON."""
    MODELS["toy"], out = Toy, {}
    for name, (data, fsdp, tensor) in {"one": (1, 1, 1), "fsdp": (2, 4, 1), "mixed": (2, 2, 2)}.items():
        sizes = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__tensor": tensor}
        config = make_config(folder, optimizer__name="adamw", optimizer__eps=0.1, **sizes)
        text = load(config.data, folder)
        made = assemble(config, text.tokenizer, config.mesh.make(jax.devices()[: data * fsdp * tensor]), text)
        step, state, batches, losses = made.train_step(), made.init_state(), made.train_batches(0), []
        with jax.set_mesh(made.mesh):
            for _ in range(10):
                state, metrics = step(state, made.put(next(batches)))
                losses.append(float(metrics["train/loss"]))
        shards = {k: x.addressable_shards[0].data.shape for k, x in state.params["backbone"].items()}
        out[name] = {"losses": losses, "shards": shards, "compiled": step._cache_size()}
    Topology.devices = lambda self: jax.devices()
    reports = compile_train(config, Topology("v5e:2x4")), compile_sampler(config, Topology("v5e:2x4"))
    print(json.dumps({**out, "chips": [report.chips for report in reports if report.fits]}))


def test_it_is_sharded_over_eight_devices(eight_devices):
    """The losses of one device; the table, the heads and their widths are split; both programs compile for all."""
    measured, _ = eight_devices
    one, mixed, fsdp = (measured[name] for name in ("one", "mixed", "fsdp"))
    assert np.ptp(one["losses"]) > 1e-2
    np.testing.assert_allclose([mixed["losses"], fsdp["losses"]], [one["losses"]] * 2, rtol=1e-5)
    assert mixed["shards"] == {"table": [129, 8], "in": [2, 8, 4, 4], "out": [2, 8, 2, 4]}
    assert fsdp["shards"] == {"table": [258, 4], "in": [2, 4, 8, 4], "out": [2, 4, 4, 4]}
    assert measured["chips"] == [8, 8] and one["compiled"] == mixed["compiled"] == fsdp["compiled"] == 1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        child(Path(folder))
