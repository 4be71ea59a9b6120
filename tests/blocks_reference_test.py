"""Block decoding against a plain loop: policies that commit by confidence, with every cache and feedback that needs no
training (dInfer's ramp on a binary model)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks_test import BLOCK, DENOISER, FIRST, KEYS, MASK, PARAMS, B, L, forwards, prompts

from smdlm.feedback.gates import StepRamp
from smdlm.feedback.mixers import Add
from smdlm.full_softmask import FullSoftMask
from smdlm.ops.filters import Filters
from smdlm.readout import Readout
from smdlm.sampling.adaptive import EntropyBound, Factor, Threshold
from smdlm.sampling.blocks import CACHES, BlockDecoder
from smdlm.sampling.loop import Sampler
from smdlm.softmask import Feedback, SoftMask

K, STEPS, BLOCKS = 2, 8, (L - FIRST) // BLOCK


def ramp(start, growth, most):
    """No parameters: PARAMS are those of a binary model."""
    return dataclasses.replace(DENOISER, softmask=SoftMask(k=K, gate=StepRamp(start, growth, most), mixer=Add()))


RAMP = ramp(0.2, 0.2, 0.8)


def threshold(best, entropy, passes):
    least = max(0.25, 0.5 - 0.1 * passes)
    return (best >= least) | (best == best.max())


def factor(best, entropy, passes):
    order, chosen = np.argsort(-best), np.zeros(len(best), bool)
    for n, place in enumerate(order, 1):
        if n > 1 and (n + 1) * (1 - best[place]) > 2.2:
            break
        chosen[place] = True
    return chosen


def entropy_bound(best, entropy, passes):
    order, chosen = np.argsort(entropy), np.zeros(len(best), bool)
    for n in range(1, len(order) + 1):
        if n > 1 and entropy[order[: n - 1]].sum() > 2.5:
            break
        chosen[order[n - 1]] = True
    return chosen


POLICIES = {
    threshold: Threshold(0.25, start=0.5, decay=0.1),
    factor: Factor(2.2),
    entropy_bound: EntropyBound(2.5),
}


def greedy(policy, denoiser=RAMP, **options):
    options = {"block": BLOCK, "filters": Filters(0.0)} | options
    return BlockDecoder(denoiser, Readout(k=K, chunk=5), policy, **options)


@functools.partial(jax.jit, static_argnums=0)
def log_probs_of(denoiser, tokens, feedback, positions, mask, cache, start):
    """([B, Q, V] dense, cache)."""
    options = {"positions": positions, "mask": mask}
    if cache is None:
        hidden = denoiser(PARAMS, tokens, feedback, **options)
    else:
        hidden, cache = denoiser(PARAMS, tokens, feedback, cache=cache, start=start, **options)
    return Readout(k=K).log_probs(denoiser.head(PARAMS), hidden), cache


def plain_loop(rule, kind):
    """[(start, size, canvas [B, L], active [B, L])] of every forward pass, with Python's loops over rows."""
    canvas, seen = (np.array(x) for x in prompts())
    positions = np.maximum(np.cumsum(seen, 1) - 1, 0)
    memory = {"ids": np.zeros((B, L, K), int), "probs": np.zeros((B, L, K)), "neg_entropy": np.zeros((B, L))}
    active, passes, cache, history = np.zeros((B, L), bool), np.zeros(B, int), None, []
    if kind != "none":
        cache = DENOISER.model.cache(B, L)
    for begin in range(FIRST, L, BLOCK):
        for step in range(STEPS // BLOCKS):
            waiting = [row for row in range(B) if (canvas[row, begin : begin + BLOCK] == MASK).any()]
            if not waiting:
                break
            start, end = 0, L
            if kind != "none" and step > 0:
                start, end = begin - 1, begin + BLOCK if kind == "dual" else L
            part = slice(start, end)
            feedback = Feedback(
                *(
                    jnp.asarray(x[:, part], kind)
                    for x, kind in zip(memory.values(), ("int32", "f4", "f4"), strict=True)
                ),
                active=jnp.asarray(active[:, part]),
                forwards=jnp.asarray(passes),
            )
            arrays = (canvas[:, part], feedback, positions[:, part], seen[:, None])
            found, cache = log_probs_of(RAMP, *arrays, cache, start)
            found = np.asarray(found, np.float64)
            for row in waiting:
                for place in range(begin, min(end, begin + 2 * BLOCK)):  # this block, and one ahead
                    if canvas[row, place] == MASK:
                        log_p = found[row, place - start]
                        best = np.argsort(-log_p)[:K]
                        memory["ids"][row, place], memory["probs"][row, place] = best, np.exp(log_p[best])
                        memory["neg_entropy"][row, place] = np.sum(np.exp(log_p) * np.maximum(log_p, -1e9))
                        active[row, place] = True
                places = np.flatnonzero(canvas[row, begin : begin + BLOCK] == MASK) + begin
                chosen = rule(memory["probs"][row, places, 0], -memory["neg_entropy"][row, places], passes[row])
                if step == STEPS // BLOCKS - 1:
                    chosen[:] = True
                canvas[row, places[chosen]] = memory["ids"][row, places[chosen], 0]
                active[row] &= canvas[row] == MASK
                passes[row] += 1
            history.append((start, end - start, canvas.copy(), active.copy()))
    return history


def cases():
    """All of them; with the prefix cache, which is a program for every block, the slow run has all policies."""
    for rule in POLICIES:
        for cache in CACHES:
            slow = cache == "prefix" and rule is not threshold
            yield pytest.param(rule, cache, marks=[pytest.mark.slow] * slow, id=f"{rule.__name__}-{cache}")


@pytest.mark.parametrize("rule, cache", cases())
def test_every_pass_is_that_of_a_plain_loop(rule, cache):
    """Tokens, what is remembered, and the number of passes, the full ones that fill a cache included."""
    run, wanted = forwards(greedy(POLICIES[rule], cache=cache), *prompts(), steps=STEPS), plain_loop(rule, cache)
    assert [(forward.start, forward.size) for forward in run] == [(start, size) for start, size, _, _ in wanted]
    for forward, (_, _, canvas, active) in zip(run, wanted, strict=True):
        np.testing.assert_array_equal(forward.after.canvas, canvas)
        np.testing.assert_array_equal(forward.after.feedback.active, active)
    counts = np.stack([(np.asarray(f.before.canvas) == MASK).sum(1) - (np.asarray(f.after.canvas) == MASK).sum(1)
                       for f in run])  # fmt: skip
    assert BLOCKS < len(run) and counts.max() > 1, "no pass commits several tokens, or all do"


def test_a_decaying_threshold_goes_on_in_the_next_block():
    """dInfer's counts the passes of a sequence."""
    policy = Threshold(0.0, start=1.0, decay=0.25)
    carries = [np.asarray(f.after.policy) for f in forwards(greedy(policy), *prompts(), steps=16)]
    assert (carries[-1] > 4).any() and all((a <= b).all() for a, b in zip(carries, carries[1:], strict=False))


def test_a_ramp_that_begins_at_nothing_is_the_binary_model():
    """Bit for bit where it stays there; one that grows has changed nothing before the third pass."""
    made = {most: greedy(Factor(0.0), ramp(0.0, 1.0, most)) for most in (0.0, 1.0)}
    binary = forwards(greedy(Factor(0.0), use_feedback=False), *prompts(), steps=STEPS)
    still, grows = (forwards(made[most], *prompts(), steps=STEPS) for most in (0.0, 1.0))
    assert len(binary) == len(still) == len(grows) == L - FIRST  # factor 0: a token a pass
    for one, two in zip(binary, still, strict=True):
        np.testing.assert_array_equal(one.after.canvas, two.after.canvas)
        np.testing.assert_allclose(one.hidden, two.hidden, rtol=1e-5, atol=1e-6)
    differs = [not np.allclose(one.hidden, two.hidden, atol=1e-4) for one, two in zip(binary, grows, strict=True)]
    assert differs[:3] == [False, False, True]


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_the_whole_distribution_is_remembered_with_a_cache(cache):
    """The mean of all rows, as dInfer's: it needs the hidden states, which are kept of the positions that were read."""
    whole = FullSoftMask(k=K, gate=StepRamp(0.2, 0.2, 0.8), mixer=Add(), learn=False)
    run = forwards(greedy(Threshold(0.25), dataclasses.replace(RAMP, softmask=whole), cache=cache), *prompts())
    feedback, masked = run[0].after.feedback, np.asarray(run[0].after.canvas) == MASK
    np.testing.assert_array_equal(feedback.active, masked)
    np.testing.assert_array_equal(np.asarray(feedback.hidden)[masked], np.asarray(run[0].hidden)[masked])
    assert not (np.asarray(run[-1].after.canvas) == MASK).any()


def test_one_block_is_the_sampler():
    """Without padding and caches, greedy: the tokens of the compiled loop."""
    canvas = jnp.full((B, L), MASK).at[:, :FIRST].set(prompts()[0][:, :FIRST])
    policy = POLICIES[threshold]
    run = forwards(greedy(policy, block=0), canvas, jnp.ones((B, L), bool), steps=L - FIRST)
    sampler = Sampler(RAMP, Readout(k=K, chunk=5), policy, Filters(0.0), steps=L - FIRST)
    np.testing.assert_array_equal(run[-1].after.canvas, sampler(PARAMS, KEYS[0], canvas).tokens)
