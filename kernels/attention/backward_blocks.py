"""Triton kernels of the backward pass for many tokens: dQ by query block, dK and dV by key block (arXiv 2307.08691, 3.1).

Weights are recomputed in both kernels, so every value has one writer; P and dS are rounded to the dtype of the input.
"""

import triton
import triton.language as tl

from .device import load_tile, place, store_tile, weights


@triton.jit
def query_blocks_kernel(
    qkv_ptr,
    QKV_STRIDE_N: tl.constexpr,
    QKV_STRIDE_P: tl.constexpr,
    dout_ptr,
    DOUT_STRIDE_N: tl.constexpr,
    DOUT_STRIDE_P: tl.constexpr,
    out_ptr,
    OUT_STRIDE_N: tl.constexpr,
    OUT_STRIDE_P: tl.constexpr,
    lse_ptr,
    delta_ptr,
    dqkv_ptr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """delta = rowsum(dO o O) and dQ of BLOCK_M queries, key block by key block."""
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    ALL_QUERIES: tl.constexpr = TOKENS % BLOCK_M == 0
    ALL_KEYS: tl.constexpr = TOKENS % BLOCK_N == 0
    ALL_CHANNELS: tl.constexpr = HEAD_DIM == BLOCK_D
    block, n, head = place((TOKENS + BLOCK_M - 1) // BLOCK_M, HEADS)
    query, channel = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q_ptr = qkv_ptr + n * QKV_STRIDE_N + head * HEAD_DIM
    do_ptr = dout_ptr + n * DOUT_STRIDE_N + head * HEAD_DIM
    o_ptr = out_ptr + n * OUT_STRIDE_N + head * HEAD_DIM
    do = load_tile(do_ptr, query, channel, DOUT_STRIDE_P, TOKENS, HEAD_DIM, ALL_QUERIES, ALL_CHANNELS)
    o = load_tile(o_ptr, query, channel, OUT_STRIDE_P, TOKENS, HEAD_DIM, ALL_QUERIES, ALL_CHANNELS)
    row = (n * HEADS + head) * TOKENS + query
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
    tl.store(delta_ptr + row, delta, mask=query < TOKENS)
    lse = tl.load(lse_ptr + row, mask=query < TOKENS, other=float("inf"))
    q = load_tile(q_ptr, query, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_QUERIES, ALL_CHANNELS)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, TOKENS, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = load_tile(q_ptr + CHANNELS, key, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_KEYS, ALL_CHANNELS)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = weights(s, lse[:, None], key[None, :], SCALE, TOKENS, ALL_KEYS)
        v = load_tile(q_ptr + 2 * CHANNELS, key, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_KEYS, ALL_CHANNELS)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    dq_ptr = dqkv_ptr + n * (3 * TOKENS * CHANNELS) + head * HEAD_DIM
    store_tile(dq_ptr, query, channel, 3 * CHANNELS, dq * SCALE, TOKENS, HEAD_DIM)


@triton.jit
def key_blocks_kernel(
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
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dK and dV of BLOCK_M keys, query block by query block of BLOCK_N; the weights are computed transposed."""
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    ALL_KEYS: tl.constexpr = TOKENS % BLOCK_M == 0
    ALL_QUERIES: tl.constexpr = TOKENS % BLOCK_N == 0
    ALL_CHANNELS: tl.constexpr = HEAD_DIM == BLOCK_D
    block, n, head = place((TOKENS + BLOCK_M - 1) // BLOCK_M, HEADS)
    key, channel = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q_ptr = qkv_ptr + n * QKV_STRIDE_N + head * HEAD_DIM
    do_ptr = dout_ptr + n * DOUT_STRIDE_N + head * HEAD_DIM
    lse_ptr += (n * HEADS + head) * TOKENS
    delta_ptr += (n * HEADS + head) * TOKENS
    k = load_tile(q_ptr + CHANNELS, key, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_KEYS, ALL_CHANNELS)
    v = load_tile(q_ptr + 2 * CHANNELS, key, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_KEYS, ALL_CHANNELS)
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, TOKENS, BLOCK_N):
        query = start + tl.arange(0, BLOCK_N)
        q = load_tile(q_ptr, query, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_QUERIES, ALL_CHANNELS)
        lse = tl.load(lse_ptr + query, mask=query < TOKENS, other=float("inf"))
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = weights(s, lse[None, :], key[:, None], SCALE, TOKENS, ALL_KEYS)
        do = load_tile(do_ptr, query, channel, DOUT_STRIDE_P, TOKENS, HEAD_DIM, ALL_QUERIES, ALL_CHANNELS)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        delta = tl.load(delta_ptr + query, mask=query < TOKENS, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dk_ptr = dqkv_ptr + n * (3 * TOKENS * CHANNELS) + head * HEAD_DIM + CHANNELS
    store_tile(dk_ptr, key, channel, 3 * CHANNELS, dk * SCALE, TOKENS, HEAD_DIM)
    store_tile(dk_ptr + CHANNELS, key, channel, 3 * CHANNELS, dv, TOKENS, HEAD_DIM)
