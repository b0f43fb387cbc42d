"""Other projects' steps and samplers, called through their own functions from checkouts outside of this repository.

A checkout is named on the command line, ``--peer fastgen=PATH``, or in the environment, FASTCM_PEER_FASTGEN=PATH; further
folders after a ":" hold what it imports. Nothing of theirs is copied; their licences stay theirs. All contestants train the
same network without dropout on images that are in the device's memory, which spares the peers their loaders and their DDP.

- ect: github.com/locuslab/ect, the network and loss of its "training" package, torch.optim.RAdam, and around them what its loop
  does: gradients made finite and weights averaged one parameter after the other. In fp32, as shipped, and with TF32.
- fastgen: github.com/NVlabs/FastGen, CMModel with the configuration of its fast CIFAR-10 experiment, its callbacks for the
  average and the gradient norm, and its automatic mixed precision in bf16.
- diffusers: ConsistencyModelPipeline with OpenAI's network, given the weights of a network of ours.
"""

import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines.contestants import NETWORKS, Setup, Step, random_dataset
from fastcm.config import UNetConfig
from fastcm.data.loader import to_unit_range
from fastcm.integrations.diffusers import export_diffusers
from fastcm.model import Model

PEERS = ("ect", "fastgen", "diffusers")
EMA_BETA, Q = 0.9999, 256.0
LOG_LEVEL = "WARNING"


class NotInstalledError(RuntimeError):
    """A peer that is not here, which is no failure of a measurement."""


def variable(name: str) -> str:
    """The environment variable of a peer."""
    return f"FASTCM_PEER_{name.upper()}"


def folders(name: str) -> list[Path]:
    """The checkout of a peer and the folders of its imports; raises NotInstalledError where no existing ones are named."""
    paths = [Path(word) for word in os.environ.get(variable(name), "").split(os.pathsep) if word]
    if not paths:
        raise NotInstalledError(f"not installed: name its checkout by --peer {name}=PATH or {variable(name)}")
    if missing := [path for path in paths if not path.is_dir()]:
        raise NotInstalledError(f"not installed: {variable(name)} names {missing[0]}, which is no folder")
    return paths


def commit(name: str) -> str | None:
    """The commit of a peer's checkout; None for a folder without version control."""
    command = ["git", "-C", str(folders(name)[0]), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


@contextmanager
def importable(name: str) -> Iterator[None]:
    """Let a peer's modules be imported; they come before anything else of the same name."""
    paths = [str(path) for path in folders(name)]
    sys.path[:0] = paths
    try:
        yield
    except ModuleNotFoundError as error:
        raise NotInstalledError(
            f"not installed: {name} needs the module {error.name}, add its folder after a '{os.pathsep}'"
        ) from error
    finally:
        for path in paths:
            sys.path.remove(path)


def images_of(setup: Setup) -> Tensor:
    """The batch that a peer trains on, in [-1, 1] and NCHW."""
    _, resolution, channels = NETWORKS[setup.network]
    return to_unit_range(random_dataset(resolution, channels, setup.device, setup.batch_size).images).contiguous()


def song_unet(setup: Setup, network: UNetConfig) -> dict[str, Any]:
    """Our network in the words of EDM's constructors, which ect and fastgen share."""
    _, resolution, channels = NETWORKS[setup.network]
    sizes = {"channel_mult": list(network.channel_mult), "attn_resolutions": list(network.attn_resolutions)}
    sizes |= {"model_channels": network.model_channels, "num_blocks": network.num_blocks, "channel_mult_noise": 1}
    kind = {"embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard", "resample_filter": [1, 1]}
    shape = {"img_resolution": resolution, "img_channels": channels, "label_dim": 0}
    return {**shape, "model_type": "SongUNet", **sizes, **kind, "dropout": 0.0}


def ect_step(setup: Setup) -> Step:
    """The official ECT step; TF32 is as the caller has set it. Its loss asks for the CUDA generator's state."""
    with importable("ect"):
        networks, losses = importlib.import_module("training.networks"), importlib.import_module("training.loss")
        net = networks.ECMPrecond(**song_unet(setup, setup.config("float32", False).network)).to(setup.device).train()
        loss = losses.ECMLoss(q=Q)
    loss.update_schedule(0)
    images, optimizer = images_of(setup), torch.optim.RAdam(net.parameters(), lr=1e-4)
    averages = [p.detach().clone() for p in net.parameters()]

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss(net, images).mean()
        value.backward()
        finish_literally(net, averages, optimizer)
        return value.detach()

    return step


def finish_literally(net: nn.Module, averages: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """What follows a backward pass where every parameter is treated on its own: finite gradients, update, average."""
    for p in net.parameters():
        if p.grad is not None:
            p.grad.nan_to_num_(nan=0.0, posinf=1e5, neginf=-1e5)
    optimizer.step()
    with torch.no_grad():
        for average, p in zip(averages, net.parameters(), strict=True):
            average.lerp_(p, 1 - EMA_BETA)


def fastgen_step(setup: Setup, amp: str = "bfloat16") -> Step:
    """FastGen's consistency model, one training step in the order of its trainer."""
    with importable("fastgen"):
        experiment = importlib.import_module("fastgen.configs.experiments.EDM.config_cm_cifar10_fast")
        utils, methods = importlib.import_module("fastgen.utils"), importlib.import_module("fastgen.methods")
        importlib.import_module("fastgen.utils.logging_utils").set_log_level(LOG_LEVEL)
        config = experiment.create_config()
        config.model.net.update(song_unet(setup, setup.config("float32", False).network))
        _, resolution, channels = NETWORKS[setup.network]
        config.model.device, config.model.input_shape = str(setup.device), [channels, resolution, resolution]
        config.model.pretrained_model_path, config.model.precision_amp = "", amp
        model = methods.CMModel(config.model)
        callbacks = [utils.instantiate(config.trainer.callbacks[name]) for name in ("ct_schedule", "grad_clip", "ema")]
    model.on_train_begin()
    model.init_optimizers()
    for callback in callbacks:
        callback.on_train_begin(model, 0)
    data = {"real": images_of(setup), "condition": None, "neg_condition": None}
    return _FastGenStep(model, callbacks, data)


class _FastGenStep:
    """Counts its iterations, which schedules and averages are functions of."""

    def __init__(self, model: Any, callbacks: list[Any], data: dict[str, Any]) -> None:
        self.model, self.callbacks, self.data, self.iteration = model, callbacks, data, 0

    def __call__(self) -> Tensor:
        self.iteration += 1
        model, number = self.model, self.iteration
        with model.autocast():
            losses, outputs = model.single_train_step(self.data, number)
        model.grad_scaler.scale(losses["total_loss"]).backward()
        for callback in self.callbacks:
            callback.on_optimizer_step_begin(model=model, iteration=number)
        model.optimizers_schedulers_step(number)
        model.optimizers_zero_grad(number)
        for callback in self.callbacks:
            callback.on_training_step_end(model, self.data, outputs, losses, iteration=number)
        return losses["total_loss"].detach()


def diffusers_sampler(model: Model, num: int, dtype: torch.dtype) -> Step:
    """One-step sampling by diffusers' pipeline with the weights of ``model``; images stay on the device."""
    device = next(model.parameters()).device
    with importable("diffusers"), tempfile.TemporaryDirectory() as folder:
        pipelines = importlib.import_module("diffusers")
        export_diffusers(model, folder)
        pipeline = pipelines.ConsistencyModelPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    label = {"class_labels": torch.zeros(num, dtype=torch.int64, device=device)} if model.label_dim else {}
    return lambda: pipeline(batch_size=num, num_inference_steps=1, output_type="pt", **label).images
