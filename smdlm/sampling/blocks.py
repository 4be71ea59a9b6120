"""Decoding block by block, with or without a cache of keys and values. One block over all of it is Dream's sampler.

    for each block, left to right:
        full pass over the canvas (fills the cache), then passes over a part of it until the block has no mask:
            'none': the canvas again    'prefix': the block and all behind it    'dual': the block alone
        { denoise -> draw -> policy, which sees the block alone -> feedback for what is still masked }

With a cache everything outside of the part that is computed again stays as the last full pass saw it. Feedback goes
together with caches: what a masked position remembers is its prediction of the last pass that computed it.

A row does not depend on its neighbours: its noise hangs on its key, its block and its step there, and once it has
nothing left to do in a block it is frozen until the others are done. The loop runs on the host, a compiled program per
size of a pass: two with 'dual', one with 'none', one per block with 'prefix'.

What runs on the device is in passes.py. Shapes: B examples, L positions of a canvas, Q positions of a pass, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from smdlm.mesh.arrays import fetch
from smdlm.sampling.passes import Now, Pass, State
from smdlm.sampling.policy import Revising, Times

CACHES = ("none", "prefix", "dual")


@dataclasses.dataclass(frozen=True)
class Forward:
    """One forward pass that was run.

    Attributes:
      start, size: the positions that were computed. block: where the block begins.
      waiting: [B] bool, the rows whose block had masks; the others are frozen.
      before, after: the state around it. now: what `step` was told. hidden: [B, Q, D] that was read out.
    """

    start: int
    size: int
    block: int
    waiting: np.ndarray
    before: State
    after: State
    now: Now
    hidden: jax.Array


def nobody(canvas: np.ndarray) -> np.ndarray:
    """[B] bool: no row stops before all of its masks are filled."""
    return np.zeros(len(canvas), bool)


def block_times(steps: int, end: float) -> Times:
    """t from 1 in equal steps towards `end`, the last of them to 0, f32 [T]."""
    grid = np.linspace(1.0, end, steps + 1).astype(np.float32)
    return Times(t=grid[:-1], s=np.append(grid[1:-1], np.float32(0)))


@dataclasses.dataclass(frozen=True)
class BlockDecoder(Pass):
    """Fills canvases whose prompts are padded on the left. Its fields are those of `Pass`."""

    def __post_init__(self):
        check_fields(self.block, self.cache, self.ahead)
        if self.denoiser.model.causal:
            raise ValueError(
                "generate: got a causal (AR) model, wanted a diffusion model: it writes left to right only"
            )
        if self.use_feedback and self.denoiser.softmask is None:
            raise ValueError("sampling.use_feedback: got True for a model without soft-masking, wanted False")
        if isinstance(self.policy, Revising):
            raise ValueError("sampling.policy: got one that revises what it committed, wanted another to generate with")
        if self.use_feedback and self.denoiser.softmask.everywhere:
            raise ValueError("softmask.variant: got one for committed positions, wanted sampling.use_feedback False")

    def forwards(
        self,
        params: Any,
        keys: jax.Array,
        canvas: jax.Array,
        seen: jax.Array,
        first: int,
        steps: int,
        stopped: Callable[[np.ndarray], np.ndarray] = nobody,
    ) -> Iterator[Forward]:
        """Runs, and yields every forward pass.

        Args:
          keys: [B] of the noise, one per row.
          canvas: [B, L] i32; masks are filled, all else never changes.
          seen: [B, L] bool, False at padding.
          first: where the first block begins; no mask may lie before it.
          steps: most passes, over all blocks; the last one of a block commits whatever is masked there. Policies that
            commit by confidence need fewer.
          stopped: canvas [B, L] after a pass -> [B] bool, rows that need nothing more (they have ended).

        Raises:
          ValueError: the blocks do not divide the canvas, or the steps the blocks.
        """
        length = canvas.shape[1]
        block, steps = self.plan(length, first, steps)
        times = block_times(steps, 1e-3 if self.parity else 0.0)
        rows, state = self.start(canvas, seen, keys)
        opening = self.parity and self.cache != "none"
        host = fetch(state.canvas)
        for begin in range(first, length, block):
            state = self.enter(block, state, begin)
            for index in range(steps):
                masked = host[:, begin : begin + block] == self.denoiser.mask_id
                waiting = masked.any(1) & ~stopped(host)
                if not waiting.any():
                    break
                start, size = self.span(index, begin, block, length)
                now = Now(
                    query=np.int32(start),
                    block=np.int32(begin),
                    index=np.int32(index),
                    times=jax.tree.map(lambda x, i=index: x[i], times),
                    last=np.bool_(index == steps - 1),
                    waiting=waiting,
                )
                u = self.noise(rows.keys, np.int32(begin - first), now.index, block)
                after, hidden = self.step(size, block, opening and index == 0, params, rows, state, now, u)
                yield Forward(start, size, begin, waiting, state, after, now, hidden)
                state, host = after, fetch(after.canvas)

    def plan(self, length: int, first: int, steps: int) -> tuple[int, int]:
        """(positions of a block, most steps in each). ValueError, one line, if they do not divide."""
        block = self.block or length - first
        if block < 1 or (length - first) % block:
            raise ValueError(
                f"generate.block: got {self.block} for {length - first} positions to fill, wanted a divisor, or 0"
            )
        blocks = (length - first) // block
        if steps < 1 or steps % blocks:
            raise ValueError(f"sampling.steps: got {steps} for {blocks} blocks, wanted a multiple of {blocks}")
        return block, steps // blocks

    def span(self, index: int, begin: int, block: int, length: int) -> tuple[int, int]:
        """(start, size) of what a pass computes."""
        if self.cache == "none" or index == 0:
            return 0, length
        # A model that shifts predicts a token at the position before it.
        start = begin if self.parity else max(0, begin - 1)
        return start, (begin + block if self.cache == "dual" else length) - start

    def flops(self, shape: tuple[int, int], sizes: list[int], read: int) -> float:
        """FLOPs of the matrix products of a run: the mathematics, whatever the compiler makes of them.

        shape: (B, L). sizes: of its passes. read: `State.read` at its end.
        """
        batch, length = shape
        positions = batch * sum(sizes)
        width, vocab = self.denoiser.model.width, self.denoiser.vocab_size
        head = 2.0 * width * vocab * read
        # A position that remembers averages the rows of its candidates; counted as if all did.
        mixed = 2.0 * width * (self.readout.k + 2) * positions if self.use_feedback else 0.0
        return positions * self.denoiser.model.flops(length) + head + mixed


def check_fields(block: int, cache: str, ahead: int) -> None:
    """ValueError for a field out of range; also asked before there is a model."""
    if block < 0:
        raise ValueError(f"generate.block: got {block}, wanted at least 1, or 0 for one block")
    if cache not in CACHES:
        raise ValueError(f"generate.cache: got {cache!r}, wanted one of {', '.join(map(repr, CACHES))}")
    if ahead < 0:
        raise ValueError(f"generate.ahead: got {ahead}, wanted at least 0 (blocks behind the current one)")
