"""The registered consistency loss on the CPU: equal to the reference, its derivatives, its place in torch.compile."""

import inspect
import math

import pytest
import torch
from torch.autograd import forward_ad, gradcheck

from fastcm.diffusion.preconditioners import EDM, EDMBoundary
from fastcm.kernels.consistency_loss import consistency_loss as loss_of
from fastcm.kernels.consistency_loss import consistency_loss_jvp, consistency_loss_reference, cost, derivatives
from fastcm.kernels.consistency_loss.forward_ad import consistency_loss as loss_with_forward_ad
from fastcm.random import Stream

# PyTorch's own forward-mode rules are loaded with a call that it has deprecated.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit")

SHAPE = (3, 5, 7)
OPTIONS = [("squared", 0.0), ("l2", 0.0), ("pseudo_huber", 1e-30), ("pseudo_huber", 0.03)]
LEAVES = (0, 1, 5)  # F_t, x_t, weight


def inputs(dtype=torch.float64, shape=SHAPE, num=4, network=None):
    """Positional and named arguments; row 1 is at the boundary, where the teacher is NaN."""
    index = torch.arange(num)

    def image(name, dtype=dtype):
        return Stream(0, name).image_normal(index, shape).to(dtype)

    def positive(name):
        return Stream(0, name).uniform(index).to(dtype) + 0.1

    network = network or dtype
    student = [
        image("F_t", network),
        image("x_t"),
        positive("c_skip_t"),
        positive("c_out_t"),
        image("clean"),
        positive("weight"),
    ]
    teacher = {"F_r": image("F_r", network), "x_r": image("x_r"), "c_skip_r": positive("c_skip_r")}
    teacher |= {"c_out_r": positive("c_out_r"), "boundary_N": index == 1}
    teacher["F_r"][1], teacher["x_r"][1] = math.nan, math.inf
    teacher["c_skip_r"][1], teacher["c_out_r"][1] = math.nan, math.inf
    return student, teacher


def with_gradients(function, student, teacher, **options):
    leaves = [value.detach() for value in student]
    for place in LEAVES:
        leaves[place].requires_grad_()
    loss = function(*leaves, **teacher, **options)
    return loss.detach(), *torch.autograd.grad(loss.mean(), [leaves[place] for place in LEAVES])


@pytest.mark.parametrize("network", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("distance", "c"), OPTIONS)
def test_values_are_those_of_the_reference_bit_for_bit(distance, c, network):
    student, teacher = inputs(torch.float32, network=network)
    for target in (teacher, {}):
        loss = loss_of(*student, **target, distance=distance, c=c)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, consistency_loss_reference(*student, **target, distance=distance, c=c))


@pytest.mark.parametrize(("distance", "c"), OPTIONS)
def test_gradients_are_those_of_finite_differences(distance, c):
    student, teacher = inputs()
    leaves = [student[place].requires_grad_() for place in LEAVES]

    def loss(F_t, x_t, weight):
        return loss_of(F_t, x_t, *student[2:5], weight, **teacher, distance=distance, c=c)

    assert gradcheck(loss, leaves)


@pytest.mark.parametrize(("distance", "c"), OPTIONS)
def test_gradients_are_those_of_the_reference(distance, c):
    student, teacher = inputs(torch.float32, network=torch.bfloat16)
    options = {"distance": distance, "c": c}
    for found, expected in zip(*(with_gradients(f, student, teacher, **options) for f in BOTH), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-6 if found.dtype == torch.float32 else 2**-7, atol=1e-9)


BOTH = (loss_of, consistency_loss_reference)


def tangents_like(student):
    """Tangents of the leaves, in their dtypes."""
    moved = [Stream(1, "tangent").normal(torch.arange(4), student[0].shape[1:], draw) for draw in (0, 1)] + [student[3] - 0.5]
    return {name: value.to(student[place].dtype) for name, place, value in zip(TANGENTS, LEAVES, moved, strict=True)}


TANGENTS = ("tF_t", "tx_t", "tweight_N")


@forward_mode
@pytest.mark.parametrize(("distance", "c"), OPTIONS)
def test_tangent_is_that_of_the_references_forward_mode(distance, c):
    student, teacher = inputs()
    tangents = tangents_like(student)
    options = {"distance": distance, "c": c}
    with forward_ad.dual_level():
        dual = list(student)
        for place, tangent in zip(LEAVES, tangents.values(), strict=True):
            dual[place] = forward_ad.make_dual(student[place], tangent)
        expected = forward_ad.unpack_dual(consistency_loss_reference(*dual, **teacher, **options)).tangent
    loss, tangent = consistency_loss_jvp(*student, **tangents, **teacher, **options)
    torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=0)
    assert torch.equal(loss, loss_of(*student, **teacher, **options))

    def of_leaves(F_t, x_t, weight):
        return loss_with_forward_ad(F_t, x_t, *student[2:5], weight, **teacher, **options)

    primals = tuple(student[place] for place in LEAVES)
    _, pushed = torch.func.jvp(of_leaves, primals, tuple(tangents.values()))
    torch.testing.assert_close(pushed, expected, rtol=1e-12, atol=0)
    assert gradcheck(of_leaves, [primal.detach().requires_grad_() for primal in primals], check_forward_ad=True)


@pytest.mark.parametrize(("distance", "c"), OPTIONS)
def test_tangents_and_gradients_are_transposes_of_each_other(distance, c):
    student, teacher = inputs()
    options = {"distance": distance, "c": c}
    tangents = tangents_like(student)
    _, pushed = consistency_loss_jvp(*student, **tangents, **teacher, **options)
    _, *pulled = with_gradients(loss_of, student, teacher, **options)
    inner = sum((tangent * gradient).sum() for tangent, gradient in zip(tangents.values(), pulled, strict=True))
    torch.testing.assert_close(pushed.mean(), inner, rtol=1e-12, atol=0)


def test_tangents_that_are_zero_may_be_left_out():
    student, teacher = inputs()
    for name, tangent in tangents_like(student).items():
        others = {other: 0 * value for other, value in tangents_like(student).items() if other != name}
        _, expected = consistency_loss_jvp(*student, **others, **{name: tangent}, **teacher)
        _, found = consistency_loss_jvp(*student, **{name: tangent}, **teacher)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    assert not consistency_loss_jvp(*student, **teacher)[1].any()


def test_tangent_at_zero_distance_is_zero():
    (F_t, x_t, c_skip, c_out, clean, weight), teacher = inputs(torch.float32)
    teacher |= {"c_skip_r": c_skip, "c_out_r": c_out, "F_r": F_t, "x_r": x_t, "boundary_N": None}
    student = (F_t, x_t, c_skip, c_out, clean, weight)
    loss, tangent = consistency_loss_jvp(*student, **tangents_like(student), **teacher)
    assert torch.equal(loss, torch.zeros(4))
    assert torch.equal(tangent, torch.zeros(4))


@pytest.mark.parametrize(("distance", "c"), [("l2", 0.0), ("pseudo_huber", 0.03)])
def test_an_overflow_is_no_gradient_of_zero(distance, c):
    student, teacher = inputs(torch.float32)
    student[0][3] = 1e30
    loss, grad_F, *_ = with_gradients(loss_of, student, teacher, distance=distance, c=c)
    assert loss.isfinite().tolist() == [True, True, True, False]
    assert grad_F[3].isnan().all()
    assert grad_F[:3].isfinite().all()


@pytest.mark.parametrize("distance", ["l2", "squared"])
def test_only_pseudo_huber_has_a_constant(distance):
    student, teacher = inputs(torch.float32)
    without, with_it = (with_gradients(loss_of, student, teacher, distance=distance, c=c) for c in (0.0, 0.7))
    assert all(torch.equal(one, other) for one, other in zip(without, with_it, strict=True))


@pytest.mark.parametrize("distance", ["squared", "l2", "pseudo_huber"])
def test_gradients_at_zero_distance_are_zero(distance):
    (F_t, x_t, c_skip, c_out, clean, weight), teacher = inputs(torch.float32)
    teacher |= {"F_r": F_t, "x_r": x_t, "c_skip_r": c_skip, "c_out_r": c_out, "boundary_N": None}
    student = (F_t, x_t, c_skip, c_out, clean, weight)
    assert all(torch.equal(value, 0 * value) for value in with_gradients(loss_of, student, teacher, distance=distance))


# One test for each method whose numbers are values of c_skip and c_out: EDM, ECT, CM at its boundary, CTM's G.


def per_image(value_N):
    return value_N[:, None, None, None]


def test_edm_denoising_loss():
    (F_t, x_t, _, _, clean, _), _ = inputs()
    sigma = torch.tensor([0.002, 0.3, 2.0, 80.0]).double()
    at = EDM(0.5).scalings(sigma)
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    denoised = 0.25 / per_image(sigma**2 + 0.25) * x_t + 0.5 * per_image(sigma / (sigma**2 + 0.25).sqrt()) * F_t
    expected = weight * ((denoised - clean) ** 2).sum((1, 2, 3))
    torch.testing.assert_close(loss_of(F_t, x_t, at.c_skip, at.c_out, clean, weight, distance="squared"), expected)


def test_ect_loss():
    (F_t, x_t, _, _, clean, _), teacher = inputs()
    t, r = torch.tensor([0.01, 0.3, 2.0, 80.0]).double(), torch.tensor([0.005, 0.0, 1.9, 79.0]).double()
    boundary = r == 0
    at_t, at_r = (EDM(0.5).scalings(level) for level in (t, torch.where(boundary, t, r)))
    others = {"F_r": teacher["F_r"], "x_r": teacher["x_r"], "c_skip_r": at_r.c_skip, "c_out_r": at_r.c_out}
    loss = loss_of(F_t, x_t, at_t.c_skip, at_t.c_out, clean, 1 / (t - r), boundary_N=boundary, **others)
    for n in range(4):
        D_t = at_t.c_skip[n] * x_t[n] + at_t.c_out[n] * F_t[n]
        target = clean[n] if n == 1 else at_r.c_skip[n] * teacher["x_r"][n] + at_r.c_out[n] * teacher["F_r"][n]
        torch.testing.assert_close(loss[n], (D_t - target).norm() / (t[n] - r[n]))


def test_consistency_model_at_its_boundary_is_the_identity():
    (F_t, x_t, _, _, _, weight), _ = inputs()
    at = EDMBoundary(0.5, 0.002).scalings(torch.full((4,), 0.002, dtype=torch.float64))
    loss, grad_F, *_ = with_gradients(loss_of, (F_t, x_t, at.c_skip, at.c_out, x_t, weight), {}, distance="l2")
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(grad_F, torch.zeros_like(grad_F))


def test_trajectory_model_jumps_from_t_and_u_to_s():
    """G(x, t, s) = (s / t) x + (1 - s / t) g(x, t, s) with EDM's g; soft consistency compares two jumps to one s."""
    (F_t, x_t, _, _, clean, weight), teacher = inputs()
    F_u, x_u = teacher["F_r"].nan_to_num(0), teacher["x_r"].nan_to_num(0, 0, 0)
    s, u, t = (
        torch.tensor(levels).double() for levels in ([0.002, 0.1, 1.0, 5.0], [0.01, 0.1, 2.0, 40.0], [0.05, 0.5, 3.0, 80.0])
    )

    def jump(F, x, time):
        sigma = per_image(time)
        g = 0.25 / (sigma**2 + 0.25) * x + 0.5 * sigma / (sigma**2 + 0.25).sqrt() * F
        return per_image(s / time) * x + (1 - per_image(s / time)) * g

    def scalings(time):
        inner = EDM(0.5).scalings(time)
        return s / time + (1 - s / time) * inner.c_skip, (1 - s / time) * inner.c_out

    expected = weight * (jump(F_t, x_t, t) - jump(F_u, x_u, u)).flatten(1).norm(dim=1)
    at_u = dict(zip(("c_skip_r", "c_out_r"), scalings(u), strict=True))
    loss = loss_of(F_t, x_t, *scalings(t), clean, weight, F_r=F_u, x_r=x_u, **at_u)
    torch.testing.assert_close(loss, expected)


def memories(x):
    wide = torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last)
    crop = torch.nn.functional.pad(x, (1, 1, 2, 1))[:, :, 2:-1, 1:-1]
    return [x.contiguous(memory_format=torch.channels_last), x.contiguous(), wide[:, : x.shape[1]], crop]


def op_arguments(student, teacher, distance="l2", c=0.0):
    order = ("F_r", "x_r", "c_skip_r", "c_out_r", "boundary_N")
    return (*student, *(teacher.get(name) for name in order), distance, c)


# opcheck itself looks at the gradients of copies that it has made of the inputs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("memory", range(4))
@pytest.mark.parametrize("with_teacher", [True, False])
def test_the_ops_are_registered_as_pytorch_wants_them(memory, with_teacher):
    student, teacher = inputs(torch.float32, shape=(3, 4, 4))
    student[0], student[1] = (memories(value)[memory].detach().requires_grad_() for value in student[:2])
    student[5].requires_grad_()
    arguments = op_arguments(student, teacher if with_teacher else {})
    torch.library.opcheck(torch.ops.fastcm.consistency_loss.default, arguments)
    tensors = tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in arguments)
    backward = (torch.ones(4), torch.ones(4), *tensors)
    for needed in ([True, True, True], [True, False, False], [False, False, True]):
        torch.library.opcheck(torch.ops.fastcm.consistency_loss_backward.default, (*backward, needed))
    tangents = (tensors[0], tensors[1].transpose(2, 3), tensors[5])
    for given in (tangents, (tangents[0], None, None), (None, None, tangents[2])):
        torch.library.opcheck(torch.ops.fastcm.consistency_loss_jvp.default, (*given, *tensors))


@pytest.mark.parametrize("memory", range(4))
def test_image_gradients_are_dense_in_the_order_of_the_network_output(memory):
    student, teacher = inputs(torch.float32)
    student[0] = memories(student[0])[memory]
    _, grad_F, grad_x, _ = with_gradients(loss_of, student, teacher)
    expected = torch.contiguous_format if memory == 1 else torch.channels_last
    assert grad_F.is_contiguous(memory_format=expected)
    assert grad_x.is_contiguous(memory_format=expected)


@pytest.mark.parametrize(("distance", "c"), OPTIONS)
def test_one_compiled_graph_gives_the_same_loss_and_gradients(distance, c):
    student, teacher = inputs(torch.float32)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    plain, graph = (with_gradients(f, student, teacher, distance=distance, c=c) for f in (loss_of, compiled))
    assert all(torch.equal(one, other) for one, other in zip(plain, graph, strict=True))


@pytest.mark.parametrize(("distance", "c"), OPTIONS)
def test_the_jvp_compiles_whole(distance, c):
    student, teacher = inputs(torch.float32, network=torch.bfloat16)
    compiled = torch.compile(consistency_loss_jvp, fullgraph=True, backend="aot_eager")
    options = {"distance": distance, "c": c, **tangents_like(student)}
    plain, graph = (function(*student, **teacher, **options) for function in (consistency_loss_jvp, compiled))
    assert plain[1].dtype == torch.float32
    assert all(torch.equal(one, other) for one, other in zip(plain, graph, strict=True))


def test_the_same_call_gives_the_same_bits():
    student, teacher = inputs(torch.float32)
    first, second = (with_gradients(loss_of, student, teacher) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_target_and_sum_of_squares_carry_no_gradient():
    student, teacher = inputs()
    student[0].requires_grad_()
    wanted = [student[4].requires_grad_(), *(teacher[name].requires_grad_() for name in ("F_r", "x_r", "c_out_r"))]
    loss = loss_of(*student, **teacher)
    assert torch.autograd.grad(loss.sum(), wanted, allow_unused=True) == (None,) * 4
    _, squares = torch.ops.fastcm.consistency_loss(*op_arguments(student, teacher))
    assert not squares.requires_grad


def test_a_loss_of_which_only_the_target_requires_grad_does_not():
    student, teacher = inputs()
    student[4].requires_grad_()
    for name in ("F_r", "x_r", "c_skip_r", "c_out_r"):
        teacher[name].requires_grad_()
    assert not loss_of(*student, **teacher).requires_grad


WRONG = {
    "F_t has shape (4, 3, 5)": (0, lambda value: value[..., 0], ValueError),
    "x_t has shape (4, 3, 5, 6)": (1, lambda value: value[..., 1:], ValueError),
    "c_out_t has shape (3,)": (3, lambda value: value[1:], ValueError),
    "clean has dtype int64": (4, lambda value: value.long(), TypeError),
    "weight_N has shape (4, 1)": (5, lambda value: value[:, None], ValueError),
    "c_skip_t requires grad": (2, lambda value: value.requires_grad_(), ValueError),
    "c_out_t requires grad": (3, lambda value: value.requires_grad_(), ValueError),
    "F_r has shape (3, 3, 5, 7)": ("F_r", lambda value: value[1:], ValueError),
    "x_r is on meta": ("x_r", lambda value: value.to("meta"), ValueError),
    "c_skip_r has dtype bool": ("c_skip_r", lambda value: value > 0, TypeError),
    "boundary_N has dtype uint8": ("boundary_N", lambda value: value.byte(), TypeError),
    "all of F_r, x_r": ("c_out_r", lambda value: None, ValueError),
}


@pytest.mark.parametrize("message", WRONG)
def test_impossible_tensors_are_named(message):
    student, teacher = inputs(torch.float32)
    place, change, error = WRONG[message]
    arguments = student if isinstance(place, int) else teacher
    arguments[place] = change(arguments[place])
    with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)")):
        inspect.unwrap(loss_of)(*student, **teacher)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("tF_t", lambda value: value[1:], ValueError, r"tF_t has shape \(3, 3, 5, 7\), expected \(4, 3, 5, 7\)"),
        ("tx_t", lambda value: value.long(), TypeError, "tx_t has dtype int64"),
        ("tweight_N", lambda value: value.to("meta"), ValueError, "tweight_N is on meta"),
    ],
)
def test_impossible_tangents_are_named(name, change, error, message):
    student, teacher = inputs(torch.float32)
    tangents = tangents_like(student)
    with pytest.raises(error, match=message):
        inspect.unwrap(consistency_loss_jvp)(*student, **teacher, **tangents | {name: change(tangents[name])})


@forward_mode
@pytest.mark.parametrize("place", [2, 3])
def test_a_tangent_of_the_scalings_is_refused_in_forward_mode_too(place):
    student, teacher = inputs()

    def of_scaling(scaling):
        return loss_with_forward_ad(*student[:place], scaling, *student[place + 1 :], **teacher)

    with pytest.raises(ValueError, match="c_skip_t or c_out_t has a forward-mode tangent"):
        torch.func.jvp(of_scaling, (student[place],), (student[place],))


@forward_mode
def test_a_tangent_is_refused_and_not_dropped():
    student, teacher = inputs()
    with forward_ad.dual_level(), pytest.raises(ValueError, match="x_t has a forward-mode tangent"):
        loss_of(student[0], forward_ad.make_dual(student[1], student[1]), *student[2:], **teacher)
    with pytest.raises(ValueError, match="F_t has a forward-mode tangent"):
        torch.func.jvp(lambda F_t: loss_of(F_t, *student[1:], **teacher), (student[0],), (student[0],))


def test_scalings_may_require_grad_where_no_gradient_is_recorded():
    student, teacher = inputs(torch.float32)
    student[2].requires_grad_()
    with torch.no_grad():
        assert loss_of(*student, **teacher).shape == (4,)


@pytest.mark.parametrize(("options", "message"), [({"distance": "l3"}, "l3"), ({"c": -1.0}, "-1.0")])
def test_impossible_options_are_named(options, message):
    student, teacher = inputs(torch.float32)
    with pytest.raises(ValueError, match=message):
        loss_of(*student, **teacher, **options)


def test_cost_counts_each_byte_once():
    (F_t, x_t, *_), _ = inputs(torch.float32, network=torch.bfloat16)
    elements = F_t[0].numel()
    image, network = x_t.nbytes, F_t.nbytes
    whole = cost.forward(4, elements, network_bytes=2)
    assert (whole.read_bytes, whole.write_bytes) == (2 * (image + network), 32)
    assert cost.forward(4, elements, 2, clean_rows=4).read_bytes == 2 * image + network
    assert cost.backward(4, elements, 2).write_bytes == network
    assert cost.jvp(4, elements, 2).read_bytes == 3 * (image + network)


def test_slope_is_the_derivative_of_the_distance():
    squares = torch.tensor([1e-6, 0.3, 7.0]).double().requires_grad_()
    for distance, c in OPTIONS:
        (half,) = torch.autograd.grad(derivatives.reference.distance_of(squares, distance, c).sum(), squares)
        torch.testing.assert_close(derivatives.slope(squares.detach(), distance, c), 2 * half)
