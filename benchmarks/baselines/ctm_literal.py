"""One CTM step (arXiv 2310.02279) as a textbook would write it in PyTorch, with no thought of speed.

A pass for every term; for each adaptive weight two gradients of the last layer through kept graphs, as published; the
discriminator's step builds the generator's graph. Feature networks and discriminator are the modules of the phase.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.plain import PlainBlock, PlainUNet
from fastcm.config import UNetConfig
from fastcm.data.batch import Batch
from fastcm.model import Model
from fastcm.objectives.ctm import Jumps
from fastcm.train.phase import Phase


class Draws(NamedTuple):
    """Everything random in a step."""

    batch: Batch
    jumps: Jumps
    num_steps: int
    noise: Tensor
    dsm_sigma: Tensor
    dsm_noise: Tensor

    @property
    def x_t(self) -> Tensor:
        """The noisy images at t."""
        return self.batch.images + per_image(self.jumps.t_N) * self.noise


class TwoConditions(nn.Linear):
    """The affine map of both embeddings side by side."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.second = nn.Linear(in_features, out_features)

    def forward(self, emb: Tensor) -> Tensor:
        """The sum of the map of each."""
        first, second = emb.chunk(2, 1)
        return super().forward(first) + self.second(second)


class PlainJumpUNet(PlainUNet):
    """DDPM++ with a second time."""

    def __init__(self, resolution: int, channels: int, width: int, *rest: Any) -> None:
        super().__init__(resolution, channels, width, *rest)
        self.map_layer0_s, self.map_layer1_s = nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)
        for block in self.modules():
            if isinstance(block, PlainBlock):
                block.affine = TwoConditions(block.affine.in_features, block.affine.out_features)

    def embed(self, c_noise: Tensor) -> Tensor:
        """Both embeddings side by side, of two noise conditions a row."""
        half = self.width // 2
        frequencies = (1 / 10000) ** (torch.arange(half, device=c_noise.device) / (half - 1))
        angles = c_noise[:, :, None] * frequencies
        emb = torch.cat([angles.sin(), angles.cos()], 2)
        first = F.silu(self.map_layer1(F.silu(self.map_layer0(emb[:, 0]))))
        return torch.cat([first, F.silu(self.map_layer1_s(F.silu(self.map_layer0_s(emb[:, 1]))))], 1)


def plain_of(model: Model, network: UNetConfig) -> PlainJumpUNet:
    """The plain network with the weights of ours."""
    sizes = (network.model_channels, network.channel_mult, network.num_blocks, network.attn_resolutions[0])
    plain = PlainJumpUNet(model.image_shape[1], model.image_shape[0], *sizes)
    plain.load_state_dict({plain_name(name): value for name, value in model.net.state_dict().items()})
    return plain.to(next(model.parameters()).device)


def plain_name(name: str) -> str:
    """The plain network's name of one of our parameters."""
    return name.replace(".affine_s.", ".affine.second.")


def per_image(value: Tensor) -> Tensor:
    """[N] to [N, 1, 1, 1]."""
    return value[:, None, None, None]


class LiteralStep:
    """The gradients of one step, term by term."""

    def __init__(self, phase: Phase) -> None:
        networks = phase.networks
        self.student, self.average, self.teacher = (plain_of(model, phase.config.network) for model in networks[:3])
        self.average.requires_grad_(False)
        self.teacher.requires_grad_(False)
        self.perceptual, self.adversary, self.objective = networks.perceptual, phase.adversary, phase.objective
        self.seed = phase.config.seed
        self.last = [module for module in self.student.modules() if isinstance(module, nn.Conv2d)][-1].weight

    def g(self, net: nn.Module, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """EDM's preconditioning of the network with two times."""
        level = per_image(t)
        c_skip, c_out, c_in = 0.25 / (level**2 + 0.25), level * 0.5 / (level**2 + 0.25).sqrt(), 1 / (level**2 + 0.25).sqrt()
        return c_skip * x + c_out * net(c_in * x, torch.stack([t.log(), s.log()], 1) / 4)

    def jump(self, net: nn.Module, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """G(x, t, s)."""
        ratio = per_image(s / t)
        return ratio * x + (1 - ratio) * self.g(net, x, t, s)

    @torch.no_grad()
    def solve(self, draws: Draws) -> Tensor:
        """Heun's method by the teacher from t to u."""
        x = draws.x_t
        for high, low in pairwise(self.objective.solver_level(draws.jumps, step) for step in range(draws.num_steps + 1)):
            slope = (x - self.g(self.teacher, x, high, high)) / per_image(high)
            there = x + per_image(low - high) * slope
            slope_there = (there - self.g(self.teacher, there, low, low)) / per_image(low)
            x = x + per_image(low - high) * (slope + slope_there) / 2
        return x

    def onward(self, x_s: Tensor, draws: Draws) -> Tensor:
        """From s to the smallest level by the average."""
        s = draws.jumps.s_N
        return self.jump(self.average, x_s, s, torch.full_like(s, self.objective.sigma_min))

    @torch.no_grad()
    def target(self, x_u: Tensor, draws: Draws) -> Tensor:
        """What the estimate is to come to."""
        return self.onward(self.jump(self.student, x_u, draws.jumps.u_N, draws.jumps.s_N), draws)

    def estimate(self, draws: Draws) -> Tensor:
        """The student's jump, and onward through the frozen average."""
        return self.onward(self.jump(self.student, draws.x_t, draws.jumps.t_N, draws.jumps.s_N), draws)

    def distance(self, estimate: Tensor, target: Tensor) -> Tensor:
        """LPIPS of the batch."""
        return self.perceptual(estimate, target).mean()

    def denoising(self, draws: Draws) -> Tensor:
        """The DSM term of the batch."""
        sigma, clean = draws.dsm_sigma, draws.batch.images
        denoised = self.g(self.student, clean + per_image(sigma) * draws.dsm_noise, sigma, sigma)
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        return (weight * (denoised - clean).square().flatten(1).mean(1)).mean()

    def logits(self, images: Tensor, draws: Draws) -> Tensor:
        """The discriminator's verdict on augmented images."""
        discriminator = self.adversary.discriminator
        return discriminator(images, None, discriminator.draw(draws.batch.index, self.seed))

    def generator(self, estimate: Tensor, draws: Draws) -> Tensor:
        """The generator's hinge loss of the batch."""
        self.adversary.discriminator.heads.requires_grad_(False)
        return -self.logits(estimate, draws).mean(1).mean()

    def balance(self, one: Tensor, other: Tensor, low: float, high: float) -> Tensor:
        """The ratio of the gradients of two losses at the last layer."""
        norms = [torch.autograd.grad(loss, self.last, retain_graph=True)[0].norm() for loss in (one, other)]
        return (norms[0] / (norms[1] + 1e-4)).clamp(low, high)

    def generator_step(self, draws: Draws, adversarial: bool) -> None:
        """The student's gradient."""
        target = self.target(self.solve(draws), draws)
        estimate = self.estimate(draws)
        consistency = self.distance(estimate, target)
        denoising = self.denoising(draws)
        total = consistency + self.balance(consistency, denoising, 0.0, 1e4) * denoising
        if adversarial:
            generator = self.generator(estimate, draws)
            total = total + self.balance(consistency, generator, 0.01, 10.0) * generator
        total.backward()

    def discriminator_step(self, draws: Draws) -> None:
        """The discriminator's gradient; the graph of the estimate is built for nothing."""
        self.adversary.discriminator.heads.requires_grad_(True)
        fake = self.estimate(draws).detach()
        real_logits, fake_logits = self.logits(draws.batch.images, draws), self.logits(fake, draws)
        (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()).backward()

    def parts(self, draws: Draws) -> dict[str, Callable[[], object]]:
        """Each part with its share of the adaptive weights' gradients, and whole steps."""
        x_u, target = draws.x_t, draws.batch.images
        estimate = target.flip(0).clone().requires_grad_()

        def differentiate(output: Tensor, weighed: Tensor) -> None:
            slope = torch.ones_like(output)
            torch.autograd.grad(output, weighed, slope, retain_graph=True)
            output.backward(slope)

        return {
            "teacher": lambda: self.solve(draws),
            "target": lambda: self.target(x_u, draws),
            "estimate": lambda: differentiate(self.estimate(draws), self.last),
            "denoising": lambda: differentiate(self.denoising(draws), self.last),
            "distance": lambda: differentiate(self.distance(estimate, target), estimate),
            "generator loss": lambda: differentiate(self.generator(estimate, draws), estimate),
            "generator's step without adversary": lambda: self.generator_step(draws, False),
            "generator's step": lambda: self.generator_step(draws, True),
            "discriminator's step": lambda: self.discriminator_step(draws),
        }
