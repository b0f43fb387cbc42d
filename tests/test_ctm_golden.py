"""CTM's losses and gradients against the official code, on both of its networks."""

import copy
from dataclasses import replace

import pytest
import torch
from golden_cases import case_names, load_case
from golden_models import kim_model_of, openai_model_of

from fastcm.data.batch import Batch
from fastcm.io.openai_layout import to_openai
from fastcm.model import one_hot
from fastcm.objectives import CTM, Networks
from fastcm.train.ctm_step import CTMStep

LOSSES = [name for name in case_names("F_") if "_loss_" in name]
WEIGHTS = {"uniform": "uniform", "karras_weight": "edm", "uniform_g": "uniform_g"}


def networks_of(name, objective):
    """Student, moving average 0.9 times and teacher 1.1 times its weights; the teacher has no second time."""
    kim = name.startswith("F_kim")
    build, weights_case = (kim_model_of, "F_kim_net") if kim else (openai_model_of, "F_sony_net")
    student = build(weights_case, objective.precond, objective.trajectory)
    target = copy.deepcopy(student).requires_grad_(False)
    teacher = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.mul_(0.9)
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    return Networks(student, target, without_second_time(teacher))


def without_second_time(model):
    """The same network as if it had never had a second time."""
    model.net.second_time = False
    for block in model.net._blocks:
        block.affine_s = None
    return model


def objective_of(case, **changes):
    config = case.config
    options = {
        "num_levels": config["start_scales"],
        "weight": WEIGHTS[config["weight_schedule"]],
        "target_student": config["ctm_target_inner_type"] == "model_sg",
        "x_u": "self" if config["self_learn"] else "teacher",
        "estimate_level": "u" if config["ctm_target_matching"] else "s",
        "dsm": "none",
        "distance": "squared",
    }
    if "in/dsm_noise" in case.tensors:  # official losses are means over pixels, our distance is a sum
        adaptive = config["apply_adaptive_weight"]
        options |= {"dsm": "adaptive" if adaptive else "fixed", "dsm_weight": float(case.tensors["in/x_start"][0].numel())}
    return CTM(**(options | changes))


def case_of(name):
    """The case, with the images and noise that the cases of one network share."""
    case = load_case(name)
    default = load_case("_".join(name.split("_")[:2]) + "_loss_default")
    shared = {key: default.tensors[key] for key in ("in/x_start", "in/noise", "in/y") if key in default.tensors}
    return replace(case, tensors={**shared, **case.tensors})


def run(name, **changes):
    """(case, objective, step, consistency loss); the gradients are in the student."""
    case = case_of(name)
    objective = objective_of(case, **changes)
    networks = networks_of(name, objective)
    step = CTMStep(networks, objective, 0, 0, compiled=False)
    tensors = case.tensors
    labels = one_hot(tensors["in/y"], 10) if networks.student.label_dim else None
    num = len(tensors["in/x_start"])
    images = tensors["in/x_start"].contiguous(memory_format=torch.channels_last)
    batch = Batch(images, labels, None, torch.arange(num))
    num_steps = case.config["num_heun_step"]
    jumps = objective.jumps_at(tensors["in/t_idx"].float(), tensors["in/s_idx"].float(), num_steps)
    sigma, noise = torch.ones(num), tensors["in/noise"]
    if objective.dsm != "none":
        # The official batch has its lognormal half first, ours every second image: index 0, 2, .. and 1, 3, ...
        half = num // 2
        order = torch.cat([torch.arange(half) * 2, torch.arange(half) * 2 + 1])
        normal, uniform = (tensors[key].repeat(2) for key in ("in/dsm_randn_sigma", "in/dsm_rand_sigma"))
        sigma, noise = objective.dsm_sigma_at(order, normal, uniform), tensors["in/dsm_noise"]
    loss_N = step.accumulate(step.solved_microbatch(batch, jumps, num_steps, tensors["in/noise"], sigma, noise))
    return case, objective, step, (batch, jumps, loss_N)


def assert_equal_to_the_official_run(name, **changes):
    case, objective, step, (batch, jumps, loss_N) = run(name, **changes)
    pixels = batch.images[0].numel()
    for level, value in zip("tus", (jumps.t_N, jumps.u_N, jumps.s_N), strict=True):
        case.close(value, f"mid/{level}")
    x_t = batch.images + jumps.t_N[:, None, None, None] * case.tensors["in/noise"]
    x_u = step.solve(x_t, jumps, case.config["num_heun_step"], batch.labels)
    case.close(x_u, "mid/x_u")
    case.close(step.target(x_u, jumps, batch.labels), "mid/target")
    case.close(objective.weight_of(jumps), "mid/weights")
    case.close(loss_N / pixels, "out/consistency_l2")
    net = step.networks.student.net
    gradients = {name: p.grad / pixels for name, p in net.named_parameters()}
    gradients = to_openai(gradients, net) if "sony" in name else {f"model.{name}": g for name, g in gradients.items()}
    case.close(torch.stack([gradients[name].norm() for name in case.name_lists["out/grad_norms"]]), "out/grad_norms")


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_the_official_ones(name):
    assert_equal_to_the_official_run(name)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("F_sony_loss_default", {"dsm_weight": 700.0}),
        ("F_sony_loss_default", {"target_student": False}),
        ("F_sony_loss_default", {"x_u": "self"}),
        ("F_sony_loss_default", {"num_levels": 41}),
        ("F_sony_loss_default", {"p_std": 1.25}),
        ("F_sony_loss_default", {"dsm_place": 0.8}),
        ("F_sony_loss_default", {"weight": "edm"}),
        ("F_kim_loss_default", {"dsm": "fixed"}),
        ("F_kim_loss_default", {"outer": "variance"}),
        ("F_kim_loss_default", {"inner": "edm_boundary"}),
    ],
)
def test_a_wrong_choice_is_noticed(name, change):
    with pytest.raises(AssertionError):
        assert_equal_to_the_official_run(name, **change)
