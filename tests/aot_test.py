"""Reading compiled programs, rooflines, sweeps and the plain step; the TPU compiler itself where it is installed."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MASK, READOUT, SOFTMASK, assert_close, make_batch, make_denoiser, make_params

from configs import ar_tiny, dream_sft, tiny
from smdlm.build import assemble
from smdlm.config import read
from smdlm.data.vocabulary import Vocabulary
from smdlm.mesh.chips import CHIPS
from smdlm.objective import SoftMaskedDiffusion
from smdlm.tools.aot import hlo, measure
from smdlm.tools.aot.chips import Topology
from smdlm.tools.aot.costs import Costs, Work
from smdlm.tools.aot.hlo import Loop
from smdlm.tools.aot.measure import compile_sampler, compile_train, largest_batch
from smdlm.tools.aot.plain import PlainReadout
from smdlm.tools.aot.report import Report

ROOT = Path(__file__).parents[1]


def run(fn, *arguments, assume=lambda loop: 1):
    """Work of a function compiled for the CPU."""
    return Costs(jax.jit(fn).lower(*arguments).compile().as_text()).work(assume)


def flops(work):
    return sum(w.flops for w in work)


# Loops, branches, bytes


@pytest.mark.parametrize("length", [1, 5, 12])
def test_loop_bodies_count_as_often_as_they_run(length):
    def fn(x, w):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]

    assert flops(run(fn, jnp.ones((8, 16)), jnp.ones((length, 16, 16)))) == length * 2 * 8 * 16 * 16


def test_nested_loops_multiply_and_unknown_ones_are_asked_for():
    def fn(x, w, n):
        inner = lambda c: jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), c, None, length=3)[0]
        return jax.lax.fori_loop(0, n, lambda _, c: inner(c), x)

    asked = []
    work = run(fn, jnp.ones((8, 16)), jnp.ones((16, 16)), jnp.int32(2), assume=lambda loop: asked.append(loop) or 7)
    assert flops(work) == 7 * 3 * 2 * 8 * 16 * 16 and len(asked) == 1


def test_the_more_expensive_branch_counts():
    def fn(x, w, n):
        return jax.lax.cond(n > 3, lambda x: x @ w @ w, lambda x: x @ w, x)

    assert flops(run(fn, jnp.ones((8, 16)), jnp.ones((16, 16)), jnp.int32(1))) == 2 * 2 * 8 * 16 * 16


def test_slices_of_large_operands_count_as_slices():
    """Reading the rows of a stack one by one moves the stack once, not once per row."""
    stack = jnp.ones((64, 1024))
    total = sum(w.hbm for w in run(lambda w: jax.lax.scan(lambda c, x: (c + x, None), jnp.zeros(1024), w)[0], stack))
    assert stack.nbytes < total < 8 * stack.nbytes  # row, carry and sum; whole operands would be 64 times as much


TPU = """HloModule jit_step, is_scheduled=true

FileNames
1 "/x/smdlm/train.py"
2 "/x/smdlm/readout.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1}
2 {file_name_id=2 function_name_id=1 line=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}


%products (a: bf16[8,1024,768,1,1], b: bf16[3,12,64,768,1]) -> bf16[8,1024,3,12,64] {
  %a = bf16[8,1024,768,1,1]{1,2,4,3,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[3,12,64,768,1]{2,1,4,3,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[8,1024,3,12,64]{1,4,3,2,0:T(8,128)(2,1)S(1)} convolution(%a, %b), window={size=1x3x12 pad=0_0x2_2x11_11 rhs_reversal=0x1x1}, dim_labels=0bf12_12oi0->0b12f
}

%sliced (o: s32[8192], n.1: s32[]) -> s32[256] {
  %o = s32[8192]{0:T(1024)} parameter(0)
  %n.1 = s32[]{:T(128)} parameter(1)
  ROOT %s = s32[256]{0:T(256)} dynamic-slice(%o, %n.1), dynamic_slice_sizes={256}
}

%body (p: (s32[], s32[8192], bf16[256,768])) -> (s32[], s32[8192], bf16[256,768]) {
  %p = (s32[]{:T(128)}, s32[8192]{0:T(1024)}, bf16[256,768]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %order = s32[8192]{0:T(1024)} get-tuple-element(%p), index=1
  %x = bf16[256,768]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=2
  %rows = s32[256]{0:T(256)S(1)} fusion(%order, %i), kind=kLoop, calls=%sliced
  %sum = bf16[256,768]{1,0:T(8,128)(2,1)} all-reduce(%x), replica_groups={}, to_apply=%add, metadata={op_name="sum" stack_frame_id=2}
  %near = (bf16[256,768]{1,0}, bf16[256,768]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) copy-start(%sum)
  %done = bf16[256,768]{1,0:T(8,128)(2,1)S(1)} copy-done(%near)
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  ROOT %t = (s32[]{:T(128)}, s32[8192]{0:T(1024)}, bf16[256,768]{1,0:T(8,128)(2,1)}) tuple(%next, %order, %sum)
}

%known (p.1: (s32[], s32[8192], bf16[256,768])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, s32[8192]{0:T(1024)}, bf16[256,768]{1,0:T(8,128)(2,1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(12)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

%unknown (p.2: (s32[], s32[8192], bf16[256,768])) -> pred[] {
  %p.2 = (s32[]{:T(128)}, s32[8192]{0:T(1024)}, bf16[256,768]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %n = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.2, %n), direction=LT
}

ENTRY %main (q: (s32[], s32[8192], bf16[256,768]), a.1: bf16[8,1024,768,1,1], b.1: bf16[3,12,64,768,1], q.1: bf16[8,12,1024,64]) -> bf16[8,1024,3,12,64] {
  %q = (s32[]{:T(128)}, s32[8192]{0:T(1024)}, bf16[256,768]{1,0:T(8,128)(2,1)}) parameter(0)
  %a.1 = bf16[8,1024,768,1,1]{1,2,4,3,0:T(8,128)(2,1)} parameter(1)
  %b.1 = bf16[3,12,64,768,1]{2,1,4,3,0:T(8,128)(2,1)} parameter(2)
  %w = (s32[]{:T(128)}, s32[8192]{0:T(1024)}, bf16[256,768]{1,0}) while(%q), condition=%known, body=%body
  %v = (s32[]{:T(128)}, s32[8192]{0:T(1024)}, bf16[256,768]{1,0}) while(%w), condition=%unknown, body=%body, metadata={op_name="while" stack_frame_id=2}
  %q.1 = bf16[8,12,1024,64]{3,2,1,0:T(8,128)(2,1)} parameter(3)
  %table = s8[1,2,2]{2,1,0} constant({...})
  %splash_mha_dq_no_residuals.1 = bf16[8,12,1024,64]{3,2,1,0:T(8,128)(2,1)} custom-call(%table, %q.1, %q.1, %q.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="splash" stack_frame_id=1}
  %one = bf16[12,1024,64]{2,1,0:T(8,128)(2,1)} parameter(4)
  %splash_mha_fwd_no_residuals.1 = bf16[12,1024,64]{2,1,0:T(8,128)(2,1)} custom-call(%table, %one, %one, %one), custom_call_target="tpu_custom_call", metadata={op_name="splash" stack_frame_id=1}
  %readout_sweep.1 = f32[8192,3]{1,0:T(8,128)} custom-call(%q.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
}}, metadata={op_name="sweep" stack_frame_id=2}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","bytes_accessed":"7"}}}
  ROOT %f = bf16[8,1024,3,12,64]{1,4,3,2,0:T(8,128)(2,1)S(1)} fusion(%a.1, %b.1), kind=kOutput, calls=%products, metadata={op_name="dot" stack_frame_id=2}
}
""".replace("/x/smdlm/", hlo.PACKAGE)  # noqa: E501


def test_the_text_of_the_tpu_compiler():
    """As libtpu writes it: trip counts in the conditions, products as convolutions, memory spaces, stack frames."""
    loops = []
    work = Costs(TPU, share=0.5).work(lambda loop: loops.append(loop) or 2)
    assert loops == [Loop("readout.py", rows=8192, chunk=256)]
    product = next(w for w in work if w.opcode == "fusion" and w.flops)
    # 8 x 1024 rows of 768 times [768, 3 x 12 x 64]; padding of the window adds nothing. The result stays on the chip.
    assert product.flops == 2 * 8 * 1024 * 768 * 3 * 12 * 64 and product.part == "readout"
    assert product.hbm == 2 * (8 * 1024 * 768 + 12 * 64 * 768 * 3)
    array = 2 * 256 * 768
    sums = [w for w in work if w.opcode == "all-reduce"]
    assert [w.count for w in sums] == [6, 2] and sum(w.sent for w in sums) == 8 * 2 * array  # 12 trips, unrolled by two
    copies = [w for w in work if w.opcode == "copy-start"]
    assert [w.hbm for w in copies] == [6 * array, 2 * array]  # read from HBM, written on the chip
    splash, single, sweep = (w for w in work if w.opcode == "custom-call")
    assert splash.flops == 3 * 2 * 8 * 12 * 1024 * 1024 * 64 and single.flops == 2 * 2 * 12 * 1024 * 1024 * 64
    assert (sweep.flops, sweep.hbm, sweep.part) == (500, 3.5, "readout")  # for half of the rows
    # An instruction without a stack of its own belongs to the loop around it.
    assert [w.part for w in copies] == ["other", "readout"]


# Reports


def make_report(**changes):
    chip = CHIPS["v5e"]
    work = [
        Work("dot", "fusion", "denoiser", 1, flops=chip.flops, hbm=0.1 * chip.hbm, sent=0),
        Work("copy", "copy", "readout", 1, flops=0, hbm=2 * chip.hbm, sent=0),
        Work("sum", "all-reduce-start", "optax", 1, flops=0, hbm=0, sent=0.5 * chip.links),
    ]
    report = Report(
        topology=Topology("v5e:2x4"), program="train", chips=8, batch=16, tokens=16000, steps=1, fits=True,
        arguments=2**30, temp=2**31, peak=3 * 2**30, largest=[(2**30, "f32[1]")], work=work, assumed=["x"],
        model_flops=6 * chip.flops, compile_s=1.0, advice="y",
    )  # fmt: skip
    return dataclasses.replace(report, **changes)


def test_roofline():
    """One second of products, then two of memory; the collectives hide behind them until they take longer."""
    row = make_report().row()
    assert row["step_ms_roofline"] == pytest.approx(3000) and row["tokens_per_s"] == pytest.approx(16000 / 3)
    assert row["mfu"] == pytest.approx(6 / 3 / 8) and row["collective_bytes"] == {
        "all-reduce": 0.5 * CHIPS["v5e"].links
    }
    work = [*make_report().work, Work("late", "all-gather", "optax", 1, 0, 0, 4 * CHIPS["v5e"].links)]
    assert make_report(work=work).row()["step_ms_roofline"] == pytest.approx(4500)
    assert make_report(steps=10).row()["step_ms_roofline"] == pytest.approx(300)


def test_rows_and_text():
    wanted = "topology chips batch_per_chip fits hbm_limit_gib arguments_gib temp_gib peak_gib flops_per_chip"
    row = make_report().row()
    assert {*wanted.split(), "step_ms_roofline", "tokens_per_s", "compile_s"} <= set(row)
    assert (row["temp_gib"], row["batch_per_chip"], json.loads(json.dumps(row))) == (2.0, 2.0, row)
    assert "to make it fit" not in str(make_report())
    over = make_report(fits=False, work=None)
    assert "DOES NOT FIT" in str(over) and "to make it fit: y" in str(over) and over.row()["step_ms_roofline"] is None


# The programs, on this machine's CPU in the place of a topology's chips


def make_config(base=tiny, **changes):
    """A config without its data, smaller; `model__causal=True` sets config.model.causal."""
    config = base.get_config()
    config.model.update(width=64, depth=3, heads=2, cond=8, remat="none")
    config.data.update(source="prepared:nowhere", tokenizer="gpt2", seq_len=16, batch_size=4)
    config.readout.chunk, config.optimizer.name, config.sampling.steps = 16, "adamw", 4
    for name, value in changes.items():
        section, _, field = name.partition("__")
        config[section][field] = value
    return read(config)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(Topology, "devices", lambda self: jax.devices()[:1])
    return Topology("v5e:1x1")


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_programs_of_a_config(here, causal):
    """Compiled without data, from the vocabulary's sizes; FLOPs are near what the mathematics needs."""
    config = make_config(ar_tiny if causal else tiny)
    for report in (compile_train(config, here), compile_sampler(config, here)):
        total = sum(w.flops for w in report.work)
        assert report.fits and report.peak > report.arguments > 0
        # A sampler also draws what it commits; every loop over rows counts as if it had half of the canvas.
        assert 0.8 < total / report.model_flops < 2.5, report.program
        readout = [a for a in report.assumed if "chunks of 16 in the readout" in a]
        assert readout == [] or (f"for {1 if causal else 0.5:g} of" in readout[0])
        assert readout or causal  # the AR sampler reads every row out: a known number of chunks


def small_dream(**changes):
    """dream_sft.py at toy size: neither base nor tokenizer nor conversations are there."""
    config = dream_sft.get_config()
    config.model.update(vocab_size=90, table_rows=96, width=32, depth=2, heads=4, key_heads=2, hidden=48, remat="none")
    config.data.update(seq_len=16, buckets="", batch_size=8)
    config.sampling.update(steps=2, count=1)
    config.update(changes)
    return read(config)


def test_a_frozen_base_needs_no_files():
    """Sizes as the config states them; the state has no room for the base's weights."""
    config = small_dream()
    assert measure._vocabulary(config) == Vocabulary(90, mask_id=89, bos_id=0)
    full = read(dream_sft.get_config())
    assert measure._vocabulary(full) == Vocabulary(151_667, mask_id=151_666, bos_id=0)
    made = assemble(full, measure._vocabulary(full), full.mesh.make(jax.devices()[:1]), None)
    base = sum(leaf.size for leaf in jax.tree.leaves(made.abstract_base()[0]))
    trained = sum(leaf.size for leaf in jax.tree.leaves(made.abstract_params()[0]))
    assert base == 7_615_616_512  # 15,231,233,024 bytes in bfloat16, as released
    assert trained < 0.0015 * base


@pytest.mark.slow
def test_programs_beside_a_frozen_base(here):
    for report in (compile_train(small_dream(), here), compile_sampler(small_dream(), here)):
        assert report.fits and report.peak > report.arguments > 0


def test_batches_that_do_not_divide_are_refused(here):
    with pytest.raises(ValueError, match="data.batch_size: got 4, wanted a multiple of 3"):
        config = make_config()
        compile_train(dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=3)), here)


def test_sweeps_end_at_the_largest_batch(monkeypatch, here):
    config = make_config(data__batch_size=8)

    def fake(limit, peak=lambda batch: 1):
        def tried(config, *_, **__):
            batch = config.data.batch_size
            return make_report(batch=batch, fits=batch <= limit, peak=peak(batch))

        monkeypatch.setattr(measure, "compile_train", tried)
        return [(r.batch, r.fits) for r in largest_batch(config, here)]

    for limit in (1, 7, 8, 9, 63, 64, 200):
        rows = fake(limit)
        assert len({batch for batch, _ in rows}) == len(rows)  # nothing twice
        fits = max(batch for batch, ok in rows if ok)
        fails = min(batch for batch, ok in rows if not ok)
        assert fits <= limit < fails <= fits + max(1, fits // 8)
    for limit in (9, 100, 1001):  # memory that grows with the batch
        gib = CHIPS["v5e"].limit_gib * 2**30 / limit
        rows = fake(limit, lambda batch: int((0.1 * limit + 0.9 * batch) * gib))  # noqa: B023
        assert len(rows) <= 5 and max(batch for batch, ok in rows if ok) > 0.88 * limit - 1
    assert [ok for _, ok in fake(0)] == [False] * len(fake(0)) and fake(0)[-1][0] == 1


@pytest.mark.slow
def test_the_plain_step_is_the_same_mathematics():
    """Loss and gradients of the full-logits readout are those of the chunked one."""
    denoiser, batch = make_denoiser(), make_batch()
    params, key = make_params(denoiser), jax.random.key(1)

    def value(readout):
        objective = SoftMaskedDiffusion(denoiser, readout, 1.0)
        example = objective.corrupt(key, batch)
        assert np.any(example.canvas == MASK)
        loss = lambda params: objective(params, example, jnp.bool_(True), None)[0]
        return jax.jit(jax.value_and_grad(loss))(params)

    assert_close(value(PlainReadout(READOUT.k)), value(READOUT), rtol=1e-3, atol=1e-5)
    assert READOUT.k == SOFTMASK.k


# Names and wheels


@pytest.mark.parametrize("name", ["v5e", "v5e:4", "v5e:4x4x4", "v5p:4x4", "h100:2x4", "v7:2x2", "v5e:0x4", "x", ""])
def test_unknown_topologies_are_refused(name):
    with pytest.raises(ValueError, match="--topology: got .*wanted CHIP:SHAPE.*v5e:4x4"):
        Topology(name)


@pytest.mark.parametrize("name, extra", [("v5e:4x4", "aot"), ("h100:8", "cuda")])
def test_missing_compilers_are_named(monkeypatch, name, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=rf"without its compiler, wanted: pip install -e '\.\[{extra}\]'"):
        Topology(name).prepare()


def command(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "smdlm.tools.aot", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--topology=v7:2x2"], "--topology: got"),
        (["--config=configs/nope.py"], "--config: got configs/nope.py, which is not there"),
        (["--json=/nowhere/rows.json"], "--json: got /nowhere/rows.json, wanted a file in a folder that is there"),
        (["--program=sample", "--plain"], "--program: got sample with --plain"),
    ],
)
def test_mistakes_are_one_line(flags, wanted):
    """Before anything is compiled."""
    done = command("--config=configs/tiny.py", "--topology=v5e:2x4", *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: {wanted}")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install -e '.[aot]'"
)
def test_the_tpu_compiler(tmp_path):
    """The real thing on eight chips: both programs fit, and one far too large is reported, not raised."""
    out = tmp_path / "rows.json"
    done = command("--config=configs/tiny.py", "--topology=v5e:2x4", f"--json={out}")
    assert done.returncode == 0, done.stderr
    train, sample = json.loads(out.read_text())
    assert train["fits"] and sample["fits"] and train["chips"] == 8 and train["batch_per_chip"] == 4
    assert {"denoiser", "readout", "optax"} <= {part["part"] for part in train["parts"]}
    assert 0 < train["temp_gib"] < 0.1 and train["collective_bytes"]["all-reduce"] > 0 and train["largest"]
    large = ("--program=train", "--config.model.width=4096", "--config.model.depth=40")
    done = command("--config=configs/tiny.py", "--topology=v5e:2x4", f"--json={out}", *large)
    assert done.returncode == 0, done.stderr
    assert not json.loads(out.read_text())[0]["fits"] and "to make it fit" in done.stdout and "fsdp" in done.stdout
