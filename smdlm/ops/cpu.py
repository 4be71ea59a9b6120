"""Forms of matrix products that XLA's CPU backend runs fast. The results are those of the plain formulas.

Shapes: B examples, L positions, M keys, H query heads, G key heads, E head width; Q = L * H / G queries of a key head;
N rows, I inputs, O outputs of a linear map.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from smdlm.mesh import traced

PRODUCTS = ("dtype", "bfloat16")  # what `operands` can be told
HIDDEN = -1e30  # the score of a key that may not be seen; finite, so that a row without keys gives no NaN

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
_barrier = jax.lax.optimization_barrier


def operands(dtype: Any, products: str) -> Any:
    """The type in which a large product of a computation in `dtype` takes its operands.

    products: 'dtype' takes them as they are; 'bfloat16' rounds them, by 0.4 % at most, if the program is for a CPU: one
    with bfloat16 instructions multiplies them three times as fast as float32. Sums are formed and kept in float32: in
    bfloat16 a sum would lose all terms below 0.4 % of it. Accelerators have jax_default_matmul_precision instead.
    """
    return jnp.dtype(jnp.bfloat16 if products == "bfloat16" and traced.platform() == "cpu" else dtype)


# The products of a linear map x [N, I], w [I, O], forward and backward, of operands of one type, in float32. In
# bfloat16 each has the form for which XLA's CPU backend has a fast kernel: its left operand lies in memory row by row
# and is summed over its last axis. One core with avx512_bf16 does 200 to 400 GFLOP/s in these forms (4096 x 192 x 768),
# 16 where the left operand is summed over its first axis, and about 110 in float32.


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x w."""
    return jnp.dot(x, w, preferred_element_type=jnp.float32)


def product_to_inputs(d_out: jax.Array, w: jax.Array) -> jax.Array:
    """d_out w^T."""
    if not _in_bfloat16(w):
        return jnp.dot(d_out, w.T, preferred_element_type=jnp.float32)
    return _einsum("no,io->ni", d_out, w)


def product_to_weights(x: jax.Array, d_out: jax.Array) -> jax.Array:
    """x^T d_out."""
    if not _in_bfloat16(x):
        return jnp.dot(x.T, d_out, preferred_element_type=jnp.float32)
    if x.shape[1] <= d_out.shape[1]:
        return product(_row_major(x.T), d_out)
    # As (d_out^T x)^T: the narrower operand is copied, and what it was made by is computed in the copy, in strides. The
    # input of the MLP's second map is a GELU: that took 187 of the 450 ms of a step of the tiny benchmark.
    return _barrier(product(_row_major(d_out.T), x)).T


def _in_bfloat16(x: jax.Array) -> bool:
    return x.dtype == jnp.bfloat16 and traced.platform() == "cpu"


def _row_major(x: jax.Array) -> jax.Array:
    """x with its last axis contiguous in memory: a copy, where it would else be a view with swapped axes."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _factor(x: jax.Array, of: Any) -> jax.Array:
    """An operand of attention in this type. In bfloat16 it gets memory of its own: XLA would take swapped axes into the
    product, for which it then has no kernel in bfloat16, and multiply the rounded numbers in float32."""
    x = x.astype(of)
    return _row_major(x) if _in_bfloat16(x) else x


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, causal: bool, products: str
) -> jax.Array:
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
    query, of = query.reshape(batch, groups, per_group * length, width), operands(query.dtype, products)
    out = _attention(query, key, value, mask, of)
    return jnp.swapaxes(out.reshape(batch, heads, length, width), 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(
    query_BxGxQxE: jax.Array, key_BxGxMxE: jax.Array, value_BxGxMxE: jax.Array, mask: jax.Array | None, of: Any
) -> jax.Array:
    """softmax(query key^T / sqrt(E)) value: [B, G, Q, E]. mask: [B or 1, 1, Q or 1, M] bool or None.

    Scores are scaled through the query, normalised after the product with the values, and formed again from the
    logsumexp in the backward pass, so that few arrays of the size of the scores pass through memory. `of` is the type
    of the operands of all products, so also that of the weights, which are summed as they were rounded.
    """
    return _attention_forward(query_BxGxQxE, key_BxGxMxE, value_BxGxMxE, mask, of)[0]


def _attention_forward(query_BxGxQxE, key_BxGxMxE, value_BxGxMxE, mask, of):
    dtype = value_BxGxMxE.dtype
    scaled = query_BxGxQxE * query_BxGxQxE.shape[-1] ** -0.5
    factors = tuple(_factor(x, of) for x in (scaled, key_BxGxMxE, value_BxGxMxE))
    saved = query_BxGxQxE, key_BxGxMxE, value_BxGxMxE = checkpoint_name(factors, "attention")
    scores_BxGxQxM = _einsum("bgqe,bgme->bgqm", query_BxGxQxE, key_BxGxMxE)
    if mask is not None:
        scores_BxGxQxM = jnp.where(mask, scores_BxGxQxM, HIDDEN)
    top = scores_BxGxQxM.max(-1, keepdims=True)
    exp_BxGxQxM = jnp.exp(scores_BxGxQxM - top).astype(of)
    total = exp_BxGxQxM.sum(-1, keepdims=True, dtype=jnp.float32)
    out_BxGxQxE = (_einsum("bgqm,bgme->bgqe", exp_BxGxQxM, value_BxGxMxE) / total).astype(dtype)
    logsumexp_BxGxQ = (top + jnp.log(total))[..., 0]
    out_BxGxQxE, logsumexp_BxGxQ = checkpoint_name((out_BxGxQxE, logsumexp_BxGxQ), "attention")
    return out_BxGxQxE, (*saved, mask, out_BxGxQxE, logsumexp_BxGxQ)


def _attention_backward(of, residuals, d_out_BxGxQxE):
    query_BxGxQxE, key_BxGxMxE, value_BxGxMxE, mask, out_BxGxQxE, logsumexp_BxGxQ = residuals
    dtype, width = d_out_BxGxQxE.dtype, query_BxGxQxE.shape[-1]
    # Probabilities [M, Q], transposed: then no product below contracts the first axis of a large left operand, which is
    # several times slower on a CPU. The barriers keep XLA from turning the one with key.T back into that form.
    scores_BxGxMxQ = _einsum("bgme,bgqe->bgmq", key_BxGxMxE, query_BxGxQxE)
    if mask is not None:
        scores_BxGxMxQ = jnp.where(jnp.swapaxes(mask, 2, 3), scores_BxGxMxQ, HIDDEN)
    probs_BxGxMxQ = jnp.exp(scores_BxGxMxQ - logsumexp_BxGxQ[:, :, None]).astype(of)
    # The derivative of a softmax: d_score = p (d_p - mean of d_p under p), whose mean is d_out . out.
    mean = jnp.sum(d_out_BxGxQxE.astype(jnp.float32) * out_BxGxQxE, -1)[:, :, None]
    d_out_BxGxQxE = _factor(d_out_BxGxQxE, of)
    d_scores_BxGxMxQ = probs_BxGxMxQ * (_einsum("bgme,bgqe->bgmq", value_BxGxMxE, d_out_BxGxQxE) - mean)
    d_scores_BxGxMxQ = d_scores_BxGxMxQ.astype(of)
    # Then those of the three products.
    key_BxGxExM = jnp.swapaxes(key_BxGxMxE, 2, 3)
    key_BxGxExM = _row_major(key_BxGxExM) if _in_bfloat16(key_BxGxExM) else _barrier(key_BxGxExM)
    d_query_BxGxExQ = _barrier(_einsum("bgem,bgmq->bgeq", key_BxGxExM, d_scores_BxGxMxQ))
    d_query = jnp.swapaxes(d_query_BxGxExQ, 2, 3) * width**-0.5
    d_key = _einsum("bgmq,bgqe->bgme", d_scores_BxGxMxQ, query_BxGxQxE)
    d_value = _einsum("bgmq,bgqe->bgme", probs_BxGxMxQ, d_out_BxGxQxE)
    return d_query.astype(dtype), d_key.astype(dtype), d_value.astype(dtype), None


_attention.defvjp(_attention_forward, _attention_backward)


def tensordot(x: jax.Array, matrix: jax.Array, inputs: int, products: str) -> jax.Array:
    """`jnp.tensordot`: x [..., *inputs] and matrix [*inputs, *outputs], `inputs` axes, -> [..., *outputs].

    In a CPU's form, with operands as `products` says, where the program is for a CPU; not on a mesh that splits heads:
    it merges their axes with others, and they would no longer be split. ValueError for rounded operands there.
    """
    split = "tensor" in traced.used()
    if split and products == "bfloat16" and traced.platform() == "cpu":
        raise ValueError(
            "model.products: got 'bfloat16' on CPUs with mesh.tensor > 1, wanted 'dtype', or mesh.tensor 1"
        )
    if split or traced.platform() != "cpu":
        return jnp.tensordot(x, matrix, inputs)
    contracted, of = math.prod(matrix.shape[:inputs]), operands(x.dtype, products)
    out = matmul(x.reshape(-1, contracted), matrix.reshape(contracted, -1), of).astype(x.dtype)
    return out.reshape(*x.shape[:-inputs], *matrix.shape[inputs:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, w: jax.Array, of: Any) -> jax.Array:
    """x w in float32. Forward and backward the operands are in the type `of`; gradients have the types of x and w.

    What is before a product is not fused into it, and in float32 the backward pass multiplies by a transposed copy of
    w: both up to three times as fast as what XLA would do.
    """
    if of == jnp.bfloat16:
        # The same rounding, which XLA's CPU backend does not fuse into the product: a layer norm with its product took
        # 4.3 ms in one, 2.9 ms apart (4096 x 192 x 768, two cores).
        x = jax.lax.reduce_precision(x, 8, 7)
    return product(_barrier(x.astype(of)), w.astype(of))


def _matmul_forward(x, w, of):
    return matmul(x, w, of), (x, w)


def _matmul_backward(of, residuals, d_out):
    x, w = (residual.astype(of) for residual in residuals)
    d_out = d_out.astype(of)
    if _in_bfloat16(w):
        d_x = product_to_inputs(d_out, w)
    else:
        d_out, w_t = _barrier((d_out, w.T))
        d_x = product(d_out, w_t)
    gradients = d_x, product_to_weights(x, d_out)
    return tuple(g.astype(residual.dtype) for g, residual in zip(gradients, residuals, strict=True))


matmul.defvjp(_matmul_forward, _matmul_backward)
