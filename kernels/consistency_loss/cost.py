"""The least that the consistency loss must move and compute."""

from ..runtime.cost import Cost

# Per element: two products and a sum for D_t, the same for D_r, the difference, its square and the sum.
FLOPS_FORWARD = 9
# D_t, D_r and the difference again, one product for the gradient.
FLOPS_BACKWARD = 8
# Beside the forward pass two products and a sum for the tangent of D_t, its product with the difference and the sum.
FLOPS_JVP = FLOPS_FORWARD + 5


def forward(num: int, elements: int, network_bytes: int, image_bytes: int = 4, *, clean_rows: int = 0) -> Cost:
    """N images of E elements whose target is D_r, but clean in ``clean_rows`` of them; item sizes in bytes."""
    total = num * elements
    return Cost(_reads(num, elements, network_bytes, image_bytes, clean_rows), 2 * 4 * num, FLOPS_FORWARD * total)


def backward(num: int, elements: int, network_bytes: int, image_bytes: int = 4, *, clean_rows: int = 0) -> Cost:
    """The gradient of F_t alone: what the forward pass reads, and one image written."""
    total = num * elements
    reads = _reads(num, elements, network_bytes, image_bytes, clean_rows)
    return Cost(reads, total * network_bytes, FLOPS_BACKWARD * total)


def jvp(num: int, elements: int, network_bytes: int, image_bytes: int = 4, *, clean_rows: int = 0) -> Cost:
    """Loss and tangent for tangents of F_t and x_t."""
    total = num * elements
    reads = _reads(num, elements, network_bytes, image_bytes, clean_rows) + total * (network_bytes + image_bytes)
    return Cost(reads, 2 * 4 * num, FLOPS_JVP * total)


def _reads(num: int, elements: int, network_bytes: int, image_bytes: int, clean_rows: int) -> int:
    pair = network_bytes + image_bytes
    return elements * (num * pair + (num - clean_rows) * pair + clean_rows * image_bytes)
