"""One forward pass of block decoding: what runs on the device. The loop around it is in blocks.py.

    denoise a part of the canvas -> draw -> the policy, which sees the block alone -> feedback for what is still masked

Shapes: B examples, L positions of a canvas, Q positions of a pass, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from smdlm.denoiser import Denoiser
from smdlm.models.base import KVCache
from smdlm.ops.filters import Filters
from smdlm.readout import Draw, Readout
from smdlm.sampling.loop import uniforms
from smdlm.sampling.policy import Lasting, Policy, Times
from smdlm.softmask import Feedback


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
class Pass:
    """The compiled half of a `BlockDecoder`.

    Attributes:
      policy: what is committed and re-masked in a block; a row is done with a block when no mask is left there.
      filters: of the draw; the feedback is always the unfiltered distribution.
      block: positions; 0 for one block over everything.
      cache: of blocks.CACHES.
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
        """The state at the start of a block: the policy sees it as a canvas, and begins anew unless it is `Lasting`."""
        if isinstance(self.policy, Lasting) and jax.tree.leaves(state.policy):
            return state
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
        # A frozen row's carry stays, so that it does not depend on how long the others take.
        policy = jax.tree.map(functools.partial(_of_rows, now.waiting), policy, state.policy)
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


def window(tree: Any, start: jax.Array, size: int) -> Any:
    """`size` positions from `start` on of all arrays [B, L, ..]; what has no positions stays whole."""

    def leaf(x: jax.Array) -> jax.Array:
        return x if x.ndim < 2 else jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)

    return jax.tree.map(leaf, tree)


def _of_rows(rows: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """new [B, ..] in these rows [B], old in the others."""
    return jnp.where(rows.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
