"""Cached against uncached decoding: python -m smdlm.tools.decoding [--size=smollm|dream] [--count] [--json=FILE]

Decodes `--new` tokens behind a prompt that fills up `--length`, in blocks, without a cache and with both kinds, binary
and soft-masked, from random weights, one case after the other in every round. Tokens are new ones alone; a policy that
commits `--tokens_per_forward` at every pass stands for a model that is as sure as that. The count of FLOPs is that of
the mathematics. With --count nothing is run: the count alone, and the most tokens per second that it allows on
accelerators, whose speed is the lower of what the products take at their bf16 peak and what reading the weights and the
cache takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from smdlm import command
from smdlm.denoiser import Denoiser
from smdlm.files import write_json
from smdlm.mesh.chips import CHIPS
from smdlm.models import MODELS
from smdlm.ops.filters import Filters
from smdlm.readout import Readout
from smdlm.sampling.blocks import CACHES, BlockDecoder
from smdlm.sampling.policies import Entropy
from smdlm.softmask import EntropyGate, SoftMask

# Of models.decoder: SmolLM2-135M with a mask behind its vocabulary, and Dream 7B.
SIZES: dict[str, dict[str, Any]] = {
    "smollm": {"vocab_size": 49153},
    "dream": {
        **{"vocab_size": 151667, "table_rows": 152064, "width": 3584, "depth": 28, "heads": 28, "key_heads": 4},
        **{"hidden": 18944, "rope_base": 1e6, "qkv_bias": True, "tied": False, "shift": True},
    },
}
ROOFLINES = ("v6e", "h100")


@dataclasses.dataclass(frozen=True)
class Case:
    """A canvas of `length` tokens, the last `new` of which are decoded in `steps` passes."""

    decoder: BlockDecoder
    length: int
    new: int
    steps: int

    @property
    def first(self) -> int:
        return self.length - self.new

    @property
    def blocks(self) -> int:
        return self.new // (self.decoder.block or self.new)

    def run(self, params: Any, steps: int) -> tuple[float, int]:
        """(seconds, forward passes) of one row behind a prompt of random tokens."""
        mask_id = self.decoder.denoiser.mask_id
        canvas = np.random.default_rng(1).integers(0, mask_id, (1, self.length)).astype(np.int32)
        canvas[:, self.first :] = mask_id
        seen, keys = np.ones(canvas.shape, bool), jax.random.split(jax.random.key(2), 1)
        begin = time.perf_counter()
        passes = self.decoder.forwards(params, keys, jnp.asarray(canvas), jnp.asarray(seen), self.first, steps)
        forwards = sum(1 for _ in passes)
        return time.perf_counter() - begin, forwards

    def count(self) -> tuple[list[int], int]:
        """(positions of each pass, positions that are read out) of one row that commits evenly, as `_Counted` does."""
        block, steps = self.decoder.plan(self.length, self.first, self.steps)
        sizes, read = [], 0
        for begin in range(self.first, self.length, block):
            for index in range(steps):
                start, size = self.decoder.span(index, begin, block, self.length)
                sizes.append(size)
                read += round(block * (1 - index / steps))
                if self.decoder.use_feedback:
                    read += max(0, min(self.decoder.ahead * block, start + size - begin - block))
        return sizes, read

    def flops(self) -> float:
        """Per new token."""
        return self.decoder.flops((1, self.length), *self.count()) / self.new


def decoder_of(size: str, block: int, cache: str, soft: bool) -> BlockDecoder:
    fields = SIZES[size]
    if jax.default_backend() != "cpu":  # there a 7B fits in half precision alone
        fields = {**fields, "dtype": "bfloat16", "param_dtype": "bfloat16"}
    model = MODELS["decoder"](**fields)
    softmask = SoftMask(gate=EntropyGate(0.5, -2.0, 2.0))
    denoiser = Denoiser(model, model.vocab_size, model.vocab_size - 1, softmask)
    filters = Filters(temperature=0.0)
    return BlockDecoder(denoiser, Readout(k=3), Entropy(), filters, block, cache, use_feedback=soft)


def cases(size: str, length: int, new: int, block: int, per_forward: int) -> dict[str, Case]:
    """{name: case}: every cache, binary and soft-masked."""
    return {
        f"{cache}, {'soft-masked' if soft else 'binary'}": Case(
            decoder_of(size, block, cache, soft), length, new, new // per_forward
        )
        for cache in CACHES
        for soft in (False, True)
    }


def counted(made: dict[str, Case]) -> dict[str, dict[str, float]]:
    """What the count says of each case, and the most tokens per second that it allows."""
    plain, rows = next(iter(made.values())).flops(), {}
    for name, case in made.items():
        binary = made[name.replace("soft-masked", "binary")].flops()
        rows[name] = {
            "tokens_per_forward": case.new / case.steps,
            "gflop_per_token": case.flops() / 1e9,
            "fewer_than_uncached": plain / case.flops(),
            "soft_masking_percent": 100 * (case.flops() / binary - 1),
            **{f"{chip}_at_most_tokens_per_s": case.new / least_seconds(case, chip) for chip in ROOFLINES},
        }
    return rows


def least_seconds(case: Case, chip: str) -> float:
    """Of all passes of one row on one chip: weights and cache are read once in each, in bf16."""
    model, (sizes, read) = case.decoder.denoiser.model, case.count()
    weights = 2 * _parameters(model)
    cache = 0 if case.decoder.cache == "none" else 2 * sum(x.size for x in jax.tree.leaves(_cache_of(case)))
    head = case.decoder.flops((1, case.length), [], read) / len(sizes)
    passes = [case.decoder.flops((1, case.length), [size], 0) + head for size in sizes]
    return sum(max(flops / CHIPS[chip].flops, (weights + cache) / CHIPS[chip].hbm) for flops in passes)


@functools.cache
def _parameters(model: Any) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))


def _cache_of(case: Case) -> Any:
    return jax.eval_shape(lambda: case.decoder.denoiser.model.cache(1, case.length))


def measured(made: dict[str, Case], repeats: int) -> dict[str, dict[str, float]]:
    """Tokens per second, milliseconds of a pass, and ratios, medians over rounds in which every case runs once.

    A ratio is of two runs of one round, so that whatever else a machine does in the meantime meets both.
    """
    denoiser = next(iter(made.values())).decoder.denoiser
    params = jax.jit(lambda key: nn.meta.unbox(denoiser.init(key)))(jax.random.key(0))
    for case in made.values():  # compiles: a full pass and one more in every block
        case.run(params, min(case.steps, 2 * case.blocks))
    rounds = []
    for number in range(repeats):
        rounds.append({name: case.run(params, case.steps) for name, case in made.items()})
        shown = ", ".join(f"{name} {seconds:.1f} s" for name, (seconds, _) in rounds[-1].items())
        print(f"round {number + 1}: {shown}", flush=True)
    return {name: _row(name, case, rounds) for name, case in made.items()}


def _row(name: str, case: Case, rounds: list[dict[str, tuple[float, int]]]) -> dict[str, float]:
    """What the rounds {name: (seconds, forwards)} say of a case."""
    seconds = float(np.median([one[name][0] for one in rounds]))
    binary, uncached = name.replace("soft-masked", "binary"), f"none, {name.partition(', ')[2]}"
    return {
        "tokens_per_s": case.new / seconds,
        "ms_per_forward": 1e3 * seconds / rounds[0][name][1],
        "faster_than_uncached": float(np.median([one[uncached][0] / one[name][0] for one in rounds])),
        "soft_masking_percent_of_time": float(np.median([100 * (one[name][0] / one[binary][0] - 1) for one in rounds])),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="smollm")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--tokens_per_forward", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="rounds")
    parser.add_argument("--count", action="store_true", help="run nothing")
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args(argv)
    try:
        if min(args.new, args.block, args.tokens_per_forward, args.repeats) < 1 or args.new > args.length:
            raise ValueError("--new, --block, --tokens_per_forward, --repeats: wanted at least 1, and new <= length")
        if args.json:
            command.check_file("--json", Path(args.json))
        made = cases(args.size, args.length, args.new, args.block, args.tokens_per_forward)
        rows = counted(made)
    except ValueError as error:
        parser.error(str(error))
    if not args.count:
        rows = {name: rows[name] | row for name, row in measured(made, args.repeats).items()}
    columns = list(next(iter(rows.values())))
    print(f"{'cache':22}" + "".join(f"  {column.replace('_', ' '):>12}" for column in columns))
    for name, row in rows.items():
        print(f"{name:22}" + "".join(f"  {row[column]:{max(12, len(column))}.2f}" for column in columns))
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
