"""Launches of the backward pass: one kernel where a program holds a whole image, else one for dQ and one for dK and dV.

No atomics: every value has one writer and every sum a fixed order, so gradients repeat bit for bit.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ..runtime.launch import Launch, ceil_div
from ..runtime.layout import PixelLayout
from ..runtime.pinned import pinned
from .backward_blocks import key_blocks_kernel, query_blocks_kernel
from .backward_rows import image_backward_kernel, rows_key_kernel, rows_query_kernel
from .call import Sizes, cover, image_arguments, query_blocks, shared_arguments, tile


def backward_launches(
    dout_NCHW: Shaped[Tensor, "N C H W"],
    dout_layout: PixelLayout,
    qkv_NCHW: Shaped[Tensor, "N C3 H W"],
    layout: PixelLayout,
    out_NCHW: Shaped[Tensor, "N C H W"],
    out_layout: PixelLayout,
    lse_NhT: Float[Tensor, "N h T"],
    num_heads: int,
    dqkv_NCHW: Shaped[Tensor, "N C3 H W"],
    arch: str,
) -> list[Launch]:
    """The launches that fill ``dqkv_NCHW`` (dense channels_last) from readable memory; scratch: delta [N, h, T]."""
    sizes = Sizes.of(qkv_NCHW, num_heads)
    facts = sizes.facts(qkv_NCHW.dtype)
    arguments = {
        **image_arguments("qkv", qkv_NCHW, layout),
        **image_arguments("dout", dout_NCHW, dout_layout),
        "lse_ptr": lse_NhT,
        "dqkv_ptr": dqkv_NCHW,
        **shared_arguments(sizes, qkv_NCHW.dtype),
    }
    queries = pinned("attention", "backward_queries", arch, **facts)
    if queries["whole_image"]:
        blocks = {"BLOCK_T": cover(sizes.tokens), "BLOCK_D": tile(queries["block_d"], sizes.head_dim)}
        launch = Launch(image_backward_kernel, (sizes.groups,), arguments | blocks, queries["num_warps"], queries["num_stages"])
        return [launch]
    arguments["delta_ptr"] = torch.empty_like(lse_NhT)
    out = image_arguments("out", out_NCHW, out_layout)
    keys = pinned("attention", "backward_keys", arch, **facts)
    return [
        _launch(rows_query_kernel, arguments, queries, sizes)
        if queries["full_row"]
        else _launch(query_blocks_kernel, arguments | out, queries, sizes),
        _launch(rows_key_kernel if keys["full_row"] else key_blocks_kernel, arguments, keys, sizes),
    ]


def _launch(kernel: object, arguments: dict[str, object], use: dict[str, int], sizes: Sizes) -> Launch:
    blocks = query_blocks(use, sizes)
    grid = (ceil_div(sizes.tokens, blocks["BLOCK_M"]) * sizes.groups,)
    return Launch(kernel, grid, arguments | blocks, use["num_warps"], use["num_stages"])
