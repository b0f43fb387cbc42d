"""The U-Nets against numbers of the official EDM networks (arXiv 2206.00364)."""

from dataclasses import replace

import pytest
import torch
from golden_cases import case_names, load_case
from torch import Tensor

from fastcm.diffusion.preconditioners import PRECONDITIONERS
from fastcm.errors import CheckpointError
from fastcm.io.edm_layout import from_edm, to_edm
from fastcm.nn import FAMILIES, UNet

CASES = [name for name in case_names("A_") if name != "A_precond_tables"]


def family_of(config):
    kwargs = config["model_kwargs"]
    if config["model_type"] == "DhariwalUNet":
        return FAMILIES["adm"]
    family = FAMILIES["ddpmpp" if kwargs["embedding_type"] == "positional" else "ncsnpp"]
    assert family.channel_mult_noise == kwargs["channel_mult_noise"]
    filter = tuple(map(float, kwargs["resample_filter"]))
    return replace(family, encoder=kwargs["encoder_type"], decoder=kwargs["decoder_type"], resample_filter=filter)


def weights_of(case):
    """The network's state dict; the iDDPM preconditioner keeps a table ``u`` of its own beside it."""
    return {name: value for name, value in case.weights.items() if name != "u"}


def unet_of(case):
    config = case.config
    sizes = ("augment_dim", "model_channels", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions", "dropout")
    unet = UNet(
        family_of(config),
        config["img_resolution"],
        config["img_channels"],
        out_channels=config["img_channels"] * (2 if config["precond"] == "iDDPMPrecond" else 1),
        label_dim=config["label_dim"],
        **{name: config["model_kwargs"][name] for name in sizes},
    )
    unet.load_state_dict(from_edm(weights_of(case), unet))
    return unet


def denoise(case, unet, x, labels=None, augment=None) -> tuple[Tensor, Tensor]:
    """(D_x, F_x) under the case's preconditioning."""
    precond = PRECONDITIONERS[case.config["precond"].removesuffix("Precond").lower()]()
    c_skip, c_out, c_in, c_noise = precond.scalings(case.tensors["in/sigma"])
    case.close(c_noise, "mid/c_noise")
    c_skip, c_out, c_in = (scaling[:, None, None, None] for scaling in (c_skip, c_out, c_in))
    F_x = unet(c_in * x, c_noise, labels=labels, augment=augment)
    return c_skip * x + c_out * F_x[:, : x.shape[1]], F_x


def close_in_scale(actual, expected, tolerance=2e-5):
    """Gradients are sums over many pixels, so rounding goes with the largest element, not with each one."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=tolerance * expected.abs().max().item())


def conditions(case):
    return {"labels": case.tensors.get("in/class_labels"), "augment": case.tensors.get("in/augment_labels")}


@pytest.fixture(params=CASES)
def case(request):
    return load_case(request.param)


def test_outputs_are_the_official_ones(case):
    D_x, F_x = denoise(case, unet_of(case), case.tensors["in/x"], **conditions(case))
    case.close(F_x, "out/F_x")
    case.close(D_x, "out/D_x")


# What is no parameter, and no choice of the golden configuration: each is wrong for every case where it changes anything.
WRONG = {
    "eps": lambda family: {"eps": 10 * family.eps},
    "skip_scale": lambda family: {"skip_scale": 1.001 * family.skip_scale},
    "groups": lambda family: {"min_group_channels": 2 * family.min_group_channels},
    "endpoint": lambda family: {"endpoint": not family.endpoint},
    "sin_first": lambda family: {"sin_first": not family.sin_first},
    "noise_scale": lambda family: {"noise_scale": 1.001},
    "heads": lambda family: {"channels_per_head": family.channels_per_head // 2 if family.channels_per_head else 8},
    "filter": lambda family: {"resample_filter": (1.0, 2.0, 2.0, 1.0)},
}


def matters(name, case):
    """Fourier features have no end, and a network without attention no heads, one of a single level no filter."""
    if name == "endpoint":
        return family_of(case.config).embedding == "positional"
    part = {"heads": "qkv", "filter": "down"}.get(name, "")
    return any(part in key for key in case.weights)


@pytest.mark.parametrize(("name", "wrong"), [(n, w) for n in CASES for w in WRONG if matters(w, load_case(n))])
def test_a_wrong_constant_is_noticed(name, wrong, monkeypatch):
    case = load_case(name)
    family = replace(family_of(case.config), **WRONG[wrong](family_of(case.config)))
    monkeypatch.setitem(globals(), "family_of", lambda config: family)
    try:
        _, F_x = denoise(case, unet_of(case), case.tensors["in/x"], **conditions(case))
    except CheckpointError:
        return  # the weights have other shapes
    with pytest.raises(AssertionError):
        case.close(F_x, "out/F_x")


def test_noise_embedding_is_the_official_one(case):
    unet, seen = unet_of(case), []
    unet.map_layer1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    unet.embed(case.tensors["mid/c_noise"], **conditions(case))
    case.close(seen[0], "mid/emb")


def test_gradients_are_the_official_ones(case):
    unet = unet_of(case)
    x = case.tensors["in/x"].clone().requires_grad_()
    D_x, _ = denoise(case, unet, x, **conditions(case))
    loss = (D_x * case.tensors["in/loss_weight"]).double().sum()
    loss.backward()
    close_in_scale(x.grad, case.tensors["grad/x"])
    torch.testing.assert_close(loss, case.tensors["out/loss"], rtol=1e-4, atol=1e-3)

    gradients = to_edm(unet.state_dict() | {name: weight.grad for name, weight in unet.named_parameters()}, unet)
    for name, expected in case.tensors.items():
        if name.startswith("grad/model."):
            close_in_scale(gradients[name.removeprefix("grad/model.")], expected)
    norms = [gradients[name.removeprefix("model.")].double().norm() for name in case.name_lists["out/grad_norms"]]
    close_in_scale(torch.stack(norms), case.tensors["out/grad_norms"], tolerance=1e-7)


OMISSIONS = {"labels": "out/D_x_nolabel_norm", "augment": "out/D_x_noaug_norm"}
OMITTED = [(name, what) for name in CASES for what, stored in OMISSIONS.items() if stored in load_case(name).tensors]


@pytest.mark.parametrize(("name", "omitted"), OMITTED)
def test_omitted_conditions_act_as_in_the_official_network(name, omitted):
    case = load_case(name)
    D_x, _ = denoise(case, unet_of(case), case.tensors["in/x"], **(conditions(case) | {omitted: None}))
    norm_N = D_x.double().flatten(1).norm(dim=1)
    torch.testing.assert_close(norm_N, case.tensors[OMISSIONS[omitted]], rtol=1e-5, atol=0)


def test_state_dict_round_trip_is_bit_for_bit(case):
    unet = unet_of(case)
    official = to_edm(unet.state_dict(), unet)
    expected = weights_of(case)
    assert official.keys() == expected.keys()
    assert all(torch.equal(official[name], expected[name]) for name in expected)
    again = from_edm(official, unet)
    assert all(torch.equal(again[name], value) for name, value in unet.state_dict().items())


def test_float64_network_agrees_with_float32(case):
    unet, x, c_noise = unet_of(case), case.tensors["in/x"], case.tensors["mid/c_noise"]
    single = unet(x, c_noise, **conditions(case))
    double = unet.double()(x.double(), c_noise.double(), **conditions(case))
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-3)
