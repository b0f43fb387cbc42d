"""What this device can do at best, measured: copying memory, matrix products, and cuDNN's three convolutions."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcm.bench.shapes import ConvShape
from fastcm.bench.timing import Thunk, Timing, l2_bytes, measuring_stream, num_sets, time_graph, time_host
from fastcm.random import Stream

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
PRODUCT_SIDE = {"cuda": 8192, "cpu": 256}
CONV_PASSES = ("fprop", "dgrad", "wgrad")


def time_calls(thunks: list[Thunk], device: torch.device, budget_s: float) -> Timing:
    """Device time on a GPU, host time on a CPU."""
    return time_graph(thunks, budget_s) if device.type == "cuda" else time_host(thunks, budget_s)


def copy_bandwidth(device: torch.device, budget_s: float = 0.2) -> float:
    """Bytes per second of a large copy, read and written bytes both counted."""
    source = _normal(device, COPY_BYTES[device.type] // 4)
    with measuring_stream(device):
        timing = time_calls([partial(torch.empty_like(source).copy_, source)], device, budget_s)
    return 2 * source.numel() * 4 / (timing.median_us * 1e-6)


def product_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16, budget_s: float = 0.2) -> float:
    """Floating-point operations per second of a large square matrix product of random numbers."""
    side = PRODUCT_SIDE[device.type]
    a, b = (_normal(device, side * side, draw).to(dtype).reshape(side, side) for draw in (0, 1))
    with measuring_stream(device):
        timing = time_calls([partial(torch.matmul, a, b)], device, budget_s)
    return 2 * side**3 / (timing.median_us * 1e-6)


def conv_times(shape: ConvShape, batch: int, device: torch.device, budget_s: float = 0.05) -> dict[str, dict[str, Any]]:
    """Time and rate of the forward pass (fprop) and of both gradients (dgrad, wgrad), bf16 and channels_last."""
    with measuring_stream(device), cudnn_search():
        first = _conv_arguments(shape, batch, device)
        sets = [first]
        while len(sets) < num_sets(sum(value.numel() * 2 for value in first), l2_bytes(device)):
            sets.append(tuple(value.clone(memory_format=torch.preserve_format) for value in first))
        timings = {
            name: time_calls([partial(_conv, shape, name, *arguments) for arguments in sets], device, budget_s)
            for name in CONV_PASSES
        }
    flops = shape.flops_per_image * batch
    rates = {name: flops / (timing.median_us * 1e-6) for name, timing in timings.items()}
    return {name: {"time": timing._asdict(), "flops_per_s": rates[name]} for name, timing in timings.items()}


@contextmanager
def cudnn_search() -> Iterator[None]:
    """Let cuDNN time its algorithms at the first call of each shape, as training does."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _conv_arguments(shape: ConvShape, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and gradient of the output."""
    x_size = (batch, shape.in_channels, shape.resolution, shape.resolution)
    weight_size = (shape.out_channels, shape.in_channels, shape.kernel, shape.kernel)
    x, weight = (_images(device, size, draw) for draw, size in enumerate((x_size, weight_size)))
    return x, weight, _images(device, _conv(shape, "fprop", x, weight, x).shape, 2)


def _conv(shape: ConvShape, name: str, x: Tensor, weight: Tensor, grad: Tensor) -> Tensor | tuple[Tensor, ...]:
    stride, padding = shape.stride, shape.padding
    if name == "fprop":
        return F.conv2d(x, weight, stride=stride, padding=padding)
    mask = (name == "dgrad", name == "wgrad", False)
    pair = ([stride] * 2, [padding] * 2, [1, 1])
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *pair, False, [0, 0], 1, mask)


def _images(device: torch.device, size: torch.Size | tuple[int, ...], draw: int) -> Tensor:
    values = _normal(device, torch.Size(size).numel(), draw).to(torch.bfloat16).reshape(size)
    return values.contiguous(memory_format=torch.channels_last)


def _normal(device: torch.device, size: int, draw: int = 0) -> Tensor:
    """Normal numbers; long ones repeat a block of 2^20, which no memory system notices."""
    block = Stream(0, "bench/ceilings").normal(torch.zeros(1, dtype=torch.int64, device=device), (min(size, 1 << 20),), draw)[0]
    return block.repeat(-(-size // len(block)))[:size]
