"""Triton kernels of the backward pass for few tokens: whole rows of weights, gradients chunk by chunk of channels.

delta = rowsum(P o dP) comes from the row itself, so the output is not read; P and dS are rounded to the dtype of the input.
"""

import triton
import triton.language as tl

from .device import load_tile, place, store_tile, two_products, weights


@triton.jit
def image_backward_kernel(
    qkv_ptr,
    QKV_STRIDE_N: tl.constexpr,
    QKV_STRIDE_P: tl.constexpr,
    dout_ptr,
    DOUT_STRIDE_N: tl.constexpr,
    DOUT_STRIDE_P: tl.constexpr,
    lse_ptr,
    dqkv_ptr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One head of one image, all tokens at once: five products, nothing computed twice."""
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    ALL: tl.constexpr = TOKENS == BLOCK_T
    ALL_CHANNELS: tl.constexpr = HEAD_DIM % BLOCK_D == 0
    _, n, head = place(1, HEADS)
    token = tl.arange(0, BLOCK_T)
    q_ptr = qkv_ptr + n * QKV_STRIDE_N + head * HEAD_DIM
    do_ptr = dout_ptr + n * DOUT_STRIDE_N + head * HEAD_DIM
    s, dp = two_products(
        q_ptr, q_ptr + CHANNELS, do_ptr, q_ptr + 2 * CHANNELS, token, token,
        QKV_STRIDE_P, QKV_STRIDE_P, DOUT_STRIDE_P, QKV_STRIDE_P, TOKENS, HEAD_DIM, PRECISION, BLOCK_T, BLOCK_T, BLOCK_D,
    )  # fmt: skip
    lse = tl.load(lse_ptr + (n * HEADS + head) * TOKENS + token, mask=token < TOKENS, other=float("inf"))
    p = weights(s, lse[:, None], token[None, :], SCALE, TOKENS, ALL)
    ds = p * (dp - tl.sum(p * dp, axis=1)[:, None]) * SCALE
    p, ds = p.to(qkv_ptr.dtype.element_ty), ds.to(qkv_ptr.dtype.element_ty)
    dq_ptr = dqkv_ptr + n * (3 * TOKENS * CHANNELS) + head * HEAD_DIM
    for start in range(0, HEAD_DIM, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        k = load_tile(q_ptr + CHANNELS, token, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL, ALL_CHANNELS)
        dq = tl.dot(ds, k, input_precision=PRECISION)
        store_tile(dq_ptr, token, channel, 3 * CHANNELS, dq, TOKENS, HEAD_DIM)
        q = load_tile(q_ptr, token, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL, ALL_CHANNELS)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        store_tile(dq_ptr + CHANNELS, token, channel, 3 * CHANNELS, dk, TOKENS, HEAD_DIM)
        do = load_tile(do_ptr, token, channel, DOUT_STRIDE_P, TOKENS, HEAD_DIM, ALL, ALL_CHANNELS)
        dv = tl.dot(tl.trans(p), do, input_precision=PRECISION)
        store_tile(dq_ptr + 2 * CHANNELS, token, channel, 3 * CHANNELS, dv, TOKENS, HEAD_DIM)


@triton.jit
def rows_query_kernel(
    qkv_ptr,
    QKV_STRIDE_N: tl.constexpr,
    QKV_STRIDE_P: tl.constexpr,
    dout_ptr,
    DOUT_STRIDE_N: tl.constexpr,
    DOUT_STRIDE_P: tl.constexpr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """delta and dQ of BLOCK_M queries, whose rows of weights are whole."""
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    ALL_KEYS: tl.constexpr = TOKENS == BLOCK_T
    ALL_CHANNELS: tl.constexpr = HEAD_DIM % BLOCK_D == 0
    block, n, head = place((TOKENS + BLOCK_M - 1) // BLOCK_M, HEADS)
    query, key = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_T)
    q_ptr = qkv_ptr + n * QKV_STRIDE_N + head * HEAD_DIM
    do_ptr = dout_ptr + n * DOUT_STRIDE_N + head * HEAD_DIM
    s, dp = two_products(
        q_ptr, q_ptr + CHANNELS, do_ptr, q_ptr + 2 * CHANNELS, query, key,
        QKV_STRIDE_P, QKV_STRIDE_P, DOUT_STRIDE_P, QKV_STRIDE_P, TOKENS, HEAD_DIM, PRECISION, BLOCK_M, BLOCK_T, BLOCK_D,
    )  # fmt: skip
    row = (n * HEADS + head) * TOKENS + query
    lse = tl.load(lse_ptr + row, mask=query < TOKENS, other=float("inf"))
    p = weights(s, lse[:, None], key[None, :], SCALE, TOKENS, ALL_KEYS)
    delta = tl.sum(p * dp, axis=1)
    tl.store(delta_ptr + row, delta, mask=query < TOKENS)
    ds = (p * (dp - delta[:, None]) * SCALE).to(qkv_ptr.dtype.element_ty)
    dq_ptr = dqkv_ptr + n * (3 * TOKENS * CHANNELS) + head * HEAD_DIM
    for start in range(0, HEAD_DIM, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        k = load_tile(q_ptr + CHANNELS, key, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_KEYS, ALL_CHANNELS)
        dq = tl.dot(ds, k, input_precision=PRECISION)
        store_tile(dq_ptr, query, channel, 3 * CHANNELS, dq, TOKENS, HEAD_DIM)


@triton.jit
def rows_key_kernel(
    qkv_ptr,
    QKV_STRIDE_N: tl.constexpr,
    QKV_STRIDE_P: tl.constexpr,
    dout_ptr,
    DOUT_STRIDE_N: tl.constexpr,
    DOUT_STRIDE_P: tl.constexpr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dK and dV of BLOCK_M keys against all queries; the weights are computed transposed, keys by queries."""
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    ALL_QUERIES: tl.constexpr = TOKENS == BLOCK_T
    ALL_CHANNELS: tl.constexpr = HEAD_DIM % BLOCK_D == 0
    block, n, head = place((TOKENS + BLOCK_M - 1) // BLOCK_M, HEADS)
    key, query = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_T)
    q_ptr = qkv_ptr + n * QKV_STRIDE_N + head * HEAD_DIM
    do_ptr = dout_ptr + n * DOUT_STRIDE_N + head * HEAD_DIM
    s, dp = two_products(
        q_ptr + CHANNELS, q_ptr, q_ptr + 2 * CHANNELS, do_ptr, key, query,
        QKV_STRIDE_P, QKV_STRIDE_P, QKV_STRIDE_P, DOUT_STRIDE_P, TOKENS, HEAD_DIM, PRECISION, BLOCK_M, BLOCK_T, BLOCK_D,
    )  # fmt: skip
    row = (n * HEADS + head) * TOKENS + query
    lse = tl.load(lse_ptr + row, mask=query < TOKENS, other=float("inf"))
    delta = tl.load(delta_ptr + row, mask=query < TOKENS, other=0.0)
    p = weights(s, lse[None, :], key[:, None], SCALE, TOKENS, TOKENS % BLOCK_M == 0)
    ds = (p * (dp - delta[None, :]) * SCALE).to(qkv_ptr.dtype.element_ty)
    p = p.to(qkv_ptr.dtype.element_ty)
    dk_ptr = dqkv_ptr + n * (3 * TOKENS * CHANNELS) + head * HEAD_DIM + CHANNELS
    for start in range(0, HEAD_DIM, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        q = load_tile(q_ptr, query, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_QUERIES, ALL_CHANNELS)
        dk = tl.dot(ds, q, input_precision=PRECISION)
        store_tile(dk_ptr, key, channel, 3 * CHANNELS, dk, TOKENS, HEAD_DIM)
        do = load_tile(do_ptr, query, channel, DOUT_STRIDE_P, TOKENS, HEAD_DIM, ALL_QUERIES, ALL_CHANNELS)
        dv = tl.dot(p, do, input_precision=PRECISION)
        store_tile(dk_ptr + CHANNELS, key, channel, 3 * CHANNELS, dv, TOKENS, HEAD_DIM)
