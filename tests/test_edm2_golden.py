"""EDM2's network, primitives, loss, forced weight normalisation and guided sampler against the official numbers."""

import math

import pytest
import torch
from golden_cases import load_case
from golden_models import batch_of, edm2_model_of, edm2_unet_of
from torch import Tensor

from fastcm import ops
from fastcm.diffusion.noise_schedules import karras_sigmas
from fastcm.io.edm2_layout import from_edm2, to_edm2
from fastcm.nn.magnitude_preserving import MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalize
from fastcm.objectives import EDMObjective
from fastcm.sampling import Guided, sample_heun

NETWORKS = ["G_net_uncond", "G_net_cond"]
EMBEDDING = {"G_net_uncond": "G_forced_norm_uncond", "G_net_cond": "G_forced_norm_cond"}
PRIMITIVES = load_case("G_mp_primitives").tensors


def denoise(case, model) -> Tensor:
    return model(case.tensors["in/x"], case.tensors["in/sigma"], case.tensors.get("in/class_labels"))


def official_gradients(net) -> dict[str, Tensor]:
    """Gradients by official name; buffers keep their values, so that the importer's check of names holds."""
    return to_edm2(net.state_dict() | {name: weight.grad for name, weight in net.named_parameters()}, net)


def assert_gradient_norms(case, net):
    gradients = official_gradients(net)
    names = case.name_lists["out/grad_norms"]
    assert len(names) == len(list(net.parameters()))
    case.close(torch.stack([gradients[name].double().norm() for name in names]), "out/grad_norms")
    for name in case.tensors:
        if name.startswith("grad/") and name != "grad/x":
            case.close(gradients[name.removeprefix("grad/")], name)


@pytest.fixture(params=NETWORKS)
def name(request):
    return request.param


def test_outputs_are_the_official_ones(name):
    case, model = load_case(name), edm2_model_of(name)
    sigma = case.tensors["in/sigma"]
    c_noise = model.precond.scalings(sigma).c_noise
    case.close(c_noise, "mid/c_noise")
    case.close(model.raw(case.tensors["in/x"], sigma, case.tensors.get("in/class_labels")), "out/F_x")
    case.close(denoise(case, model), "out/D_x")
    case.close(model.net.log_variance(c_noise)[:, None, None, None], "out/logvar")


def test_gradients_are_the_official_ones(name):
    case, model = load_case(name), edm2_model_of(name)
    x, sigma = case.tensors["in/x"].clone().requires_grad_(), case.tensors["in/sigma"]
    D_x = model(x, sigma, case.tensors.get("in/class_labels"))
    u = model.net.log_variance(model.precond.scalings(sigma).c_noise)
    loss = (D_x * case.tensors["in/loss_weight"]).double().sum() + u.double().sum()
    loss.backward()
    case.close(loss, "out/loss")
    case.close(x.grad, "grad/x")
    assert_gradient_norms(case, model.net)


def test_a_constrained_network_is_the_official_one_after_a_training_forward_pass(name):
    case, base, model = load_case(EMBEDDING[name]), load_case(name), edm2_model_of(name)
    model.net.constrain_weights(torch.ones(()))
    case.close(denoise(base, model), "out/D_x")
    official = to_edm2(model.net.state_dict(), model.net)
    # The official pass did not ask for the log variance, so it left that layer alone.
    official["logvar_linear.weight"] = case.weights["logvar_linear.weight"]
    norms = [official[parameter].double().norm() for parameter in case.name_lists["out/weight_norms_after"]]
    case.close(torch.stack(norms), "out/weight_norms_after")
    for parameter in ("unet.emb_noise.weight", "unet.out_conv.weight"):
        case.close(official[parameter], f"out/{parameter}")


def test_forward_in_training_mode_writes_no_weight(name):
    case, model = load_case(name), edm2_model_of(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            denoise(case, model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("option", [{"res_balance": 0.31}, {"attn_balance": 0.29}, {"clip_act": 1.0}, {"concat_balance": 0.45}])
def test_a_wrong_constant_is_noticed(option, monkeypatch):
    case, config = load_case("G_net_uncond"), load_case("G_net_uncond").config
    part = "unet" if "concat_balance" in option else "block"
    monkeypatch.setitem(config, part, config[part] | option)
    with pytest.raises(AssertionError):
        case.close(denoise(case, edm2_model_of("G_net_uncond")), "out/D_x")


def test_a_wrong_label_balance_is_noticed(monkeypatch):
    case = load_case("G_net_cond")
    monkeypatch.setitem(case.config, "unet", case.config["unet"] | {"label_balance": 0.45})
    with pytest.raises(AssertionError):
        case.close(denoise(case, edm2_model_of("G_net_cond")), "out/D_x")


def test_state_dict_round_trip_is_bit_for_bit(name):
    case, net = load_case(name), edm2_unet_of(name)
    official = to_edm2(net.state_dict(), net)
    assert official.keys() == case.weights.keys()
    assert all(torch.equal(official[key], value) for key, value in case.weights.items())
    again = from_edm2(official, net)
    assert all(torch.equal(again[key], value) for key, value in net.state_dict().items())


def test_loss_and_gradients_are_the_official_ones():
    case = load_case("G_EDM2Loss")
    constants = {"p_mean": case.config["P_mean"], "p_std": case.config["P_std"], "sigma_data": case.config["sigma_data"]}
    objective, model = EDMObjective(uncertainty=True, **constants), edm2_model_of("G_net_cond")
    batch = batch_of(case.tensors["in/images"], case.tensors["in/labels"])
    sigma = objective.noise.sigma(case.tensors["in/rnd_normal"].flatten())
    loss = objective.loss_at(model, batch, sigma, case.tensors["in/noise_unit"]).loss_N
    expected = case.tensors["out/loss"].double().flatten(1).sum(1)
    torch.testing.assert_close(loss.double(), expected, rtol=case.tolerance["rtol"], atol=case.tolerance["atol"])
    loss.mean().backward()
    assert_gradient_norms(case, model.net)


def flipped_weights() -> dict[str, Tensor]:
    """The guide: every parameter of at least one axis flipped along the first, in the official layout."""
    weights, parameters = load_case("G_net_cond").weights, load_case("G_net_cond").name_lists["out/grad_norms"]
    return {name: w.flip(0) if name in parameters and w.ndim else w for name, w in weights.items()}


@pytest.mark.parametrize(("guidance", "stored"), [(1.7, "out/x_guided"), (1.0, "out/x_unguided")])
def test_guided_samples_are_the_official_ones(guidance, stored):
    case = load_case("G_sampler_guided")
    config = case.config
    assert config["guidance"] == 1.7
    model = Guided(edm2_model_of("G_net_cond"), edm2_model_of("G_net_cond", flipped_weights()), guidance)
    sigmas = karras_sigmas(config["num_steps"], config["sigma_min"], config["sigma_max"], config["rho"])
    x = sample_heun(model, case.tensors["in/noise"] * sigmas[0], sigmas, labels=case.tensors["in/labels"])
    case.close(x, stored)


def mp_conv(weight, *sizes) -> MPConv:
    conv = MPConv(*sizes)
    conv.load_state_dict({"weight": weight})
    return conv


def primitives() -> dict[str, Tensor]:
    """Each result of the golden case by name."""
    a, b, c, img = (PRIMITIVES[f"in/{name}"] for name in ("a", "b", "c", "img"))
    fourier = MPFourier(8)
    fourier.load_state_dict({"freqs": PRIMITIVES["in/fourier_freqs"], "phases": PRIMITIVES["in/fourier_phases"]})
    conv = mp_conv(PRIMITIVES["in/conv_weight"], 6, 7, 3)
    found = {
        "normalize_default": normalize(a, (1, 2, 3)),
        "normalize_dim1": normalize(a, (1,)),
        "normalize_scalar_eps": normalize(a * 1e-5, (1, 2, 3)),
        "mp_silu": mp_silu(a),
        "fourier": fourier(PRIMITIVES["in/noise_labels"]),
        "conv": conv(a),
        "conv_gain": conv(a, load_case("G_mp_primitives").config["gain"]),
        "linear": mp_conv(PRIMITIVES["in/linear_weight"], 5, 4)(PRIMITIVES["in/lin_in"]),
    }
    for t in (0.5, 0.3):
        found |= {f"mp_sum_{t}": mp_sum(a, b, t), f"mp_cat_{t}": mp_cat(a, c, t)}
    for suffix, taps in (("", (1.0, 1.0)), ("_1331", (1.0, 3.0, 3.0, 1.0))):
        found |= {f"resample_{way}{suffix}": ops.resample(img, taps, way == "up") for way in ("up", "down")}
    return found


@pytest.mark.parametrize("name", [name.removeprefix("out/") for name in PRIMITIVES if name.startswith("out/")])
def test_primitives_are_the_official_ones(name):
    load_case("G_mp_primitives").close(primitives()[name], f"out/{name}")


def test_equal_halves_are_concatenated_as_they_are():
    a, b = PRIMITIVES["in/a"], PRIMITIVES["in/b"]
    assert torch.equal(mp_cat(a, b, 0.5), torch.cat([a, b], dim=1))
    assert math.isclose(mp_cat(a, b, 0.3)[:, :6].square().sum() / a.square().sum(), 2 * 0.49 / 0.58, rel_tol=1e-5)
