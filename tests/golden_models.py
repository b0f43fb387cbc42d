"""Models with the weights of a golden case, and what tests measure of them."""

from dataclasses import dataclass, replace

import torch
from golden_cases import Case, load_case
from torch import Tensor

from fastcm.config import FamilyOverrides
from fastcm.diffusion.preconditioners import EDM, Preconditioner
from fastcm.diffusion.trajectory import Trajectory
from fastcm.io.edm2_layout import from_edm2
from fastcm.io.edm_layout import describe_edm, from_edm
from fastcm.io.openai_layout import describe_openai, from_openai
from fastcm.io.unet_facts import UNetFacts
from fastcm.model import Model
from fastcm.nn import FAMILIES, EDM2UNet, UNet

SIZES = ("augment_dim", "model_channels", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions", "dropout")


@dataclass(frozen=True)
class PlainBatch:
    """What objectives read of a batch."""

    images: Tensor
    labels: Tensor | None
    augment: Tensor | None
    index: Tensor


def batch_of(images: Tensor, labels: Tensor | None = None, first_index: int = 0) -> PlainBatch:
    """The images, channels_last, with consecutive sample numbers."""
    index = torch.arange(first_index, first_index + len(images))
    return PlainBatch(images.contiguous(memory_format=torch.channels_last), labels, None, index)


def model_of(weights_case: str, precond: Preconditioner) -> Model:
    """The network of a golden case under any preconditioner."""
    case = load_case(weights_case)
    config = case.config
    kwargs = config["model_kwargs"]
    adm = config["model_type"] == "DhariwalUNet"
    family = FAMILIES["adm" if adm else "ddpmpp" if kwargs["embedding_type"] == "positional" else "ncsnpp"]
    if not adm:
        filter = tuple(map(float, kwargs["resample_filter"]))
        family = replace(family, encoder=kwargs["encoder_type"], decoder=kwargs["decoder_type"], resample_filter=filter)
    channels, resolution = config["img_channels"], config["img_resolution"]
    out_channels = channels * (2 if config["precond"] == "iDDPMPrecond" else 1)
    sizes = {name: kwargs[name] for name in SIZES}
    net = UNet(family, resolution, channels, out_channels=out_channels, label_dim=config["label_dim"], **sizes)
    weights = {name: value for name, value in case.weights.items() if name != "u"}
    net.load_state_dict(from_edm(weights, net))
    return Model(net, precond, (channels, resolution, resolution), config["label_dim"])


def edm2_unet_of(weights_case: str, weights: dict[str, Tensor] | None = None) -> EDM2UNet:
    """The network of a golden case of EDM2, with its weights or others under the official names."""
    case = load_case(weights_case)
    precond, unet, block = (case.config[part] for part in ("precond", "unet", "block"))
    sizes = {name: precond[name] for name in ("img_resolution", "img_channels", "label_dim", "logvar_channels")}
    sizes |= {name: unet[name] or 0 for name in ("channel_mult_noise", "channel_mult_emb")}
    sizes |= {name: unet[name] for name in unet.keys() - sizes.keys()}
    sizes |= {name: block[name] for name in ("channels_per_head", "res_balance", "attn_balance", "clip_act")}
    net = EDM2UNet(**sizes)
    net.load_state_dict(from_edm2(case.weights if weights is None else weights, net))
    return net


def edm2_model_of(weights_case: str, weights: dict[str, Tensor] | None = None) -> Model:
    """The same under EDM's preconditioner."""
    net = edm2_unet_of(weights_case, weights)
    return Model(net, EDM(), (net.img_channels, net.img_resolution, net.img_resolution), net.label_dim)


def openai_model_of(weights_case: str, precond: Preconditioner, trajectory: Trajectory | None = None) -> Model:
    """OpenAI's network of a golden case, or CTM's second form of it, built from what its state dict and heads tell."""
    case = load_case(weights_case)
    config = case.config
    up = config["num_heads_upsample"]
    heads = {"num_heads": config["num_heads"], "num_heads_up": config["num_heads"] if up == -1 else up}
    given = FamilyOverrides(channels_per_head=max(config["num_head_channels"], 0), **heads)
    facts = describe_openai(case.weights, config["image_size"], given)
    return _loaded(facts, from_openai(case.weights, facts.build()), precond, trajectory)


def kim_model_of(weights_case: str, precond: Preconditioner, trajectory: Trajectory | None = None) -> Model:
    """CTM's network for CIFAR-10, EDM's with a second time, of a golden case."""
    weights = load_case(weights_case).weights
    facts = describe_edm(weights)
    return _loaded(facts, from_edm(weights, facts.build()), precond, trajectory)


def _loaded(facts: UNetFacts, weights: dict[str, Tensor], precond: Preconditioner, trajectory: Trajectory | None) -> Model:
    net = facts.build()
    net.load_state_dict(weights)
    return Model(net, precond, facts.image_shape, facts.label_dim, trajectory=trajectory)


def assert_gradients_match(case: Case, model: Model) -> None:
    """Assert the norms of all parameter gradients, and the full gradients that the case stores."""
    gradients = {f"model.{name}": parameter.grad for name, parameter in model.net.named_parameters()}
    names = case.name_lists["out/grad_norms"]
    assert sorted(names) == sorted(gradients)
    case.close(torch.stack([gradients[name].norm() for name in names]), "out/grad_norms")
    for name in case.tensors:
        if name.startswith("grad/"):
            case.close(gradients[name.removeprefix("grad/")], name)
