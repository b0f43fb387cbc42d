"""Triton kernels of the forward pass: a whole row of weights at once where T is small, else online softmax over key blocks.

P is rounded to the dtype of the input for its product with V; scores, statistics and sums are fp32, exponentials base 2.
"""

import triton
import triton.language as tl
from jaxtyping import Float, Shaped
from torch import Tensor

from ..runtime.launch import Launch, ceil_div
from ..runtime.layout import PixelLayout
from ..runtime.pinned import pinned
from .call import Sizes, image_arguments, query_blocks, shared_arguments
from .device import LN_2, LOG2_E, load_tile, place, store_tile


@triton.jit
def rows_kernel(
    qkv_ptr,
    QKV_STRIDE_N: tl.constexpr,
    QKV_STRIDE_P: tl.constexpr,
    out_ptr,
    lse_ptr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_M queries against all keys: S over chunks of channels, softmax once, O chunk by chunk (no [BLOCK_M, D] sum)."""
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    ALL_QUERIES: tl.constexpr = TOKENS % BLOCK_M == 0
    ALL_KEYS: tl.constexpr = TOKENS == BLOCK_T
    ALL_CHANNELS: tl.constexpr = HEAD_DIM % BLOCK_D == 0
    block, n, head = place((TOKENS + BLOCK_M - 1) // BLOCK_M, HEADS)
    query, key = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_T)
    q_ptr = qkv_ptr + n * QKV_STRIDE_N + head * HEAD_DIM
    s = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
    for start in range(0, HEAD_DIM, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        q = load_tile(q_ptr, query, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_QUERIES, ALL_CHANNELS)
        k = load_tile(q_ptr + CHANNELS, key, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_KEYS, ALL_CHANNELS)
        s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)
    s *= SCALE * LOG2_E
    if not ALL_KEYS:
        s = tl.where((key < TOKENS)[None, :], s, float("-inf"))
    maximum = tl.max(s, axis=1)
    p = tl.exp2(s - maximum[:, None])
    total = tl.sum(p, axis=1)
    lse = (maximum + tl.log2(total)) * LN_2
    tl.store(lse_ptr + (n * HEADS + head) * TOKENS + query, lse, mask=query < TOKENS)
    p = p.to(qkv_ptr.dtype.element_ty)
    o_ptr = out_ptr + n * (TOKENS * CHANNELS) + head * HEAD_DIM
    for start in range(0, HEAD_DIM, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        v = load_tile(q_ptr + 2 * CHANNELS, key, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_KEYS, ALL_CHANNELS)
        o = tl.dot(p, v, input_precision=PRECISION) / total[:, None]
        store_tile(o_ptr, query, channel, CHANNELS, o, TOKENS, HEAD_DIM)


@triton.jit
def online_kernel(
    qkv_ptr,
    QKV_STRIDE_N: tl.constexpr,
    QKV_STRIDE_P: tl.constexpr,
    out_ptr,
    lse_ptr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_M queries, key block by key block, with a running maximum and total; arXiv 2307.08691, Algorithm 1."""
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    ALL_QUERIES: tl.constexpr = TOKENS % BLOCK_M == 0
    ALL_KEYS: tl.constexpr = TOKENS % BLOCK_N == 0
    ALL_CHANNELS: tl.constexpr = HEAD_DIM == BLOCK_D
    block, n, head = place((TOKENS + BLOCK_M - 1) // BLOCK_M, HEADS)
    query, channel = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q_ptr = qkv_ptr + n * QKV_STRIDE_N + head * HEAD_DIM
    q = load_tile(q_ptr, query, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_QUERIES, ALL_CHANNELS)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, TOKENS, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k = load_tile(q_ptr + CHANNELS, key, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_KEYS, ALL_CHANNELS)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (SCALE * LOG2_E)
        if not ALL_KEYS:
            s = tl.where((key < TOKENS)[None, :], s, float("-inf"))
        # Every block has a key, so the new maximum is finite and nothing is inf - inf.
        higher = tl.maximum(maximum, tl.max(s, axis=1))
        shrink = tl.exp2(maximum - higher)
        p = tl.exp2(s - higher[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        v = load_tile(q_ptr + 2 * CHANNELS, key, channel, QKV_STRIDE_P, TOKENS, HEAD_DIM, ALL_KEYS, ALL_CHANNELS)
        o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision=PRECISION)
        maximum = higher
    lse = (maximum + tl.log2(total)) * LN_2
    tl.store(lse_ptr + (n * HEADS + head) * TOKENS + query, lse, mask=query < TOKENS)
    o_ptr = out_ptr + n * (TOKENS * CHANNELS) + head * HEAD_DIM
    store_tile(o_ptr, query, channel, CHANNELS, o / total[:, None], TOKENS, HEAD_DIM)


def forward_launches(
    qkv_NCHW: Shaped[Tensor, "N C3 H W"],
    layout: PixelLayout,
    num_heads: int,
    out_NCHW: Shaped[Tensor, "N C H W"],
    lse_NhT: Float[Tensor, "N h T"],
    arch: str,
) -> list[Launch]:
    """The launch that fills ``out_NCHW`` (dense channels_last) and ``lse_NhT`` (natural logarithm) from readable memory."""
    sizes = Sizes.of(qkv_NCHW, num_heads)
    use = pinned("attention", "forward", arch, **sizes.facts(qkv_NCHW.dtype))
    arguments = {
        **image_arguments("qkv", qkv_NCHW, layout),
        "out_ptr": out_NCHW,
        "lse_ptr": lse_NhT,
        **shared_arguments(sizes, qkv_NCHW.dtype),
    }
    kernel, blocks = (rows_kernel if use["full_row"] else online_kernel), query_blocks(use, sizes)
    grid = (ceil_div(sizes.tokens, blocks["BLOCK_M"]) * sizes.groups,)
    return [Launch(kernel, grid, arguments | blocks, use["num_warps"], use["num_stages"])]
