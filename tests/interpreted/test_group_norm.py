"""Triton kernels of group norm in the interpreter, against the reference in fp64."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad

from fastcm.kernels.group_norm import group_norm, group_norm_jvp, group_norm_reference
from fastcm.kernels.group_norm.tiling import Tiling
from fastcm.random import Stream

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")  # of PyTorch's own forward mode
EPS = 1e-5
# Tolerances relative to the largest value of each result: rounding of fp32 sums, or of the fp16 result itself.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1.5e-3}
FLAGS = list(itertools.product((False, True), repeat=4))
NAMES = ("x", "weight", "bias", "addend", "scale", "shift")


def draw(purpose, *shape, dtype=torch.float32):
    return Stream(3, purpose).normal(torch.arange(shape[0]), shape[1:]).to(dtype)


def image(purpose, n, c, h, w, dtype=torch.float32):
    return Stream(3, purpose).image_normal(torch.arange(n), (c, h, w)).to(dtype)


def problem(n, c, h, w, dtype, addend=True, film=True, dropout=0.3):
    """(differentiable arguments by name, options) with parameters in fp32."""
    values = {"x": image("x", n, c, h, w, dtype), "weight": draw("weight", c) + 1, "bias": draw("bias", c)}
    values |= {"addend": draw("addend", n, c) if addend else None}
    values |= {name: 0.5 * draw(name, n, c) if film else None for name in ("scale", "shift")}
    key = Stream(9, "dropout").at(torch.arange(n) + 2**33, draw=2)
    return values, {"dropout": dropout, "dropout_key": key if dropout else None}


def call(norm, groups, x, weight, bias, addend, scale, shift, **options):
    return norm(x, groups, weight, bias, EPS, addend_NC=addend, scale_NC=scale, shift_NC=shift, **options)


def in_fp64(values):
    return {name: None if value is None else value.double() for name, value in values.items()}


def forward_mode(function, primals, tangents):
    """The value and its tangent by PyTorch's own forward mode."""
    with forward_ad.dual_level():
        output = function(*map(forward_ad.make_dual, primals, tangents))
        return forward_ad.unpack_dual(output)


def close(actual, expected, dtype, factor=1.0):
    assert actual.shape == expected.shape
    bound = factor * TOLERANCE[dtype] * max(expected.abs().max().item(), 1.0)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)


def gradients(norm, groups, values, dy, **options):
    leaves = {name: value.clone().requires_grad_() for name, value in values.items() if value is not None}
    y = call(norm, groups, **(values | leaves), **options)
    return y.detach(), dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def check_forward_and_backward(shape, groups, dtype, **flags):
    silu = flags.pop("silu", True)
    values, options = problem(*shape, dtype, **flags)
    dy = image("dy", *shape, dtype)
    y, found = gradients(group_norm, groups, values, dy, silu=silu, **options)
    expected, truth = gradients(group_norm_reference, groups, in_fp64(values), dy.double(), silu=silu, **options)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    close(y, expected, dtype)
    for name, value in found.items():
        assert value.dtype == values[name].dtype
        # Sums over samples and pixels of values that were rounded once each.
        close(value, truth[name], dtype, 1 if name == "x" else 4)


def check_jvp(shape, groups, dtype, addend=True, film=True, silu=True, dropout=0.3):
    values, options = problem(*shape, dtype, addend=addend, film=film, dropout=dropout)
    tangents = {"x": image("tx", *shape, dtype)}
    tangents |= {"addend": draw("taddend", *shape[:2])} if addend else {}
    tangents |= {name: draw(f"t{name}", *shape[:2]) for name in ("scale", "shift") if film}
    rows = {f"{name}_NC": values[name] for name in NAMES[3:]}
    rows |= {f"t{name}_NC": tangent for name, tangent in tangents.items() if name != "x"}
    affine = (groups, values["weight"], values["bias"], EPS)
    y, ty = group_norm_jvp(values["x"], tangents["x"], *affine, **rows, silu=silu, **options)
    names = list(tangents)

    def plain(*inputs):
        return call(
            group_norm_reference, groups, **(in_fp64(values) | dict(zip(names, inputs, strict=True))), silu=silu, **options
        )

    primals = tuple(values[name].double() for name in names)
    expected, truth = forward_mode(plain, primals, tuple(tangents[name].double() for name in names))
    close(y, expected, dtype)
    close(ty, truth, dtype)


def tiled(monkeypatch, resident, block=(4, 32)):
    """Small tiles: everything resident, or everything looped over; ``block``: the least and most channels of a tile."""
    use = {"min_channels": block[0], "max_channels": block[1], "resident": 4096 if resident else 0, "per_thread": 8}
    use |= {"loop_tile": 128, "loop_warps": 4}
    monkeypatch.setattr("fastcm.kernels.group_norm.tiling.pinned", lambda *_, **__: use)


@pytest.fixture(params=[True, False], ids=["resident", "looped"])
def resident(request, monkeypatch):
    tiled(monkeypatch, request.param)
    return request.param


# Channels per group 3 (odd, with two slabs), 6, 12 and 5; odd and single pixels; channels that no vector divides.
SHAPES = [((2, 12, 5, 7), 4), ((1, 24, 4, 4), 4), ((2, 24, 3, 5), 2), ((3, 15, 1, 3), 3), ((1, 6, 1, 1), 1), ((2, 20, 2, 9), 5)]


@pytest.mark.usefixtures("resident")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_any_shape(shape, groups, dtype):
    check_forward_and_backward(shape, groups, dtype)
    check_jvp(shape, groups, dtype)


@pytest.mark.parametrize("resident", [True, False])
def test_a_last_slab_with_fewer_channels(monkeypatch, resident):
    """18 channels in slabs of 8, two of them in the last; Philox blocks of four do not begin with a pixel."""
    tiled(monkeypatch, resident, block=(8, 8))
    check_forward_and_backward((2, 18, 4, 8), 9, torch.float32)
    check_jvp((2, 18, 4, 8), 9, torch.float32)


@pytest.mark.usefixtures("resident")
@pytest.mark.parametrize(("addend", "film", "silu", "dropout"), FLAGS)
def test_any_flags(addend, film, silu, dropout):
    flags = {"addend": addend, "film": film, "silu": silu, "dropout": 0.4 * dropout}
    check_forward_and_backward((1, 12, 3, 5), 4, torch.float32, **flags)
    check_jvp((1, 12, 3, 5), 4, torch.float32, **flags)


@pytest.mark.usefixtures("resident")
@pytest.mark.parametrize("mean", [50, 500])
def test_a_mean_far_from_zero_costs_no_precision(mean):
    """x has a standard deviation of 1; fp32 holds x itself to 3e-5 at 500, and the reference sees the same x."""
    x = image("x", 2, 16, 6, 6) + mean
    one, zero = torch.ones(16), torch.zeros(16)
    y, found = gradients(group_norm, 4, dict.fromkeys(NAMES) | {"x": x, "weight": one, "bias": zero}, image("dy", 2, 16, 6, 6))
    values = in_fp64(dict.fromkeys(NAMES) | {"x": x, "weight": one, "bias": zero})
    expected, truth = gradients(group_norm_reference, 4, values, image("dy", 2, 16, 6, 6).double())
    close(y, expected, torch.float32)
    close(found["x"], truth["x"], torch.float32, 20)  # the saved mean is rounded: 3e-5 of a standard deviation
    _, ty = group_norm_jvp(x, image("tx", 2, 16, 6, 6) + mean, 4, one, zero, EPS)
    inputs = (x.double(),), ((image("tx", 2, 16, 6, 6) + mean).double(),)
    _, truth = forward_mode(lambda value: group_norm_reference(value, 4, one, zero, EPS), *inputs)
    close(ty, truth, torch.float32, 60)


def test_an_outlier_in_the_tile_of_the_pivot_costs_no_precision(monkeypatch):
    tiled(monkeypatch, False)
    x = image("x", 1, 8, 16, 16) * 1e-2
    x[:, :, 0, 0] = 300.0
    one, zero = torch.ones(8), torch.zeros(8)
    close(group_norm(x, 2, one, zero, EPS), group_norm_reference(x.double(), 2, one, zero, EPS), torch.float32)


def test_slices_and_foreign_strides_are_read_in_place():
    """x is a slice of channels, dy the slice that cat's backward hands out, rows are slices of one projection."""
    wide = image("x", 2, 20, 3, 4)
    rows = draw("rows", 2, 36)
    weight, bias = draw("weight", 12), draw("bias", 12)
    direction = image("dy", 2, 20, 3, 4)

    def joined(norm, wide, rows, weight, bias):
        parts = rows.chunk(3, dim=1)
        y = norm(wide[:, 4:16], 4, weight, bias, EPS, addend_NC=parts[0], scale_NC=parts[1], shift_NC=parts[2], silu=True)
        return torch.cat([wide[:, :4], y, wide[:, 16:]], dim=1)

    results = []
    for norm, dtype in ((group_norm, torch.float32), (group_norm_reference, torch.float64)):
        leaves = [value.to(dtype).clone().requires_grad_() for value in (wide, rows, weight, bias)]
        results.append(torch.autograd.grad(joined(norm, *leaves), leaves, direction.to(dtype)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected, torch.float32, 4)


def test_other_memory_is_copied():
    x, weight, bias = image("x", 2, 6, 3, 4), draw("weight", 6), draw("bias", 6)
    plain = group_norm(x, 2, weight, bias, EPS)
    for other in (x.contiguous(), x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)):
        assert torch.equal(group_norm(other, 2, weight, bias, EPS), plain)


@pytest.mark.usefixtures("resident")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_and_parameters_keep_their_dtypes_and_repeat(dtype):
    values, options = problem(3, 12, 3, 5, torch.bfloat16)
    values = {name: value if name == "x" else value.to(dtype) for name, value in values.items()}
    dy = image("dy", 3, 12, 3, 5, torch.bfloat16)
    y, found = gradients(group_norm, 4, values, dy, silu=True, **options)
    expected, truth = gradients(group_norm_reference, 4, in_fp64(values), dy.double(), silu=True, **options)
    # The interpreter cuts off where hardware rounds to the nearest bfloat16.
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=1e-2)
    for name, value in found.items():
        assert value.dtype == values[name].dtype
        torch.testing.assert_close(value.double(), truth[name], rtol=2**-7, atol=2e-2 * truth[name].abs().max().item())
    again, more = gradients(group_norm, 4, values, dy, silu=True, **options)
    assert torch.equal(again, y)
    assert all(torch.equal(more[name], value) for name, value in found.items())


@pytest.mark.parametrize("needed", [("x",), ("addend",), ("weight",), ("scale",), ("bias", "shift")])
def test_only_what_is_needed_is_computed(needed):
    values, options = problem(2, 12, 3, 5, torch.float32)
    leaves = {name: values[name].clone().requires_grad_() for name in needed}
    dy = image("dy", 2, 12, 3, 5)
    y = call(group_norm, 4, **(values | leaves), silu=True, **options)
    found = torch.autograd.grad(y, list(leaves.values()), dy)
    _, truth = gradients(group_norm_reference, 4, in_fp64(values), dy.double(), silu=True, **options)
    for name, value in zip(needed, found, strict=True):
        close(value, truth[name], torch.float32, 4)


def test_no_samples_are_no_launch():
    values, options = problem(0, 12, 3, 5, torch.float32)
    y, found = gradients(group_norm, 4, values, image("dy", 0, 12, 3, 5), silu=True, **options)
    assert y.shape == (0, 12, 3, 5)
    assert not found["weight"].any()
    assert not found["bias"].any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_nan_or_infinity_stays_in_its_group():
    x = image("x", 2, 8, 4, 4)
    x[0, 0, 1, 1], x[1, 5, 0, 0] = torch.nan, torch.inf
    y = group_norm(x, 2, torch.ones(8), torch.zeros(8), EPS)
    bad = ~y.isfinite().all(dim=(2, 3))
    assert bad.tolist() == [[True] * 4 + [False] * 4, [False] * 4 + [True] * 4]
    assert y[0, :4].isnan().all()


def test_the_pinned_tiling_covers_every_channel_once():
    for channels, groups, itemsize in itertools.product((3, 32, 192, 576, 1344), (1, 3, 32), (2, 4)):
        if channels % groups:
            continue
        from fastcm.kernels.group_norm.tiling import tiling

        tile = tiling("forward", "sm90", num_pixels=64, channels=channels, num_groups=groups, itemsize=itemsize, dropout=False)
        assert isinstance(tile, Tiling)
        assert tile.slab % (channels // groups) == 0
        assert (tile.num_slabs - 1) * tile.slab < channels <= tile.num_slabs * tile.slab
        assert tile.slab <= tile.block_c
