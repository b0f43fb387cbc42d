"""The least that attention must move and compute: each tensor once, and the products of T x T x D."""

from ..runtime.cost import Cost

# Products of T x T x D, a multiply-add being two operations. Forward: S, O; backward: S, dP, dV, dQ, dK; JVP: S, O and for
# tS and tO two each.
PRODUCTS_FORWARD = 2
PRODUCTS_BACKWARD = 5
PRODUCTS_JVP = 6


def forward(num: int, tokens: int, num_heads: int, head_dim: int, itemsize: int) -> Cost:
    """q, k and v read, the output and its fp32 normalisers written."""
    image, rows, product = _sizes(num, tokens, num_heads, head_dim)
    return Cost(3 * image * itemsize, image * itemsize + 4 * rows, PRODUCTS_FORWARD * product)


def backward(num: int, tokens: int, num_heads: int, head_dim: int, itemsize: int) -> Cost:
    """q, k, v, the output, its gradient and the normalisers read, the gradients of q, k and v written."""
    image, rows, product = _sizes(num, tokens, num_heads, head_dim)
    return Cost(5 * image * itemsize + 4 * rows, 3 * image * itemsize, PRODUCTS_BACKWARD * product)


def jvp(num: int, tokens: int, num_heads: int, head_dim: int, itemsize: int) -> Cost:
    """q, k, v and their tangents read, the output and its tangent written."""
    image, _, product = _sizes(num, tokens, num_heads, head_dim)
    return Cost(6 * image * itemsize, 2 * image * itemsize, PRODUCTS_JVP * product)


def _sizes(num: int, tokens: int, num_heads: int, head_dim: int) -> tuple[int, int, int]:
    """Elements of an image tensor of C channels, rows of weights, operations of one product."""
    rows = num * num_heads * tokens
    return rows * head_dim, rows, 2 * rows * tokens * head_dim
