"""Block decoding: caches that change nothing where they must not, rows that do not depend on each other, counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_params

from smdlm.denoiser import Denoiser
from smdlm.feedback.committed import Stages
from smdlm.feedback.gates import ConstantGate
from smdlm.models.decoder import Decoder
from smdlm.ops.filters import Filters
from smdlm.readout import Readout
from smdlm.sampling.adaptive import Threshold
from smdlm.sampling.blocks import BlockDecoder, block_times
from smdlm.sampling.policies import Cap, Edit, Entropy, FirstHitting, MaxProbability
from smdlm.sampling.transfer import Transfer
from smdlm.softmask import SoftMask
from smdlm.tools.decoding import Case, _row, cases, counted

B, L, FIRST, BLOCK, V, MASK, PAD = 3, 12, 4, 4, 24, 20, 0
MODEL = Decoder(V, 26, 16, 2, heads=4, key_heads=2, hidden=24, rope_base=500.0, shift=True, tied=False, qkv_bias=True)
SOFT = SoftMask(k=2, gate=ConstantGate(0.6))
DENOISER = Denoiser(MODEL, V, MASK, SOFT)
PARAMS = make_params(DENOISER, noise=0.6)
KEYS = jax.random.split(jax.random.key(3), B)


# Rows are done at different times, and its carry goes on from block to block.
DECAYING = Threshold(0.3, start=0.5, decay=0.1)


def decoder(policy=DECAYING, **options):
    options = {"block": BLOCK, "filters": Filters(0.8, 0.9)} | options
    return BlockDecoder(DENOISER, Readout(k=2, chunk=5), policy, **options)


def prompts(rows=range(B)):
    """(canvas, seen): prompts of 4, 2 and 3 tokens."""
    canvas, seen = np.full((B, L), MASK, np.int32), np.ones((B, L), bool)
    tokens = np.random.default_rng(0).integers(0, MASK, (B, FIRST))
    for row, size in enumerate((4, 2, 3)):
        canvas[row, :FIRST], seen[row, : FIRST - size] = tokens[row], False
        canvas[row, : FIRST - size] = PAD
    return jnp.asarray(canvas[list(rows)]), jnp.asarray(seen[list(rows)])


def forwards(made, canvas, seen, keys=KEYS, first=FIRST, steps=8, **options):
    return list(made.forwards(PARAMS, keys, canvas, seen, first, steps, **options))


def tokens(*args, **options):
    return np.asarray(forwards(*args, **options)[-1].after.canvas)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_row_alone_is_the_row_in_a_batch(cache):
    """Bit for bit, feedback included: the same program runs copies of one row, which finish together."""
    made = decoder(cache=cache)
    together = forwards(made, *prompts())
    waits = np.stack([forward.waiting for forward in together])
    assert (waits.any(1) & ~waits.all(1)).any(), "no row waited for another"
    for row in range(B):
        alone = forwards(made, *prompts([row] * B), KEYS[jnp.array([row] * B)])
        ends = together[-1].after, alone[-1].after
        assert len(alone) <= len(together) and len(alone) == waits[:, row].sum()
        for got, wanted in zip(*(jax.tree.leaves((end.canvas, end.feedback, end.policy)) for end in ends), strict=True):
            assert np.array_equal(np.asarray(got)[row], np.asarray(wanted)[row])
    assert not (np.asarray(together[-1].after.canvas) == MASK).any()


def test_padding_changes_nothing():
    """The prompt of two tokens on a canvas of its own."""
    canvas, seen = prompts([1] * B)
    made = decoder(FirstHitting())
    padded, tight = tokens(made, canvas, seen), tokens(made, canvas[:, 2:], seen[:, 2:], first=FIRST - 2)
    np.testing.assert_array_equal(padded[:, 2:], tight)


def test_a_cache_of_what_is_computed_anyway():
    """One block over the whole canvas: every pass computes everything, so that a cache changes nothing."""
    made = decoder(cache="dual", block=0)
    canvas, seen = jnp.full((B, L), MASK).at[:, 3].set(5), jnp.ones((B, L), bool)
    cached, uncached = (forwards(d, canvas, seen, first=0, steps=12) for d in (made, decoder(block=0)))
    np.testing.assert_array_equal(cached[-1].after.canvas, uncached[-1].after.canvas)
    np.testing.assert_allclose(cached[-1].hidden, uncached[-1].hidden, rtol=1e-4, atol=1e-5)


def test_caches_keep_what_they_say():
    """Only the parts named are computed, and keys outside of them are those of the last full pass."""
    for cache, sizes in {"prefix": [L, 9, 9, 9, L, 5, 5, 5], "dual": [L, 5, 5, 5, L, 5, 5, 5], "none": [L] * 8}.items():
        run = forwards(decoder(FirstHitting(), cache=cache), *prompts())
        assert [forward.size for forward in run] == sizes
        assert [forward.block for forward in run] == [4] * 4 + [8] * 4
        for forward in run:
            if cache == "none":
                assert forward.after.cache is None
                continue
            before, after = np.asarray(forward.before.cache.keys), np.asarray(forward.after.cache.keys)
            changed = np.any(before != after, axis=(0, 1, 3, 4))
            inside = (np.arange(L) >= forward.start) & (np.arange(L) < forward.start + forward.size)
            assert not changed[~inside].any()
            assert changed[forward.block : forward.start + forward.size].all()


def test_feedback_goes_with_a_cache():
    canvas, seen = prompts()
    for cache in ("none", "prefix", "dual"):
        made = decoder(FirstHitting(), cache=cache)
        run = forwards(made, canvas, seen)
        for forward in run:
            feedback, masked = forward.after.feedback, np.asarray(forward.after.canvas) == MASK
            # One block ahead remembers too, and here that is everything.
            np.testing.assert_array_equal(feedback.active, masked)
            assert np.all(np.asarray(feedback.probs)[masked].sum(-1) > 0)
        np.testing.assert_array_equal(run[2].after.feedback.forwards, [3] * B)
        np.testing.assert_allclose(run[2].after.feedback.time, [5 / 8] * B)
    binary = tokens(decoder(FirstHitting(), cache="dual", use_feedback=False), canvas, seen)
    assert not np.array_equal(binary, run[-1].after.canvas)
    closed = dataclasses.replace(DENOISER, softmask=SoftMask(k=2, gate=ConstantGate(0.0)))
    np.testing.assert_array_equal(tokens(dataclasses.replace(made, denoiser=closed), canvas, seen), binary)


@pytest.mark.parametrize("cache, soft", [("none", True), ("prefix", True), ("dual", True), ("dual", False)])
def test_the_count_of_the_bench_is_that_of_a_run(cache, soft):
    made = decoder(FirstHitting(), cache=cache, use_feedback=soft)
    run = forwards(made, *prompts())
    sizes, read = Case(made, L, L - FIRST, 8).count()
    assert sizes == [forward.size for forward in run] and B * read == int(run[-1].after.read)


def test_the_bench_at_full_size():
    """Counted, not run: at L 1024 in blocks of 32 a dual cache takes at least 4 times fewer FLOPs, soft masks 3 %."""
    for size, per_forward in (("smollm", 1), ("dream", 4)):
        rows = counted(cases(size, 1024, 512, 32, per_forward))
        assert rows["dual, soft-masked"]["fewer_than_uncached"] > 4
        assert all(row["soft_masking_percent"] < 3 for name, row in rows.items())


def test_ratios_of_the_bench_are_of_one_round():
    """A machine that is three times slower in the second round changes none of them."""
    made = cases("smollm", 1024, 64, 32, 4)
    took = {"none, binary": 4.0, "none, soft-masked": 5.0, "dual, binary": 1.0, "dual, soft-masked": 1.25}
    rounds = [{name: (slower * seconds, 16) for name, seconds in took.items()} for slower in (1, 3, 1)]
    rows = {name: _row(name, made[name], rounds) for name in took}
    assert [row["faster_than_uncached"] for row in rows.values()] == [1, 1, 4, 4]
    assert [row["soft_masking_percent_of_time"] for row in rows.values()] == [0, 25, 0, 25]
    assert rows["dual, binary"]["tokens_per_s"] == 64 and rows["dual, binary"]["ms_per_forward"] == 62.5
    assert made["dual, binary"].blocks == 2


def test_ahead():
    """Without blocks ahead the next block begins without memory, and fewer positions are read out."""
    canvas, seen = prompts()
    near, far = (forwards(decoder(FirstHitting(), cache="dual", ahead=n), canvas, seen) for n in (0, 1))
    assert not np.asarray(near[3].after.feedback.active).any() and np.asarray(far[3].after.feedback.active).any()
    assert int(near[-1].after.read) == 2 * B * (4 + 3 + 2 + 1)
    assert int(far[-1].after.read) == int(near[-1].after.read) + B * BLOCK  # once, at the full pass of the first block
    assert not np.array_equal(near[-1].after.canvas, far[-1].after.canvas)


def test_parity():
    """The public code's full pass commits the first position of the block, and later passes begin at the block."""
    canvas, seen = prompts()
    ours, theirs = (forwards(decoder(FirstHitting(), cache="dual", parity=p), canvas, seen) for p in (False, True))
    assert [forward.size for forward in theirs] == [L, 4, 4, 4, L, 4, 4, 4]
    np.testing.assert_array_equal(np.asarray(theirs[0].after.canvas)[:, FIRST:] != MASK, [[True] + [False] * 7] * B)
    assert not np.array_equal(ours[-1].after.canvas, theirs[-1].after.canvas)
    assert block_times(4, 0.0).s.tolist() == [0.75, 0.5, 0.25, 0.0]


def test_parity_goes_by_the_filtered_distribution():
    canvas, seen = prompts()
    options = {"policy": Transfer(MaxProbability(), sampled=True), "filters": Filters(0.3, 0.8, top_k=3), "block": 0}
    made = [decoder(parity=True, **options), decoder(parity=True, **options | {"filters": Filters(0.3)})]
    (filtered,), (plain,) = (forwards(d, canvas, seen, steps=1) for d in made)
    draws = [d.readout.feedback(d.denoiser.head(PARAMS), plain.hidden, canvas == MASK, d.filters) for d in made]
    assert np.all(np.asarray(draws[0].probs)[..., 0] >= np.asarray(draws[1].probs)[..., 0])
    assert not np.array_equal(filtered.after.canvas, plain.after.canvas)


def test_one_program_per_size():
    canvas, seen = prompts()
    made = decoder(FirstHitting(), cache="dual")
    forwards(made, canvas, seen)
    count = BlockDecoder.step._cache_size()
    forwards(made, canvas.at[0, 3].set(7), seen.at[0, 0].set(False), jax.random.split(jax.random.key(9), B), steps=4)
    assert BlockDecoder.step._cache_size() == count


def test_a_policy_that_masks_again():
    """The prompt never changes, and nothing outside of the block."""
    run = forwards(decoder(Cap(eta=0.9)), *prompts(), steps=16)
    undone = 0
    for forward in run:
        before, after = np.asarray(forward.before.canvas), np.asarray(forward.after.canvas)
        outside = (np.arange(L) < forward.block) | (np.arange(L) >= forward.block + BLOCK)
        np.testing.assert_array_equal(before[:, outside], after[:, outside])
        undone += np.sum((before != MASK) & (after == MASK))
    assert undone and not (np.asarray(run[-1].after.canvas) == MASK).any()


def test_rows_that_have_ended_stand_still():
    def stopped(canvas):
        return np.array([True, False, (canvas[2, FIRST : FIRST + BLOCK] != MASK).all()])

    run = forwards(decoder(FirstHitting()), *prompts(), stopped=stopped)
    end = np.asarray(run[-1].after.canvas)
    assert (end[0, FIRST:] == MASK).all() and (end[1] != MASK).all()
    assert (end[2, : FIRST + BLOCK] != MASK).all() and (end[2, FIRST + BLOCK :] == MASK).all()
    assert len(run) == 8
    assert not forwards(decoder(), *prompts(), stopped=lambda canvas: np.ones(B, bool))


@pytest.mark.parametrize("steps", [2, 8])
def test_small_step_counts(steps):
    run = forwards(decoder(FirstHitting(), cache="dual"), *prompts(), steps=steps)
    assert len(run) == steps and not (np.asarray(run[-1].after.canvas) == MASK).any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block": 3}, "^generate.block: got 3 for 8 positions to fill, wanted a divisor, or 0$"),
        ({"block": -1}, "^generate.block: got -1, wanted at least 1, or 0"),
        ({"cache": "full"}, "^generate.cache: got 'full', wanted one of 'none', 'prefix', 'dual'$"),
        ({"ahead": -1}, "^generate.ahead: got -1"),
        ({"steps": 3}, "^sampling.steps: got 3 for 2 blocks, wanted a multiple of 2$"),
        ({"steps": 0}, "^sampling.steps: got 0 for 2 blocks"),
    ],
)
def test_refused(options, message):
    steps = options.pop("steps", 8)
    with pytest.raises(ValueError, match=message):
        forwards(decoder(**options), *prompts(), steps=steps)


def test_what_looks_back_at_committed_positions_is_refused():
    with pytest.raises(ValueError, match="^sampling.policy: got one that revises"):
        BlockDecoder(DENOISER, Readout(), Edit())
    with pytest.raises(ValueError, match="^softmask.variant: got one for committed positions"):
        BlockDecoder(dataclasses.replace(DENOISER, softmask=Stages()), Readout(), Entropy())


def test_a_causal_model_and_a_binary_one_are_refused():
    causal = Denoiser(dataclasses.replace(MODEL, causal=True, shift=False), V, MASK, None)
    with pytest.raises(ValueError, match="^generate: got a causal"):
        BlockDecoder(causal, Readout(), Entropy(), use_feedback=False)
    with pytest.raises(ValueError, match="^sampling.use_feedback: got True"):
        BlockDecoder(dataclasses.replace(DENOISER, softmask=None), Readout(), Entropy())
