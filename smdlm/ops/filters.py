"""Which tokens may be drawn (temperature, nucleus, top-k), and the draw itself: one uniform per position.

All functions work on rows of a probability matrix [N, V]; nothing is ever sorted.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from smdlm.mesh import traced

BLOCK = 128  # vocabulary ids per block of the two-level inverse CDF; the lane width of a TPU

# Thresholds that a pass of the nucleus search tries, and passes before it first asks whether all rows are done; else
# (1, 0). On a GPU a pass costs reading the rows from HBM, whatever is done with them, and the question costs a copy to
# the host: four passes of 16 do what sixteen of one did.
SEARCH = {"gpu": (16, 4)}


@dataclasses.dataclass(frozen=True)
class Filters:
    """Temperature, then top-p, then top-k.

    Attributes:
      temperature: 0 takes the most probable token.
      top_p: 1 keeps everything.
      top_p_rule: 'standard' keeps the token that crosses p; 'reference' drops it (the public soft-masking code keeps
        tokens whose inclusive cumulative probability is <= p, and always the first).
      top_k: 0 keeps everything; equal probabilities are kept or dropped together.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_p_rule: str = "standard"
    top_k: int = 0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"sampling.temperature: got {self.temperature}, wanted >= 0 (0 takes the argmax)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p: got {self.top_p}, wanted 0 < top_p <= 1 (1 keeps everything)")
        if self.top_p_rule not in ("standard", "reference"):
            raise ValueError(f"sampling.top_p_rule: got {self.top_p_rule!r}, wanted 'standard' or 'reference'")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k: got {self.top_k}, wanted at least 1, or 0 to keep everything")

    @property
    def plain(self) -> bool:
        """Whether the distribution is that of the model, of which the best token may be taken."""
        return self.temperature in (0, 1) and self.top_p >= 1 and not self.top_k

    def log_probs(self, logits: jax.Array, excluded: float) -> jax.Array:
        """Logarithms of `probs`, not renormalised either, `excluded` where they are 0; temperature 0 counts as 1."""
        filters = self if self.temperature else dataclasses.replace(self, temperature=1.0)
        probs = filters.probs(logits)
        return jnp.where(probs > 0, jnp.log(probs), excluded)

    def probs(self, logits: jax.Array, top: jax.Array | None = None) -> jax.Array:
        """Filtered probabilities, not renormalised: logits [N, V] f32 -> [N, V] f32. Not for temperature 0.

        top: the largest logit of each row [N, 1], for who has it: finding it is a pass over all of them.
        """
        top = logits.max(-1, keepdims=True) if top is None else top
        if self.temperature != 1:
            logits, top = logits / self.temperature, top / self.temperature
        unnormalised = jnp.exp(logits - top)
        probs = unnormalised / unnormalised.sum(-1, keepdims=True)
        threshold = None if self.top_p >= 1 else nucleus_threshold(probs, self.top_p, self.top_p_rule)
        if self.top_k:
            largest = kth_largest(probs, self.top_k)
            threshold = largest if threshold is None else jnp.maximum(threshold, largest)
        return probs if threshold is None else jnp.where(probs >= threshold[:, None], probs, 0.0)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def nucleus_threshold(probs: jax.Array, top_p: float, rule: str = "standard") -> jax.Array:
    """The smallest probability that top-p keeps: [N, V] f32 -> [N] f32.

    A search in the bits of the threshold, whose mass {p >= threshold} falls as it rises: for positive floats the order
    of the bits is the order of the values, so half of the steps are spent on the exponent and half inside an octave.
    Each pass over the rows tries M thresholds that part the bounds evenly (`SEARCH`); M = 1 is bisection. A row is done
    when at most one token lies between the bounds; equal probabilities are kept or dropped together.
    """
    candidates, sure = SEARCH.get(traced.platform(), (1, 0))

    def open_rows(state):
        low, high, mass_low, mass_high = state
        # Tokens between the bounds are at least `low` each, so a gap below 2 low holds at most one of them; 1.5 leaves
        # room for the rounding of the two sums.
        return (high - low > 1) & (mass_low - mass_high >= 1.5 * _float(low))

    def narrow(state):
        low, high, mass_low, mass_high = state
        step, rest = jnp.divmod(high - low, candidates + 1)
        tried = [low + j * step + jnp.maximum(rest - candidates - 1 + j, 0) for j in range(1, candidates + 1)]
        tried_MxN, mass_MxN = jnp.stack(tried), jnp.stack(_masses(probs, [_float(bits) for bits in tried]))
        # 'reference' keeps what does not exceed p, so a mass equal to p belongs to the upper side there.
        enough = mass_MxN >= top_p if rule == "standard" else mass_MxN > top_p
        keep = open_rows(state)
        enough, short = enough & keep, ~enough & keep
        # The mass falls with the threshold: the bounds are the last candidate with enough and the first without.
        return (
            jnp.maximum(low, jnp.where(enough, tried_MxN, 0).max(0)),
            jnp.minimum(high, jnp.where(short, tried_MxN, _bits(jnp.float32(jnp.inf))).min(0)),
            jnp.minimum(mass_low, jnp.where(enough, mass_MxN, jnp.inf).min(0)),
            jnp.maximum(mass_high, jnp.where(short, mass_MxN, 0).max(0)),
        )

    rows, vocab = probs.shape
    top = probs.max(-1)
    # All tokens below (1 - p) / V together weigh less than 1 - p; halved against rounding of the sum.
    low = jnp.minimum(_bits(jnp.full(rows, 0.5 * (1 - top_p) / vocab, jnp.float32)), _bits(top))
    state = (low, _bits(top) + 1, jnp.ones(rows), jnp.zeros(rows))
    for _ in range(sure):
        state = narrow(state)
    low, high, _, _ = jax.lax.while_loop(lambda s: jnp.any(open_rows(s)), narrow, state)
    return _float(low) if rule == "standard" else jnp.minimum(_float(high), top)


def _masses(probs: jax.Array, thresholds: list[jax.Array]) -> list[jax.Array]:
    """The sum of {p >= threshold} of each row [N], for each of the thresholds [N], in one pass over probs [N, V]."""
    kept = [jnp.where(probs >= threshold[:, None], probs, 0.0) for threshold in thresholds]

    def add(sums: list[jax.Array], terms: list[jax.Array]) -> list[jax.Array]:
        return [a + b for a, b in zip(sums, terms, strict=True)]

    return jax.lax.reduce(kept, [jnp.float32(0)] * len(kept), add, (1,))


def kth_largest(probs: jax.Array, k: int) -> jax.Array:
    """The k-th largest entry of each row, 0 if the row has fewer: [N, V] f32 >= 0 -> [N] f32, by bisection as above."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # at least k entries are >= low, fewer are >= high
        middle = low + (high - low) // 2
        enough = jnp.sum(probs >= _float(middle)[:, None], -1) >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(len(probs), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, _bits(jnp.full(len(probs), jnp.inf))))
    return _float(low)


def inverse_cdf(probs: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws an id per row with one uniform: probs [N, V] (>= 0, any sum > 0), u [N] in [0, 1) -> ids [N], total [N].

    Against V Gumbels per position this is one random number and no sort, and f32 Gumbel noise, whose truncated tail
    lowers the temperature of every draw, never enters. Two levels (blocks, then ids of one block) keep the running
    sums short; ids of probability 0 are never drawn.
    """
    rows, vocab = probs.shape
    blocks = jnp.pad(probs, ((0, 0), (0, -vocab % BLOCK))).reshape(rows, -1, BLOCK)
    ends = jnp.cumsum(blocks.sum(-1), -1)
    total = ends[:, -1]
    # u * total can round up to total: the largest float below it still falls into the last non-empty block.
    target = jnp.minimum(u * total, jnp.nextafter(total, jnp.zeros_like(total)))[:, None]
    block = jnp.sum(ends <= target, -1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    start = jnp.where(block > 0, jnp.take_along_axis(ends, jnp.maximum(block - 1, 0)[:, None], axis=1)[:, 0], 0.0)
    above = (start[:, None] + jnp.cumsum(inside, -1)) > target
    # The two summation orders may differ by an ulp, so that nothing exceeds the target: then the last possible id.
    last = BLOCK - 1 - jnp.argmax((inside > 0)[:, ::-1], -1)
    within = jnp.where(above.any(-1), jnp.argmax(above, -1), last)
    return (block * BLOCK + within).astype(jnp.int32), total
