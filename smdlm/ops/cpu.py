"""Forms of matrix products that XLA's CPU backend runs fast. The results are those of the plain formulas.

Shapes: B examples, L positions, M keys, H query heads, G key heads, E head width; Q = L * H / G queries of a key head.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from smdlm.mesh import traced

HIDDEN = -1e30  # the score of a key that may not be seen; finite, so that a row without keys gives no NaN

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, causal: bool) -> jax.Array:
    """Softmax attention; shapes and arguments as in `models.attention`, where this form is chosen."""
    batch, length, heads, width = query.shape
    groups = key.shape[2]
    per_group = heads // groups
    if causal:
        order = jnp.tri(length, dtype=bool)[None]
        mask = order if mask is None else mask & order
    if mask is not None:
        mask = mask[:, None]
        if mask.shape[2] > 1:
            mask = jnp.tile(mask, (1, 1, per_group, 1))
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    # Heads that read the same keys stand one behind the other, as more queries.
    out = _attention(query.reshape(batch, groups, per_group * length, width), key, value, mask)
    return jnp.swapaxes(out.reshape(batch, heads, length, width), 1, 2)


@jax.custom_vjp
def _attention(
    query_BxGxQxE: jax.Array, key_BxGxMxE: jax.Array, value_BxGxMxE: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """softmax(query key^T / sqrt(E)) value: [B, G, Q, E]. mask: [B or 1, 1, Q or 1, M] bool or None.

    Scores are scaled through the query, normalised after the product with the values, and formed again from the
    logsumexp in the backward pass, so that few arrays of the size of the scores pass through memory.
    """
    return _attention_forward(query_BxGxQxE, key_BxGxMxE, value_BxGxMxE, mask)[0]


def _attention_forward(query_BxGxQxE, key_BxGxMxE, value_BxGxMxE, mask):
    scaled = query_BxGxQxE * query_BxGxQxE.shape[-1] ** -0.5
    query_BxGxQxE, key_BxGxMxE, value_BxGxMxE = checkpoint_name((scaled, key_BxGxMxE, value_BxGxMxE), "attention")
    scores_BxGxQxM = _dot("bgqe,bgme->bgqm", query_BxGxQxE, key_BxGxMxE)
    if mask is not None:
        scores_BxGxQxM = jnp.where(mask, scores_BxGxQxM, HIDDEN)
    top = scores_BxGxQxM.max(-1, keepdims=True)
    exp_BxGxQxM = jnp.exp(scores_BxGxQxM - top)
    total = exp_BxGxQxM.sum(-1, keepdims=True)
    dtype = value_BxGxMxE.dtype
    out_BxGxQxE = (_dot("bgqm,bgme->bgqe", exp_BxGxQxM.astype(dtype), value_BxGxMxE) / total).astype(dtype)
    logsumexp_BxGxQ = (top + jnp.log(total))[..., 0]
    out_BxGxQxE, logsumexp_BxGxQ = checkpoint_name((out_BxGxQxE, logsumexp_BxGxQ), "attention")
    return out_BxGxQxE, (query_BxGxQxE, key_BxGxMxE, value_BxGxMxE, mask, out_BxGxQxE, logsumexp_BxGxQ)


def _attention_backward(residuals, d_out_BxGxQxE):
    query_BxGxQxE, key_BxGxMxE, value_BxGxMxE, mask, out_BxGxQxE, logsumexp_BxGxQ = residuals
    # Probabilities [M, Q], transposed: then no product below contracts the first axis of a large left operand, which is
    # several times slower on a CPU. The barriers keep XLA from turning the one with key.T back into that form.
    barrier = jax.lax.optimization_barrier
    scores_BxGxMxQ = _dot("bgme,bgqe->bgmq", key_BxGxMxE, query_BxGxQxE)
    if mask is not None:
        scores_BxGxMxQ = jnp.where(jnp.swapaxes(mask, 2, 3), scores_BxGxMxQ, HIDDEN)
    probs_BxGxMxQ = jnp.exp(scores_BxGxMxQ - logsumexp_BxGxQ[:, :, None])
    # The derivative of a softmax: d_score = p (d_p - mean of d_p under p), whose mean is d_out . out.
    mean = jnp.sum(d_out_BxGxQxE.astype(jnp.float32) * out_BxGxQxE, -1)[:, :, None]
    d_scores_BxGxMxQ = probs_BxGxMxQ * (_dot("bgme,bgqe->bgmq", value_BxGxMxE, d_out_BxGxQxE) - mean)
    probs_BxGxMxQ = probs_BxGxMxQ.astype(value_BxGxMxE.dtype)
    d_scores_BxGxMxQ = d_scores_BxGxMxQ.astype(value_BxGxMxE.dtype)
    # Then those of the three products.
    key_BxGxExM = barrier(jnp.swapaxes(key_BxGxMxE, 2, 3))
    d_query_BxGxExQ = barrier(_dot("bgem,bgmq->bgeq", key_BxGxExM, d_scores_BxGxMxQ))
    d_query = jnp.swapaxes(d_query_BxGxExQ, 2, 3) * query_BxGxQxE.shape[-1] ** -0.5
    d_key = _dot("bgmq,bgqe->bgme", d_scores_BxGxMxQ, query_BxGxQxE)
    d_value = _dot("bgmq,bgqe->bgme", probs_BxGxMxQ, d_out_BxGxQxE)
    return (
        d_query.astype(query_BxGxQxE.dtype),
        d_key.astype(key_BxGxMxE.dtype),
        d_value.astype(value_BxGxMxE.dtype),
        None,
    )


_attention.defvjp(_attention_forward, _attention_backward)


def tensordot(x: jax.Array, matrix: jax.Array, inputs: int) -> jax.Array:
    """`jnp.tensordot`: x [..., *inputs] and matrix [*inputs, *outputs], `inputs` axes, -> [..., *outputs].

    In a CPU's form where the program is for a CPU; not on a mesh that splits heads: it merges their axes with others,
    and they would no longer be split.
    """
    if traced.platform() != "cpu" or "tensor" in traced.used():
        return jnp.tensordot(x, matrix, inputs)
    contracted = math.prod(matrix.shape[:inputs])
    out = _matmul(x.reshape(-1, contracted), matrix.reshape(contracted, -1))
    return out.reshape(*x.shape[:-inputs], *matrix.shape[inputs:])


@jax.custom_vjp
def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w: what is before a product is not fused into it, and the backward pass multiplies by a transposed
    copy of w; both up to three times as fast as what XLA would do."""
    return jax.lax.optimization_barrier(x) @ w


def _matmul_forward(x, w):
    return _matmul(x, w), (x, w)


def _matmul_backward(residuals, d_out):
    x, w = residuals
    d_out, w_t = jax.lax.optimization_barrier((d_out, w.T))
    return d_out @ w_t, x.T @ d_out


_matmul.defvjp(_matmul_forward, _matmul_backward)
