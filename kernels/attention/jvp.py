"""Triton kernels of the JVP: output and tangent from q, k, v and their tangents, with one sum for the tangent.

With P = softmax(S), S = q k^T / sqrt(D) and tS = (tq k^T + q tk^T) / sqrt(D) (arXiv 2410.11081, Appendix F):
tO = P tv + (P o (tS - mu)) v, mu = rowsum(P o tS). Both products go into one sum, because P tv and (P o tS) v are rescaled
alike; a shift of a row of tS changes nothing, so a shift near mu is taken before the rounding of P o tS to the dtype of v.
"""

import triton
import triton.language as tl
from jaxtyping import Shaped
from torch import Tensor

from ..runtime.launch import Launch, ceil_div
from ..runtime.layout import PixelLayout
from ..runtime.pinned import pinned
from .call import Sizes, image_arguments, query_blocks, shared_arguments, tile
from .device import LOG2_E, load_tile, place, store_tile


@triton.jit
def rows_jvp_kernel(
    qkv_ptr,
    QKV_STRIDE_N: tl.constexpr,
    QKV_STRIDE_P: tl.constexpr,
    tqkv_ptr,
    TQKV_STRIDE_N: tl.constexpr,
    TQKV_STRIDE_P: tl.constexpr,
    out_ptr,
    tout_ptr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_M queries against all keys: S and tS over chunks of channels, softmax once, then O and tO chunk by chunk."""
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    ALL_QUERIES: tl.constexpr = TOKENS % BLOCK_M == 0
    ALL_KEYS: tl.constexpr = TOKENS == BLOCK_T
    ALL_CHANNELS: tl.constexpr = HEAD_DIM % BLOCK_D == 0
    block, n, head = place((TOKENS + BLOCK_M - 1) // BLOCK_M, HEADS)
    query, key = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_T)
    q_ptr = qkv_ptr + n * QKV_STRIDE_N + head * HEAD_DIM
    tq_ptr = tqkv_ptr + n * TQKV_STRIDE_N + head * HEAD_DIM
    s = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
    ts = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
    for start in range(0, HEAD_DIM, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        q = load_tile(q_ptr, query, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_QUERIES, ALL_CHANNELS)
        k = load_tile(q_ptr + CHANNELS, key, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_KEYS, ALL_CHANNELS)
        s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
        tq = load_tile(tq_ptr, query, channel, TQKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_QUERIES, ALL_CHANNELS)
        ts = tl.dot(tq, tl.trans(k), ts, input_precision=PRECISION)
        tk = load_tile(tq_ptr + CHANNELS, key, channel, TQKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_KEYS, ALL_CHANNELS)
        ts = tl.dot(q, tl.trans(tk), ts, input_precision=PRECISION)
    s *= SCALE * LOG2_E
    if not ALL_KEYS:
        s = tl.where((key < TOKENS)[None, :], s, float("-inf"))
    p = tl.exp2(s - tl.max(s, axis=1)[:, None])
    total = tl.sum(p, axis=1)
    h = p * (ts - (tl.sum(p * ts, axis=1) / total)[:, None]) * SCALE
    p, h = p.to(qkv_ptr.dtype.element_ty), h.to(qkv_ptr.dtype.element_ty)
    o_offset = n * (TOKENS * CHANNELS) + head * HEAD_DIM
    for start in range(0, HEAD_DIM, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        v = load_tile(q_ptr + 2 * CHANNELS, key, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_KEYS, ALL_CHANNELS)
        tv = load_tile(tq_ptr + 2 * CHANNELS, key, channel, TQKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_KEYS, ALL_CHANNELS)
        o = tl.dot(p, v, input_precision=PRECISION) / total[:, None]
        store_tile(out_ptr + o_offset, query, channel, CHANNELS, o, TOKENS, HEAD_DIM)
        to = tl.dot(p, tv, input_precision=PRECISION)
        to = tl.dot(h, v, to, input_precision=PRECISION) / total[:, None]
        store_tile(tout_ptr + o_offset, query, channel, CHANNELS, to, TOKENS, HEAD_DIM)


@triton.jit
def _first_scores(
    q,
    tq,
    k_ptr,
    tk_ptr,
    channel,
    STRIDE_P: tl.constexpr,
    TANGENT_STRIDE_P: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    ALL_CHANNELS: tl.constexpr,
):
    """tq k^T + q tk^T, the mean over the first keys: it stands for mu, not known yet, and takes out what all keys share."""
    NUM: tl.constexpr = 16
    key = tl.arange(0, NUM)
    k = load_tile(k_ptr, key, channel, STRIDE_P, TOKENS, HEAD_DIM, TOKENS >= NUM, ALL_CHANNELS)
    tk = load_tile(tk_ptr, key, channel, TANGENT_STRIDE_P, TOKENS, HEAD_DIM, TOKENS >= NUM, ALL_CHANNELS)
    ts = tl.dot(tq, tl.trans(k), input_precision=PRECISION)
    ts = tl.dot(q, tl.trans(tk), ts, input_precision=PRECISION)
    COUNT: tl.constexpr = NUM if TOKENS >= NUM else TOKENS
    return tl.sum(ts, axis=1) / COUNT


@triton.jit
def online_jvp_kernel(
    qkv_ptr,
    QKV_STRIDE_N: tl.constexpr,
    QKV_STRIDE_P: tl.constexpr,
    tqkv_ptr,
    TQKV_STRIDE_N: tl.constexpr,
    TQKV_STRIDE_P: tl.constexpr,
    out_ptr,
    tout_ptr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """BLOCK_M queries and BLOCK_V output channels, key block by key block; one factor rescales every running sum."""
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    ALL_QUERIES: tl.constexpr = TOKENS % BLOCK_M == 0
    ALL_KEYS: tl.constexpr = TOKENS % BLOCK_N == 0
    ALL_CHANNELS: tl.constexpr = HEAD_DIM == BLOCK_D
    ALL_VALUES: tl.constexpr = HEAD_DIM % BLOCK_V == 0
    PARTS: tl.constexpr = (HEAD_DIM + BLOCK_V - 1) // BLOCK_V
    block, n, head = place(((TOKENS + BLOCK_M - 1) // BLOCK_M) * PARTS, HEADS)
    query, channel = (block // PARTS) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    value = (block % PARTS) * BLOCK_V + tl.arange(0, BLOCK_V)
    q_ptr = qkv_ptr + n * QKV_STRIDE_N + head * HEAD_DIM
    tq_ptr = tqkv_ptr + n * TQKV_STRIDE_N + head * HEAD_DIM
    q = load_tile(q_ptr, query, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_QUERIES, ALL_CHANNELS)
    tq = load_tile(tq_ptr, query, channel, TQKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_QUERIES, ALL_CHANNELS)
    shift = _first_scores(
        q, tq, q_ptr + CHANNELS, tq_ptr + CHANNELS, channel, QKV_STRIDE_P, TQKV_STRIDE_P,
        TOKENS, HEAD_DIM, PRECISION, ALL_CHANNELS,
    )  # fmt: skip
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    moved = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    to = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, TOKENS, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = load_tile(q_ptr + CHANNELS, key, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_KEYS, ALL_CHANNELS)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (SCALE * LOG2_E)
        ts = tl.dot(tq, tl.trans(k), input_precision=PRECISION)
        tk = load_tile(tq_ptr + CHANNELS, key, channel, TQKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_KEYS, ALL_CHANNELS)
        ts = tl.dot(q, tl.trans(tk), ts, input_precision=PRECISION)
        if not ALL_KEYS:
            s = tl.where((key < TOKENS)[None, :], s, float("-inf"))
        higher = tl.maximum(maximum, tl.max(s, axis=1))
        shrink = tl.exp2(maximum - higher)
        p = tl.exp2(s - higher[:, None])
        h = p * (ts - shift[:, None]) * SCALE
        total = total * shrink + tl.sum(p, axis=1)
        moved = moved * shrink + tl.sum(h, axis=1)
        v = load_tile(q_ptr + 2 * CHANNELS, key, value, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_KEYS, ALL_VALUES)
        p = p.to(v.dtype)
        o = tl.dot(p, v, o * shrink[:, None], input_precision=PRECISION)
        to = tl.dot(h.to(v.dtype), v, to * shrink[:, None], input_precision=PRECISION)
        tv = load_tile(tq_ptr + 2 * CHANNELS, key, value, TQKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_KEYS, ALL_VALUES)
        to = tl.dot(p, tv, to, input_precision=PRECISION)
        maximum = higher
    o /= total[:, None]
    to = to / total[:, None] - (moved / total)[:, None] * o
    o_offset = n * (TOKENS * CHANNELS) + head * HEAD_DIM
    store_tile(out_ptr + o_offset, query, value, CHANNELS, o, TOKENS, HEAD_DIM)
    store_tile(tout_ptr + o_offset, query, value, CHANNELS, to, TOKENS, HEAD_DIM)


def jvp_launches(
    qkv_NCHW: Shaped[Tensor, "N C3 H W"],
    layout: PixelLayout,
    tqkv_NCHW: Shaped[Tensor, "N C3 H W"],
    tangent_layout: PixelLayout,
    num_heads: int,
    out_NCHW: Shaped[Tensor, "N C H W"],
    tout_NCHW: Shaped[Tensor, "N C H W"],
    arch: str,
) -> list[Launch]:
    """The launch that fills ``out_NCHW`` and ``tout_NCHW`` (dense channels_last) from readable memory of one dtype."""
    sizes = Sizes.of(qkv_NCHW, num_heads)
    use = pinned("attention", "jvp", arch, **sizes.facts(qkv_NCHW.dtype))
    arguments = {
        **image_arguments("qkv", qkv_NCHW, layout),
        **image_arguments("tqkv", tqkv_NCHW, tangent_layout),
        "out_ptr": out_NCHW,
        "tout_ptr": tout_NCHW,
        **shared_arguments(sizes, qkv_NCHW.dtype),
    }
    blocks = query_blocks(use, sizes)
    programs = ceil_div(sizes.tokens, blocks["BLOCK_M"]) * sizes.groups
    if use["full_row"]:
        return [Launch(rows_jvp_kernel, (programs,), arguments | blocks, use["num_warps"], use["num_stages"])]
    blocks["BLOCK_V"] = tile(use["block_d"], sizes.head_dim)
    programs *= ceil_div(sizes.head_dim, blocks["BLOCK_V"])
    return [Launch(online_jvp_kernel, (programs,), arguments | blocks, use["num_warps"], use["num_stages"])]
