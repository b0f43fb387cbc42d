"""Triton kernel: normals on the fly, one or two noise levels and the scaled network inputs in one pass over the images."""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from ..philox import PhiloxKey
from ..philox.device import interleave4, random_normal4
from ..runtime.elements import image_arguments
from ..runtime.launch import Launch, as_int32, ceil_div, next_power_of_2
from ..runtime.load import load_elements
from ..runtime.pinned import pinned
from .reference import NoisedInputs

LANES = 4


@triton.jit
def _store_level(x_ptr, input_ptr, level_ptr, c_in_ptr, n, offset, mask, clean, noise):
    """x = y + level n and its scaled copy in the dtype of ``input_ptr``."""
    x = clean + tl.load(level_ptr + n) * noise
    tl.store(x_ptr + offset, x, mask=mask)
    tl.store(input_ptr + offset, (tl.load(c_in_ptr + n) * x).to(input_ptr.dtype.element_ty), mask=mask)


# The words of the key are no sizes: a specialisation on their value would compile anew for another seed.
@triton.jit(do_not_specialize=["key0", "key1", "draw"])
def add_noise_kernel(
    clean_ptr,
    clean_stride_n,
    noise_ptr,
    noise_stride_n,
    index_ptr,
    key0,
    key1,
    draw,
    t_ptr,
    c_in_t_ptr,
    r_ptr,
    c_in_r_ptr,
    x_t_ptr,
    input_t_ptr,
    x_r_ptr,
    input_r_ptr,
    clean_ROW: tl.constexpr,
    clean_COLUMN: tl.constexpr,
    noise_ROW: tl.constexpr,
    noise_COLUMN: tl.constexpr,
    CHANNELS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """4 BLOCKS elements of one image; outputs are dense channels_last, element e = (h W + w) C + c."""
    program = tl.program_id(0)
    n, chunk = (program // CHUNKS).to(tl.int64), program % CHUNKS
    block = chunk * BLOCKS + tl.arange(0, BLOCKS)
    element = chunk * 4 * BLOCKS + tl.arange(0, 4 * BLOCKS)
    mask = element < ELEMENTS
    clean = load_elements(clean_ptr, n, clean_stride_n, element, mask, CHANNELS, clean_ROW, clean_COLUMN)
    if noise_ptr is None:
        n0, n1, n2, n3 = random_normal4(key0, key1, draw, tl.load(index_ptr + n), block)
        noise = interleave4(n0, n1, n2, n3)
    else:
        noise = load_elements(noise_ptr, n, noise_stride_n, element, mask, CHANNELS, noise_ROW, noise_COLUMN)
    offset = n * ELEMENTS + element
    _store_level(x_t_ptr, input_t_ptr, t_ptr, c_in_t_ptr, n, offset, mask, clean, noise)
    if x_r_ptr is not None:
        _store_level(x_r_ptr, input_r_ptr, r_ptr, c_in_r_ptr, n, offset, mask, clean, noise)


def add_noise_launches(
    clean_NCHW: Float[Tensor, "N C H W"],
    noise: PhiloxKey | Float[Tensor, "N C H W"],
    t_N: Float[Tensor, " N"],
    c_in_t_N: Float[Tensor, " N"],
    r_N: Float[Tensor, " N"] | None,
    c_in_r_N: Float[Tensor, " N"] | None,
    out: NoisedInputs,
    arch: str,
) -> list[Launch]:
    """The launch that fills ``out`` (dense channels_last); images evenly spaced, [N] vectors contiguous and fp32."""
    num, channels, height, width = clean_NCHW.shape
    elements = channels * height * width
    chosen = pinned("noise", "forward", arch, elements=elements)
    blocks = min(chosen["blocks"], next_power_of_2(ceil_div(elements, LANES)))
    given = isinstance(noise, Tensor)
    (key0, key1), index_N, draw = ((0, 0), None, 0) if given else noise
    chunks = ceil_div(elements, LANES * blocks)
    arguments = {
        **image_arguments("clean", clean_NCHW, torch.channels_last),
        **image_arguments("noise", noise if given else None, torch.channels_last),
        "index_ptr": index_N,
        "key0": as_int32(key0),
        "key1": as_int32(key1),
        "draw": as_int32(draw),
        "t_ptr": t_N,
        "c_in_t_ptr": c_in_t_N,
        "r_ptr": r_N,
        "c_in_r_ptr": c_in_r_N,
        **{f"{name}_ptr": image for name, image in out._asdict().items()},
        "CHANNELS": channels,
        "ELEMENTS": elements,
        "CHUNKS": chunks,
        "BLOCKS": blocks,
    }
    return [Launch(add_noise_kernel, (num * chunks,), arguments, chosen["num_warps"])]
