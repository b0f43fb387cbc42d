"""The least that noise and input preconditioning must move and compute."""

from ..runtime.cost import Cost

# Per element and level: two multiplications, one addition.
FLOPS_PER_LEVEL = 3
# Per normal: a quarter of ten Philox rounds (eight word operations and the keys' two additions) and half of a logarithm, a
# root, a sine and a cosine (70 operations as ``philox/device.py`` writes them).
FLOPS_PER_NORMAL = 60


def forward(num: int, elements: int, levels: int, clean_bytes: int, input_bytes: int, *, given: bool = False) -> Cost:
    """One pass over N images of E elements; item sizes in bytes, ``given``: whether fp32 noise is read instead of drawn.

    Reads the images once (and the noise), writes fp32 x and the network input per level.
    """
    total = num * elements
    flops = total * (levels * FLOPS_PER_LEVEL + (0 if given else FLOPS_PER_NORMAL))
    return Cost(total * (clean_bytes + (4 if given else 0)), total * levels * (4 + input_bytes), flops)
