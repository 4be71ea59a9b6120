"""Dream's generation and Fast-dLLM's block decoding, token for token; single draws; the number of tokens per step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden.arrays import NOISE, TOKENS, Group, largest
from golden.dream import DREAM, load_dream
from golden.generation import Budget, Threshold, Transfer, decoder, history, played, replayed, settings
from smdlm.models.base import Head
from smdlm.ops.filters import Filters
from smdlm.readout import Readout
from smdlm.sampling.blocks import block_times
from smdlm.sampling.policies import Entropy

LOGITS = Group("generation logits", 1e-4)
SOFT_LOGITS = Group("soft-masked generation logits", 5e-3)
DRAWS = Group("draws", 0)
CONFIDENCES = Group("confidences of draws", 1e-6)  # as a share of the largest logit at its temperature


def names(file, chosen=lambda run: True):
    if not DREAM.has(file):
        return []
    return [name for name, run in settings(file).items() if chosen(run)]


@pytest.mark.parametrize("name", names("generate.json"))
def test_history(name):
    stored, run = DREAM.arrays("generate.npz"), settings("generate.json")[name]
    made, params, seen, forwards = replayed(name)
    stored.check(TOKENS, f"{name}__history", history(forwards, run["steps"]))
    if f"{name}__logits" in stored:
        logits = [made.denoiser.head(params).logits(forward.hidden) for forward in forwards]
        where = (seen & np.concatenate([seen[:, :1], seen[:, :-1]], axis=1))[None, ..., None]
        stored.check(SOFT_LOGITS if run["sm"] else LOGITS, f"{name}__logits", np.stack(logits), where=where)


def test_times_of_the_histories():
    stored = DREAM.arrays("generate.npz")
    for match in stored.matches(r"timesteps_(\d+)"):
        times = block_times(int(match[1]), 1e-3)
        stored.check(NOISE, match[0], np.append(times.t, np.append(times.s, 1e-3)[-1]))
        assert np.array_equal(times.s[:-1], times.t[1:]) and times.s[-1] == 0


def test_tokens_per_step():
    stored = DREAM.arrays("transfer_schedules.npz")
    for match in stored.matches(r"timesteps_(\d+)"):
        stored.check(NOISE, match[0], np.append(block_times(int(match[1]), 1e-3).t, 1e-3))

    def body(left, times):
        count = Transfer(Entropy()).count(left, times)
        return left - count, count[0]

    for match in stored.matches(r"L(\d+)_s(\d+)"):
        masks, steps = map(int, match.groups())
        _, counts = jax.lax.scan(body, jnp.array([masks]), jax.tree.map(jnp.asarray, block_times(steps, 1e-3)))
        stored.check(TOKENS, match[0], counts)


# Fast-dLLM


def is_bug(run):
    """With one step per block the public code runs a second pass, commits nothing in it and leaves the masks."""
    return run["cached"] and not run["error"] and run["remaining_masks"] > 0


def block_decoder(run):
    if not run["cached"]:
        return decoder(Budget(run["threshold"], run["steps"]))
    cache = "dual" if run["dual_cache"] else "prefix"
    # Without a threshold it goes by the entropy, whatever it is asked for.
    policy = Threshold(run["threshold"]) if run["alg"] == "confidence_threshold" else Transfer(Entropy())
    return decoder(policy, block=run["block_length"], cache=cache)


@functools.cache
def run_blocks(name):
    stored, run = DREAM.arrays("fastdllm.npz"), settings("fastdllm.json")[name]
    start = stored[f"{name}__x_before"][0]
    first = stored["prompt"].shape[1]
    assert np.array_equal(start[:, :first], stored["prompt" if run["batch"] == 1 else f"prompt_batch{run['batch']}"])
    made, params = block_decoder(run)
    # With a threshold its steps mean nothing.
    steps = start.shape[1] - first if run["alg"] == "confidence_threshold" else run["steps"]
    return made, params, played(made, params, start, np.ones(start.shape, bool), first, steps)


@pytest.mark.parametrize("name", names("fastdllm.json", lambda run: not run["error"] and not is_bug(run)))
def test_block_run(name):
    stored, run = DREAM.arrays("fastdllm.npz"), settings("fastdllm.json")[name]
    made, params, forwards = run_blocks(name)
    assert len(forwards) == run["nfe"]
    stored.check(TOKENS, f"{name}__x_before", np.stack([forward.before.canvas for forward in forwards]))
    stored.check(TOKENS, f"{name}__sequences", forwards[-1].after.canvas)
    stored.check(TOKENS, f"{name}__query_len", [forward.size for forward in forwards])
    stored.check(TOKENS, f"{name}__query_start", [forward.start for forward in forwards])
    for i, forward in enumerate(forwards):
        key = f"{name}__logits_{i}"
        if key in stored:  # ours are shifted, and the first has its own: the last of the stored ones predicts nothing
            got = np.asarray(made.denoiser.head(params).logits(forward.hidden))
            stored.check(LOGITS, key, np.concatenate([got[:, 1:], stored[key][:, -1:]], axis=1))
            assert np.allclose(got[:, 0], stored[key][:, 0], atol=1e-4)


@pytest.mark.parametrize("name", names("fastdllm.json", is_bug))
def test_one_step_per_block(name):
    """Ours fills the block in its only pass."""
    stored, run = DREAM.arrays("fastdllm.npz"), settings("fastdllm.json")[name]
    _, _, forwards = run_blocks(name)
    blocks = (stored["prompt"].shape[1] - stored[f"{name}__x_before"].shape[2]) // -run["block_length"]
    assert len(forwards) == run["steps"] == blocks
    assert not (np.asarray(forwards[-1].after.canvas) == load_dream().config["mask_token_id"]).any()
    stored.no_result(*(f"{name}__{what}" for what in ("sequences", "query_len", "query_start")))


# Single draws


def test_draws():
    """The public code's confidence is that of the drawn token, the margin or the entropy of what it is drawn from."""
    stored, runs = DREAM.arrays("sample_tokens.npz"), settings("sample_tokens.json")
    logits, u = jnp.asarray(stored["logits"])[None], jnp.asarray(stored["uniform"])[None]
    vocab = logits.shape[-1]
    head, masked = Head(jnp.eye(vocab), jnp.zeros(vocab)), jnp.ones(logits.shape[:2], bool)
    readout, found = Readout(k=2, chunk=17), {}
    with jax.disable_jit():
        for run in runs:
            filters = Filters(run["temperature"], run["top_p"] or 1.0, top_k=run["top_k"] or 0)
            if filters not in found:
                draw = readout.draw(head, logits, masked, u, filters)
                found[filters] = draw, readout.feedback(head, logits, masked, filters)
            draw, seen = found[filters]
            confidence = {
                "plain": jnp.exp(draw.log_prob) if filters.temperature else seen.probs[..., 0],
                "margin": seen.probs[..., 0] - seen.probs[..., 1],
                "entropy": seen.neg_entropy,
            }[run["mode"]]
            stored.check(DRAWS, f"s{run['i']}_x0", draw.ids[0])
            size = max(1.0, largest(stored["logits"]) / (filters.temperature or 1.0))
            stored.check(CONFIDENCES, f"s{run['i']}_conf", confidence[0], size=size)
    for found in stored.matches(r"top_(p|k)_(.*)_keep"):
        filters = Filters(top_p=float(found[2])) if found[1] == "p" else Filters(top_k=int(found[2]))
        stored.check(DRAWS, found[0], filters.probs(logits[0]) > 0)
