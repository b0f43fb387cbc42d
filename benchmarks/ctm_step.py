"""One CTM step (arXiv 2310.02279) against the same step written literally, whole and by its parts.

    python -m benchmarks.ctm_step [--size small|cifar10] [--batch-size 4] [--solver-steps 12] [--rounds 7] [--json FILE]

The literal step is plain PyTorch: a pass for every term, and for each adaptive weight two gradients of the last layer
through kept graphs, as published; its discriminator steps build the generator's graph. Networks, weights, noise, feature
networks and discriminator are the same. Everything runs in this process in turns; the figure is the ratio of the medians,
literal over fastcm. Times of a shared machine are noisy, ratios less so. The predicted ratio is that of the convolutions'
multiply-adds, counted in passes through each network. Gradients only: optimizers and averages are for ``benchmarks.step``.
On CUDA fastcm also runs compiled in bf16.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.baselines.contestants import random_dataset
from benchmarks.baselines.ctm_literal import Draws, LiteralStep
from benchmarks.measuring.in_turns import median_seconds
from benchmarks.measuring.result_file import write_result
from fastcm.config import parse_config
from fastcm.random import Stream
from fastcm.train.build import keep_freed_memory
from fastcm.train.phase import Phase

SEED = 0
# Side and channels of the images, the network, and the feature networks.
SIZES: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {
    "tiny": (
        8,
        1,
        {"model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4]},
        {"lpips_resize": 16, "discriminator": {"mobilenetv3_small_050": "random"}, "size": 64},
    ),
    "small": (
        16,
        3,
        {"model_channels": 64, "channel_mult": [1, 2], "num_blocks": 2, "attn_resolutions": [8]},
        {"lpips_resize": 24, "discriminator": {"mobilenetv3_small_050": "random"}, "size": 64},
    ),
    "cifar10": (
        32,
        3,
        {"model_channels": 128, "channel_mult": [2, 2, 2], "num_blocks": 4, "attn_resolutions": [16]},
        {"discriminator": {"deit_base_distilled_patch16_224": "random", "tf_efficientnet_lite0": "random"}},
    ),
}
# The discriminator; norms by the batch, as published, but where two results are to be equal.
GANS = {"tiny": {"width": 16, "norm": "group"}, "small": {"width": 64}, "cifar10": {"width": 512}}


class OurStep:
    """The same parts by ``fastcm.train.ctm_step``."""

    def __init__(self, phase: Phase) -> None:
        self.phase, self.step, self.networks = phase, phase.gradient, phase.networks
        self.layer = list(phase.model.net.tail().parameters())

    def generator_step(self, draws: Draws, adversarial: bool) -> Tensor:
        """The student's gradient; the consistency loss of each image."""
        levels = draws.noise, draws.dsm_sigma, draws.dsm_noise
        solved = self.step.solved_microbatch(draws.batch, draws.jumps, draws.num_steps, *levels)
        return self.step.accumulate(solved, adversarial=adversarial)

    def discriminator_step(self, draws: Draws) -> None:
        """The discriminator's gradient."""
        fake = self.step.generate(draws.batch, draws.jumps)
        self.phase.adversary.accumulate(draws.batch.images, fake, None, draws.batch.index)

    def through_student(self, draws: Draws, sigma: Tensor, second: Tensor, denoising: bool) -> None:
        """One term from the noisy images to all parameters, cut at the last layer."""
        point = self.step._noised(draws.batch, sigma, draws.dsm_noise if denoising else draws.noise)
        features = self.step._features([point], [self.step._second(second)], None)
        leaf = features.detach().requires_grad_()
        if denoising:
            output = self.step._denoising(leaf, self.layer, point, draws.batch.images)
        else:
            output = self.step._estimate(leaf, self.layer, point, draws.jumps, None)
        *by_layer, by_features = torch.autograd.grad(output, [*self.layer, leaf], torch.ones_like(output))
        by_layer[0].norm()
        features.backward(by_features)

    def parts(self, draws: Draws) -> dict[str, Callable[[], object]]:
        """As those of the literal step."""
        images, jumps = draws.batch.images, draws.jumps
        estimate = images.flip(0).clone().requires_grad_()

        def differentiate(loss_N: Tensor) -> None:
            torch.autograd.grad(loss_N.mean(), estimate)

        return {
            "teacher": lambda: self.step.solve(draws.x_t, jumps, draws.num_steps, None),
            "target": lambda: self.step.target(draws.x_t, jumps, None),
            "estimate": lambda: self.through_student(draws, jumps.t_N, jumps.s_N, False),
            "denoising": lambda: self.through_student(draws, draws.dsm_sigma, draws.dsm_sigma, True),
            "distance": lambda: differentiate(self.step._distance(estimate, images, jumps, draws.batch.index)),
            "generator loss": lambda: differentiate(self.phase.adversary.generator_loss(estimate, None, draws.batch.index)),
            "generator's step without adversary": lambda: self.generator_step(draws, False),
            "generator's step": lambda: self.generator_step(draws, True),
            "discriminator's step": lambda: self.discriminator_step(draws),
        }


def build_phase(size: str, batch_size: int, device: torch.device, compiled: bool = False) -> Phase:
    """A phase of CTM with adversary, LPIPS and random weights."""
    resolution, channels, network, features = SIZES[size]
    common = {"duration_images": 1, "batch_size": batch_size}
    config = {
        "seed": SEED,
        "network": {"family": "ddpmpp", "second_time": True, **network},
        "features": {"lpips": "random", **features},
        "phases": {
            "pretrain": {"objective": {"kind": "edm"}, **common},
            "distill": {"objective": {"kind": "ctm", "distance": "lpips", "gan": GANS[size]}, **common},
        },
        "compute": {"compile": "on" if compiled else "off", "dtype": "bfloat16" if compiled else "float32"},
    }
    data = random_dataset(resolution, channels, device)
    phase = Phase(parse_config(config, "benchmark"), "distill", data, device, 0)
    teacher = {name: value.clone() for name, value in phase.model.net.init_weights(SEED).state_dict().items()}
    phase.start(teacher)
    return phase


def draw(phase: Phase, num_steps: int) -> Draws:
    """A step's draws with this number of solver steps."""
    batch, objective = phase.loader.batch(0), phase.objective
    shape = tuple(batch.images.shape[1:])
    noise, dsm_noise = (Stream(SEED, name).image_normal(batch.index, shape) for name in ("noise", "dsm_noise"))
    jumps = objective.jumps(batch.index, SEED, num_steps)
    return Draws(batch, jumps, num_steps, noise, objective.dsm_sigma(batch.index, SEED), dsm_noise)


class Passes(TorchDispatchMode):
    """Multiply-adds of all convolutions by network and kind: forward, backward to the input, backward to the weights."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.owner = {
            tensor.data_ptr(): name
            for name, module in networks.items()
            for tensor in (*module.parameters(), *module.buffers())
            if tensor.numel()
        }
        self.work: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Count, then do."""
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self._add("forward", result, args[1])
        elif func is torch.ops.aten.convolution_backward.default:
            for kind, asked in zip(("to input", "to weights"), args[10], strict=False):
                if asked:
                    self._add(kind, args[0], args[2])
        return result

    def _add(self, kind: str, output: Tensor, weight: Tensor) -> None:
        owner = self.owner.get(weight.data_ptr(), "discriminator heads")  # whose weights are normalised at every pass
        self.work[owner, kind] += output.numel() * weight[0].numel()


def count_passes(part: Callable[[], object], networks: Mapping[str, nn.Module]) -> Counter[tuple[str, str]]:
    """The work of one call."""
    with Passes(networks) as passes:
        part()
    return passes.work


def networks_of(contestant: LiteralStep | OurStep) -> dict[str, nn.Module]:
    """The networks by name."""
    if isinstance(contestant, OurStep):
        student, average, teacher = (model.net for model in contestant.networks[:3])
        perceptual, adversary = contestant.networks.perceptual, contestant.phase.adversary
    else:
        student, average, teacher = contestant.student, contestant.average, contestant.teacher
        perceptual, adversary = contestant.perceptual, contestant.adversary
    networks = {"student": student, "average": average, "teacher": teacher, "LPIPS": perceptual}
    return networks | {"feature networks": adversary.discriminator.features}


def build(size: str, batch_size: int, device: torch.device) -> dict[str, LiteralStep | OurStep]:
    """The contestants with equal weights; the compiled one on CUDA only."""
    phase = build_phase(size, batch_size, device)
    steps = {"literal": LiteralStep(phase), "fastcm": OurStep(phase)}
    return steps | ({"compiled": OurStep(build_phase(size, batch_size, device, True))} if device.type == "cuda" else {})


def waiting(part: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call, and a wait for the device."""

    def call() -> None:
        part()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def compare(size: str, batch_size: int, num_steps: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each part: medians, ratios, multiply-adds and the ratio that they predict."""
    contestants = build(size, batch_size, device)
    draws = draw(contestants["fastcm"].phase, num_steps)
    parts = {name: contestant.parts(draws) for name, contestant in contestants.items()}
    unit = sum(
        count_passes(torch.no_grad()(lambda: contestants["literal"].onward(draws.x_t, draws)), {"": nn.Identity()}).values()
    )
    rows = []
    for part in parts["literal"]:
        work = {name: count_passes(parts[name][part], networks_of(contestants[name])) for name in ("literal", "fastcm")}
        medians = median_seconds({name: waiting(calls[part], device) for name, calls in parts.items()}, rounds)
        ratios = {name: medians["literal"] / seconds for name, seconds in medians.items() if name != "literal"}
        predicted = work["literal"].total() / work["fastcm"].total()
        rows.append(
            {"part": part, "seconds": medians, "ratio": ratios, "predicted": predicted, "passes": passes_of(work, unit)}
        )
    return rows


def passes_of(work: Mapping[str, Counter[tuple[str, str]]], unit: int) -> dict[str, dict[str, float]]:
    """Work by network and kind in forward passes of the U-Net."""
    return {name: {", ".join(key): round(value / unit, 3) for key, value in counts.items()} for name, counts in work.items()}


def show(row: Mapping[str, Any]) -> None:
    """Print a row, and where the passes of the two differ."""
    times = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in row["seconds"].items())
    ratios = ", ".join(f"{ratio:.2f}" for ratio in row["ratio"].values())
    print(f"{row['part']}: {times}, ratio {ratios}, predicted {row['predicted']:.2f}")
    literal, ours = row["passes"]["literal"], row["passes"]["fastcm"]
    for key in sorted({*literal, *ours}):
        if abs(literal.get(key, 0) - ours.get(key, 0)) > 0.01:
            print(f"    {key}: {literal.get(key, 0):.2f} against {ours.get(key, 0):.2f} passes of the U-Net")


def main() -> None:
    """Command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cifar10" if cuda else "small")
    parser.add_argument("--batch-size", type=int, default=64 if cuda else 4)
    parser.add_argument("--solver-steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=20 if cuda else 7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    device = torch.device("cuda" if cuda else "cpu")
    rows = compare(options.size, options.batch_size, options.solver_steps, options.rounds, device)
    for row in rows:
        show(row)
    if options.json:
        given = {name: getattr(options, name) for name in ("size", "batch_size", "solver_steps", "rounds")}
        write_result(options.json, "ctm_step", given, {"rows": rows}, device)


if __name__ == "__main__":
    main()
