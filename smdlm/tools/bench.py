"""Speed and memory: python -m smdlm.tools.bench [--size=tiny|6x192|169m|all] [--repeats=N] [--json=FILE]

Times whole train steps (dropout, backward pass, AdamW, EMA) with binary masks and with soft-masking at every step, one
bare forward (all logits of all positions), and the sampler per forward, averaged over a whole trajectory from all masks
to none with top-p 0.9 and feedback. Variants are interleaved and medians taken: on a shared machine only the ratios
within one run mean something. Each size runs in its own process, so that the peak memory is its own.

python -m smdlm.performance writes these figures, those of meshes and of accelerators to docs/performance.md.
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

from smdlm import command, startup
from smdlm.denoiser import Denoiser
from smdlm.mesh.rules import MeshConfig, batch_sharding, param_shardings, state_shardings
from smdlm.models import MODELS
from smdlm.objective import SoftMaskedDiffusion
from smdlm.ops.filters import Filters
from smdlm.optimizer import OptimizerConfig, init_state, make_optimizer
from smdlm.readout import Readout
from smdlm.sampling.loop import Sampler
from smdlm.sampling.policies import Ancestral
from smdlm.softmask import EntropyGate, SoftMask
from smdlm.train import make_train_step


@dataclasses.dataclass(frozen=True)
class Size:
    """width, depth, heads, length L, batch B, vocabulary V; chunk: tokens per readout step; sampler steps timed."""

    width: int
    depth: int
    heads: int
    length: int
    batch: int
    vocab: int
    chunk: int
    steps: int


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
    sizes = {"width": size.width, "depth": size.depth, "heads": size.heads, "vocab_multiple": multiple}
    net = MODELS["dit"](vocab_size=size.vocab, **sizes)
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


def measure(name: str, repeats: int) -> dict[str, Any]:
    """One row; times in ms, memory in GiB."""
    size = SIZES[name]
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
    forward = jax.jit(lambda params, canvas: denoiser.head(params).logits(denoiser(params, canvas)))
    sampler = Sampler(denoiser, readout, Ancestral(), Filters(top_p=0.9), steps=size.steps)
    masks = jnp.full(batch["tokens"].shape, size.vocab - 1)
    for repeat in range(-1, max(2, repeats // 4)):
        sampled, samples = None, None

        def run() -> Any:
            nonlocal samples
            samples = sampler(params, jax.random.key(repeat + 1), masks)  # noqa: B023
            return samples

        forwards = [_timed(lambda: forward(params, batch["tokens"])) for _ in range(5)]
        sampled = _timed(run)
        if repeat >= 0:
            times["forward_ms"] += forwards
            times["sampler_step_ms"].append(sampled / int(samples.forwards))
    row = {"size": name, **{n: float(np.median(t)) for n, t in times.items()}}
    row["sm_over_binary"] = row["train_sm_ms"] / row["train_binary_ms"]
    row["sampler_over_forward"] = row["sampler_step_ms"] / row["forward_ms"]
    row["peak_rss_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return row


COLUMNS = (
    "train_binary_ms",
    "train_sm_ms",
    "sm_over_binary",
    "forward_ms",
    "sampler_step_ms",
    "sampler_over_forward",
    "peak_rss_gib",
)


def measured(name: str, repeats: int = 0) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "smdlm.tools.bench", "--row", f"--size={name}", f"--repeats={repeats}"]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "all"], default="tiny")
    parser.add_argument("--repeats", type=int, default=0, help="timed train steps of each kind; 0: 20, or 4 at 169m")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)  # child process: one row as JSON
    args = parser.parse_args(argv)
    if args.repeats < 0:
        parser.error(f"--repeats: got {args.repeats}, wanted at least 1 (or 0 for the default)")
    if args.json:
        try:
            command.check_file("--json", Path(args.json))
        except ValueError as error:
            parser.error(str(error))
    if args.row:
        startup.keep_memory()
        print(json.dumps(measure(args.size, args.repeats or (4 if args.size == "169m" else 20))))
        return
    rows = []
    print(f"{'size':8}" + "".join(f"{name:>22}" for name in COLUMNS), flush=True)
    for name in SIZES if args.size == "all" else [args.size]:
        rows.append(measured(name, args.repeats))
        print(f"{name:8}" + "".join(f"{rows[-1][column]:22.2f}" for column in COLUMNS), flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
