"""Arithmetic on one row of logits or log-probabilities: largest entries, entropy, likelihood. It knows no model.

Shapes: C rows, V vocabulary, K candidates.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def neg_entropy(log_probs: jax.Array) -> jax.Array:
    """Sum of p log p over the last axis, in nats: [..., V] -> [...]. 0 * log 0 counts as 0."""
    probs = jnp.exp(log_probs)
    return jnp.sum(jnp.where(probs > 0, probs * log_probs, 0.0), axis=-1)


def _largest(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest by k sweeps of max; vectorises where `lax.top_k` becomes a sort, and compiles on every backend."""
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    values, ids = [], []
    for _ in range(k):
        top = x.max(-1, keepdims=True)
        first = jnp.min(jnp.where(x == top, index, x.shape[-1]), -1, keepdims=True)
        x = jnp.where(index == first, -jnp.inf, x)
        values.append(top)
        ids.append(first)
    return jnp.concatenate(values, -1), jnp.concatenate(ids, -1)


def top_k(x: jax.Array, k: int, block: int = 128) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` over the last axis for small k, several times faster: finite [..., V] -> values, ids [..., k].

    The k largest values lie in the k blocks with the largest maxima, so one vectorised max over blocks leaves only
    k * block candidates. Ties go to the lowest index, exactly as in `lax.top_k`.
    """
    vocab = x.shape[-1]
    if vocab <= 2 * k * block:
        return _largest(x, k)
    pad = -vocab % block
    if pad:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)], constant_values=-jnp.inf)
    blocks = x.reshape(*x.shape[:-1], -1, block)
    _, best = _largest(blocks.max(-1), k)
    best = jnp.sort(best, axis=-1)  # ascending blocks keep ties in index order below
    candidates = jnp.take_along_axis(blocks, best[..., None], axis=-2)
    ids = best[..., None] * block + jnp.arange(block, dtype=jnp.int32)
    values, where = _largest(candidates.reshape(*x.shape[:-1], -1), k)
    return values, jnp.take_along_axis(ids.reshape(*x.shape[:-1], -1), where, axis=-1)


def statistics(logits: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """logits [C, V] and the K largest of each row [C, K] -> (probs [C, K], neg_entropy [C]): one exponential each."""
    shifted = logits - values[:, :1]
    exp = jnp.exp(shifted)
    total = exp.sum(-1)
    entropy = jnp.sum(exp * shifted, -1) / total - jnp.log(total)
    return jnp.exp(values - values[:, :1]) / total[:, None], entropy


def cross_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """logits [C, V], targets [C] -> (nll [C], log of the partition function [C])."""
    top = logits.max(-1)
    partition = top + jnp.log(jnp.exp(logits - top[:, None]).sum(-1))
    return partition - jnp.take_along_axis(logits, targets[:, None], 1)[:, 0], partition
