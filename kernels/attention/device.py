"""What the attention kernels share: where a program stands, tiles of tokens and channels in and out of memory, products."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def place(BLOCKS: tl.constexpr, HEADS: tl.constexpr):
    """(block, image, head) of this program; blocks of one head are neighbours, so that they find its keys in L2."""
    program = tl.program_id(0)
    group = program // BLOCKS
    return program % BLOCKS, (group // HEADS).to(tl.int64), group % HEADS


@triton.jit
def load_tile(
    x_ptr,
    token,
    channel,
    STRIDE_P: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ALL_TOKENS: tl.constexpr,
    ALL_CHANNELS: tl.constexpr,
):
    """[tokens, channels] of one head in the dtype of memory, 0 outside; the flags say that nothing is outside."""
    pointers = x_ptr + token[:, None] * STRIDE_P + channel[None, :]
    if ALL_TOKENS and ALL_CHANNELS:
        x = tl.load(pointers)
    elif ALL_TOKENS:
        x = tl.load(pointers, mask=(channel < HEAD_DIM)[None, :], other=0.0)
    elif ALL_CHANNELS:
        x = tl.load(pointers, mask=(token < TOKENS)[:, None], other=0.0)
    else:
        x = tl.load(pointers, mask=(token < TOKENS)[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
    return x


@triton.jit
def weights(s, lse, key, SCALE: tl.constexpr, TOKENS: tl.constexpr, ALL_KEYS: tl.constexpr):
    """P = exp(S SCALE - lse); s, lse and key broadcast. Keys that do not exist and queries with lse = inf weigh nothing."""
    s = s * (SCALE * LOG2_E) - lse * LOG2_E
    if not ALL_KEYS:
        # Before the exponential: the score 0 of padding can be far above every other.
        s = tl.where(key < TOKENS, s, float("-inf"))
    return tl.exp2(s)


@triton.jit
def store_tile(x_ptr, token, channel, STRIDE_P: tl.constexpr, x, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[tokens, channels] of one head, rounded once to the dtype of memory; nothing outside is written."""
    mask = (token < TOKENS)[:, None] & (channel < HEAD_DIM)[None, :]
    tl.store(x_ptr + token[:, None] * STRIDE_P + channel[None, :], x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def two_products(
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    row,
    column,
    A_STRIDE_P: tl.constexpr,
    B_STRIDE_P: tl.constexpr,
    C_STRIDE_P: tl.constexpr,
    D_STRIDE_P: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A B^T and C D^T in fp32, summed over chunks of channels; A and C are tiles of ROWS tokens, B and D of COLUMNS."""
    ALL_ROWS: tl.constexpr = TOKENS % ROWS == 0
    ALL_COLUMNS: tl.constexpr = TOKENS % COLUMNS == 0
    ALL_CHANNELS: tl.constexpr = HEAD_DIM % BLOCK_D == 0
    ab = tl.zeros([ROWS, COLUMNS], tl.float32)
    cd = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, HEAD_DIM, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        a = load_tile(a_ptr, row, channel, A_STRIDE_P, TOKENS, HEAD_DIM, ALL_ROWS, ALL_CHANNELS)
        b = load_tile(b_ptr, column, channel, B_STRIDE_P, TOKENS, HEAD_DIM, ALL_COLUMNS, ALL_CHANNELS)
        ab = tl.dot(a, tl.trans(b), ab, input_precision=PRECISION)
        c = load_tile(c_ptr, row, channel, C_STRIDE_P, TOKENS, HEAD_DIM, ALL_ROWS, ALL_CHANNELS)
        d = load_tile(d_ptr, column, channel, D_STRIDE_P, TOKENS, HEAD_DIM, ALL_COLUMNS, ALL_CHANNELS)
        cd = tl.dot(c, tl.trans(d), cd, input_precision=PRECISION)
    return ab, cd
