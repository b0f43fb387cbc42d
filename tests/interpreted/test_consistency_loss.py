"""The loss kernels in the interpreter against fp64: every distance, target, memory and split, and what NaN may touch."""

import math

import pytest
import torch

from fastcm.kernels.consistency_loss import (
    backward,
    consistency_loss,
    consistency_loss_jvp,
    consistency_loss_reference,
    derivatives,
    difference,
    split,
)
from fastcm.kernels.consistency_loss.derivatives import Denoiser, Tangents, Target
from fastcm.random import Stream

SHAPES = [(3, 5, 7), (1, 8, 8), (3, 16, 17), (2, 1, 3), (1, 1, 1)]
OPTIONS = [("squared", 0.0), ("l2", 0.0), ("pseudo_huber", 0.03), ("pseudo_huber", 1e-30)]
NUM = 4


def inputs(shape=(3, 5, 7), dtype=torch.float32, num=NUM):
    """Student and teacher; row 1 is at the boundary, where the teacher is NaN."""
    index = torch.arange(num)

    def image(name, dtype=torch.float32):
        return Stream(0, name).image_normal(index, shape).to(dtype)

    def positive(name):
        return Stream(0, name).uniform(index) + 0.1

    student = [image("F_t", dtype), image("x_t"), positive("c_skip_t"), positive("c_out_t"), image("clean"), positive("weight")]
    teacher = {
        "F_r": image("F_r", dtype),
        "x_r": image("x_r"),
        "c_skip_r": positive("c_skip_r"),
        "c_out_r": positive("c_out_r"),
    }
    teacher["boundary_N"] = index == 1
    teacher["F_r"][1:2], teacher["x_r"][1:2] = math.nan, math.inf
    teacher["c_skip_r"][1:2], teacher["c_out_r"][1:2] = math.nan, math.nan
    return student, teacher


def in_fp64(student, teacher):
    """The loss and its gradients of F_t, x_t and weight for the gradient of a mean, by the reference in fp64."""

    def double(value):
        return value.detach().double() if value is not None and value.is_floating_point() else value

    def compute(**options):
        leaves = [double(value) for value in student]
        for place in (0, 1, 5):
            leaves[place].requires_grad_()
        loss = consistency_loss_reference(*leaves, **{name: double(value) for name, value in teacher.items()}, **options)
        return loss.detach(), *torch.autograd.grad(loss.mean(), [leaves[place] for place in (0, 1, 5)])

    return compute


def by_kernel(student, teacher, **options):
    leaves = [value.detach() for value in student]
    for place in (0, 1, 5):
        leaves[place].requires_grad_()
    loss = consistency_loss(*leaves, **teacher, **options)
    return loss.detach(), *torch.autograd.grad(loss.mean(), [leaves[place] for place in (0, 1, 5)])


def assert_close(actual, expected):
    """fp32 arithmetic, and one rounding to the dtype of each gradient (which the interpreter cuts off in bf16)."""
    for got, exact in zip(actual, expected, strict=True):
        step = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}.get(got.dtype, 0.0)
        scale = exact.abs().max().item() if exact.numel() else 0.0
        torch.testing.assert_close(got.double(), exact, rtol=2e-6 + step, atol=1e-6 * scale + (6e-8 if step else 0.0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("distance", "c"), OPTIONS)
def test_loss_and_gradients_with_a_teacher(shape, distance, c):
    student, teacher = inputs(shape)
    options = {"distance": distance, "c": c}
    assert_close(by_kernel(student, teacher, **options), in_fp64(student, teacher)(**options))


def tangents_like(student):
    index = torch.arange(len(student[0]))
    moved = [Stream(1, name).image_normal(index, student[0].shape[1:]) for name in ("tF_t", "tx_t")]
    moved.append(Stream(1, "tweight").normal(index))
    return {name: value.to(student[place].dtype) for name, place, value in zip(TANGENTS, (0, 1, 5), moved, strict=True)}


TANGENTS = ("tF_t", "tx_t", "tweight_N")


def check_jvp(student, teacher, tangents, distance="l2", c=0.0):
    """Loss and tangent of the kernel, after comparing them with the closed form in fp64."""
    found = consistency_loss_jvp(*student, **teacher, **tangents, distance=distance, c=c)

    def double(value):
        return value.double() if value is not None and value.is_floating_point() else value

    at_t, weight = Denoiser(*map(double, student[:4])), double(student[5])
    at_r = Denoiser(*(double(teacher[name]) for name in ("F_r", "x_r", "c_skip_r", "c_out_r"))) if teacher else None
    target = Target(double(student[4]), at_r, teacher.get("boundary_N"))
    moved = Tangents(*(double(tangents.get(name)) for name in TANGENTS))
    expected = derivatives.jvp(moved, at_t, target, weight, distance, c)
    # Terms of both signs may cancel: the rounding is that of their sizes, |v| |tD| <= |v| (c_out |tF| + c_skip |tx|).
    squares = derivatives.difference(at_t, target).square().flatten(1).sum(1)
    along = [
        scaling * tangent.flatten(1).norm(dim=1)
        for scaling, tangent in zip(at_t[3:1:-1], moved, strict=False)
        if tangent is not None
    ]
    size = weight * derivatives.slope(squares, distance, c) * squares.sqrt() * sum(along) + expected[1].abs()
    assert [value.dtype for value in found] == [torch.float32] * 2
    torch.testing.assert_close(found[0].double(), expected[0], rtol=2e-6, atol=1e-12)
    assert ((found[1] - expected[1]).abs() <= 1e-6 * size + 1e-12).all()
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("distance", "c"), OPTIONS)
def test_tangents_with_a_teacher(shape, distance, c):
    student, teacher = inputs(shape)
    _, tangent = check_jvp(student, teacher, tangents_like(student), distance, c)
    assert tangent.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [("tF_t",), ("tx_t",), ("tweight_N",), ("tF_t", "tweight_N"), ()])
def test_each_tangent_alone_and_every_target(dtype, given):
    student, teacher = inputs((3, 4, 6), dtype)
    rows = [value[2:] for value in student], {name: value[2:] for name, value in teacher.items()}
    for arguments in ((student, teacher), (rows[0], rows[1] | {"boundary_N": None}), (rows[0], {})):
        tangents = {name: value for name, value in tangents_like(arguments[0]).items() if name in given}
        _, tangent = check_jvp(*arguments, tangents)
        assert tangent.any() or not given


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", ["teacher", "no boundary", "clean"])
def test_low_precision_networks_and_every_target(dtype, target):
    student, teacher = inputs((3, 4, 6), dtype)
    if target != "teacher":
        student, teacher = [value[2:] for value in student], {name: value[2:] for name, value in teacher.items()}
        teacher = {} if target == "clean" else teacher | {"boundary_N": None}
    found = by_kernel(student, teacher)
    assert [gradient.dtype for gradient in found[1:]] == [dtype, torch.float32, torch.float32]
    assert_close(found, in_fp64(student, teacher)())


def memories(x):
    n, c, h, w = x.shape
    wide, crop = x.new_full((n, 2 * c, h, w), torch.nan), x.new_full((n, c, h + 2, w + 3), torch.nan)
    wide = wide.contiguous(memory_format=torch.channels_last)
    wide[:, :c], crop[:, :, 1 : h + 1, 2 : w + 2] = x, x
    return {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "nchw": x.contiguous(),
        "slice": wide[:, :c],
        "crop": crop[:, :, 1 : h + 1, 2 : w + 2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


@pytest.mark.parametrize("of_F", ["channels_last", "nchw", "slice", "crop", "transposed"])
@pytest.mark.parametrize("of_others", ["channels_last", "nchw", "slice", "crop"])
def test_every_image_may_have_a_memory_of_its_own(of_F, of_others):
    student, teacher = inputs((3, 4, 6), torch.float16)
    F_t, x_t, *scalings, clean, weight = student
    moved = [memories(F_t)[of_F], memories(x_t)[of_others], *scalings, memories(clean)[of_F], weight]
    moved_teacher = teacher | {"F_r": memories(teacher["F_r"])[of_others], "x_r": memories(teacher["x_r"])["nchw"]}
    found = by_kernel(moved, moved_teacher)
    assert_close(found, in_fp64(student, teacher)())
    expected = torch.contiguous_format if of_F == "nchw" else torch.channels_last
    assert all(gradient.is_contiguous(memory_format=expected) for gradient in found[1:3])
    tangents = tangents_like(student)
    elsewhere = tangents | {"tF_t": memories(tangents["tF_t"])[of_others], "tx_t": memories(tangents["tx_t"])[of_F]}
    dense, apart = (check_jvp(student, teacher, moved)[1] for moved in (tangents, elsewhere))
    assert torch.equal(dense, apart)


@pytest.fixture(params=[(16, 1024), (16, 3)], ids=["split", "split with several tiles"])
def _small_programs(request, monkeypatch):
    block, splits = request.param
    for module in (split, backward):
        monkeypatch.setattr(module, "pinned", lambda *_, **__: {"block": block, "num_warps": 1})
    monkeypatch.setattr(split, "MAX_SPLITS", splits)


@pytest.mark.usefixtures("_small_programs")
@pytest.mark.parametrize(("distance", "c"), OPTIONS)
@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 4, 8)])
def test_an_image_of_several_programs(distance, c, shape):
    student, teacher = inputs(shape)
    options = {"distance": distance, "c": c}
    assert_close(by_kernel(student, teacher, **options), in_fp64(student, teacher)(**options))
    check_jvp(student, teacher, tangents_like(student), **options)


def test_a_large_image_is_split_as_pinned():
    student, teacher = inputs((3, 64, 64), num=2)
    assert_close(by_kernel(student, teacher), in_fp64(student, teacher)())
    check_jvp(student, teacher, tangents_like(student))


@pytest.mark.usefixtures("_small_programs")
def test_a_loss_does_not_depend_on_its_batch():
    student, teacher = inputs()
    whole = by_kernel(student, teacher)
    alone = by_kernel([value[2:3] for value in student], {name: value[2:3] for name, value in teacher.items()})
    assert torch.equal(alone[0], whole[0][2:3])
    assert torch.equal(alone[1] / NUM, whole[1][2:3])
    tangents = tangents_like(student)
    alone = [value[2:3] for value in student], {name: value[2:3] for name, value in (teacher | tangents).items()}
    found = consistency_loss_jvp(*student, **teacher, **tangents), consistency_loss_jvp(*alone[0], **alone[1])
    assert all(torch.equal(one[2:3], other) for one, other in zip(*found, strict=True))


def test_rows_of_the_teacher_under_the_boundary_are_never_read(monkeypatch):
    student, teacher = inputs()
    teacher["boundary_N"][3] = True
    read = []
    load = difference.load_elements

    def watched(pointer, n, stride_n, element, mask, *layout):
        read.append((int(n.handle.data.item()), bool(mask.handle.data.any())))
        return load(pointer, n, stride_n, element, mask, *layout)

    monkeypatch.setattr(difference, "load_elements", watched)
    by_kernel(student, teacher)
    # Loads of a tile in order: F_t, x_t, clean, F_r, x_r; forward and backward.
    assert read == 2 * [(n, is_read) for n in range(NUM) for is_read in ([True] * 3 + [False] * 2 if n in (1, 3) else INNER)]


INNER = [True, True, False, True, True]


@pytest.mark.parametrize(("distance", "c"), [*OPTIONS, ("pseudo_huber", 0.0)])
def test_value_and_gradients_are_zero_at_zero_distance(distance, c):
    (F_t, x_t, c_skip, c_out, _, weight), teacher = inputs()
    teacher |= {"c_skip_r": c_skip, "c_out_r": c_out, "F_r": F_t, "x_r": x_t, "boundary_N": None}
    for gradient in by_kernel([F_t, x_t, c_skip, c_out, x_t, weight], teacher, distance=distance, c=c):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    student = [F_t, x_t, c_skip, c_out, x_t, weight]
    for value in consistency_loss_jvp(*student, **teacher, **tangents_like(student), distance=distance, c=c):
        assert torch.equal(value, torch.zeros(NUM))


def test_a_sum_below_the_normal_numbers_counts_as_zero():
    """The root of some releases of Triton flushes it to 0, and 0 / 0 would be the loss."""
    (F_t, x_t, _, c_out, _, weight), _ = inputs()
    zero = torch.zeros(NUM)
    student = [1e-21 * F_t, x_t, zero, c_out, torch.zeros_like(x_t), weight]
    loss, grad_F, *_ = by_kernel(student, {})
    assert 0 < difference_of(student).square().flatten(1).sum(1).max() < 2.0**-126
    assert torch.equal(loss, zero)
    assert grad_F.abs().max() < 1e-20


@pytest.mark.parametrize("distance", ["l2", "squared"])
def test_only_pseudo_huber_has_a_constant(distance):
    student, teacher = inputs()
    without, with_it = (by_kernel(student, teacher, distance=distance, c=c) for c in (0.0, 0.7))
    assert all(torch.equal(one, other) for one, other in zip(without, with_it, strict=True))


@pytest.mark.parametrize(("distance", "c"), OPTIONS)
def test_a_nan_stays_a_nan_of_its_own_sample(distance, c):
    student, teacher = inputs()
    healthy = by_kernel(student, teacher, distance=distance, c=c)
    student[0][0, 1, 2, 3], teacher["F_r"][2, 0, 0, 0] = math.nan, math.nan
    loss, grad_F, grad_x, grad_weight = by_kernel(student, teacher, distance=distance, c=c)
    assert loss.isnan().tolist() == [True, False, True, False]
    for gradient in (grad_F, grad_x):
        assert gradient.flatten(1).isnan().any(1).tolist() == [True, False, True, False]
    assert grad_weight.isnan().tolist() == [True, False, True, False]
    for broken, whole in zip((loss, grad_F, grad_x, grad_weight), healthy, strict=True):
        assert torch.equal(broken[[1, 3]], whole[[1, 3]])
    tangents = tangents_like(student)
    tangents["tx_t"][3, 0, 1, 1] = math.nan
    loss, tangent = consistency_loss_jvp(*student, **teacher, **tangents, distance=distance, c=c)
    assert loss.isnan().tolist() == [True, False, True, False]
    assert tangent.isnan().tolist() == [True, False, True, True]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(("distance", "c"), [("l2", 0.0), ("pseudo_huber", 0.03)])
def test_an_overflow_is_no_gradient_of_zero(distance, c):
    student, teacher = inputs()
    student[0][3] = 1e30
    loss, grad_F, _, _ = by_kernel(student, teacher, distance=distance, c=c)
    assert loss.isfinite().tolist() == [True, True, True, False]
    assert grad_F[3].isnan().all()
    assert grad_F[:3].isfinite().all()
    _, tangent = consistency_loss_jvp(*student, **teacher, **tangents_like(student), distance=distance, c=c)
    assert tangent.isfinite().tolist() == [True, True, True, False]


def test_pseudo_huber_keeps_its_digits_at_small_distances():
    student, _ = inputs()
    student[4] = student[2][:, None, None, None] * student[1] + student[3][:, None, None, None] * student[0] + 1e-5
    loss = consistency_loss(*student, distance="pseudo_huber", c=10.0)
    v = difference_of(student)
    torch.testing.assert_close(loss.double(), student[5].double() * v.square().flatten(1).sum(1) / 20, rtol=1e-4, atol=0)


def difference_of(student):
    """v as fp32 makes it, in fp64."""
    F_t, x_t, c_skip, c_out, clean, _ = student
    return (c_skip[:, None, None, None] * x_t + c_out[:, None, None, None] * F_t - clean).double()


def test_gradients_are_written_only_where_asked_for():
    student, teacher = inputs()
    everything = by_kernel(student, teacher)
    for place, expected in zip((0, 1, 5), everything[1:], strict=True):
        leaves = [value.detach() for value in student]
        leaves[place].requires_grad_()
        (gradient,) = torch.autograd.grad(consistency_loss(*leaves, **teacher).mean(), leaves[place])
        assert torch.equal(gradient, expected)


def test_gradient_of_a_low_precision_weight():
    student, teacher = inputs()
    student[5] = student[5].half()
    order = ("F_r", "x_r", "c_skip_r", "c_out_r", "boundary_N")
    arguments = (*student, *(teacher[name] for name in order), "l2", 0.0)
    loss, squares = torch.ops.fastcm.consistency_loss(*arguments)
    (gradient,) = torch.ops.fastcm.consistency_loss_backward(torch.ones(NUM), squares, *arguments, [False, False, True])
    assert loss.dtype == torch.float32
    assert gradient.dtype == torch.float16
    torch.testing.assert_close(gradient, squares.sqrt().half())


def test_gradient_of_a_strided_loss():
    student, teacher = inputs()
    cotangent = torch.arange(1.0, 2 * NUM + 1)[::2]
    F_t = student[0].requires_grad_()
    (gradient,) = torch.autograd.grad(consistency_loss(*student, **teacher), F_t, cotangent)
    (expected,) = torch.autograd.grad(consistency_loss_reference(*student, **teacher), F_t, cotangent)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_no_images_at_all():
    student, teacher = inputs(num=0)
    loss, grad_F, _, grad_weight = by_kernel(student, teacher)
    assert loss.shape == grad_weight.shape == (0,)
    assert grad_F.shape == (0, 3, 5, 7)
    assert [value.shape for value in consistency_loss_jvp(*student, **teacher, **tangents_like(student))] == [(0,), (0,)]
