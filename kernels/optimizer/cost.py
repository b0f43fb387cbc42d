"""What one optimizer step must move: the floor under its time."""

from ..runtime.cost import Cost

FP32_BYTES = 4


def norm_cost(num_elements: int, grad_itemsize: int = FP32_BYTES) -> Cost:
    """The finite check reads every gradient once: two FLOPs each, three with the unscaling."""
    return Cost(grad_itemsize * num_elements, 0, 3 * num_elements)


def update_cost(num_elements: int, num_averages: int = 0, grad_itemsize: int = FP32_BYTES, copy_itemsize: int = 0) -> Cost:
    """The update reads gradient, parameter, two moments and the averages, and writes all but the gradient, and the copy.

    With fp32 gradients 28 bytes a parameter, 8 more for each average, ``copy_itemsize`` for the copy.
    """
    state = FP32_BYTES * (3 + num_averages)
    flops = 14 + 4 * num_averages
    return Cost((grad_itemsize + state) * num_elements, (state + copy_itemsize) * num_elements, flops * num_elements)


def step_cost(num_elements: int, num_averages: int = 0, grad_itemsize: int = FP32_BYTES, copy_itemsize: int = 0) -> Cost:
    """Both passes: with fp32 gradients, one average and a two-byte copy 42 bytes a parameter."""
    passes = norm_cost(num_elements, grad_itemsize), update_cost(num_elements, num_averages, grad_itemsize, copy_itemsize)
    return Cost(*(sum(values) for values in zip(*passes, strict=True)))
