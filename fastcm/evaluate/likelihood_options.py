"""The command line options of ``fastcm likelihood``; importing them costs nothing."""

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)
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
    click.option("--levels", type=click.IntRange(2), help="Values a pixel can have; default 256, and 17 for the digits."),
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
    click.option("--json", "file", type=PATH, help="Write everything, image by image."),
)


def likelihood_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add all arguments and options to a command."""
    return reduce(lambda wrapped, parameter: parameter(wrapped), reversed(PARAMETERS), command)
