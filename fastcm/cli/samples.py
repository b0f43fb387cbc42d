"""Verbs that put a model to use: sample, likelihood."""

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import click

from fastcm.cli.group import cli
from fastcm.cli.paths import PATH, OutputFile

MODES = ["uniform", "truncated_normal", "none"]
PARAMETERS = (
    click.argument("model", type=PATH),
    click.argument("data", required=False, type=PATH),
    click.option(
        "--kind", default="digits", show_default=True, type=click.Choice(["digits", "cifar10", "edm_zip", "folder", "npz"])
    ),
    click.option("--num", default=100, show_default=True, type=click.IntRange(1), help="Number of images, drawn by the seed."),
    click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1)),
    click.option("--probes", default=1, show_default=True, type=click.IntRange(1), help="Random vectors for the divergence."),
    click.option("--probe", default="rademacher", show_default=True, type=click.Choice(["rademacher", "gaussian", "exact"])),
    click.option("--rtol", default=1e-3, show_default=True, type=float, help="Relative tolerance of the ODE's solver."),
    click.option("--atol", default=1e-3, show_default=True, type=float, help="Absolute tolerance, of order bits/dim."),
    click.option("--sigma-min", type=float, help="Noise level to begin at; default 0.002, within the model's range."),
    click.option("--sigma-max", type=float, help="Noise level to end at; default 80, within the model's range."),
    click.option("--dequantize", default="uniform", show_default=True, type=click.Choice(MODES), help="Noise within the bins."),
    click.option(
        "--levels", type=click.IntRange(2, 2**16), help="Values a pixel can have; default 256, and 17 for the digits."
    ),
    click.option(
        "--residual",
        default="none",
        show_default=True,
        type=click.Choice(["none", "corrected", "official"]),
        help="What going from --sigma-min to 0 costs; 'official' is CTM's code, which is wrong.",
    ),
    click.option("--ema", default="", help="Weight average to use, or 'net' for the raw weights; default the first average."),
    click.option("--batch-size", default=64, show_default=True, type=click.IntRange(1)),
    click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"])),
    click.option("--json", "file", type=OutputFile(), help="Write everything, image by image."),
)


def likelihood_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add all arguments and options to a command."""
    return reduce(lambda wrapped, parameter: parameter(wrapped), reversed(PARAMETERS), command)


@cli.command()
@click.argument("model", type=PATH)
@click.option(
    "--steps",
    type=click.IntRange(1),
    help="Network evaluations of a consistency or trajectory model, solver steps of a diffusion model; default 2 or 18.",
)
@click.option("--num", default=64, show_default=True, type=click.IntRange(1, 10_000_000), help="Number of images.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1), help="Names the latents, at any batch size."
)
@click.option(
    "--out",
    default="samples.png",
    show_default=True,
    type=PATH,
    help="A .png grid, an .npz, or a folder.",
)
@click.option("--label", type=click.IntRange(0, 100_000), help="Class of every image; default a random one.")
@click.option(
    "--sampler",
    type=click.Choice(["heun", "euler", "ancestral", "dpm", "consistency", "trajectory"]),
    help="Default the model's own; trajectory jumps, with networks that have a second time (CTM).",
)
@click.option("--gamma", type=float, help="Of trajectory: noise between jumps, from 0 (none) to 1; default the model's own.")
@click.option("--eta", type=float, help="Of ancestral: noise after each step, from 0 (none) to 1, the default.")
@click.option("--s-churn", type=float, help="Of heun and dpm: noise before each step; default 0 (EDM's ImageNet-64: 40).")
@click.option("--s-tmin", type=float, help="Smallest noise level with churn; default 0.")
@click.option("--s-tmax", type=float, help="Largest noise level with churn; default all.")
@click.option("--s-noise", type=float, help="Standard deviation of that noise; default 1.")
@click.option("--midpoint-rho", type=float, help="Of dpm: 3 as in the consistency models' code; default halfway in log sigma.")
@click.option(
    "--mid-sigma", "mid_sigmas", multiple=True, type=float, help="Noise level to return to between steps; repeat for more."
)
@click.option("--ema", default="", help="Weight average to use, or 'net' for the raw weights; default the first average.")
@click.option("--batch-size", default=256, show_default=True, type=click.IntRange(1))
@click.option("--accelerate", is_flag=True, help="On a GPU, compile the network and replay it as CUDA graphs.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
def sample(
    model: Path,
    steps: int | None,
    num: int,
    seed: int,
    out: Path,
    label: int | None,
    mid_sigmas: tuple[float, ...],
    ema: str,
    batch_size: int,
    accelerate: bool,
    device: str,
    **sampler: str | float | None,
) -> None:
    """Draw images from MODEL, a bundle or a run folder."""
    from fastcm.config import ComputeConfig
    from fastcm.errors import CheckpointError
    from fastcm.io.bundle import load
    from fastcm.io.images import check_destination, save_images
    from fastcm.sampling.accelerate import accelerate as accelerated
    from fastcm.sampling.generate import draw_labels
    from fastcm.sampling.generate import sample as draw
    from fastcm.train.build import compute_settings, select_device

    check_destination(out)
    with compute_settings(ComputeConfig()):
        network = load(model, ema=ema, device=select_device(device))
        network = accelerated(network) if accelerate else network
        labels = draw_labels(network, num, seed, label)
        options = {"mid_sigmas": mid_sigmas or None, "batch_size": batch_size, **sampler}
        images = draw(network, num, steps, seed, labels=labels, **options)
    if not images.isfinite().all():
        raise CheckpointError(
            f"{model}: the images are not finite; its weights are damaged or these noise levels are not for it"
        )
    save_images(out, images, labels)
    click.echo(f"{num} images: {out}")


@cli.command()
@likelihood_options
def likelihood(
    model: Path, data: Path | None, kind: str, device: str, file: Path | None, **options: str | float | None
) -> None:
    """Measure bits per dimension of MODEL, a bundle or a run folder, on DATA of the format --kind, by the ODE.

    \b
    fastcm likelihood runs/digits/pretrain.safetensors --probes 4
    fastcm likelihood edm.safetensors cifar-10-binary.tar.gz --kind cifar10 --num 1000 --json bpd.json
    """
    from fastcm.config import ComputeConfig
    from fastcm.evaluate.likelihood import measure_likelihood
    from fastcm.train.build import compute_settings, select_device

    with compute_settings(ComputeConfig()):
        found = measure_likelihood(model, kind, data, device=select_device(device), **options)
    if file:
        found.write(file)
    click.echo("\n".join(found.lines()))
