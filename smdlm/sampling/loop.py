"""The sampler: one `lax.scan` over the schedule, compiled once per (sampler, B, L, number of steps).

    canvas -> { denoise -> draw -> policy -> feedback for what is still masked } x T -> argmax of what is left

Randomness is two uniforms per position and step, drawn from a key per row: a row of a batch equals the same row alone.

Shapes: B examples, L positions, T steps, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from smdlm.denoiser import Denoiser
from smdlm.models.base import Head
from smdlm.ops.filters import Filters
from smdlm.readout import Draw, Readout
from smdlm.sampling.policies import linear_times
from smdlm.sampling.policy import Drawing, Policy, Revising, Times
from smdlm.softmask import Feedback


class Samples(flax.struct.PyTreeNode):
    """tokens [B, L] i32, and forwards [] i32: how many forward passes were really run (the nominal NFE is T)."""

    tokens: jax.Array
    forwards: jax.Array


class Carry(flax.struct.PyTreeNode):
    """State between two steps. hidden, and changed [B] (rows to run again), serve refresh other than 'always'."""

    canvas: jax.Array
    feedback: Feedback | None
    policy: Any
    forwards: jax.Array
    hidden: jax.Array | None
    changed: jax.Array


def check_fields(steps: int, feedback_source: str, refresh: str) -> None:
    """ValueError for a field of `Sampler` out of range; also asked before there is a model."""
    if steps < 1:
        raise ValueError(f"sampling.steps: got {steps}, wanted at least 1")
    for name, value, known in (
        ("feedback_source", feedback_source, ("subs", "raw")),
        ("refresh", refresh, ("always", "on_change", "on_batch_change")),
    ):
        if value not in known:
            raise ValueError(f"sampling.{name}: got {value!r}, wanted one of {', '.join(map(repr, known))}")


def uniforms(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """f32 in [0, 1), exact to 24 bits down to 2^-56. jax.random.uniform gives multiples of 2^-23, which truncates the
    tail of an exponential race: candidates 16 nats below the best would tie."""
    high, low = jax.random.bits(key, (2, *shape))
    return jnp.minimum((high >> 8) * jnp.float32(2**-24) + low * jnp.float32(2**-56), jnp.float32(1 - 2**-24))


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Diffusion sampler.

    Attributes:
      policy: what is committed and re-masked (policies.py).
      filters: temperature and top-p of the draw; the feedback is always the unfiltered distribution.
      steps: nominal NFE.
      use_feedback: False samples a soft-masked model like a binary one.
      feedback_source: what a re-masked position remembers. 'subs': the token it held, as a one-hot (the reference feeds
        back the carry-over distribution, so lambda is at its largest there); 'raw': the model's own prediction.
      refresh: when the model runs. For a soft-masked model the three differ: each forward is also a step of feedback.
        'always': at every step.
        'on_change': only for rows whose canvas changed since their last forward; skipped when no row did.
        'on_batch_change': for all rows if any changed, the reference's cache. Its rows depend on each other, so it is
        for parity alone; the two caches agree at batch size 1, that of the published runs.
    """

    denoiser: Denoiser
    readout: Readout
    policy: Policy
    filters: Filters = Filters()
    steps: int = 128
    use_feedback: bool = True
    feedback_source: str = "subs"
    refresh: str = "always"

    def __post_init__(self):
        check_fields(self.steps, self.feedback_source, self.refresh)
        if self.use_feedback and self.denoiser.softmask is None:
            raise ValueError(
                "sampling.use_feedback: got True for a model without soft-masking, wanted False (or softmask.p_sm > 0 "
                "or softmask.soften)"
            )

    def __call__(self, params: Any, key: jax.Array, canvas: jax.Array) -> Samples:
        """Fills every mask of the canvas [B, L]; all other positions are prompts and never change."""
        return self.run(params, key, canvas, linear_times(self.steps))

    @functools.partial(jax.jit, static_argnums=0)
    def run(self, params: Any, key: jax.Array, canvas: jax.Array, times: Times) -> Samples:
        prompt = canvas != self.denoiser.mask_id
        row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(canvas)))

        def body(carry: Carry, xs: tuple[jax.Array, Times]) -> tuple[Carry, None]:
            index, now = xs
            u = jax.vmap(lambda k: uniforms(jax.random.fold_in(k, index), (2, canvas.shape[1])))(row_keys)
            return self.step(params, carry, now, prompt, u[:, 0], u[:, 1]), None

        xs = (jnp.arange(times.t.shape[0]), times)
        carry, _ = jax.lax.scan(body, self.init(canvas), xs)
        return self.finish(params, carry)

    def init(self, canvas: jax.Array) -> Carry:
        shape = (*canvas.shape, self.denoiser.model.width)
        hidden = jnp.zeros(shape, self.denoiser.model.dtype)
        feedback = None
        if self.use_feedback:
            feedback = Feedback.none(*canvas.shape, self.readout.k)
            feedback = self.denoiser.softmask.attach(feedback, hidden)
        return Carry(
            canvas=canvas,
            feedback=feedback,
            policy=self.policy.init(canvas == self.denoiser.mask_id),
            forwards=jnp.zeros((), jnp.int32),
            hidden=None if self.refresh == "always" else hidden,
            changed=jnp.ones(len(canvas), bool),
        )

    def step(
        self, params: Any, carry: Carry, times: Times, prompt: jax.Array, u_token: jax.Array, u_move: jax.Array
    ) -> Carry:
        """One step. u_token decides what a position would become, u_move whether it does: [B, L] uniforms in [0, 1)."""
        canvas, masked = carry.canvas, carry.canvas == self.denoiser.mask_id
        # 1. Denoise.
        if self.refresh == "always":
            hidden, forwards = self.denoiser(params, canvas, carry.feedback), carry.forwards + 1
        else:

            def fresh() -> jax.Array:
                return jnp.where(
                    carry.changed[:, None, None], self.denoiser(params, canvas, carry.feedback), carry.hidden
                )

            hidden = jax.lax.cond(carry.changed.any(), fresh, lambda: carry.hidden)
            forwards = carry.forwards + carry.changed.any()
        # 2. Read every position whose prediction somebody asks for, and draw candidates if the policy looks at them.
        head = self.denoiser.head(params)
        draw = self._read(head, hidden, canvas, prompt, u_token)
        # 3. Commit, re-mask, and replace where the policy does.
        moves = self.policy(u_move, canvas, masked, draw, times, carry.policy)
        commit, remask, policy = moves[0] & masked, moves[1] & ~masked & ~prompt, moves[-1]
        ids = draw.ids
        if ids is None:
            ids = self.readout.draw(head, hidden, commit, u_token, self.filters).ids
        after = jnp.where(commit, ids, jnp.where(remask, self.denoiser.mask_id, canvas))
        if isinstance(self.policy, Revising):
            edit = moves[2]
            after = jnp.where((edit >= 0) & ~masked & ~remask & ~prompt, edit, after)
        # 4. What is masked now remembers this step's prediction; with some operators every position does.
        feedback = None
        if self.use_feedback:
            operator = self.denoiser.softmask
            feedback = draw.feedback.first(self.readout.k)
            if self.feedback_source == "subs":
                feedback = _remember_token(feedback, remask, canvas)
            feedback = feedback.replace(
                active=operator.remembering(after == self.denoiser.mask_id, prompt),
                forwards=carry.feedback.forwards + (1 if self.refresh == "always" else carry.changed),
                time=jnp.broadcast_to(times.s, len(canvas)),
            )
            feedback = operator.attach(feedback, hidden)
        changed = jnp.any(after != canvas, axis=1)
        if self.refresh == "on_batch_change":
            changed = jnp.broadcast_to(changed.any(), changed.shape)
        return Carry(
            canvas=after,
            feedback=feedback,
            policy=policy,
            forwards=forwards,
            hidden=None if self.refresh == "always" else hidden,
            changed=changed,
        )

    def _read(self, head: Head, hidden: jax.Array, canvas: jax.Array, prompt: jax.Array, u: jax.Array) -> Draw:
        """Statistics of all positions whose prediction somebody asks for, and the candidates of a `Drawing` policy."""
        masked = canvas == self.denoiser.mask_id
        revising = isinstance(self.policy, Revising)
        read = ~prompt if revising else masked
        if self.use_feedback:
            read |= self.denoiser.softmask.remembering(masked, prompt)
            if self.feedback_source == "raw":
                read = jnp.ones_like(masked)
        readout = dataclasses.replace(self.readout, k=max(2, self.readout.k))  # two for the margin
        if isinstance(self.policy, Drawing):
            draw = readout.draw(head, hidden, read, u, self.filters)
        else:
            draw = Draw(None, None, readout.feedback(head, hidden, read))
        if revising:
            committed = ~masked & ~prompt
            _, nll = readout.nll(head, hidden, canvas, committed.astype(jnp.float32))
            draw = draw.replace(canvas_prob=jnp.where(committed, jnp.exp(-nll), 0.0))
        return draw

    def finish(self, params: Any, carry: Carry) -> Samples:
        """Noise removal: whatever is still masked becomes the argmax of one more forward, run only if needed."""
        masked = carry.canvas == self.denoiser.mask_id

        def argmax() -> Samples:
            hidden = self.denoiser(params, carry.canvas, carry.feedback)
            best = self.readout.feedback(self.denoiser.head(params), hidden, masked).ids[..., 0]
            return Samples(jnp.where(masked, best, carry.canvas), carry.forwards + 1)

        return jax.lax.cond(masked.any(), argmax, lambda: Samples(carry.canvas, carry.forwards))


def _remember_token(feedback: Feedback, where: jax.Array, tokens: jax.Array) -> Feedback:
    """Feedback with a one-hot of `tokens` (entropy 0) at `where`."""
    first = jnp.arange(feedback.ids.shape[-1]) == 0
    return feedback.replace(
        ids=jnp.where(where[..., None], tokens[..., None], feedback.ids),
        probs=jnp.where(where[..., None], first.astype(jnp.float32), feedback.probs),
        neg_entropy=jnp.where(where, 0.0, feedback.neg_entropy),
    )
