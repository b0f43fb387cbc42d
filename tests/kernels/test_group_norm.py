"""The registered group norm on the CPU: gradients, tangents, registration, compilation and errors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

from fastcm.kernels.group_norm import forward_ad, group_norm, group_norm_jvp, group_norm_reference
from fastcm.kernels.group_norm.cost import backward as backward_cost
from fastcm.kernels.group_norm.cost import forward as forward_cost
from fastcm.kernels.group_norm.cost import jvp as jvp_cost
from fastcm.kernels.group_norm.registration import _norm, _norm_backward, _norm_jvp, checked_call, checked_tangents
from fastcm.kernels.group_norm.tiling import slab_channels
from fastcm.kernels.group_norm.two_pass import _averaging_matrix
from fastcm.random import Stream

EPS = 1e-3
NAMES = ("x", "weight", "bias", "addend", "scale", "shift")
SIZES = [(3, 2), (9, 8)]

# PyTorch's own forward-mode rules are loaded with a call that it has deprecated.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit")


def normal(purpose, *shape, dtype=torch.float64):
    return Stream(1, purpose).normal(torch.arange(shape[0]), shape[1:]).to(dtype)


def image(purpose, n, c, h, w, dtype=torch.float64):
    return Stream(1, purpose).image_normal(torch.arange(n), (c, h, w)).to(dtype)


def arguments(n=2, c=6, h=3, w=2, dtype=torch.float64):
    """x, weight, bias, addend, scale, shift."""
    rows = [normal(name, n, c, dtype=dtype) for name in NAMES[3:]]
    return [image("x", n, c, h, w, dtype), 1 + normal("weight", c, dtype=dtype), normal("bias", c, dtype=dtype), *rows]


def key(n=2):
    return Stream(0, "dropout").at(torch.arange(n) + 7, draw=3)


def norm_of(norm, groups=2, **options):
    """The op as a function of its differentiable arguments."""

    def call(x, weight, bias, addend=None, scale=None, shift=None):
        return norm(x, groups, weight, bias, EPS, addend_NC=addend, scale_NC=scale, shift_NC=shift, **options)

    return call


OPTIONS = [{}, {"silu": True}, {"silu": True, "dropout": 0.4, "dropout_key": key()}, {"dropout": 0.25, "dropout_key": key()}]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("count", [3, 4, 6])
def test_values_and_gradients_are_those_of_the_reference(size, options, count):
    leaves = [leaf.requires_grad_() for leaf in arguments(2, 6, *size)[:count]]
    actual, expected = (norm_of(norm, **options)(*leaves) for norm in (group_norm, group_norm_reference))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    direction = image("direction", *actual.shape)
    found, truth = (torch.autograd.grad(y, leaves, direction) for y in (actual, expected))
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS[::2])
def test_gradients_are_those_of_finite_differences(size, options):
    leaves = [leaf.requires_grad_() for leaf in arguments(1, 4, *size)]
    options = options | ({"dropout_key": key(1)} if options else {})
    assert gradcheck(norm_of(group_norm, **options), leaves, fast_mode=size == SIZES[1])


@pytest.mark.parametrize("needed", [["x"], ["addend"], ["weight"], ["bias", "shift"], ["scale"]])
def test_each_gradient_can_be_had_alone(needed):
    values = arguments()
    leaves = [value.requires_grad_(name in needed) for name, value in zip(NAMES, values, strict=True)]
    leaves = [leaf for leaf in leaves if leaf.requires_grad]
    direction = image("direction", *values[0].shape)
    found, truth = (
        torch.autograd.grad(norm_of(norm, silu=True)(*values), leaves, direction) for norm in (group_norm, group_norm_reference)
    )
    torch.testing.assert_close(found, truth)


@forward_mode
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_jvp_is_the_derivative_along_the_tangents(size, options, count):
    """Tangents of x alone, of x and addend, and of all; against forward mode through the reference."""
    x, weight, bias, *rows = arguments(2, 6, *size)
    primals = [x, *rows][:count]
    tangents = [normal(f"t{number}", *value.shape) for number, value in enumerate(primals)]

    def plain(x, *moved):
        return norm_of(group_norm_reference, **options)(x, weight, bias, *moved, *rows[len(moved) :])

    expected = torch.func.jvp(plain, tuple(primals), tuple(tangents))
    names = ("addend_NC", "scale_NC", "shift_NC")
    values = dict(zip(names, rows, strict=True)) | {f"t{name}": value for name, value in zip(names, tangents[1:], strict=False)}
    actual = group_norm_jvp(x, tangents[0], 2, weight, bias, EPS, **values, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


def test_jvp_and_gradient_are_transposes_of_each_other():
    values = [value.requires_grad_() for value in arguments(2, 12, 5, 3)]
    x, weight, bias, *rows = values
    tangents = [normal(f"t{number}", *value.shape) for number, value in enumerate([x, *rows])]
    direction = image("direction", *x.shape)
    options = {"silu": True, "dropout": 0.3, "dropout_key": key()}
    y = norm_of(group_norm, 4, **options)(*values)
    grads = torch.autograd.grad(y, [x, *rows], direction)
    names = ("addend_NC", "scale_NC", "shift_NC")
    with torch.no_grad():
        moved = dict(zip(names, rows, strict=True)) | dict(zip(map("t{}".format, names), tangents[1:], strict=True))
        _, ty = group_norm_jvp(x, tangents[0], 4, weight, bias, EPS, **moved, **options)
    pulled = sum((grad * tangent).sum() for grad, tangent in zip(grads, tangents, strict=True))
    torch.testing.assert_close((ty * direction).sum(), pulled)


@forward_mode
def test_torch_func_jvp_goes_through_the_class_for_forward_mode():
    x, weight, bias, *rows = arguments()
    primals = (x, *rows)
    tangents = tuple(normal(f"t{number}", *value.shape) for number, value in enumerate(primals))

    def along(norm):
        call = norm_of(norm, silu=True, dropout=0.3, dropout_key=key())
        return torch.func.jvp(lambda x, *rows: call(x, weight, bias, *rows), primals, tangents)

    torch.testing.assert_close(along(forward_ad.group_norm), along(group_norm_reference))


@forward_mode
def test_the_class_for_forward_mode_has_both_modes():
    x, weight, bias, *rows = arguments(1, 4)
    call = norm_of(forward_ad.group_norm, silu=True)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias, *rows)]
    assert gradcheck(call, leaves)
    moving = [leaves[0], *leaves[3:]]
    fixed = weight.detach(), bias.detach()
    assert gradcheck(lambda x, *rows: call(x, *fixed, *rows), moving, check_forward_ad=True, check_backward_ad=False)


@forward_mode
def test_a_tangent_is_never_dropped_in_silence():
    x, weight, bias, *_ = arguments()
    with pytest.raises(ValueError, match=r"x_NCHW has a forward-mode tangent.*group_norm_jvp"):
        torch.func.jvp(lambda x: norm_of(group_norm)(x, weight, bias), (x,), (x,))
    with pytest.raises(ValueError, match="weight_C or bias_C has a forward-mode tangent"):
        torch.func.jvp(lambda weight: norm_of(forward_ad.group_norm)(x, weight, bias), (weight,), (weight,))


def permuted(x):
    """The same image in a memory that is neither NCHW nor channels_last."""
    return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def sliced(x):
    return torch.cat([x, x, x], dim=1)[:, x.shape[1] : 2 * x.shape[1]]


# opcheck itself looks at the gradients of copies that it has made of the inputs.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("layout", [lambda x: x, torch.Tensor.contiguous, permuted, sliced])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(layout, full):
    x, *others = arguments(2, 8, 3, 5, torch.float32)
    leaves = [value.detach().requires_grad_() for value in (layout(x), *others)]
    x, weight, bias, *rows = leaves
    extra = (*rows, True, 0.3, key().index_N, *key().key, 3) if full else (None, None, None, False, 0.0, None, 0, 0, 0)
    call = (x, 4, weight, bias, EPS, *extra)
    torch.library.opcheck(_norm, call)
    with torch.no_grad():
        y, mean, rstd = _norm(*call)
        tangents = (x, *rows) if full else (x, None, None, None)
        detached = [value.detach() if isinstance(value, torch.Tensor) else value for value in (*tangents, *call)]
        torch.library.opcheck(_norm_jvp, detached)
        needs = [True, True, False, full, full, False]
        torch.library.opcheck(_norm_backward, (layout(y), mean, rstd, *detached[4:], needs))


@pytest.mark.parametrize("size", SIZES)
def test_compiles_whole_with_its_gradient(size):
    values = [value.requires_grad_() for value in arguments(2, 8, *size, torch.float32)]

    def step(*values):
        y = norm_of(group_norm, 4, silu=True, dropout=0.3, dropout_key=key())(*values)
        return torch.cat([y, values[0]], dim=1).square()  # the gradient comes back as a slice

    plain = torch.autograd.grad(step(*values).sum(), values)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*values).sum(), values)
    torch.testing.assert_close(found, plain)


def test_the_jvp_compiles_whole():
    x, weight, bias, addend, *_ = arguments(2, 8, 3, 5, torch.float32)

    def along(x, tx, addend):
        return group_norm_jvp(x, tx, 4, weight, bias, EPS, addend_NC=addend, taddend_NC=addend, silu=True)

    compiled = torch.compile(along, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, 2 * x, addend), along(x, 2 * x, addend))


def test_memory_format_and_dtype_are_those_of_x():
    values = arguments(2, 8, 3, 5, torch.bfloat16)
    call = norm_of(group_norm, 4)
    x, weight, bias, *_ = values
    y = call(x, weight.float(), bias.float())
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert call(x.contiguous(), weight, bias).is_contiguous()
    assert call(sliced(x), weight, bias).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", SIZES)
def test_results_repeat_bit_for_bit(size):
    values = [value.requires_grad_() for value in arguments(3, 8, *size, torch.float32)]
    call = norm_of(group_norm, 4, silu=True, dropout=0.3, dropout_key=key(3))
    first, second = (torch.autograd.grad(call(*values).square().sum(), values) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("mean", [50, 500])
@pytest.mark.parametrize("size", SIZES)
def test_a_mean_far_from_zero_costs_no_precision(mean, size):
    x = (image("x", 2, 8, *size) + mean).float()
    one, zero = torch.ones(8), torch.zeros(8)
    expected = group_norm_reference(x.double(), 2, one, zero, 1e-6)
    torch.testing.assert_close(group_norm(x, 2, one, zero, 1e-6).double(), expected, rtol=0, atol=mean * 2**-22)


@pytest.mark.parametrize("size", [(32, 32), (60, 2), (256, 4)])
@pytest.mark.parametrize("row", [0, 7, 16, 128])
def test_a_row_unlike_all_others_costs_few_bits(row, size):
    x = image("x", 2, 8, *size, dtype=torch.float32)
    x[:, :, row % size[0]] += 1000
    x, one = x.requires_grad_(), torch.ones(8)
    y = group_norm_reference(x, 2, one, one, 1e-6)
    expected = group_norm_reference(x.double(), 2, one, one, 1e-6)
    assert (y - expected).abs().max() < 16 * 2**-23 * expected.abs().max()
    dy = image("dy", 2, 8, *size)
    found, truth = (torch.autograd.grad(value, x, dy.to(value.dtype))[0] for value in (y, expected))
    assert (found - truth).abs().max() < 1e-5 * truth.abs().max()


def test_autocast_leaves_the_statistics_of_the_reference_in_fp32():
    x, one = image("x", 2, 8, 9, 8, dtype=torch.float32) + 5, torch.ones(8)
    x = x.contiguous(memory_format=torch.channels_last)
    expected = group_norm_reference(x, 2, one, one, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(group_norm_reference(x, 2, one, one, 1e-6), expected)


def test_torch_func_differentiates_the_reference():
    x, one = image("x", 2, 8, 9, 8), torch.ones(8, dtype=torch.float64)

    def loss(x):
        return group_norm_reference(x, 2, one, one, 1e-6, silu=True).square().sum()

    leaf = x.detach().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(leaf), leaf)[0])


def test_images_without_a_pixel_are_an_error_of_the_reference_too():
    with pytest.raises(ValueError, match="expected images that have a pixel"):
        group_norm_reference(torch.ones(2, 8, 4, 0), 2, torch.ones(8), torch.ones(8), 1e-6)


@pytest.mark.parametrize("value", [21623214.0, 1e9])
def test_a_constant_image_has_no_variance_below_zero(value):
    x = torch.full((1, 10, 5, 5), value).contiguous(memory_format=torch.channels_last)
    assert group_norm_reference(x, 1, torch.ones(10), torch.zeros(10), 1e-6).isfinite().all()


@pytest.mark.parametrize("foreign", [lambda x: x[:, :, 1:-1, 1:-1], lambda x: x[:, 1:9], lambda x: x.transpose(2, 3)])
def test_the_reference_takes_images_of_any_strides(foreign):
    x = foreign(torch.randn(2, 16, 8, 10, generator=torch.Generator().manual_seed(0)))[:, :8]
    one, dense = torch.ones(8), x.contiguous(memory_format=torch.channels_last)
    found, expected = (value.requires_grad_() for value in (x.detach(), dense.detach()))
    y, truth = (group_norm_reference(value, 2, one, one, 1e-6) for value in (found, expected))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, truth)
    torch.testing.assert_close(*(torch.autograd.grad(v.square().sum(), i)[0] for v, i in ((y, found), (truth, expected))))


def test_a_default_device_or_fake_tensors_leave_no_constants_behind():
    x, one = image("x", 2, 24, 6, 6, dtype=torch.float32), torch.ones(24)
    expected = group_norm_reference(x.double(), 3, one, one, 1e-6).float()
    _averaging_matrix.cache_clear()
    with torch.device("meta"):
        group_norm_reference(x, 3, one, one, 1e-6)
    with FakeTensorMode() as mode:
        x_fake, one_fake = mode.from_tensor(x), mode.from_tensor(one)
        _averaging_matrix.cache_clear()
        group_norm_reference(x_fake, 3, one_fake, one_fake, 1e-6)
    torch.testing.assert_close(group_norm_reference(x, 3, one, one, 1e-6), expected)


def test_no_samples():
    values = [value.requires_grad_() for value in arguments(2, 8, 3, 5, torch.float32)]
    x, weight, bias, *_ = values
    y = norm_of(group_norm, 4, silu=True)(x[:0], weight, bias)
    assert y.shape == (0, 8, 3, 5)
    assert not torch.autograd.grad(y.sum(), weight)[0].any()


ERRORS = [
    ({"x_NCHW": torch.ones(2, 8)}, ValueError, r"x_NCHW has shape \(2, 8\)"),
    ({"x_NCHW": torch.ones(2, 8, 3, 3, dtype=torch.int32)}, TypeError, "x_NCHW has dtype int32"),
    ({"x_NCHW": torch.ones(2, 8, 0, 3)}, ValueError, r"x_NCHW has shape \(2, 8, 0, 3\), expected images that have a pixel"),
    ({"num_groups": 3}, ValueError, "num_groups is 3, which does not divide the 8 channels"),
    ({"num_groups": 0}, ValueError, "num_groups is 0"),
    ({"weight_C": torch.ones(7)}, ValueError, r"weight_C has shape \(7,\), expected \(8,\)"),
    ({"bias_C": torch.ones(8, dtype=torch.float64)}, TypeError, "bias_C has dtype float64"),
    ({"addend_NC": torch.ones(1, 8)}, ValueError, r"addend_NC has shape \(1, 8\), expected \(2, 8\)"),
    ({"scale_NC": torch.ones(2, 8, device="meta")}, ValueError, "scale_NC is on meta, expected cpu"),
    ({"shift_NC": torch.ones(2, 8, dtype=torch.int64)}, TypeError, "shift_NC has dtype int64"),
    ({"dropout": 1.0}, ValueError, "dropout is 1.0"),
    ({"dropout": -0.1}, ValueError, "dropout is -0.1"),
    ({"dropout": 0.1, "dropout_key": key(3)}, ValueError, r"dropout_key.index_N has shape \(3,\), expected \(2,\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_bad_input_is_named(change, error, message):
    names = ("x_NCHW", "num_groups", "weight_C", "bias_C", "eps", "addend_NC", "scale_NC", "shift_NC")
    good = dict.fromkeys(names) | {"x_NCHW": torch.ones(2, 8, 3, 3), "num_groups": 4, "eps": EPS}
    good |= {"weight_C": torch.ones(8), "bias_C": torch.ones(8), "silu": True, "dropout": 0.0, "dropout_key": None}
    checked_call(**good)
    with pytest.raises(error, match=message):
        checked_call(**(good | change))


def test_bad_tangents_are_named():
    x = torch.ones(2, 8, 3, 3)
    with pytest.raises(ValueError, match=r"tx_NCHW has shape \(1, 8, 3, 3\)"):
        checked_tangents(x, x[:1], None, None, None)
    with pytest.raises(TypeError, match="tscale_NC has dtype float64"):
        checked_tangents(x, x, None, torch.ones(2, 8, dtype=torch.float64), None)
    with pytest.raises(ValueError, match="tshift_NC has shape"):
        checked_tangents(x, x, None, None, torch.ones(2, 4))


@pytest.mark.parametrize(
    ("channels", "per_group", "vector", "expected"),
    [
        (256, 8, 8, (16, 16)),
        (192, 6, 8, (24, 32)),  # whole vectors: 24 channels, not 18 or 30
        (576, 18, 8, (216, 256)),  # three blocks of 256 idle less than eight of 128
        (15, 3, 8, (15, 16)),
        (3, 3, 8, (3, 4)),
        (2048, 512, 8, (512, 512)),  # a group wider than the limit
    ],
)
def test_slabs_are_whole_groups_and_vectors_with_few_idle_lanes(channels, per_group, vector, expected):
    assert slab_channels(channels, per_group, vector, 16, 256) == expected


def test_costs_are_one_read_and_one_write_of_each_image():
    sizes = {"num": 128, "channels": 256, "pixels": 1024, "itemsize": 2, "num_groups": 32}
    elements = 128 * 256 * 1024
    for cost, bytes_per_element in ((forward_cost, 4), (backward_cost, 6), (jvp_cost, 8)):
        assert 0 <= cost(**sizes).bytes - bytes_per_element * elements < 2e-3 * elements
        assert cost(**sizes, rows=2).bytes > cost(**sizes).bytes


def test_a_second_derivative_on_the_cpu_is_an_error_and_not_zero():
    x, one = image("x", 2, 8, 6, 6, dtype=torch.float32).requires_grad_(), torch.ones(8)
    (gradient,) = torch.autograd.grad(group_norm_reference(x, 2, one, one, 1e-5).square().sum(), x, create_graph=False)
    assert gradient.isfinite().all()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(group_norm_reference(x, 2, one, one, 1e-5).square().sum(), x, create_graph=True)
