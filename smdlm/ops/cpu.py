"""Forms of matrix products that XLA's CPU backend runs fast. The results are those of the plain formulas."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from smdlm.mesh import traced

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
        if per_group > 1 and mask.shape[2] > 1:
            mask = jnp.tile(mask, (1, 1, per_group, 1))
    swap = lambda x: jnp.swapaxes(x, 1, 2)
    # Heads that read the same keys stand one behind the other, as more queries.
    queries = swap(query).reshape(batch, groups, per_group * length, width)
    out = _attention(queries, swap(key), swap(value), mask)
    return swap(out.reshape(batch, heads, length, width))


@jax.custom_vjp
def _attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """query [B, H, L, E], key and value [B, H, M, E], mask [B or 1, 1, L or 1, M] bool or None.

    Scores are scaled through the query, normalised after the product with the values, and formed again from the
    logsumexp in the backward pass, so that few arrays of the size of the scores pass through memory.
    """
    return _attention_forward(query, key, value, mask)[0]


def _attention_forward(query, key, value, mask):
    query, key, value = checkpoint_name((query * query.shape[-1] ** -0.5, key, value), "attention")
    scores = _dot("bhle,bhme->bhlm", query, key)
    if mask is not None:
        scores = jnp.where(mask, scores, -1e30)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = (_dot("bhlm,bhme->bhle", weights.astype(value.dtype), value) / total).astype(value.dtype)
    out, partition = checkpoint_name((out, (top + jnp.log(total))[..., 0]), "attention")
    return out, (query, key, value, mask, out, partition)


def _attention_backward(residuals, d_out):
    query, key, value, mask, out, partition = residuals
    # Weights [M, L], transposed: then no product below contracts the first axis of a large left operand, which is
    # several times slower on a CPU. The barriers keep XLA from turning the one with key.T back into that form.
    scores = _dot("bhme,bhle->bhml", key, query)
    if mask is not None:
        scores = jnp.where(jnp.swapaxes(mask, 2, 3), scores, -1e30)
    weights = jnp.exp(scores - partition[:, :, None])
    mean = jnp.sum(d_out.astype(jnp.float32) * out, -1)[:, :, None]
    d_scores = weights * (_dot("bhme,bhle->bhml", value, d_out) - mean)
    weights, d_scores = weights.astype(value.dtype), d_scores.astype(value.dtype)
    barrier = jax.lax.optimization_barrier
    d_query_t = barrier(_dot("bhem,bhml->bhel", barrier(jnp.swapaxes(key, 2, 3)), d_scores))
    d_query = jnp.swapaxes(d_query_t, 2, 3) * query.shape[-1] ** -0.5
    d_key, d_value = _dot("bhml,bhle->bhme", d_scores, query), _dot("bhml,bhle->bhme", weights, d_out)
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)


def tensordot(x: jax.Array, weights: jax.Array, inputs: int) -> jax.Array:
    """`jnp.tensordot`: x [..., *inputs] and weights [*inputs, *outputs], `inputs` axes, -> [..., *outputs].

    In a CPU's form where the program is for a CPU; not on a mesh that splits heads: it merges their axes with others,
    and they would no longer be split.
    """
    if traced.platform() != "cpu" or "tensor" in traced.used():
        return jnp.tensordot(x, weights, inputs)
    contracted = math.prod(weights.shape[:inputs])
    out = _matmul(x.reshape(-1, contracted), weights.reshape(contracted, -1))
    return out.reshape(*x.shape[:-inputs], *weights.shape[inputs:])


@jax.custom_vjp
def _matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w: what is before a product is not fused into it, and the backward pass multiplies by a transposed
    copy of w; both up to three times as fast as what XLA would do."""
    return jax.lax.optimization_barrier(x) @ w


def _matmul_backward(residuals, g):
    x, w = residuals
    g, w_t = jax.lax.optimization_barrier((g, w.T))
    return g @ w_t, x.T @ g


_matmul.defvjp(lambda x, w: (_matmul(x, w), (x, w)), _matmul_backward)
