"""What a cache changes: the same prompts with and without one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smdlm.mesh.arrays import fetch
from smdlm.sampling.blocks import BlockDecoder, Forward
from smdlm.sampling.generate import Batch, Generator, Prompt
from smdlm.sampling.passes import Now, Rows, State, window


@dataclasses.dataclass(frozen=True)
class Verified:
    """Cached against uncached decoding.

    Attributes:
      largest_logit_difference: at masked positions of the block, over all passes, each on the canvas and with the
        feedback that the cached run had there.
      differing: share of the filled positions that hold another token at the end; a single one that tips over may carry
        many with it.
      forwards, flops: of the cached run and of the uncached one.
    """

    largest_logit_difference: float
    differing: float
    forwards: tuple[int, int]
    flops: tuple[float, float]

    def summary(self) -> dict[str, float]:
        """What is reported."""
        return {
            "largest_logit_difference": self.largest_logit_difference,
            "share_of_tokens_that_differ": self.differing,
            "forwards_cached": self.forwards[0],
            "forwards_uncached": self.forwards[1],
            "flops_cached": self.flops[0],
            "flops_uncached": self.flops[1],
            "flops_saved": 1 - self.flops[0] / self.flops[1],
        }


def verify(generator: Generator, params: Any, prompts: Sequence[Prompt]) -> Verified:
    """Decodes twice. ValueError without a cache, or with nothing but infills, which use none."""
    continued = [prompt for prompt in prompts if not prompt.infill]
    if generator.decoder.cache == "none" or not continued:
        raise ValueError(
            f"--verify_cache: got generate.cache {generator.decoder.cache!r} and {len(continued)} prompts that are "
            "continued, wanted 'prefix' or 'dual' and at least 1"
        )
    plain = dataclasses.replace(generator, decoder=dataclasses.replace(generator.decoder, cache="none"))
    worst, same, filled = 0.0, 0, 0
    forwards, flops = np.zeros(2, int), np.zeros(2)
    for batch in generator.batches(continued):
        canvases = []
        for i, one in enumerate((generator, plain)):
            passes = list(_watched(one, params, batch, continued))
            worst = max(worst, *(difference for _, difference in passes))
            last = passes[-1][0].after
            canvases.append(fetch(last.canvas)[: len(batch.numbers), batch.first :])
            forwards[i] += len(passes)
            flops[i] += one.decoder.flops(batch.canvas.shape, [forward.size for forward, _ in passes], int(last.read))
        there = (canvases[0] != generator.tokenizer.mask_id) | (canvases[1] != generator.tokenizer.mask_id)
        same, filled = same + int(np.sum((canvases[0] == canvases[1]) & there)), filled + int(there.sum())
    return Verified(worst, 1 - same / filled, tuple(map(int, forwards)), tuple(map(float, flops)))


def _watched(generator: Generator, params: Any, batch: Batch, prompts: Sequence[Prompt]):
    """(a pass without its state's cache, largest difference of its logits from those of a pass without one)."""
    decoder = generator.decoder
    block, _ = decoder.plan(batch.canvas.shape[1], batch.first, batch.steps)
    plain, rows = dataclasses.replace(decoder, cache="none"), None
    for forward in generator.forwards(params, batch, prompts):
        worst = 0.0
        if decoder.cache != "none":
            if rows is None:
                rows, _ = plain.start(generator.place(batch.canvas), generator.place(batch.seen), jnp.zeros(0))
            before = forward.before.replace(cache=None)
            worst = float(difference(plain, block, params, rows, before, forward.now, forward.hidden))
        yield _light(forward), worst


def _light(forward: Forward) -> Forward:
    """Without the arrays that fill a device's memory when a run is kept."""
    return dataclasses.replace(forward, before=None, after=forward.after.replace(cache=None), hidden=None)


@functools.partial(jax.jit, static_argnums=(0, 1))
def difference(
    plain: BlockDecoder, block: int, params: Any, rows: Rows, before: State, now: Now, hidden: jax.Array
) -> jax.Array:
    """[] f32: the largest difference between the logits of `hidden` [B, Q, D], what a pass with a cache computed, and
    those of the whole canvas computed anew, at the masked positions of the block."""
    length, head = before.canvas.shape[1], plain.denoiser.head(params)
    whole, _ = plain.denoise(length, params, rows, before, jnp.int32(0))
    got, wanted = (head.logits(window(h, now.block - at, block)) for h, at in ((hidden, now.query), (whole, 0)))
    masked = window(before.canvas, now.block, block) == plain.denoiser.mask_id
    return jnp.max(jnp.where(masked & now.waiting[:, None], jnp.abs(got - wanted).max(-1), 0.0))
