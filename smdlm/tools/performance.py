"""Writes docs/performance.md, which says how fast and how large things are: python -m smdlm.tools.performance

CPU speed (smdlm.tools.bench), meshes of forced devices, and programs for accelerators whose compilers are installed.
Rows are kept in docs/performance.json as they are measured; what is there is not measured again. Delete the file, or
some of its rows, to measure anew.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax starts: the tables are of a CPU, whatever else this machine has

import jax
import numpy as np

from smdlm.mesh.rules import MeshConfig
from smdlm.tools.bench import COLUMNS, SIZES, measured, training

DOCS = Path("docs")
MESHES = ((1, 1, 1), (2, 1, 1), (8, 1, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2))
STEPS = 5
# (what, config, topology, examples per chip, further flags): plain against ours first, then every size everywhere.
LOOP = ("--config.model.unroll=False",)
PLAIN = ("--plain", "--program=train", *LOOP)
NONE = ("--program=train", "--config.model.remat=none", *LOOP)
BLOCK = ("--program=train", "--config.model.remat=block", *LOOP)
PROGRAMS = (
    *(("plain", "owt", chips, batch, PLAIN) for chips, batch in (("v5e:4x4", 8), ("h100:8", 32), ("v5p:2x2x4", 8))),
    *(("no remat", "owt", chips, batch, NONE) for chips, batch in (("v5e:4x4", 8), ("h100:8", 32), ("v5p:2x2x4", 8))),
    ("remat block", "owt", "v5e:4x4", 32, BLOCK),
    ("in a loop", "owt", "v5e:4x4", 32, ("--program=train", *LOOP)),
    ("as configured", "owt", "v5e:4x4", 32, ("--program=train",)),
    *(
        (what, config, chips, 8, flags)
        for chips in ("v5e:4x4", "h100:8", "v6e:4x4", "v5p:2x2x4")
        for what, config, flags in (
            ("as configured", "owt_1b7", ("--program=train",)),
            ("as configured", "owt_medium", ("--program=train",)),
            ("in a loop", "owt", LOOP),
        )
    ),
)


def mesh_row(sizes: tuple[int, int, int]) -> dict[str, Any]:
    """Losses of a few soft-masked steps on the first devices, and seconds until the first (mostly compilation)."""
    mesh = MeshConfig(*sizes).make(jax.devices()[: int(np.prod(sizes))])
    begin = time.perf_counter()
    make, state, batch = training(SIZES["tiny"], mesh)
    step, losses, seconds = make(1.0), [], 0.0
    with jax.set_mesh(mesh):
        for _ in range(STEPS):
            state, metrics = step(state, batch)
            losses.append(float(metrics["train/loss"]))
            seconds = seconds or time.perf_counter() - begin
    return {"mesh": list(sizes), "losses": losses, "first_step_s": seconds}


def _child(*code: str) -> Any:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-c", *code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _mesh(sizes: tuple[int, int, int]) -> dict[str, Any]:
    return _child(f"import json; from smdlm.tools.performance import mesh_row; print(json.dumps(mesh_row({sizes})))")


def _compiler(topology: str) -> bool:
    return importlib.util.find_spec("jax_cuda13_plugin" if topology.startswith("h100") else "libtpu") is not None


def _program(what: str, config: str, topology: str, batch: int, flags: tuple[str, ...]) -> list[dict[str, Any]] | None:
    """Rows of `python -m smdlm.tools.aot`, None without the compiler."""
    if not _compiler(topology):
        return None
    chips = int(np.prod([int(n) for n in topology.partition(":")[2].split("x")]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "smdlm.tools.aot", f"--config=configs/{config}.py", f"--topology={topology}"]
        command += [f"--config.data.batch_size={batch * chips}", f"--json={file}", *flags]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        return json.loads(file.read_text())


def write() -> None:
    """Measures what docs/performance.json lacks, then writes docs/performance.md."""
    DOCS.mkdir(exist_ok=True)
    file = DOCS / "performance.json"
    rows: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def get(name: str, measure: Callable[[], Any]) -> Any:
        if name not in rows and (row := measure()) is not None:
            rows[name] = row
            file.write_text(json.dumps(rows, indent=1) + "\n")
            print(name, flush=True)
        return rows.get(name)

    try:
        for name in SIZES:
            get(f"cpu {name}", lambda name=name: measured(name))
        for m in MESHES:
            get(f"mesh {m}", lambda m=m: _mesh(m))
        for p in PROGRAMS:
            get(_name(p), lambda p=p: _program(*p))
    finally:  # interrupted, the page shows what there is
        (DOCS / "performance.md").write_text(render(rows))


def _name(program: tuple[Any, ...]) -> str:
    return f"aot {' '.join(map(str, program[:4]))}"


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [list(head), ["---"] * len(list(head)), *(list(map(str, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _head_bytes(parts: list[dict[str, Any]]) -> float:
    """HBM bytes of the head with its loss and feedback, in our form or in the plain one."""
    return sum(part["hbm_bytes"] for part in parts if part["part"] in ("readout", "tools/aot/plain"))


PAGE = """# Performance

Written by `python -m smdlm.tools.performance` from `performance.json`; delete that file to measure anew.
What was seen on a real H100 is in [gpu.md](gpu.md).

## On a CPU

Medians of interleaved runs in ms. On a shared machine only the ratios mean something: a soft-masked step
over a binary one, and a sampler's step over a bare forward pass with all logits.

{cpu}
### Products in bfloat16

`model.products=bfloat16` rounds the operands of large products (the maps of the blocks, attention, the head) on a
CPU; everything between them, all sums, the parameters and the optimizer stay in float32. It is meant for a CPU with
bfloat16 instructions (`avx512_bf16` or `amx_bf16` in `/proc/cpuinfo`): others have to imitate them.
`model.dtype=bfloat16` also rounds what is between the products, which at small sizes costs a CPU more time than it
saves.

It costs no loss at the size of `configs/tiny.py`: `python -m smdlm.main --mode=study --config=configs/products.py`
trains five seeds for 1,000 updates in both forms. Nats per token with two passes are 4.318 ± .332 in float32 and
4.231 ± .132 rounded, paired -.087 ± .237; seed by seed, in bits per byte, 2.111, 2.098, 2.379, 2.093, 2.047 and 2.117,
2.074, 2.170, 2.121, 2.031.

### Beside the public PyTorch code

Both programs in turns on the same two cores (avx512_bf16, no AMX, a shared machine), ms, medians; PyTorch 2.13 runs
the public MDLM and soft-masked MDLM modules with float32 parameters, `scaled_dot_product_attention`, fused AdamW and
pass one under `no_grad`. Its forms: float32, autocast to bf16, and at the tiny size `torch.compile` of both.

| size | | PyTorch | bf16 | compiled | compiled bf16 | ours | products bf16 | best over ours |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| tiny | binary step | 248, 258, 320 | 299, 416 | 243, 391 | 379 | 274, 342 | 191, 191, 204, 219, 261 | 1.3 to 1.9 |
| | soft-masked step | 370, 373, 483 | 393, 560 | 341, 525 | 479 | 332, 426 | 224, 230, 242, 269, 285 | 1.5 to 2.0 |
| | sampler, per forward | 92, 107, 121, 146 | 93, 126 | 89, 137 | 117 | 66, 78 | 31, 32, 43, 51, 52 | 2.4 to 2.8 |
| 6x192 | binary step | 971 | 619, 705, 763 | | | 1001 | 529, 530, 654, 688 | 1.0 to 1.2 |
| | soft-masked step | 1402 | 865, 933, 988 | | | 1225 | 582, 669, 820, 829 | 1.1 to 1.5 |
| | sampler, per forward | 236 | 152, 194, 219 | | | 245 | 90, 105, 116 | 1.4 to 1.9 |
| 169m | binary step | | 3597, 4420, 4586 | | | 6423 | 3167, 3747, 3821, 4965 | .9 to 1.4 |
| | soft-masked step | | 4617, 6563, 5897 | | | 8406 | 4262, 4607, 4735, 6412 | 1.0 to 1.4 |
| | sampler, per forward | | 4557, 5038, 4740 | | | 2105 | 1068, 1308, 1314, 1345 | 3.5 to 4.4 |

Several figures in a field are several runs; the machine's speed changed by a third and more between them, so that
neighbours in time are compared. The highest ratios of 169m are those of the kept heap (below).

### Memory

Peak memory of the bench in training, GiB, theirs and ours in the fastest forms: tiny .58 (bf16), .71 (compiled)
against .77, of which the compiler has its share (.54 when the compiled program is found in the cache); 6x192 .82
against .85 to .89; 169m 4.81 against 4.33. 50 soft-masked updates at 169m alone: between 3.66 and 4.23 after 1, 3, 6,
12, 25 and 50 of them, peak 4.28.

XLA's CPU backend takes the temporaries of a step from `malloc` and frees them at its end, which costs page faults.
Ways that were measured, two cores, all with products in bfloat16 (medians of few steps on a noisy machine: single
figures differ by a quarter):

| | tiny, ms | 6x192, ms | 169m, ms, soft-masked | memory, GiB (after updates) |
| --- | --- | --- | --- | --- |
| glibc as it is | 299, 348 | 669, 778 | 6422 | flat |
| kept heap in huge pages | 198-279, 247-333 | 572-691, 710-879 | 4552-5140 | .88 to 1.18 (25); 4.7 to 8.4 (12) |
| blocks from 32 MiB outside of it | 235, 290 | 673, 880 | | .91 to 1.05 (12) |
| kept heap, no caches of small blocks | 204, 251 | | | .91 to 1.19 (25) |
| jemalloc that keeps freed blocks | | | 4386 | 5.0 to 6.3 (3) |
| tcmalloc | | | 5670 | 4.7 to 6.0 (3) |
| **huge pages, given back** | 217-269, 258-315 | 566-720, 672-862 | 4752-6278 | flat, at most 4.6 |

"Kept" means that freed blocks are not given back. The last row is what programs do (`smdlm/memory.py`): at the small
sizes as fast as the heap, at 169m about a tenth slower, and flat. What compiling took is given back as well, which is
.3 GiB at every size.

### Where the time goes

At 6x192 half of a step is not spent on products. Three changes were tried there, CPU time on one core, the least of
five steps, binary and soft-masked: the layers unrolled instead of scanned (739 to 731 ms, 874 to 977), sums of weight
gradients split over examples (739 to 708, 874 to 847), and, kept, a layer norm apart from its product together with
factors of attention saved as they were rounded (915 to 885, 1123 to 1044; the forward pass 199 to 157). At the small
sizes the sampler's time is that of its forward pass; at 169m the public sampler sorts the vocabulary and draws Gumbel
noise in float64 for all positions.

### Against another program

```bash
python -m smdlm.tools.bench --size=all --products=bfloat16 --json=ours.json --against=theirs.json
```

`theirs.json` has a row for each size of whoever runs the other program: `size` and `batch` as here, and of the times in
ms those that it has.

```json
[{{"size": "tiny", "batch": 32, "train_binary_ms": 263.0, "train_sm_ms": 396.0}},
 {{"size": "169m", "batch": 1, "train_binary_ms": 5227.0, "train_sm_ms": 7241.0, "sampler_step_ms": 5186.0}}]
```

A ratio above 1 says that the other one takes longer. The same work: the sizes are those of `smdlm/tools/bench.py`
(width, depth, heads, length, batch, vocabulary); a train step is forward and backward pass with dropout 0.1, clipping,
AdamW and EMA, for `train_sm_ms` with soft-masking at every step; `sampler_step_ms` is a whole trajectory from all masks
to none with top-p 0.9 and feedback, divided by its forward passes. The same machine: both on the same cores
(`taskset`), float32 parameters, as many threads as cores, medians of at least ten steps (four at 169m) after the first,
the two programs in turns rather than one after the other, and nothing else running: else only the ratio of the least
times means something.

## Meshes

The tiny model on devices forced out of one CPU: the largest relative difference of the losses of {steps}
soft-masked steps from those of one device, and the seconds to the end of the first step (compilation). This
shows that meshes are correct and compile; it says nothing about speed on real devices.

{meshes}
## On accelerators that were not there

From the compilers of the accelerators (`python -m smdlm.tools.aot`), per chip; HBM in GiB, of which the peak
may be less than arguments and temporaries together: the memory of a donated argument is used again. TFLOP
and time count loops as often as they run, half of the tokens masked, a step with feedback. GB are what
goes through HBM, of which `head` for logits, loss and feedback; of a sampler, for all of its steps. The
time is a roofline, a lower bound: no program was run. `plain`: all logits, XLA's attention, autodiff, no
remat. All rows of owt but the one "as configured" are of one layer that runs in a loop (`model.unroll=False`), which
is compiled in a third of the time. The CUDA compiler offers no cost analysis.

{programs}"""
HEAD = ("config", "form", "program", "chips", "batch per chip", "arguments", "temporaries", "peak", "limit", "fits")
WORK = ("TFLOP", "HBM, GB", "head, GB", "ms per step", "tokens/s", "MFU", "compile, s")


def render(rows: dict[str, Any]) -> str:
    """The page, from the rows by name."""
    cpu = [(name, row) for name in SIZES if (row := rows.get(f"cpu {name}"))]
    return PAGE.format(
        steps=STEPS,
        cpu=_table(("size", *COLUMNS), [(name, *(f"{row[c]:.2f}" for c in COLUMNS)) for name, row in cpu]),
        meshes=_mesh_table(rows),
        programs=_program_table(rows),
    )


def _mesh_table(rows: dict[str, Any]) -> str:
    meshes = [row for m in MESHES if (row := rows.get(f"mesh {m}"))]
    one = np.array(meshes[0]["losses"]) if meshes else None
    lines = [
        (*m["mesh"], f"{np.max(np.abs(np.array(m['losses']) / one - 1)):.1e}", f"{m['first_step_s']:.1f}")
        for m in meshes
    ]
    return _table(("data", "fsdp", "tensor", "loss difference", "first step, s"), lines)


def _program_table(rows: dict[str, Any]) -> str:
    """Of what was compiled, and below it which compilers were missing."""
    lines = [_program_row(program, row) for program in PROGRAMS for row in rows.get(_name(program), ())]
    parts = [_table((*HEAD, *WORK), lines)] if lines else []
    missing = sorted({p[2].partition(":")[0] for p in PROGRAMS if _name(p) not in rows and not _compiler(p[2])})
    for chip in missing:
        extra = "cuda" if chip == "h100" else "aot"
        parts.append(f"Not measured for {chip}: its compiler is missing (`pip install -e '.[{extra}]'`).\n")
    return "\n".join(parts)


def _program_row(program: tuple[Any, ...], row: dict[str, Any]) -> tuple[str, ...]:
    what, config, topology, *_ = program

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        *(config, what, row["program"], topology, f"{row['batch_per_chip']:g}"),
        *(f"{row[name]:.2f}" for name in ("arguments_gib", "temp_gib", "peak_gib", "hbm_limit_gib")),
        "yes" if row["fits"] else "no",
        number(row["flops_per_chip"] and row["flops_per_chip"] / 1e12, ".2f"),
        number(row["hbm_bytes_per_chip"] and row["hbm_bytes_per_chip"] / 1e9, ".1f"),
        number(row["parts"] and _head_bytes(row["parts"]) / 1e9, ".2f"),
        number(row["step_ms_roofline"], ".1f"),
        number(row["tokens_per_s"], ",.0f"),
        number(row["mfu"], ".0%"),
        f"{row['compile_s']:.0f}",
    )


if __name__ == "__main__":
    write()
