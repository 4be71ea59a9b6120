"""A sampling run written down step by step, for whoever wants to look at it: the sampler's scan keeps only its end.

The same steps with the same uniforms as `Sampler.run`, from a Python loop, so that a recorded run ends in the same
tokens. What a binary run predicts and throws away is recorded too, from one more forward pass a step.

Shapes: B examples, L positions, T steps, F frames, K candidates.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smdlm.denoiser import Denoiser
from smdlm.mesh.arrays import fetch
from smdlm.sampling.blocks import BlockDecoder, Forward
from smdlm.sampling.loop import Carry, Sampler, uniforms
from smdlm.sampling.passes import window
from smdlm.sampling.policies import Times, linear_times
from smdlm.softmask import Feedback


@dataclasses.dataclass(frozen=True)
class Trace:
    """One example of a run, as NumPy arrays. Frame 0 is the canvas as it was given, frame i what step i left.

    The noise removal, where masks were left for it, is one frame more: F is T + 1 or T + 2.

    Attributes:
      mask_id: the token of a masked position.
      tokens: [F, L] i32 canvas.
      predicted: [F, L] bool, masked positions for which the step of this frame predicted something. What follows is
        meaningless elsewhere.
      ids: [F, L, K] i32, the most probable tokens, best first.
      probs: [F, L, K] f32, their probabilities under the full softmax.
      entropy: [F, L] f32, of the whole prediction, in nats.
      lam: [F, L] f32, lambda: the share of the prediction in what the next step is shown at this position, the rest
        being the mask. 0 in a binary run, which is shown none of it.
      forwards: [F] i32, forward passes of the sampler so far.
      computed: [F, 2] i32, the positions that the step of this frame computed, from the first up to the second; keys
        and values of the others were read from a cache. The whole canvas without one.
      fed_back: whether predictions reach the next step at all; an operator may do so in another way than by lambda.
    """

    mask_id: int
    tokens: np.ndarray
    predicted: np.ndarray
    ids: np.ndarray
    probs: np.ndarray
    entropy: np.ndarray
    lam: np.ndarray
    forwards: np.ndarray
    computed: np.ndarray
    fed_back: bool

    @property
    def masked(self) -> np.ndarray:
        """[F, L] bool."""
        return self.tokens == self.mask_id

    @property
    def prompt(self) -> np.ndarray:
        """[L] bool: given, not written."""
        return ~self.masked[0]

    @property
    def settled(self) -> np.ndarray:
        """[L] i32: the frame from which on a position holds its last token; 0 for a prompt."""
        differs = self.tokens != self.tokens[-1]
        return np.where(differs.any(0), len(differs) - differs[::-1].argmax(0), 0).astype(np.int32)


def record(sampler: Sampler, params: Any, key: jax.Array, canvas: jax.Array) -> list[Trace]:
    """Runs `sampler(params, key, canvas)` and writes down every step: a Trace for each row of the canvas [B, L] i32."""
    prompt = canvas != sampler.denoiser.mask_id
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(canvas)))
    times = linear_times(sampler.steps)
    t, s = np.asarray(times.t), np.asarray(times.s)
    carry = _init(sampler, canvas)
    nothing = Feedback.none(*canvas.shape, sampler.readout.k)
    frames = [_frame(carry.canvas, nothing, jnp.zeros(canvas.shape), carry.forwards)]
    for index in range(len(t)):
        before = carry
        carry = _step(sampler, params, before, Times(t[index], s[index]), prompt, row_keys, index)
        feedback, lam = _seen(sampler, params, before, carry)
        frames.append(_frame(carry.canvas, feedback, lam, carry.forwards))
    if np.any(frames[-1]["tokens"] == sampler.denoiser.mask_id):
        samples = _finish(sampler, params, carry)
        frames.append(_frame(samples.tokens, nothing, jnp.zeros(canvas.shape), samples.forwards))
    stacked = {name: np.stack([frame[name] for frame in frames]) for name in frames[0]}
    shared = {
        "mask_id": sampler.denoiser.mask_id,
        "forwards": stacked.pop("forwards"),
        "computed": np.tile(np.array([0, canvas.shape[1]], np.int32), (len(frames), 1)),
        "fed_back": sampler.use_feedback,
    }
    return [Trace(**shared, **{name: x[:, row] for name, x in stacked.items()}) for row in range(len(canvas))]


def record_blocks(decoder: BlockDecoder, params: Any, passes: Iterable[Forward], seen: np.ndarray, row: int) -> Trace:
    """Writes down one row of a run of a `BlockDecoder`: a frame for each pass that the row took part in.

    Args:
      passes: what `decoder.forwards` yields. seen: [B, L] bool; padding is left out of the trace.
    """
    first = int(np.argmax(seen[row]))
    frames, spans, count = [], [(0, seen.shape[1])], 0
    for forward in passes:
        if not frames:
            nothing = Feedback.none(*seen.shape, decoder.readout.k)
            frames.append(_frame(forward.before.canvas, nothing, jnp.zeros(seen.shape), jnp.int32(0)))
        if not forward.waiting[row]:
            continue
        count += 1
        spans.append((forward.start, forward.start + forward.size))
        canvas, feedback = forward.after.canvas, forward.after.feedback
        if decoder.use_feedback:
            feedback, lam = _shown(decoder.denoiser, params, canvas, feedback)
        else:
            feedback = _thrown_away(decoder, params, forward.hidden, canvas, forward.now.query)
            lam = jnp.zeros(seen.shape)
        frames.append(_frame(canvas, feedback, lam, jnp.int32(count)))
    stacked = {name: np.stack([frame[name] for frame in frames]) for name in frames[0]}
    return Trace(
        mask_id=decoder.denoiser.mask_id,
        forwards=stacked.pop("forwards"),
        computed=np.maximum(np.array(spans, np.int32) - first, 0),
        fed_back=decoder.use_feedback,
        **{name: x[:, row, first:] for name, x in stacked.items()},
    )


def _frame(canvas: jax.Array, feedback: Feedback, lam: jax.Array, forwards: jax.Array) -> dict[str, np.ndarray]:
    """The fields of a Trace for one frame, [B, ...] where they have an example's axis."""
    arrays = {
        "tokens": canvas,
        "predicted": feedback.active,
        "ids": feedback.ids,
        "probs": feedback.probs,
        "entropy": -feedback.neg_entropy,
        "lam": lam,
        "forwards": forwards,
    }
    return {name: fetch(x) for name, x in arrays.items()}


# One program each for a sampler and a shape, however many steps are taken.
_init = jax.jit(Sampler.init, static_argnums=0)
_finish = jax.jit(Sampler.finish, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _step(
    sampler: Sampler, params: Any, carry: Carry, now: Times, prompt: jax.Array, row_keys: jax.Array, index: int
) -> Carry:
    u = jax.vmap(lambda key: uniforms(jax.random.fold_in(key, index), (2, prompt.shape[1])))(row_keys)
    return sampler.step(params, carry, now, prompt, u[:, 0], u[:, 1])


@functools.partial(jax.jit, static_argnums=0)
def _seen(sampler: Sampler, params: Any, before: Carry, after: Carry) -> tuple[Feedback, jax.Array]:
    """(what a step predicted for the positions that are masked after it, lambda [B, L] of the next step)."""
    denoiser = sampler.denoiser
    if sampler.use_feedback:
        return _shown(denoiser, params, after.canvas, after.feedback)
    masked = before.canvas == denoiser.mask_id
    feedback = sampler.readout.feedback(denoiser.head(params), denoiser(params, before.canvas), masked)
    feedback = feedback.replace(active=masked & (after.canvas == denoiser.mask_id))
    return feedback, jnp.zeros(masked.shape)


@functools.partial(jax.jit, static_argnums=0)
def _shown(denoiser: Denoiser, params: Any, canvas: jax.Array, feedback: Feedback) -> tuple[Feedback, jax.Array]:
    """(what masked positions remember, lambda [B, L] of the next step: 0 where that shows no soft mask)."""
    operator, omega, table = denoiser.softmask, params["softmask"], denoiser.model.table(params["backbone"])
    feedback = feedback.replace(active=feedback.active & (canvas == denoiser.mask_id))
    if not operator.mixes:
        return feedback, jnp.zeros(canvas.shape)
    _, _, neg_entropy = operator.look_up(omega, table, denoiser.head(params), canvas, feedback)
    lam = operator.lam(omega, table, feedback, neg_entropy)[..., 0]
    return feedback, jnp.where(feedback.active, lam, 0.0)


@functools.partial(jax.jit, static_argnums=0)
def _thrown_away(
    decoder: BlockDecoder, params: Any, hidden: jax.Array, canvas: jax.Array, start: jax.Array
) -> Feedback:
    """The prediction of hidden [B, Q, D] for positions that are masked all the same, as [B, L, ..]."""
    masked = window(canvas, start, hidden.shape[1]) == decoder.denoiser.mask_id
    found = decoder.readout.feedback(decoder.denoiser.head(params), hidden, masked)
    nothing = Feedback.none(*canvas.shape, decoder.readout.k).replace(forwards=None, time=None)

    def place(whole: jax.Array, part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=1)

    return jax.tree.map(place, nothing, found)
