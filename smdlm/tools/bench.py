"""Speed and memory: python -m smdlm.tools.bench [--size=tiny|6x192|169m|all] [--batch=N] [--repeats=N] [--json=FILE]
[--products=bfloat16] [--against=FILE]

Times whole train steps (dropout, backward pass, AdamW, EMA) with binary masks and with soft-masking at every step, one
bare forward (all logits of all positions), and the sampler per forward, averaged over a whole trajectory from all masks
to none with top-p 0.9 and feedback. Variants are interleaved and medians taken: on a shared machine only the ratios
within one run mean something. Each size runs in its own process, so that the peak memory of training is its own. A
second line says what a soft-masked step is spent on, and on an accelerator (in bf16) which share of its peak is used.
There the sampler and the bare forward get 64 canvases, whatever the batch of training is.

--against reads the times of another program, which it took by itself, and prints how many times as long it takes: rows
as --json writes them, of which 'size', 'batch' and the times in ms that it has are looked at. docs/performance.md says
how such a comparison is made.

python -m smdlm.tools.performance writes these figures, those of meshes and of accelerators to docs/performance.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from smdlm import command, files, memory
from smdlm.denoiser import Denoiser
from smdlm.feedback.gates import EntropyGate
from smdlm.mesh.chips import chip_of
from smdlm.mesh.rules import MeshConfig, batch_sharding, param_shardings, state_shardings
from smdlm.models import MODELS
from smdlm.objective import SoftMaskedDiffusion
from smdlm.ops.cpu import PRODUCTS
from smdlm.ops.filters import Filters
from smdlm.optimizer import OptimizerConfig, init_state, make_optimizer
from smdlm.readout import Readout
from smdlm.sampling.loop import Sampler
from smdlm.sampling.policies import Ancestral
from smdlm.softmask import SoftMask
from smdlm.train import make_train_step


@dataclasses.dataclass(frozen=True)
class Size:
    """width, depth, heads, length L, batch B, vocabulary V; chunk: tokens per readout step; sampler steps timed.

    canvases: batch of the sampler and of the bare forward; 0: that of training.
    """

    width: int
    depth: int
    heads: int
    length: int
    batch: int
    vocab: int
    chunk: int
    steps: int
    dtype: str = "float32"
    products: str = "dtype"
    unroll: bool = False
    canvases: int = 0


# Of every size on an accelerator: a pass over a chunk's logits shall outweigh starting a kernel, and a step commit few
# of the masked positions, as in a real trajectory.
ACCELERATOR = {"dtype": "bfloat16", "unroll": True, "chunk": 2048, "canvases": 64, "steps": 32}
SIZES = {
    "tiny": Size(128, 4, 4, 128, 32, 258, 512, 32),
    "6x192": Size(192, 6, 6, 256, 16, 258, 512, 16),
    "169m": Size(768, 12, 12, 1024, 1, 50258, 256, 6),
}


def _timed(fn: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(fn())
    return 1e3 * (time.perf_counter() - begin)


def model(size: Size) -> tuple[Denoiser, Readout]:
    """A soft-masked DiT of this size, with a gate that is open from the start."""
    multiple = 1 if size.vocab < 1024 else 128
    fields = ("width", "depth", "heads", "dtype", "products", "unroll")
    net = MODELS["dit"](size.vocab, vocab_multiple=multiple, **{name: getattr(size, name) for name in fields})
    denoiser = Denoiser(net, size.vocab, size.vocab - 1, SoftMask(gate=EntropyGate(0.5, -2.0, 2.0)))
    return denoiser, Readout(k=3, chunk=size.chunk)


def training(size: Size, mesh: Mesh) -> tuple[Callable[[float], Any], Any, dict[str, jax.Array]]:
    """(function of p_sm that makes a jitted train step, fresh state, batch) on a mesh."""
    denoiser, readout = model(size)
    optimizer = make_optimizer(OptimizerConfig(warmup=10), 1000, denoiser.model.matrices())
    boxed = jax.eval_shape(denoiser.init, jax.random.key(0))

    def init(key: jax.Array) -> Any:
        state = init_state(nn.meta.unbox(denoiser.init(key)), optimizer)
        # The head starts at zero, which would make every distribution uniform and every token a tie.
        kernel = jax.random.normal(key, state.params["backbone"]["head"]["kernel"].shape) * 3 * size.width**-0.5
        state.params["backbone"]["head"]["kernel"] = kernel
        return state

    shardings = state_shardings(mesh, jax.eval_shape(init, jax.random.key(0)), param_shardings(mesh, boxed))

    def make(p_sm: float) -> Any:
        return make_train_step(
            SoftMaskedDiffusion(denoiser, readout, p_sm),
            optimizer,
            ema_decay=0.9999,
            accumulate=1,
            seed=0,
            mesh=mesh,
            shardings=shardings,
        )

    shape = (size.batch, size.length)
    batch = {
        "tokens": jax.random.randint(jax.random.key(1), shape, 0, size.vocab - 1),
        "valid": jnp.ones(shape[0], bool),
    }
    state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    return make, state, jax.device_put(batch, batch_sharding(mesh))


def measure(size: Size, repeats: int) -> dict[str, Any]:
    """One row; times in ms, memory in GiB."""
    denoiser, readout = model(size)
    make, state, batch = training(size, MeshConfig().make(jax.devices()[:1]))
    train = {"train_binary_ms": make(0.0), "train_sm_ms": make(1.0)}
    times: dict[str, list[float]] = {n: [] for n in (*train, "forward_ms", "sampler_step_ms")}
    for repeat in range(-1, repeats):  # the first round compiles
        for label, step in train.items():
            begin = time.perf_counter()
            # The same noise for both: at B = 1 the share of masked tokens, and so the work, hangs on one draw of t.
            state, metrics = step(state.replace(step=jnp.int32(repeat + 1)), batch)
            jax.block_until_ready((state, metrics))
            if repeat >= 0:
                times[label].append(1e3 * (time.perf_counter() - begin))
    params = state.ema
    del state
    peak = _peak_bytes()
    parts = _parts(denoiser, readout, params, batch, max(3, repeats // 4))
    forward = jax.jit(lambda params, canvas: denoiser.head(params).logits(denoiser(params, canvas)))
    sampler = Sampler(denoiser, readout, Ancestral(), Filters(top_p=0.9), steps=size.steps)
    masks = jnp.full((size.canvases or size.batch, size.length), size.vocab - 1)
    for repeat in range(-1, max(2, repeats // 4)):
        forwards = [_timed(lambda: forward(params, masks)) for _ in range(5)]
        key, begin = jax.random.key(repeat + 1), time.perf_counter()
        samples = jax.block_until_ready(sampler(params, key, masks))
        sampled = 1e3 * (time.perf_counter() - begin)
        if repeat >= 0:
            times["forward_ms"] += forwards
            times["sampler_step_ms"].append(sampled / int(samples.forwards))
    row = {n: float(np.median(t)) for n, t in times.items()}
    row["sm_over_binary"] = row["train_sm_ms"] / row["train_binary_ms"]
    row["sampler_over_forward"] = row["sampler_step_ms"] / row["forward_ms"]
    row["tokens_per_s"] = 1e3 * size.batch * size.length / row["train_sm_ms"]
    row["mfu"] = _mfu(step_flops(denoiser, size), row["train_sm_ms"])
    row["parts_ms"] = parts | {"optimizer, EMA and the rest": max(0.0, row["train_sm_ms"] - sum(parts.values()))}
    row["peak_gib"] = peak / 2**30
    return row


def _parts(denoiser: Denoiser, readout: Readout, params: Any, batch: Any, repeats: int) -> dict[str, float]:
    """ms of what a soft-masked step is made of, each compiled by itself: {part: median}."""
    objective = SoftMaskedDiffusion(denoiser, readout, 1.0)
    example = jax.jit(objective.corrupt)(jax.random.key(0), batch)
    masked = example.canvas == denoiser.mask_id
    once = jax.jit(denoiser)
    remember = jax.jit(lambda params, hidden: readout.feedback(denoiser.head(params), hidden, masked))
    binary = jax.jit(jax.value_and_grad(dataclasses.replace(objective, p_sm=0.0), has_aux=True))
    loss = jax.jit(jax.grad(lambda h, p: readout.nll(denoiser.head(p), h, example.targets, example.weights)[0], (0, 1)))
    hidden = once(params, example.canvas)
    calls = {
        "pass one": lambda: once(params, example.canvas),
        "feedback": lambda: remember(params, hidden),
        "loss and its gradients": lambda: loss(hidden, params),
        "pass two and its backward": lambda: binary(params, example, False, None),
    }
    found = {}
    for name, call in calls.items():
        _timed(call)  # compiles
        found[name] = float(np.median([_timed(call) for _ in range(repeats)]))
    found["pass two and its backward"] -= found["loss and its gradients"]
    return found


def step_flops(denoiser: Denoiser, size: Size) -> float:
    """Of the mathematics of a soft-masked step: pass one, pass two, and twice that for its backward pass."""
    return 4 * size.batch * size.length * denoiser.flops(size.length, read=0.5)


def _mfu(flops: float, step_ms: float) -> float | None:
    """Share of the chip's peak that these products of a step take; None on a CPU."""
    chip = chip_of(jax.devices()[0].device_kind)
    return flops / (step_ms / 1e3) / chip.flops if chip else None


def _peak_bytes() -> int:
    """Of the accelerator, else of this process."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


COLUMNS = (
    *("train_binary_ms", "train_sm_ms", "sm_over_binary", "forward_ms", "sampler_step_ms", "sampler_over_forward"),
    *("tokens_per_s", "peak_gib"),
)


TIMES = ("train_binary_ms", "train_sm_ms", "forward_ms", "sampler_step_ms")  # what another program is compared by


def measured(name: str, repeats: int = 0, batch: int = 0, products: str = "dtype") -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "smdlm.tools.bench", "--row", f"--size={name}", f"--repeats={repeats}"]
    command += [f"--batch={batch}", f"--products={products}"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def _row(name: str, repeats: int, batch: int, products: str) -> dict[str, Any]:
    """The row of a size on this process's device."""
    size = dataclasses.replace(SIZES[name], products=products)
    if jax.default_backend() != "cpu":
        size = dataclasses.replace(size, **ACCELERATOR)
    if batch:
        size = dataclasses.replace(size, batch=batch)
    measured = measure(size, repeats or (4 if name == "169m" else 20))
    about = {"size": name, "batch": size.batch, "products": products, "device": jax.devices()[0].device_kind}
    return {**about, **measured}


def read_times(file: Path) -> dict[str, dict[str, Any]]:
    """{size: row} of another program. ValueError, one line, for what is no list of rows with times of these sizes."""
    wanted = f'wanted a list of rows like {{"size": "tiny", "batch": 32, "{TIMES[0]}": 263.0}}'
    try:
        rows = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--against: got {file}, which is not read ({files.one_line(error)}), {wanted}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"--against: got {file} with something else, {wanted}")
    for row in rows:
        name, times = str(row.get("size")), {column: row[column] for column in TIMES if column in row}
        if name not in SIZES or "batch" not in row or not times:
            raise ValueError(f"--against: got the row {row}, {wanted}, of {', '.join(SIZES)}")
        for column, time_ms in times.items():
            if isinstance(time_ms, bool) or not isinstance(time_ms, (int, float)) or not 0 < time_ms < float("inf"):
                raise ValueError(f"--against: got {column} {time_ms!r} of {name}, wanted milliseconds > 0")
    if len(found := {row["size"]: row for row in rows}) < len(rows):
        raise ValueError(f"--against: got {[row['size'] for row in rows]}, wanted each size once")
    return found


def check_batches(sizes: list[str], batch: int, other: dict[str, dict[str, Any]]) -> None:
    """ValueError, one line, unless the other program has a row of one of the sizes, and the same batch in each."""
    shared = [name for name in sizes if name in other]
    if not shared:
        raise ValueError(f"--against: got rows of {', '.join(other) or 'nothing'}, wanted one of {', '.join(sizes)}")
    for name in shared:
        if (theirs := other[name]["batch"]) != (ours := batch or SIZES[name].batch):
            raise ValueError(f"--against: got batch {theirs!r} at {name}, wanted that of --batch, {ours}")


def ratio_line(row: dict[str, Any], other: dict[str, Any]) -> str:
    """How many times as long the other program takes: above 1 this one is faster."""
    shared = [column for column in TIMES if column in other]
    return "  against: " + ", ".join(f"{c} {other[c]:.2f}, {other[c] / row[c]:.2f} times ours" for c in shared)


def _share_line(row: dict[str, Any]) -> str:
    """What a soft-masked step is spent on, and how well the chip is used."""
    whole = sum(row["parts_ms"].values())
    shares = ", ".join(f"{name} {time / whole:.0%}" for name, time in row["parts_ms"].items())
    used = "" if row["mfu"] is None else f", MFU {row['mfu']:.0%}"
    return f"  {row['device']}, batch {row['batch']}: {row['tokens_per_s']:,.0f} tokens/s{used}; {shares}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "all"], default="tiny")
    parser.add_argument("--repeats", type=int, default=0, help="timed train steps of each kind; 0: 20, or 4 at 169m")
    parser.add_argument("--batch", type=int, default=0, help="examples of a training step; 0: the size's own")
    parser.add_argument("--products", choices=PRODUCTS, default="dtype", help="model.products, for a CPU")
    parser.add_argument("--against", type=Path, help="rows of another program (JSON), to print ratios to")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)  # child process: one row as JSON
    args = parser.parse_args(argv)
    for name in ("repeats", "batch"):
        if getattr(args, name) < 0:
            parser.error(f"--{name}: got {getattr(args, name)}, wanted at least 1 (or 0 for the default)")
    sizes, other = (list(SIZES) if args.size == "all" else [args.size]), {}
    try:
        if args.json:
            command.check_file("--json", Path(args.json))
        if args.against:
            other = read_times(args.against)
            check_batches(sizes, args.batch, other)
    except ValueError as error:
        parser.error(str(error))
    if args.row:
        memory.return_after_compiling()
        print(json.dumps(_row(args.size, args.repeats, args.batch, args.products)))
        return
    rows = []
    print(f"{'size':8}" + "".join(f"{name:>22}" for name in COLUMNS), flush=True)
    for name in sizes:
        rows.append(measured(name, args.repeats, args.batch, args.products))
        print(f"{name:8}" + "".join(f"{rows[-1][column]:22.2f}" for column in COLUMNS), flush=True)
        print(_share_line(rows[-1]), flush=True)
        if name in other:
            print(ratio_line(rows[-1], other[name]), flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
