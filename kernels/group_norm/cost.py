"""The least that group norm must move and compute."""

from ..runtime.cost import Cost

# Per element: two sums and a square for the statistics, scale and shift, sigmoid (a scale, exp2, a sum, a root, a square) and
# its product; backward has the sigmoid again with its derivative, two sums with a product each and dx; JVP both statistics.
FLOPS_FORWARD = 12
FLOPS_BACKWARD = 20
FLOPS_JVP = 24


def forward(num: int, channels: int, pixels: int, itemsize: int, *, num_groups: int, rows: int = 0) -> Cost:
    """x read, y and the statistics written; ``rows`` counts the optional vectors per sample (addend, scale, shift)."""
    image = num * channels * pixels
    return Cost(
        image * itemsize + _vectors(num, channels, itemsize, rows),
        image * itemsize + 8 * num * num_groups,
        FLOPS_FORWARD * image,
    )


def backward(num: int, channels: int, pixels: int, itemsize: int, *, num_groups: int, rows: int = 0) -> Cost:
    """x and dy read, dx written, and the gradients of weight, bias (fp32) and of each optional vector."""
    image = num * channels * pixels
    reads = 2 * image * itemsize + _vectors(num, channels, itemsize, rows) + 8 * num * num_groups
    return Cost(reads, image * itemsize + _vectors(num, channels, itemsize, rows), FLOPS_BACKWARD * image)


def jvp(num: int, channels: int, pixels: int, itemsize: int, *, num_groups: int, rows: int = 0) -> Cost:
    """x and tx read, y and ty written; each optional vector comes with its tangent. ``num_groups`` changes nothing."""
    image = num * channels * pixels
    return Cost(2 * image * itemsize + _vectors(num, channels, itemsize, 2 * rows), 2 * image * itemsize, FLOPS_JVP * image)


def _vectors(num: int, channels: int, itemsize: int, rows: int) -> int:
    """Bytes of weight and bias in fp32, and of optional vectors per sample."""
    return 2 * 4 * channels + rows * num * channels * itemsize
