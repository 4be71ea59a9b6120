"""The training loss on one screen: Algorithm 1 of the paper, and next-token prediction for the AR baseline.

An objective has two parts. `corrupt` draws all noise for the *global* batch, so that neither the mesh nor the number of
micro-batches changes it, and normalises the token weights over that batch (`corrupt_by_number` does so for evaluation).
`__call__` is the loss of any subset of the examples; losses (and gradients) of the subsets add up to those of the whole
batch.

Shapes: B examples, L positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import chex
import flax.struct
import jax
import jax.numpy as jnp

from smdlm.denoiser import Denoiser
from smdlm.diffusion import LogLinear, TimeSampler, mask_where, uniforms_by_number
from smdlm.readout import Readout

Batch = Mapping[str, jax.Array]


class Example(flax.struct.PyTreeNode):
    """What the loss needs.

    Attributes:
      canvas, targets: [B, L] i32.
      weights: [B, L] f32, 1 / (tokens of the global batch that count) folded in.
      attend: [B, L] bool, which positions of the canvas may be seen; None for all.
      given: [B, L] bool, a prompt: what remembers nothing; None for no position.
      time: [B] f32, the t of the canvas; None without noise.
      coins: [B] bool, which examples use feedback; None for all, if the step does.
    """

    canvas: jax.Array
    targets: jax.Array
    weights: jax.Array
    attend: jax.Array | None = None
    given: jax.Array | None = None
    time: jax.Array | None = None
    coins: jax.Array | None = None

    @property
    def mask(self) -> jax.Array | None:
        """For the denoiser: [B, 1, L]."""
        return None if self.attend is None else self.attend[:, None]


class Objective(Protocol):
    """p_step: chance that a step uses feedback. See the module's docstring for the two methods."""

    denoiser: Denoiser

    @property
    def p_step(self) -> float: ...

    def corrupt(self, key: jax.Array, batch: Batch) -> Example:
        """For training."""
        ...

    def corrupt_by_number(self, key: jax.Array, batch: Batch) -> Example:
        """For evaluation: the noise of an example is a function of (key, batch['number'] [B] i32) alone."""
        ...

    def __call__(
        self, params: Any, example: Example, use_feedback: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]: ...


def counted(batch: Batch) -> jax.Array:
    """1 for tokens that count, 0 for others: [B, L] f32.

    batch['valid'] is [B] or [B, L] bool; batch['attend'] [B, L], if there, takes padding out of attention too, and
    batch['frozen'] [B, L], if there, are tokens that are given (prompts).
    """
    valid = batch["valid"]
    if valid.ndim == 1:
        valid = valid[:, None]
    valid = jnp.broadcast_to(valid, batch["tokens"].shape) & batch.get("attend", True)
    if "frozen" in batch:
        valid &= ~batch["frozen"]
    return valid.astype(jnp.float32)


def _token_weights(batch: Batch) -> jax.Array:
    """1 / (tokens of the global batch that count) on those: [B, L] f32."""
    counts = counted(batch)
    return counts / jnp.maximum(counts.sum(), 1.0)


@dataclasses.dataclass(frozen=True)
class SoftMaskedDiffusion:
    """Two-pass masked diffusion loss; p_sm 0 is plain MDLM.

    Attributes:
      p_sm: chance of soft-masking (paper: 0.8 for language, 0.5 for code).
      coin: 'step', one for all examples of an optimizer step, so that the others are spared pass one; or 'example'.
      through: whether the gradient also flows through pass one.
    """

    denoiser: Denoiser
    readout: Readout
    p_sm: float
    schedule: LogLinear = LogLinear()
    times: TimeSampler = TimeSampler()
    coin: str = "step"
    through: bool = False

    def __post_init__(self):
        if not 0 <= self.p_sm <= 1:
            raise ValueError(f"objective p_sm: got {self.p_sm}, wanted 0 <= p_sm <= 1")
        if self.coin not in ("step", "example"):
            raise ValueError(f"softmask.coin: got {self.coin!r}, wanted 'step' or 'example'")
        if self.p_sm > 0 and self.denoiser.softmask is None:
            raise ValueError("objective p_sm: got > 0 for a model without soft-masking, wanted 0")

    @property
    def p_step(self) -> float:
        return 1.0 if self.coin == "example" and self.p_sm > 0 else self.p_sm

    @property
    def bound(self) -> SoftMaskedDiffusion:
        """The objective whose expectation is a bound of the likelihood: what evaluation takes."""
        return self

    def corrupt(self, key: jax.Array, batch: Batch) -> Example:
        key_t, key_mask = jax.random.split(key)
        t = self.times(key_t, len(batch["tokens"]))
        example = self._masked(batch, t, jax.random.uniform(key_mask, batch["tokens"].shape))
        if self.schedule.replace:
            example = self._replaced(jax.random.fold_in(key, 2), batch, example)
        if self.coin == "example" and self.p_sm > 0:
            coins = jax.random.bernoulli(jax.random.fold_in(key, 3), self.p_sm, t.shape)
            example = example.replace(coins=coins)
        return example

    def corrupt_by_number(self, key: jax.Array, batch: Batch) -> Example:
        key_t, key_mask = jax.random.split(key)
        t = self.times.by_number(key_t, batch["number"])
        return self._masked(batch, t, uniforms_by_number(key_mask, batch["number"], batch["tokens"].shape[1]))

    def _masked(self, batch: Batch, t: jax.Array, u: jax.Array) -> Example:
        # 1. t ~ U(t_min, t_max); x_t masks each token with probability 1 - alpha(t).
        tokens, chance = batch["tokens"], 1 - self.schedule.alpha(t)
        canvas, masked = mask_where(u, tokens, chance, self.denoiser.mask_id, batch.get("frozen"))
        # Masked tokens weigh 1/t; the sum is divided by all valid tokens, masked or not, as in the reference.
        weights = _token_weights(batch) * self.schedule.weight(t)[:, None] * masked
        return Example(canvas, tokens, weights, batch.get("attend"), batch.get("frozen"), t)

    def _replaced(self, key: jax.Array, batch: Batch, example: Example) -> Example:
        """Some visible tokens become others, and all visible ones count."""
        canvas, mask_id = example.canvas, self.denoiser.mask_id
        visible = canvas != mask_id
        if example.given is not None:
            visible &= ~example.given
        key_where, key_what = jax.random.split(key)
        others = jax.random.randint(key_what, canvas.shape, 0, self.denoiser.vocab_size - 1)
        others += others >= mask_id  # any id but the mask's
        chosen = visible & (jax.random.uniform(key_where, canvas.shape) < self.schedule.replace)
        return example.replace(
            canvas=jnp.where(chosen, others, canvas), weights=example.weights + visible * _token_weights(batch)
        )

    def __call__(
        self, params: Any, example: Example, use_feedback: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """(sum of weights * nll in nats/token, nll [B, L]).

        use_feedback: [] bool, the coin. key: dropout, None for evaluation.
        """
        chex.assert_equal_shape([example.canvas, example.targets, example.weights])
        key_one, key_two = (None, None) if key is None else jax.random.split(key)
        # 2. Pass one, without gradient unless asked for, only when the coin says so.
        feedback = None
        if self.p_sm > 0:
            first = params if self.through else jax.lax.stop_gradient(params)
            statistics = self.readout.feedback_with_gradient if self.through else self.readout.feedback

            def pass_one():
                hidden = self.denoiser(first, example.canvas, mask=example.mask, dropout_key=key_one)
                masked = example.canvas == self.denoiser.mask_id
                given = jnp.zeros_like(masked) if example.given is None else example.given
                remembering = self.denoiser.softmask.remembering(masked, given)
                if example.coins is not None:
                    remembering &= example.coins[:, None]
                feedback = statistics(self.denoiser.head(first), hidden, remembering)
                feedback = feedback.replace(forwards=jnp.ones(len(masked), jnp.int32), time=example.time)
                return self.denoiser.softmask.attach(feedback, hidden)

            def skip():
                # All zeros: nothing is active.
                return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(pass_one))

            feedback = pass_one() if self.p_step == 1 else jax.lax.cond(use_feedback, pass_one, skip)
        # 3. Pass two, with gradient, on the soft-masked input; the loss of the masked tokens.
        hidden = self.denoiser(params, example.canvas, feedback, mask=example.mask, dropout_key=key_two)
        return self.readout.nll(self.denoiser.head(params), hidden, example.targets, example.weights)


@dataclasses.dataclass(frozen=True)
class ResponseDiffusion(SoftMaskedDiffusion):
    """Fine-tuning on responses, as Dream does it: another noise and another mean, the same two passes.

    batch['frozen'] (prompts) is never masked, and every row has at least one mask. Masked tokens weigh 1/t, divided by
    the number of masked tokens instead of that of all tokens.

    Attributes:
      parts: rows whose numbers leave the same remainder by `parts`, a micro-batch, are divided by their own masked
        tokens, and the losses add up: the reference's accumulation. 1: by those of the whole batch.
    """

    parts: int = 1

    @property
    def bound(self) -> SoftMaskedDiffusion:
        """With masks of every share, where training takes those of `times` alone."""
        return SoftMaskedDiffusion(self.denoiser, self.readout, self.p_sm, self.schedule)

    def _masked(self, batch: Batch, t: jax.Array, u: jax.Array) -> Example:
        tokens, learned = batch["tokens"], counted(batch) > 0
        # The reference's chance is 1 - alpha(t) and a floor.
        chance = 1 - self.schedule.alpha(t) + self.schedule.eps
        # The position that is masked first is masked in any case, so that every row teaches something.
        first = jnp.argmin(jnp.where(learned, u, jnp.inf), axis=1)[:, None] == jnp.arange(tokens.shape[1])
        masked = learned & ((u < chance[:, None]) | first)
        counts = masked.sum(1).reshape(-1, self.parts).sum(0)
        counts = jnp.tile(jnp.maximum(counts, 1), len(tokens) // self.parts)
        weights = masked * (self.schedule.weight(t) / counts)[:, None]
        canvas = jnp.where(masked, self.denoiser.mask_id, tokens)
        return Example(canvas, tokens, weights, batch.get("attend"), batch.get("frozen"), t)


@dataclasses.dataclass(frozen=True)
class NextToken:
    """The AR baseline: position i predicts token i + 1; the first token of a block is given."""

    denoiser: Denoiser
    readout: Readout
    p_step: float = 0.0

    def corrupt(self, key: jax.Array, batch: Batch) -> Example:
        tokens = batch["tokens"]
        return Example(tokens[:, :-1], tokens[:, 1:], _token_weights(self.predicted(batch)))

    @staticmethod
    def predicted(batch: Batch) -> Batch:
        """The batch without the first position of each block."""
        return {name: value[:, 1:] if value.ndim == 2 else value for name, value in batch.items()}

    def corrupt_by_number(self, key: jax.Array, batch: Batch) -> Example:
        return self.corrupt(key, batch)

    def __call__(
        self, params: Any, example: Example, use_feedback: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        hidden = self.denoiser(params, example.canvas, dropout_key=key)
        return self.readout.nll(self.denoiser.head(params), hidden, example.targets, example.weights)
