"""What is measured: one case per op, pass and shape, with random inputs of the statistics that a network has."""

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcm.bench.shapes import ALL_SETS, AttentionShape, GroupNormShape, kernel_calls, parameter_shapes
from fastcm.kernels.philox import PhiloxKey
from fastcm.random import Stream

PASSES = {"fwd": "forward", "bwd": "backward", "jvp": "jvp"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

DROPOUT = 0.13  # of EDM's CIFAR-10 networks
GROUP_NORM_EPS = 1e-6
MEAN_OFFSET = 0.5  # activations have a mean, and a mean is what breaks careless variances
SIGMA_DATA = 0.5
BOUNDARY_EVERY = 8  # one in so many images has the clean image as its target


class ImageShape(NamedTuple):
    """One call of noise or loss: images as the data set has them."""

    channels: int
    resolution: int


class ParameterShape(NamedTuple):
    """One optimizer step: tensors, their elements in all, and the update rule."""

    num_tensors: int
    num_parameters: int
    kind: str


Shape = GroupNormShape | AttentionShape | ImageShape | ParameterShape


class Case(NamedTuple):
    """One thing to measure. ``calls`` is how often a training forward pass (the optimizer: a step) makes this call."""

    op: str
    shape_set: str
    shape: Shape
    calls: int
    batch: int
    dtype: torch.dtype
    direction: str

    @property
    def label(self) -> str:
        """The shape in a few words."""
        return describe(self.shape)


class Problem(NamedTuple):
    """The arguments of a call by name: tensors that may have gradients, everything else, and vectors to multiply with.

    ``shared`` names the tensors without a sample axis. ``cotangent`` belongs to the (first) result; ``tangents`` to
    those tensors that the JVP moves.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    differentiable: tuple[str, ...]
    shared: frozenset[str]
    cotangent: Tensor
    tangents: dict[str, Tensor]


def describe(shape: Shape) -> str:
    """A shape as a table shows it."""
    if isinstance(shape, GroupNormShape):
        flags = [name for name in ("addend", "film", "silu", "dropout") if getattr(shape, name)]
        return " ".join([f"{shape.channels}x{shape.resolution}x{shape.resolution} g{shape.num_groups}", *flags])
    if isinstance(shape, AttentionShape):
        return f"T{shape.tokens} h{shape.num_heads} d{shape.head_dim}"
    if isinstance(shape, ImageShape):
        return f"{shape.channels}x{shape.resolution}x{shape.resolution}"
    return f"{shape.kind} {shape.num_parameters} in {shape.num_tensors}"


def cases(op: str, shape_set: str, batch: int, dtype: torch.dtype, directions: tuple[str, ...]) -> Iterator[Case]:
    """The cases of one op on the shapes of a network, the costliest shapes first."""
    for shape, calls in sorted(_shapes(op, shape_set), key=lambda pair: -pair[1] * _size(pair[0])):
        for direction in directions:
            if direction in OP_PASSES[op]:
                yield Case(op, shape_set, shape, calls, batch, dtype, direction)


# Which passes an op has: noise is drawn, not differentiated; an optimizer step is one pass.
OP_PASSES: dict[str, tuple[str, ...]] = {
    "group_norm": ("fwd", "bwd", "jvp"),
    "attention": ("fwd", "bwd", "jvp"),
    "consistency_loss": ("fwd", "bwd", "jvp"),
    "add_noise": ("fwd",),
    "optimizer": ("fwd",),
}


def _shapes(op: str, shape_set: str) -> list[tuple[Shape, int]]:
    if op in ("group_norm", "attention"):
        kind = GroupNormShape if op == "group_norm" else AttentionShape
        return [(shape, calls) for shape, calls in kernel_calls(shape_set).items() if isinstance(shape, kind)]
    if op == "optimizer":
        shapes = parameter_shapes(shape_set)
        return [(ParameterShape(len(shapes), sum(map(prod, shapes)), kind), 1) for kind in ("adam", "radam")]
    channels, resolution, _ = ALL_SETS[shape_set][1]
    return [(ImageShape(channels, resolution), 1)]


def _size(shape: Shape) -> int:
    if isinstance(shape, GroupNormShape):
        return shape.channels * shape.resolution**2
    return shape.num_parameters if isinstance(shape, ParameterShape) else prod(shape)


def build(case: Case, device: torch.device, seed: int = 0) -> Problem:
    """The inputs of a case; the same for the same seed on every device, up to rounding."""
    return BUILDERS[case.op](case.shape, case.batch, case.dtype, _Draw(device, case.batch, seed))


class _Draw:
    """Random tensors, each from a stream of its own name."""

    def __init__(self, device: torch.device, batch: int, seed: int) -> None:
        self.index, self.seed = torch.arange(batch, device=device), seed

    def images(self, name: str, channels: int, side: int, dtype: torch.dtype, mean: float = 0.0) -> Tensor:
        """Normal images, channels_last."""
        return (self.stream(name).image_normal(self.index, (channels, side, side)) + mean).to(dtype)

    def rows(self, name: str, *shape: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
        """One fp32 row per sample."""
        return self.stream(name).normal(self.index, shape) * scale + mean

    def shared(self, name: str, size: int, mean: float = 0.0) -> Tensor:
        """One fp32 row for all samples."""
        return self.stream(name).normal(self.index.new_zeros(1), (size,))[0] * 0.2 + mean

    def stream(self, name: str) -> Stream:
        """The stream of a name."""
        return Stream(self.seed, f"bench/{name}")


def _group_norm(shape: GroupNormShape, batch: int, dtype: torch.dtype, draw: _Draw) -> Problem:
    c, side = shape.channels, shape.resolution
    tensors = {"x_NCHW": draw.images("x", c, side, dtype, MEAN_OFFSET)}
    tensors |= {"weight_C": draw.shared("weight", c, 1.0), "bias_C": draw.shared("bias", c)}
    names = (["addend_NC"] if shape.addend else []) + (["scale_NC", "shift_NC"] if shape.film else [])
    tensors |= {name: draw.rows(name, c, scale=0.3).to(dtype) for name in names}
    tangents = {"x_NCHW": draw.images("tx", c, side, dtype)} | {name: draw.rows(f"t{name}", c).to(dtype) for name in names}
    options = {"num_groups": shape.num_groups, "eps": GROUP_NORM_EPS, "silu": shape.silu}
    if shape.dropout:
        options |= {"dropout": DROPOUT, "dropout_key": draw.stream("dropout").at(draw.index)}
    cotangent = draw.images("dy", c, side, dtype)
    return Problem(tensors, options, tuple(tensors), frozenset({"weight_C", "bias_C"}), cotangent, tangents)


def _attention(shape: AttentionShape, batch: int, dtype: torch.dtype, draw: _Draw) -> Problem:
    side, c = round(shape.tokens**0.5), shape.num_heads * shape.head_dim
    tensors = {"qkv_NCHW": draw.images("qkv", 3 * c, side, dtype, MEAN_OFFSET)}
    tangents = {"qkv_NCHW": draw.images("tqkv", 3 * c, side, dtype)}
    options = {"num_heads": shape.num_heads}
    return Problem(tensors, options, tuple(tensors), frozenset(), draw.images("do", c, side, dtype), tangents)


def _consistency_loss(shape: ImageShape, batch: int, dtype: torch.dtype, draw: _Draw) -> Problem:
    """Student and teacher of ECT: network outputs in ``dtype``, images in fp32."""
    tensors, fp32 = {}, torch.float32
    t_N = (draw.rows("t") * 2 - 1.1).exp()
    tensors = {f"F_{at}": draw.images(f"F_{at}", *shape, dtype) for at in "tr"}
    tensors |= {f"x_{at}": draw.images(f"x_{at}", *shape, fp32) * (t_N**2 + 1).sqrt()[:, None, None, None] for at in "tr"}
    for at, sigma_N in (("t", t_N), ("r", 0.99 * t_N)):
        variance_N = sigma_N**2 + SIGMA_DATA**2
        tensors |= {f"c_skip_{at}": SIGMA_DATA**2 / variance_N, f"c_out_{at}": sigma_N * SIGMA_DATA / variance_N.sqrt()}
    tensors |= {"clean": draw.images("clean", *shape, fp32) * SIGMA_DATA, "weight_N": 1 / t_N}
    tensors["boundary_N"] = draw.index % BOUNDARY_EVERY == 0
    tangents = {"F_t": draw.images("tF_t", *shape, dtype), "x_t": draw.images("tx_t", *shape, fp32)}
    return Problem(tensors, {"distance": "l2"}, ("F_t",), frozenset(), torch.ones_like(t_N) / batch, tangents)


def _add_noise(shape: ImageShape, batch: int, dtype: torch.dtype, draw: _Draw) -> Problem:
    """What ECT draws: two noise levels per image and one noise."""
    t_N = (draw.rows("t") * 2 - 1.1).exp()
    tensors = {"clean_NCHW": draw.images("clean", *shape, torch.float32) * SIGMA_DATA}
    for at, sigma_N in (("t", t_N), ("r", 0.99 * t_N)):
        tensors |= {f"{at}_N": sigma_N, f"c_in_{at}_N": (sigma_N**2 + SIGMA_DATA**2).rsqrt()}
    options = {"noise": draw.stream("noise").at(draw.index), "dtype": dtype}
    return Problem(tensors, options, (), frozenset(), t_N, {})


BUILDERS = {
    "group_norm": _group_norm,
    "attention": _attention,
    "consistency_loss": _consistency_loss,
    "add_noise": _add_noise,
}


def rotated(problem: Problem, by: int) -> Problem:
    """The same samples in another order in other memory: a further set of inputs, cheaper than drawing one."""

    def move(name: str, value: Any) -> Any:
        if isinstance(value, PhiloxKey):
            return value._replace(index_N=value.index_N.roll(by))
        if not isinstance(value, Tensor) or name in problem.shared:
            return value
        value = value.roll(by, 0)
        return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value

    return _map(problem, move)


def sliced(problem: Problem, part: slice) -> Problem:
    """Some of the samples."""

    def cut(name: str, value: Any) -> Any:
        if isinstance(value, PhiloxKey):
            return value._replace(index_N=value.index_N[part])
        return value[part] if isinstance(value, Tensor) and name not in problem.shared else value

    return _map(problem, cut)


def in_fp64(problem: Problem) -> Problem:
    """The same numbers in double precision."""

    def widen(_: str, value: Any) -> Any:
        if isinstance(value, torch.dtype):  # of the results
            return torch.float64
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return _map(problem, widen)


def _map(problem: Problem, change: Any) -> Problem:
    return problem._replace(
        tensors={name: change(name, value) for name, value in problem.tensors.items()},
        options={name: change(name, value) for name, value in problem.options.items()},
        cotangent=change("", problem.cotangent),
        tangents={name: change(name, value) for name, value in problem.tangents.items()},
    )
