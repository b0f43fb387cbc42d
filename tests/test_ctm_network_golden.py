"""CTM's two networks and their jumps against numbers of the official implementations (arXiv 2310.02279)."""

import pytest
import torch
from golden_cases import load_case
from golden_models import kim_model_of, openai_model_of

from fastcm.diffusion.noise_schedules import karras_sigmas
from fastcm.diffusion.preconditioners import EDM, Direct, EDMBoundary
from fastcm.diffusion.trajectory import Trajectory
from fastcm.io.edm_layout import to_edm
from fastcm.io.openai_layout import to_openai
from fastcm.model import Model
from fastcm.nn import UNet

INNER = {"edm": EDM(), "cm": EDMBoundary(sigma_min=0.002), "no": Direct()}
OUTER = ("euler", "variance", "euler_variance_mixed")
PARTIAL = [("cm", "euler"), ("no", "euler"), ("edm", "variance"), ("edm", "euler_variance_mixed")]
NETWORKS = {"F_kim_net": kim_model_of, "F_sony_net": openai_model_of}
TABLES = ("F_kim_tables", "F_sony_tables")


@pytest.fixture(params=NETWORKS)
def name(request):
    return request.param


def model_of(name, inner="edm", outer="euler"):
    return NETWORKS[name](name, INNER[inner], Trajectory(outer))


def inputs(name, rows=slice(None)):
    tensors = load_case(name).tensors
    return [tensors[f"in/{key}"][rows] if f"in/{key}" in tensors else None for key in ("x", "t", "s", "y")]


def g(model, x, t, s, y):
    """g(x, t, s), the inner parametrisation."""
    c_skip, c_out, _, _ = (scaling[:, None, None, None] for scaling in model.precond.scalings(t))
    return c_skip * x + c_out * model.raw(x, t, y, s_N=s)


def test_output_g_and_jump_are_the_official_ones(name):
    case, model = load_case(name), model_of(name)
    x, t, s, y = inputs(name)
    case.close(model.raw(x, t, y, s_N=s), "out/raw")
    case.close(g(model, x, t, s, y), "out/denoised_edm_euler")
    case.close(model.jump(x, t, s, y), "out/G_edm_euler")


@pytest.mark.parametrize(("inner", "outer"), PARTIAL)
def test_other_parametrisations_are_the_official_ones(name, inner, outer):
    case, model = load_case(name), model_of(name, inner, outer)
    x, t, s, y = inputs(name)
    jumped = model.jump(x, t, s, y)
    case.close(jumped[1:], f"out/G_{inner}_{outer}_rows12")
    denoised = model.trajectory.denoised(x, g(model, x, t, s, y), t)
    case.close(denoised[2], f"out/denoised_{inner}_{outer}_row2")
    case.close(model(x, t, y)[2], f"out/denoised_{inner}_{outer}_row2")  # row 2 has s = t
    torch.testing.assert_close(jumped[2], x[2], rtol=0, atol=0)


def test_gradients_of_the_jump_are_the_official_ones(name):
    case, model = load_case(name), model_of(name)
    x, t, s, y = inputs(name)
    loss = (model.jump(x, t, s, y) * case.tensors["in/loss_weight"]).double().sum()
    loss.backward()
    torch.testing.assert_close(loss, case.tensors["out/loss"], rtol=1e-4, atol=1e-3)

    gradients = model.net.state_dict() | {key: weight.grad for key, weight in model.net.named_parameters()}
    official = to_edm(gradients, model.net) if name == "F_kim_net" else to_openai(gradients, model.net)
    official |= {f"model.{key}": value for key, value in official.items()}
    for key, expected in case.tensors.items():
        if key.startswith("grad/"):
            torch.testing.assert_close(
                official[key.removeprefix("grad/")], expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item()
            )
    names = case.name_lists["out/grad_norms"]
    assert len(names) == len(list(model.net.parameters()))
    expected = case.tensors["out/grad_norms"]
    norms = torch.stack([official[key].double().norm() for key in names])
    torch.testing.assert_close(norms, expected, rtol=1e-4, atol=1e-6 * expected.max().item())


def test_teacher_is_the_network_without_its_second_time(name):
    case, student = load_case(name), model_of(name)
    x, t, _, y = inputs(name, slice(0, 2))
    plain = UNet(
        student.net.family,
        student.image_shape[1],
        3,
        label_dim=student.label_dim,
        model_channels=case.config["model_channels"],
        channel_mult=case.config["channel_mult"],
        num_blocks=1,
        attn_resolutions=student.net.attn_resolutions,
    )
    weights = student.net.state_dict()
    plain.load_state_dict({key: 1.1 * weights[key] for key in plain.state_dict()})
    case.close(Model(plain, EDM(), student.image_shape, student.label_dim)(x, t, y), "out/teacher_denoised_row01")


@pytest.mark.parametrize("table", TABLES)
def test_tables_of_parametrisations_are_the_official_ones(table):
    case = load_case(table)
    sigma, s = case.tensors["in/sigma"], case.tensors["in/outer_s"]
    for inner, precond in INNER.items():
        case.close(torch.stack(precond.scalings(sigma)[:2]), f"out/inner_{inner}")
    for outer in OUTER:
        case.close(torch.stack(Trajectory(outer).coefficients(sigma, s)), f"out/outer_{outer}")


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("num", [18, 40])
def test_time_grids_are_the_official_ones(table, num):
    load_case(table).close(karras_sigmas(num)[:-1], f"out/t_table_{num}")


def test_denoised_is_g_where_both_times_are_one(name):
    x, t, _, y = inputs(name)
    model = model_of(name)
    torch.testing.assert_close(model(x, t, y), g(model, x, t, t, y), rtol=0, atol=0)


@pytest.mark.parametrize("outer", OUTER)
def test_denoised_is_the_slope_of_the_jump(outer):
    """dG/ds = (x - D) / t at s = t: the trajectory follows the ODE of its own denoiser, whatever the parametrisation."""
    trajectory, t = Trajectory(outer), torch.tensor([0.01, 0.7, 30.0], dtype=torch.float64)
    x, g_NCHW = torch.linspace(-3, 3, 6, dtype=torch.float64).reshape(2, 3, 1, 1, 1)
    s = t.clone().requires_grad_()
    trajectory.jump(x, g_NCHW, t, s).sum().backward()
    expected = (x - trajectory.denoised(x, g_NCHW, t)).flatten() / t
    torch.testing.assert_close(s.grad, expected)


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("inner", INNER)
def test_limits_are_exact_and_finite(inner, outer):
    model = model_of("F_sony_net", inner, outer)
    x, t, _, _ = inputs("F_sony_net")
    assert torch.equal(model.jump(x, t, t), x)
    for level in (t, torch.zeros(3), torch.full((3,), 1e-30)):
        x_in, s = x.clone().requires_grad_(), level.clone().requires_grad_()
        jumped = model.jump(x_in, t, s)
        jumped.square().sum().backward()
        for value in (jumped, x_in.grad, s.grad, *(weight.grad for weight in model.net.parameters())):
            assert value.isfinite().all()
    torch.testing.assert_close(model.jump(x, t, 0.0), model.jump(x, t, 1e-30), rtol=1e-5, atol=1e-5)


def test_levels_below_the_smallest_are_told_as_the_smallest():
    model, seen = model_of("F_kim_net"), []
    x, t, _, y = inputs("F_kim_net")
    model.net.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["second_N"]), with_kwargs=True)
    for s in (0.0, 0.001, 0.002, 0.5):
        model.jump(x, t, s, y)
    levels = torch.tensor([0.002, 0.002, 0.002, 0.5])
    torch.testing.assert_close(torch.stack(seen)[:, 0], levels.log() / 4)


def test_model_without_a_second_time_cannot_jump():
    net = UNet("ddpmpp", 8, 3, model_channels=16, channel_mult=(1,), num_blocks=1).init_weights(0)
    with pytest.raises(ValueError, match="without a second time"):
        Model(net, EDM(), (3, 8, 8)).jump(torch.zeros(1, 3, 8, 8), 1.0, 0.5)


def test_wrong_levels_say_why(name):
    x, _, _, y = inputs(name)
    with pytest.raises(ValueError, match=r"or \[3\], got shape \[2\]"):
        model_of(name).jump(x, 1.0, torch.ones(2), y)


def test_jump_is_one_graph():
    model = model_of("F_sony_net")
    x, t, s, _ = inputs("F_sony_net")
    compiled = torch.compile(model.jump, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, s), model.jump(x, t, s))


def test_jump_has_a_derivative_in_its_second_time():
    model, step = model_of("F_kim_net"), 1e-2
    x, t, s, y = inputs("F_kim_net", slice(1, 2))
    level = s.clone().requires_grad_()
    model.jump(x, t, level, y).sum().backward()
    expected = (model.jump(x, t, s + step, y) - model.jump(x, t, s - step, y)).sum() / (2 * step)
    torch.testing.assert_close(level.grad[0], expected, rtol=0.01, atol=0)
