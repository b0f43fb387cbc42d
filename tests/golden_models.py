"""Models with the weights of a golden case, and what tests measure of them."""

from dataclasses import dataclass, replace

import torch
from golden_cases import Case, load_case
from torch import Tensor

from fastcm.diffusion.preconditioners import Preconditioner
from fastcm.io.edm_layout import from_edm
from fastcm.model import Model
from fastcm.nn import FAMILIES, UNet

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


def assert_gradients_match(case: Case, model: Model) -> None:
    """Assert the norms of all parameter gradients, and the full gradients that the case stores."""
    gradients = {f"model.{name}": parameter.grad for name, parameter in model.net.named_parameters()}
    names = case.name_lists["out/grad_norms"]
    assert sorted(names) == sorted(gradients)
    case.close(torch.stack([gradients[name].norm() for name in names]), "out/grad_norms")
    for name in case.tensors:
        if name.startswith("grad/"):
            case.close(gradients[name.removeprefix("grad/")], name)
