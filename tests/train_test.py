"""The train step (what it computes, what it must not store) and the loop (resume, NaN, SIGTERM, many devices)."""

import json
import math
import os
import re
import signal
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import READOUT, B, L, V, assert_close, assert_identical, make_batch, make_denoiser, make_training, same

from smdlm.evaluate.base import Value
from smdlm.io.checkpoint import Checkpointer
from smdlm.objective import NextToken, SoftMaskedDiffusion
from smdlm.readout import Readout
from smdlm.train import NonFinite, TrainConfig, Training, run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def training():
    """(step, fresh) of the micro model, p_sm .5."""
    return make_training(SoftMaskedDiffusion(make_denoiser(), READOUT, 0.5))


@pytest.fixture(scope="module")
def history(training):
    """[(state, metrics)] of 12 steps on one batch; states are copied to the host, since the step donates them."""
    step, fresh = training
    state, states = fresh(), []
    for _ in range(12):
        states.append(jax.device_get(state))
        state, metrics = step(state, make_batch())
        states[-1] = (states[-1], jax.device_get(metrics))
    states.append((jax.device_get(state), None))
    return states


def omega_moments(state):
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    found = {jax.tree_util.keystr(k): x for k, x in leaves}
    found = {k: x for k, x in found.items() if "raw_" in k}
    assert len(found) == 6
    return found


# The step


def test_omega_rests_on_steps_without_feedback(history):
    """Through the compiled step: value and moments bit for bit the same exactly when the coin said no."""
    coins = [metrics["train/feedback"] for _, metrics in history[:-1]]
    assert 2 <= sum(coins) <= 10
    for (before, metrics), (after, _) in zip(history[:-1], history[1:], strict=True):
        rests = metrics["train/feedback"] == 0
        assert same(before.params["softmask"], after.params["softmask"]) == rests
        assert same(omega_moments(before), omega_moments(after)) == rests
        assert not same(before.params["backbone"], after.params["backbone"])
        assert int(after.step) == int(before.step) + 1


def test_ema_follows_the_parameters(history):
    decay = 0.9999
    for (before, _), (after, _) in zip(history[:-1], history[1:], strict=True):
        d = min(decay, (1 + int(after.step)) / (10 + int(after.step)))
        wanted = jax.tree.map(lambda s, p, d=d: s + (1 - d) * (p - s), before.ema, after.params)
        assert_close(after.ema, wanted, rtol=1e-5)


def test_metrics(history):
    for (_, metrics), (after, _) in zip(history[:-1], history[1:], strict=True):
        assert set(metrics) == {
            *("train/loss", "train/grad_norm", "train/masked", "train/feedback"),
            *("train/omega_s", "train/omega_a", "train/omega_b"),
        }
        assert all(np.isfinite(x) and np.shape(x) == () for x in metrics.values())
        wanted = 1 / (1 + np.exp(-after.params["softmask"]["raw_scale"]))
        np.testing.assert_allclose(metrics["train/omega_s"], wanted, rtol=1e-5)
        assert 0 < metrics["train/masked"] < 1 and metrics["train/grad_norm"] > 0


def test_noise_depends_on_seed_and_step_alone(training, history):
    step, fresh = training
    state = fresh()
    _, metrics = step(state, make_batch())
    assert float(metrics["train/loss"]) == history[0][1]["train/loss"]
    assert jax.tree.leaves(state.params)[0].is_deleted()  # donated
    _, metrics = step(fresh().replace(step=jnp.int32(1)), make_batch())
    assert float(metrics["train/loss"]) != history[0][1]["train/loss"]
    other, _ = make_training(SoftMaskedDiffusion(make_denoiser(), READOUT, 0.5), seed=1)
    assert float(other(fresh(), make_batch())[1]["train/loss"]) != history[0][1]["train/loss"]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_learns(name):
    """Rows of one repeated token: whatever is visible tells the rest. With dropout and both kinds of steps."""
    objective = SoftMaskedDiffusion(make_denoiser(dropout=0.1), READOUT, 0.5)
    step, fresh = make_training(objective, name=name, lr=1e-2, muon_lr=0.05)
    batch = make_batch()
    batch = {**batch, "tokens": jnp.broadcast_to(batch["tokens"][:, :1], (B, L))}
    state, losses = fresh(), []
    for _ in range(120):
        state, metrics = step(state, batch)
        losses.append(metrics["train/loss"])
    losses = np.array(jax.device_get(losses))
    assert losses[-30:].mean() < 0.5 * losses[:8].mean()


def first_gradients(objective, accumulate, batch):
    """(loss, gradient norm, first moments = (1 - b1) * gradients) of one step; the norm is left unclipped."""
    step, fresh = make_training(objective, accumulate=accumulate, clip=1e9)
    state, metrics = step(fresh(), batch)
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    mu = {jax.tree_util.keystr(k): np.asarray(x) for k, x in leaves if ".mu" in jax.tree_util.keystr(k)}
    return metrics["train/loss"], metrics["train/grad_norm"], mu


@pytest.mark.parametrize("causal", [False, True])
def test_accumulation_does_not_change_the_gradient(causal):
    """1 and 4 micro-batches, with rows that are not valid spread unevenly over them: weighted by tokens."""
    batch = make_batch(8, valid=[True, False, True, True, True, False, True, True])
    denoiser = make_denoiser(None if causal else make_denoiser().softmask, causal=causal)
    objective = NextToken(denoiser, READOUT) if causal else SoftMaskedDiffusion(denoiser, READOUT, 1.0)
    whole, parts = (first_gradients(objective, n, batch) for n in (1, 4))
    assert len(whole[2]) > 10
    assert_close(parts, whole, rtol=2e-4, atol=2e-5)


# Memory


def shapes_of(jaxpr):
    """Shapes of all values of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            if hasattr(variable.aval, "shape"):
                yield tuple(variable.aval.shape)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from shapes_of(inner)


def too_large(shapes, rows, vocab):
    """Arrays of rows * vocab elements, or a row of the vocabulary for each of at least `rows` tokens."""
    return {s for s in shapes if s and (math.prod(s) >= rows * vocab or (s[-1] == vocab and math.prod(s[:-1]) >= rows))}


@pytest.mark.parametrize("full", [False, True])
def test_the_step_never_holds_b_l_v(full):
    """B 4, L 16, V 512, chunk 8: neither in the jaxpr nor in what XLA made of it, with both kinds of soft mask."""
    from smdlm.full_softmask import FullSoftMask
    from smdlm.softmask import SoftMask

    batch, length, vocab = 4, 16, 512
    rows = batch * length
    denoiser = make_denoiser(FullSoftMask(chunk=8) if full else SoftMask(), vocab=vocab)
    objective = SoftMaskedDiffusion(denoiser, Readout(chunk=8), 0.5)
    step, fresh = make_training(objective)
    arguments = jax.eval_shape(lambda: (fresh(), make_batch(batch, length, vocab)))
    shapes = set(shapes_of(jax.make_jaxpr(step)(*arguments).jaxpr))
    assert (8, vocab) in shapes and (16, vocab) in shapes  # the chunk's logits and the head's kernel were seen
    assert not too_large(shapes, rows, vocab)
    text = step.lower(*arguments).compile().as_text()
    shapes = {tuple(map(int, m.split(","))) for m in re.findall(r"\b(?:f32|bf16|f16|s32|u32|pred)\[([\d,]+)\]", text)}
    assert (8, vocab) in shapes and not too_large(shapes, rows, vocab)


def test_the_memory_test_can_fail():
    dense = jax.make_jaxpr(jax.jit(lambda h, w: jax.nn.log_softmax(h @ w)))(jnp.ones((4, 16, 16)), jnp.ones((16, 512)))
    assert too_large(shapes_of(dense.jaxpr), 64, 512) == {(4, 16, 512)}


# The loop


class FakeWriter:
    def __init__(self):
        self.lines, self.said, self.closed = [], [], False

    def scalars(self, step, values):
        self.lines.append((step, dict(values)))

    def values(self, step, values):
        self.scalars(step, {f"val/{name}": value.mean for name, value in values.items()})

    def progress(self, step, values):
        pass

    def line(self, text):
        self.said.append(text)

    def close(self):
        self.closed = True


class FakeCheckpointer:
    def __init__(self):
        self.saved = []

    def save(self, step, state, *, data, meta):
        self.saved.append((step, data))

    def latest_step(self):
        return self.saved[-1][0] if self.saved else None

    def wait(self):
        pass


@pytest.fixture(autouse=True)
def keep_signal_handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def loop(
    step_fn, state, steps, *, start=0, checkpointer=None, writer=None, evaluate=lambda _: {}, pending=(), **config
):
    """`run` on batches that depend on their number alone: (final state, tokens/s, writer, checkpointer)."""
    writer, checkpointer = writer or FakeWriter(), checkpointer or FakeCheckpointer()

    def batches():
        number = start
        while True:
            yield make_batch(seed=number)
            number += 1

    training = Training(
        config=TrainConfig(**{"steps": steps, "log_every": 2, "save_every": 4, **config}),
        steps=steps,
        step_fn=step_fn,
        batches=batches(),
        put=lambda x: x,
        tokens_per_batch=B * L,
        checkpointer=checkpointer,
        writer=writer,
        meta=dict,
        evaluate=evaluate,
    )
    state, speed = run(state, training, pending)
    return state, speed, writer, checkpointer


def counting_step(bad=(), kind=math.nan):
    """A train step without a model: loss 1, or `kind` at the steps of `bad`."""

    def step(state, batch):
        done = state.step + 1
        loss = kind if done in bad else 1.0
        return state_at(done), {"train/loss": jnp.float32(loss), "train/grad_norm": jnp.float32(2)}

    return step


def state_at(step):
    """A state without a model."""
    return types.SimpleNamespace(step=step, params={}, ema={}, opt_state={})


START = state_at(0)


def untimed(lines):
    timed = ("train/tokens_per_s", "train/goodput")
    return [(s, {k: v for k, v in values.items() if k not in timed}) for s, values in lines]


def test_resumed_run_is_the_straight_run(training, tmp_path):
    """8 steps at once, or 4, a checkpoint on disk, and 4 more: parameters, EMA, optimizer and logged losses."""
    step, fresh = training
    straight, _, writer, _ = loop(step, fresh(), 8)
    saver = Checkpointer(tmp_path, keep=2)
    _, _, first, _ = loop(step, fresh(), 4, checkpointer=saver)
    saver.close()
    again = Checkpointer(tmp_path, keep=2)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fresh())
    state, data, meta = again.restore(abstract)
    assert data == {"next_index": 4, "pending": []} and int(state.step) == 4
    resumed, _, second, _ = loop(step, state, 8, start=data["next_index"], checkpointer=again)
    again.close()
    assert_identical(resumed, straight)
    assert untimed(first.lines + second.lines) == untimed(writer.lines)
    assert [s for s, _ in writer.lines] == [2, 4, 6, 8]


@pytest.mark.parametrize("kind", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(kind):
    """Within the logging interval, naming it; nothing is saved over the good checkpoint."""
    checkpointer = FakeCheckpointer()
    with pytest.raises(NonFinite, match=r"between steps 7 and 9.*last good checkpoint is step 6") as error:
        loop(counting_step({8}, kind), START, 30, log_every=3, save_every=3, checkpointer=checkpointer)
    assert [s for s, _ in checkpointer.saved] == [3, 6]
    assert "\n" not in str(error.value) and "wanted" in str(error.value)


def test_a_single_bad_step_is_noticed_before_the_last_save():
    """The interval that ends the run is checked too."""
    checkpointer = FakeCheckpointer()
    with pytest.raises(NonFinite, match="between steps 5 and 5"):
        loop(counting_step({5}), START, 5, checkpointer=checkpointer)
    assert [s for s, _ in checkpointer.saved] == [4]


def test_what_the_loop_writes_and_saves():
    evaluated = []

    def evaluate(state):
        evaluated.append(state.step)
        return {"x": Value(3.0, None, "nats/token", "a label")}

    state, speed, writer, checkpointer = loop(counting_step(), START, 11, eval_every=6, evaluate=evaluate)
    assert state.step == 11 and speed > 0
    assert checkpointer.saved == [(s, {"next_index": s, "pending": []}) for s in (4, 8, 11)]
    assert evaluated == [6]
    assert [s for s, values in writer.lines if "train/loss" in values] == [2, 4, 6, 8, 10, 11]
    assert [s for s, values in writer.lines if "val/x" in values] == [6]
    line = writer.lines[0][1]
    assert line["train/loss"] == 1 and line["train/grad_norm"] == 2 and line["train/tokens_per_s"] > 0


def test_a_finished_run_does_nothing():
    state, speed, writer, checkpointer = loop(counting_step(), state_at(5), 5)
    assert (state.step, speed, writer.lines, checkpointer.saved) == (5, 0.0, [], [])


def test_sigterm_saves_and_ends_with_status_zero():
    """After the update under way, whether or not it is a log point; the next run logs what the straight one does."""
    plain, checkpointer, writer, straight = counting_step(), FakeCheckpointer(), FakeWriter(), FakeWriter()

    def numbered(state, batch):
        state, metrics = plain(state, batch)
        return state, {**metrics, "train/grad_norm": jnp.float32(state.step**2)}

    def step(state, batch):
        if state.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return numbered(state, batch)

    with pytest.raises(SystemExit) as stop:
        loop(step, START, 100, log_every=4, checkpointer=checkpointer, writer=writer)
    assert stop.value.code == 0
    assert [s for s, _ in checkpointer.saved] == [4, 8, 9] and writer.closed
    data = checkpointer.saved[-1][1]
    assert data["next_index"] == 9 and json.loads(json.dumps(data["pending"])) == [
        {"train/loss": 1.0, "train/grad_norm": 81.0}
    ]
    loop(numbered, state_at(9), 12, log_every=4, writer=writer, pending=data["pending"])
    loop(numbered, START, 12, log_every=4, writer=straight)
    assert untimed(writer.lines) == untimed(straight.lines)


@pytest.mark.parametrize("saving", [False, True])
def test_a_signal_at_the_last_update_stops_there(saving):
    """Before the evaluation and the samples behind the loop, with which the next run goes on."""
    plain = counting_step()

    def step(state, batch):
        if state.step == 4 and not saving:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(state, batch)

    class Interrupted(FakeCheckpointer):
        def save(self, step, *args, **options):
            super().save(step, *args, **options)
            if saving and step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    checkpointer = Interrupted()
    with pytest.raises(SystemExit):
        loop(step, START, 5, checkpointer=checkpointer)
    assert checkpointer.saved[-1] == (5, {"next_index": 5, "pending": []})


def test_the_signal_handler_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    loop(counting_step(), START, 3)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_signal_handler_is_put_back_after_a_bad_loss():
    """A notebook or a caller that catches NonFinite ends on SIGTERM again."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(NonFinite):
        loop(counting_step({1}), START, 3)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"accumulate": 0},
        {"log_every": 0},
        {"save_every": 0},
        {"keep": 0},
        {"update_budget": "iso"},
        {"log_every": 10, "save_every": 15},
        {"log_every": 10, "save_every": 10, "eval_every": 5},
    ],
)
def test_fields_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="got .*, wanted"):
        TrainConfig(**{"steps": 10, **wrong})


def test_vocabulary_is_larger_than_any_width():
    """The memory test tells axes apart by size."""
    assert V > 16
