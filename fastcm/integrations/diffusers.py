"""Consistency models to and from the folders of diffusers' ``ConsistencyModelPipeline``; diffusers need not be installed.

Only OpenAI's network (arXiv 2105.05233, 2303.01469) exists on both sides. A pipeline loaded from an export and
``sample_consistency`` give the same images to 1e-4 under the same noise when

- the noise levels lie on the scheduler's grid (``pipeline_timesteps`` finds the nearest; ``num_train_timesteps`` refines it),
- the model's ``renoise_sigma_min`` is the scheduler's sigma_min, as in all that is imported: the pipeline adds
  sqrt(sigma^2 - sigma_min^2) z between steps,
- denoised images are not clipped between steps (exports say so; published folders clip to [-1, 1]),
- both run in fp32. The pipeline embeds 250 ln(sigma) rounded once and ours 1000 times a rounded ln(sigma) / 4: up to
  2e-4 apart at sigma = 80, which a network that is very sensitive to the noise level can amplify.

The pipeline scales its latents by sigma_max itself and draws the noise of each step from its generator in order.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor

from fastcm.diffusion.preconditioners import EDMBoundary
from fastcm.errors import CheckpointError, ConfigError
from fastcm.integrations.diffusers_config import INSTEAD, SchedulerConfig, UNet2DConfig, pipeline_timesteps, unet_config
from fastcm.integrations.files import read_section, read_weights, write_json, write_weights
from fastcm.integrations.hub_layout import ONLY_NET
from fastcm.io.bundle import BundleHeader, load, model_from_header
from fastcm.io.tensors import copy_into
from fastcm.model import Model, SamplingDefaults
from fastcm.nn.layers import Conv
from fastcm.nn.unet import UNet

UNET, SCHEDULER, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET_CLASS, SCHEDULER_CLASS = "UNet2DModel", "CMStochasticIterativeScheduler"
VERSION = "0.18.0"  # the first diffusers with consistency models, which it must be at least
_BLOCK = {"norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2"}
_ENDS = {
    "map_layer0": "time_embedding.linear_1",
    "map_layer1": "time_embedding.linear_2",
    "map_label": "class_embedding",
    "out_norm": "conv_norm_out",
    "out_conv": "conv_out",
}


def export_diffusers(
    model: Model | str | Path,
    folder: str | Path,
    *,
    ema: str = "",
    num_train_timesteps: int = 40,
    clip_denoised: bool = False,
) -> list[int]:
    """Write a folder for ``diffusers.ConsistencyModelPipeline.from_pretrained`` and return timesteps for it.

    model: a model, or the path of a bundle or run folder, of which ``ema`` chooses the weights as in ``load``.
    num_train_timesteps: points of the pipeline's grid of noise levels; more of them lie closer to any ``mid_sigmas``.
    clip_denoised: whether the pipeline clips images to [-1, 1] after each step, which fastcm's samplers do not.
    The timesteps are those that come nearest to the model's own steps (``model.sampling``).
    Raises ConfigError saying which part of the model diffusers does not have.
    """
    if isinstance(model, Model):
        if ema:
            raise ConfigError(f"ema: {ema!r} chooses among the weights of a bundle, but a model was given; leave it out")
    else:
        model = load(model, ema=ema)
    if not isinstance(model.precond, EDMBoundary):
        raise ConfigError(
            f"cannot be written for diffusers: the preconditioner is {model.precond}, but the pipeline always applies the "
            f"boundary scalings of consistency models (edm_boundary); {INSTEAD}"
        )
    unet = unet_config(model.net)
    scheduler = _scheduler(model.precond, num_train_timesteps, clip_denoised)
    timesteps = pipeline_timesteps(model.sampling.mid_sigmas, scheduler)
    folder = Path(folder)
    write_weights(folder / "unet" / WEIGHTS, _diffusers_names(model.net.state_dict(), model.net))
    write_json(folder / UNET, _headed(UNET_CLASS) | unet.model_dump())
    write_json(folder / SCHEDULER, _headed(SCHEDULER_CLASS) | scheduler.model_dump())
    parts = {"scheduler": ["diffusers", SCHEDULER_CLASS], "unet": ["diffusers", UNET_CLASS]}
    write_json(folder / INDEX, _headed("ConsistencyModelPipeline") | parts)
    return timesteps


def import_diffusers(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[Model, BundleHeader]:
    """The model in the folder of a ``ConsistencyModelPipeline``, or of its ``UNet2DModel`` alone, and the header of a bundle.

    ``save_bundle(file, header, model.net.state_dict(), {})`` makes a bundle of it. The scheduler's configuration gives the
    boundary scalings; a bare network gets sigma_data 0.5 and sigma_min 0.002, which all published consistency models
    have. dtype: precision of the network's torso. Only safetensors are read.
    Raises CheckpointError naming the file, and the key or value that is missing, damaged or has no counterpart in fastcm.
    """
    folder = Path(folder)
    bare = not (folder / INDEX).is_file() and not (folder / UNET).is_file()
    unet_file = folder / "config.json" if bare else folder / UNET
    unet = read_section(unet_file, UNet2DConfig, UNET_CLASS)
    scheduler = SchedulerConfig() if bare else read_section(folder / SCHEDULER, SchedulerConfig, SCHEDULER_CLASS)
    try:
        header = _header(unet, scheduler)
        model = model_from_header(header, dtype=dtype, origin=unet_file)
    except ConfigError as error:
        raise CheckpointError(f"{unet_file}: {error}") from None
    weights_file = unet_file.with_name(WEIGHTS)
    copy_into(_diffusers_names(model.net.state_dict(), model.net), read_weights(weights_file), "", weights_file)
    return model.eval().requires_grad_(False), header


def _headed(class_name: str) -> dict[str, str]:
    return {"_class_name": class_name, "_diffusers_version": VERSION}


def _scheduler(precond: EDMBoundary, num_train_timesteps: int, clip_denoised: bool) -> SchedulerConfig:
    levels = {"sigma_min": precond.sigma_min, "sigma_data": precond.sigma_data}
    try:
        return SchedulerConfig(num_train_timesteps=num_train_timesteps, clip_denoised=clip_denoised, **levels)
    except ValidationError as invalid:
        error = invalid.errors()[0]
        raise ConfigError(f"cannot be written for diffusers: {error['loc'][0]} is {error['input']!r}: {error['msg']}") from None


def _header(unet: UNet2DConfig, scheduler: SchedulerConfig) -> BundleHeader:
    network = unet.network()
    return BundleHeader(
        network=network.model_dump(mode="json"),
        image_shape=(unet.in_channels, unet.sample_size, unet.sample_size),
        label_dim=unet.num_class_embeds or 0,
        augment_dim=0,
        preconditioner={"kind": "edm_boundary", "sigma_data": scheduler.sigma_data, "sigma_min": scheduler.sigma_min},
        sampling=SamplingDefaults("consistency", renoise_sigma_min=scheduler.sigma_min),
        emas=ONLY_NET,
        trained={"phase": "diffusers", "images": 0, "weights": "net"},
    )


def _diffusers_names(state: Mapping[str, Float[Tensor, "..."]], unet: UNet) -> dict[str, Float[Tensor, "..."]]:
    """A state dict of ``unet`` under the names and in the shapes of UNet2DModel: views of the tensors in ``state``."""
    modules = dict(_module_names(unet))
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        target, kind = modules[module], module.rpartition(".")[2]
        if kind == "qkv":
            rows = value[..., 0, 0] if leaf == "weight" else value
            named |= {f"{target}.to_{part}.{leaf}": third for part, third in zip("qkv", rows.chunk(3), strict=True)}
        elif kind == "proj" and leaf == "weight":
            named[f"{target}.{leaf}"] = value[..., 0, 0]
        else:
            named[f"{target}.{leaf}"] = value.T if kind == "map_label" else value
    return named


def _module_names(unet: UNet) -> Iterator[tuple[str, str]]:
    """Each layer with parameters of ``unet``, and the layer of UNet2DModel that it is (a qkv: the attention it belongs to)."""
    top, bottom = (f"{r}x{r}" for r in (unet.resolutions[0], unet.resolutions[-1]))
    yield f"enc.{top}_conv", "conv_in"
    yield from _ENDS.items()
    for level, resolution in enumerate(unet.resolutions):
        name = f"enc.{resolution}x{resolution}"
        if level:
            yield from _layers(unet, f"{name}_down", f"down_blocks.{level - 1}.downsamplers", 0)
        for index in range(unet.num_blocks):
            yield from _layers(unet, f"{name}_block{index}", f"down_blocks.{level}.resnets", index)
    yield from _layers(unet, f"dec.{bottom}_in0", "mid_block.resnets", 0)
    yield from _layers(unet, f"dec.{bottom}_in1", "mid_block.resnets", 1)
    for level, resolution in enumerate(reversed(unet.resolutions)):
        name = f"dec.{resolution}x{resolution}"
        if level:
            yield from _layers(unet, f"{name}_up", f"up_blocks.{level - 1}.upsamplers", 0)
        for index in range(unet.num_blocks + 1):
            yield from _layers(unet, f"{name}_block{index}", f"up_blocks.{level}.resnets", index)


def _layers(unet: UNet, name: str, target: str, index: int) -> Iterator[tuple[str, str]]:
    """The layers of one block: diffusers keeps its attention in a list beside the residual blocks."""
    block = unet.get_submodule(name)
    for ours, theirs in _BLOCK.items():
        yield f"{name}.{ours}", f"{target}.{index}.{theirs}"
    if isinstance(block.skip, Conv):
        yield f"{name}.skip", f"{target}.{index}.conv_shortcut"
    if block.num_heads:
        attention = f"{target.rpartition('.')[0]}.attentions.{index}"
        yield f"{name}.norm2", f"{attention}.group_norm"
        yield f"{name}.qkv", attention
        yield f"{name}.proj", f"{attention}.to_out.0"
