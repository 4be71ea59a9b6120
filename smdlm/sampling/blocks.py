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

Shapes: B examples, L positions of a canvas, Q positions of a pass, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from smdlm.denoiser import Denoiser
from smdlm.mesh.arrays import fetch
from smdlm.models.base import KVCache
from smdlm.ops.filters import Filters
from smdlm.readout import Draw, Readout
from smdlm.sampling.loop import uniforms
from smdlm.sampling.policy import Policy, Revising, Times
from smdlm.softmask import Feedback

CACHES = ("none", "prefix", "dual")


class Rows(flax.struct.PyTreeNode):
    """What does not change: keys [B] of the noise, seen [B, L] bool (False at padding, which is on the left), positions
    [B, L] i32, given [B, L] bool (what was no mask at the start)."""

    keys: jax.Array
    seen: jax.Array
    positions: jax.Array
    given: jax.Array


class State(flax.struct.PyTreeNode):
    """What a pass changes: canvas [B, L] i32, feedback [B, L, ..], cache of L slots, carry of the policy, and read []
    i32, the positions of all rows that the head was multiplied with so far."""

    canvas: jax.Array
    feedback: Feedback | None
    cache: KVCache | None
    policy: Any
    read: jax.Array


class Now(flax.struct.PyTreeNode):
    """One pass: query and block [] i32 are where the positions begin that are computed, and the block; index [] i32 is
    the step in the block, times its part of the schedule, last the end of that, waiting [B] the rows that need it."""

    query: jax.Array
    block: jax.Array
    index: jax.Array
    times: Times
    last: jax.Array
    waiting: jax.Array


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
class BlockDecoder:
    """Fills canvases whose prompts are padded on the left.

    Attributes:
      policy: what is committed and re-masked in a block; a row is done with a block when no mask is left there.
      filters: of the draw; the feedback is always the unfiltered distribution.
      block: positions; 0 for one block over everything.
      cache: of CACHES.
      ahead: blocks behind the current one whose masks remember their predictions as well. A pass reads out no more.
      use_feedback: False decodes a soft-masked model like a binary one.
      parity: decodes as the public code does. A full pass that fills a cache commits the first position of the block
        alone; later passes begin at the block, so that a model that shifts has no state before its first position, and
        not one before it; confidences are those of the filtered distribution.
    """

    denoiser: Denoiser
    readout: Readout
    policy: Policy
    filters: Filters = Filters()
    block: int = 0
    cache: str = "none"
    ahead: int = 1
    use_feedback: bool = True
    parity: bool = False

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

    # ------------------------------------------------------------------------------------------ what runs on the device

    @functools.partial(jax.jit, static_argnums=0)
    def start(self, canvas: jax.Array, seen: jax.Array, keys: jax.Array) -> tuple[Rows, State]:
        rows = Rows(keys, seen, jnp.maximum(jnp.cumsum(seen, 1) - 1, 0), canvas != self.denoiser.mask_id)
        feedback = None
        if self.use_feedback:
            feedback = Feedback.none(*canvas.shape, self.readout.k)
            width, dtype = self.denoiser.model.width, self.denoiser.model.dtype
            feedback = self.denoiser.softmask.attach(feedback, jnp.zeros((*canvas.shape, width), dtype))
            feedback = feedback.replace(
                forwards=jnp.zeros(len(canvas), jnp.int32), time=jnp.ones(len(canvas), jnp.float32)
            )
        cache = None if self.cache == "none" else self.denoiser.model.cache(*canvas.shape)
        return rows, State(canvas, feedback, cache, (), jnp.int32(0))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def enter(self, block: int, state: State, begin: jax.Array) -> State:
        """The state at the start of a block: the policy sees it as it would see a canvas."""
        masked = jax.lax.dynamic_slice_in_dim(state.canvas, begin, block, axis=1) == self.denoiser.mask_id
        return state.replace(policy=self.policy.init(masked))

    @functools.partial(jax.jit, static_argnums=(0, 4))
    def noise(self, keys: jax.Array, begin: jax.Array, index: jax.Array, block: int) -> jax.Array:
        """[2, B, block] uniforms: what a position would become, and whether it does.

        begin: of the block, counted from the first, so that padding changes nothing.
        """

        def row(key: jax.Array) -> jax.Array:
            return uniforms(jax.random.fold_in(jax.random.fold_in(key, begin), index), (2, block))

        return jnp.moveaxis(jax.vmap(row)(keys), 1, 0)

    @functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
    def step(
        self, size: int, block: int, opening: bool, params: Any, rows: Rows, state: State, now: Now, u: jax.Array
    ) -> tuple[State, jax.Array]:
        """One pass over `size` positions: (state, hidden [B, Q, D]).

        opening: it commits the first position of the block alone. u: [2, B, block] of `noise`.
        """
        mask_id, head = self.denoiser.mask_id, self.denoiser.head(params)
        hidden, cache = self.denoise(size, params, rows, state, now.query)
        tokens = window(state.canvas, now.query, size)
        offset = now.block - now.query
        # 1. Who is read out: masks of the block, and those that will remember.
        behind = jnp.arange(size) - offset
        reach = block * (1 + self.ahead if self.use_feedback else 1)
        read = (tokens == mask_id) & (behind >= 0) & (behind < reach) & now.waiting[:, None]
        readout = dataclasses.replace(self.readout, k=max(2, self.readout.k))  # two for the margin
        u_token = jax.lax.dynamic_update_slice(jnp.zeros(tokens.shape), u[0], (0, offset))
        draw = readout.draw(head, hidden, read, u_token, self.filters)
        # 2. Commit and re-mask, in the block alone.
        here = window(tokens, offset, block)
        masked = here == mask_id
        seen_by_policy = self.measured(head, window(hidden, offset, block), masked, window(draw, offset, block))
        commit, remask, policy = self.policy(u[1], here, masked, seen_by_policy, now.times, state.policy)
        if opening:
            commit, remask = jnp.broadcast_to(jnp.arange(block) == 0, masked.shape), jnp.zeros_like(masked)
        commit = (commit | now.last) & masked & now.waiting[:, None]
        remask = remask & ~now.last & ~masked & ~window(rows.given, now.block, block) & now.waiting[:, None]
        filled = jnp.where(commit, seen_by_policy.ids, jnp.where(remask, mask_id, here))
        canvas = jax.lax.dynamic_update_slice_in_dim(state.canvas, filled, now.block, axis=1)
        # 3. What was read out and is still masked remembers.
        feedback = None
        if self.use_feedback:
            found = self.denoiser.softmask.attach(draw.feedback.first(self.readout.k), hidden)
            feedback = self.remember(state.feedback, found, rows, now, read, canvas)
        return State(canvas, feedback, cache, policy, state.read + read.sum()), hidden

    def denoise(
        self, size: int, params: Any, rows: Rows, state: State, query: jax.Array
    ) -> tuple[jax.Array, KVCache | None]:
        """(hidden [B, Q, D] of `size` positions from `query` on, the cache with their keys and values)."""
        tokens, positions = (window(x, query, size) for x in (state.canvas, rows.positions))
        feedback = None if state.feedback is None else window(state.feedback, query, size)
        options = {"positions": positions, "mask": rows.seen[:, None]}
        if state.cache is None:
            return self.denoiser(params, tokens, feedback, **options), None
        return self.denoiser(params, tokens, feedback, cache=state.cache, start=query, **options)

    def measured(self, head: Any, hidden: jax.Array, masked: jax.Array, draw: Draw) -> Draw:
        """The draw of a block with the statistics that the policy goes by."""
        if not self.parity or self.filters.plain:
            return draw
        readout = dataclasses.replace(self.readout, k=2)
        return draw.replace(feedback=readout.feedback(head, hidden, masked, self.filters))

    def remember(
        self, old: Feedback, found: Feedback, rows: Rows, now: Now, read: jax.Array, canvas: jax.Array
    ) -> Feedback:
        """The feedback [B, L, ..] with what was found at the positions of a pass where they were read out [B, Q]."""
        size = read.shape[1]

        def write(kept: jax.Array, new: jax.Array) -> jax.Array:
            here = window(kept, now.query, size)
            where = read.reshape(*read.shape, *(1,) * (new.ndim - 2))
            return jax.lax.dynamic_update_slice_in_dim(kept, jnp.where(where, new, here), now.query, axis=1)

        masked = canvas == self.denoiser.mask_id
        found = found.replace(active=read, forwards=None, time=None)
        memory = jax.tree.map(write, old.replace(forwards=None, time=None), found)
        left = masked.sum(1) / jnp.maximum((~rows.given).sum(1), 1)
        return memory.replace(
            active=memory.active & masked,
            forwards=old.forwards + now.waiting,
            time=jnp.where(now.waiting, left.astype(jnp.float32), old.time),
        )

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


def window(tree: Any, start: jax.Array, size: int) -> Any:
    """`size` positions from `start` on of all arrays [B, L, ..]; what has no positions stays whole."""

    def leaf(x: jax.Array) -> jax.Array:
        return x if x.ndim < 2 else jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

    return jax.tree.map(leaf, tree)


def check_fields(block: int, cache: str, ahead: int) -> None:
    """ValueError for a field out of range; also asked before there is a model."""
    if block < 0:
        raise ValueError(f"generate.block: got {block}, wanted at least 1, or 0 for one block")
    if cache not in CACHES:
        raise ValueError(f"generate.cache: got {cache!r}, wanted one of {', '.join(map(repr, CACHES))}")
    if ahead < 0:
        raise ValueError(f"generate.ahead: got {ahead}, wanted at least 0 (blocks behind the current one)")
