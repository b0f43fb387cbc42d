"""Loads that kernels share."""

import triton
import triton.language as tl


@triton.jit
def load_elements(x_ptr, n, stride_n, element, mask, COLUMNS: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr):
    """Elements of image n in fp32, 0 outside the mask; n is int64, an image alone is below 2^31 elements.

    ROW and COLUMN are the strides of the image's rows and columns, as ``elements.image_arguments`` gives them.
    """
    # Dense in this order: neighbours stay neighbours, and loads are wide.
    IS_DENSE: tl.constexpr = ROW == COLUMNS and COLUMN == 1
    offset = element if IS_DENSE else (element // COLUMNS) * ROW + (element % COLUMNS) * COLUMN
    return tl.load(x_ptr + n * stride_n + offset, mask=mask, other=0.0).to(tl.float32)
