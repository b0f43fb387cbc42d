"""The consistency loss: values, gradients, and finiteness that does not come from scrubbing."""

import math

import pytest
import torch
from torch.autograd import forward_ad

from fastcm import ops
from fastcm.kernels.consistency_loss import DISTANCES
from fastcm.random import Stream

# torch's own forward mode still uses torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

SHAPE = (3, 5, 7)
OPTIONS = [("squared", 0.0), ("l2", 0.0), ("pseudo_huber", 0.0), ("pseudo_huber", 1e-30), ("pseudo_huber", 0.03)]


def inputs(num=4, dtype=torch.float64, shape=SHAPE):
    """Random arguments; row 1 is at the boundary."""
    index = torch.arange(num)

    def image(name):
        return Stream(0, name).image_normal(index, shape).to(dtype)

    def positive(name):
        return Stream(0, name).uniform(index).to(dtype) + 0.1

    student = (image("F_t"), image("x_t"), positive("c_skip_t"), positive("c_out_t"), image("clean"), positive("weight"))
    teacher = {"F_r": image("F_r"), "x_r": image("x_r"), "c_skip_r": positive("c_skip_r"), "c_out_r": positive("c_out_r")}
    return student, teacher | {"boundary_N": index == 1}


def with_student_at_target(dtype=torch.float32):
    """Arguments whose student output equals the target in every row, exactly."""
    student, teacher = inputs(dtype=dtype)
    F_t, x_t, c_skip, c_out, clean, weight = student
    inner = ~teacher["boundary_N"]
    F_r, x_r = torch.where(inner[:, None, None, None], F_t, math.nan), torch.where(inner[:, None, None, None], x_t, math.inf)
    clean = c_skip[:, None, None, None] * x_t + c_out[:, None, None, None] * F_t
    teacher |= {"F_r": F_r, "x_r": x_r, "c_skip_r": c_skip, "c_out_r": c_out}
    return (F_t.requires_grad_(), x_t.requires_grad_(), c_skip, c_out, clean, weight), teacher


@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize(("distance", "c"), OPTIONS)
def test_value_is_the_formula(distance, c, with_teacher):
    (F_t, x_t, c_skip, c_out, clean, weight), teacher = inputs()
    loss = ops.consistency_loss(
        F_t, x_t, c_skip, c_out, clean, weight, **(teacher if with_teacher else {}), distance=distance, c=c
    )
    for n in range(len(loss)):
        target = clean[n]
        if with_teacher and n != 1:
            target = teacher["c_skip_r"][n] * teacher["x_r"][n] + teacher["c_out_r"][n] * teacher["F_r"][n]
        total = ((c_skip[n] * x_t[n] + c_out[n] * F_t[n] - target) ** 2).sum().item()
        expected = total if distance == "squared" else math.sqrt(total + c**2) - c
        assert loss[n].item() == pytest.approx(weight[n].item() * expected, rel=1e-12)


@pytest.mark.parametrize(("distance", "c"), OPTIONS)
def test_gradients_are_those_of_finite_differences(distance, c):
    (*denoiser, clean, weight), teacher = inputs()

    def loss(*denoiser):
        return ops.consistency_loss(*denoiser, clean, weight, **teacher, distance=distance, c=c)

    denoiser = tuple(value.requires_grad_() for value in denoiser)
    assert torch.autograd.gradcheck(loss, denoiser, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize(("distance", "c"), OPTIONS)
def test_forward_and_reverse_mode_agree(distance, c):
    (F_t, *rest), teacher = inputs()
    tangent, cotangent = Stream(1, "tangent").image_normal(torch.arange(4), SHAPE).double(), torch.arange(1.0, 5).double()
    with forward_ad.dual_level():
        loss = ops.consistency_loss(forward_ad.make_dual(F_t, tangent), *rest, **teacher, distance=distance, c=c)
        pushed = forward_ad.unpack_dual(loss).tangent
    F_t.requires_grad_()
    (pulled,) = torch.autograd.grad(ops.consistency_loss(F_t, *rest, **teacher, distance=distance, c=c), F_t, cotangent)
    torch.testing.assert_close((pushed * cotangent).sum(), (pulled * tangent).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("distance", "c"), OPTIONS)
def test_value_and_gradient_are_zero_at_zero_distance_and_at_the_boundary(distance, c, dtype):
    student, teacher = with_student_at_target(dtype)
    loss = ops.consistency_loss(*student, **teacher, distance=distance, c=c)
    assert torch.equal(loss, torch.zeros_like(loss))
    for gradient in torch.autograd.grad(loss.sum(), student[:2]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(("distance", "c"), OPTIONS)
def test_nothing_is_scrubbed(distance, c):
    (F_t, *rest), teacher = inputs(dtype=torch.float32)
    healthy = ops.consistency_loss(F_t, *rest, **teacher, distance=distance, c=c)
    broken_student = F_t.clone()
    broken_student[0, 1, 2, 3] = math.nan
    broken_teacher = teacher["F_r"].clone()
    broken_teacher[1:3] = math.nan  # row 1 is at the boundary, where the teacher is not read
    loss = ops.consistency_loss(broken_student, *rest, **(teacher | {"F_r": broken_teacher}), distance=distance, c=c)
    assert loss.isnan().tolist() == [True, False, True, False]
    assert torch.equal(loss[[1, 3]], healthy[[1, 3]])
    overflow = F_t.clone()
    overflow[3] = math.inf
    assert ops.consistency_loss(overflow, *rest, **teacher, distance=distance, c=c)[3].isfinite().item() is False


def test_target_carries_no_gradient():
    (F_t, *rest), teacher = inputs()
    clean = rest[3].requires_grad_()
    teacher["F_r"].requires_grad_()
    teacher["x_r"].requires_grad_()
    loss = ops.consistency_loss(F_t.requires_grad_(), *rest, **teacher)
    assert torch.autograd.grad(loss.sum(), (clean, teacher["F_r"], teacher["x_r"]), allow_unused=True) == (None, None, None)


def test_pseudo_huber_keeps_its_digits_at_small_distances():
    student, teacher = with_student_at_target(torch.float32)
    F_t, *rest = student
    rest[3] = rest[3] + 1e-5  # moves the target of the boundary row only
    loss = ops.consistency_loss(F_t, *rest, **teacher, distance="pseudo_huber", c=10.0)
    total = ((rest[1][1] * rest[0][1] + rest[2][1] * F_t[1] - rest[3][1]).double() ** 2).sum().item()
    assert loss[1].item() == pytest.approx(rest[4][1].item() * total / 20, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_network_outputs_are_used_in_single_precision(dtype):
    (F_t, *rest), teacher = inputs(dtype=torch.float32)
    low, low_teacher = F_t.to(dtype), teacher["F_r"].to(dtype)
    loss = ops.consistency_loss(low, *rest, **(teacher | {"F_r": low_teacher}))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, ops.consistency_loss(low.float(), *rest, **(teacher | {"F_r": low_teacher.float()})))


def test_loss_of_a_sample_does_not_depend_on_its_batch():
    student, teacher = inputs(dtype=torch.float32)
    whole = ops.consistency_loss(*student, **teacher)
    alone = ops.consistency_loss(*(value[2:3] for value in student), **{name: value[2:3] for name, value in teacher.items()})
    torch.testing.assert_close(alone, whole[2:3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("distance", DISTANCES)
def test_one_compiled_graph_gives_the_same_loss(distance):
    student, teacher = inputs(dtype=torch.float32)
    compiled = torch.compile(ops.consistency_loss, fullgraph=True, backend="aot_eager")
    actual = compiled(*student, **teacher, distance=distance, c=0.1)
    torch.testing.assert_close(actual, ops.consistency_loss(*student, **teacher, distance=distance, c=0.1))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"distance": "l3"}, "l3"), ({"distance": "pseudo_huber", "c": -1.0}, "negative"), ({"x_r": None}, "all of F_r")],
)
def test_impossible_arguments_say_why(change, message):
    student, teacher = inputs()
    with pytest.raises(ValueError, match=message):
        ops.consistency_loss(*student, **(teacher | change))
