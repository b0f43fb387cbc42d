"""Verbs that carry weights in and out: convert, export."""

from pathlib import Path

import click

from fastcm.cli.group import cli
from fastcm.cli.paths import PATH, OutputFile

SAMPLERS = ["heun", "euler", "consistency", "trajectory"]
EXPORTS = ["hf", "diffusers", "safetensors", "edm", "openai", "edm2"]


@cli.command()
@click.argument("model", type=PATH)
@click.argument("dst", type=PATH)
@click.option("--format", "layout", required=True, type=click.Choice(EXPORTS))
@click.option("--ema", default="", help="Weight average to write, or 'net' for the raw weights; default the first average.")
def export(model: Path, dst: Path, layout: str, ema: str) -> None:
    """Write MODEL, a bundle or a run folder, for others to DST.

    \b
    hf           folder for the Hugging Face Hub: config.json and model.safetensors
    diffusers    folder for diffusers.ConsistencyModelPipeline, for OpenAI's network only
    safetensors  one file for fastcm.load, with one set of weights
    edm          state dict as safetensors under EDM's names; also openai and edm2, where the network is theirs
    """
    from fastcm.integrations.export import export as write

    note = write(model, dst, layout, ema=ema)
    click.echo(f"{layout}: {dst}\n{note}")


def _list_presets(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from fastcm.convert.options import preset_table

        click.echo(preset_table())
        context.exit()


@cli.command()
@click.argument("src", type=PATH)
@click.argument("dst", type=OutputFile())
@click.option("--preset", default="", help="What the authors of a published file say of it, see --list-presets.")
@click.option("--list-presets", is_flag=True, is_eager=True, expose_value=False, callback=_list_presets, help="List them.")
@click.option("--weights", help="ema, net, or the width of an average, such as 0.1; default ema where there is one.")
@click.option("--resolution", type=click.IntRange(1), help="Side of the images in pixels (OpenAI's network).")
@click.option("--label-dim", type=click.IntRange(0), help="Number of classes, checked against the file.")
@click.option("--channels-per-head", type=click.IntRange(1), help="Width of an attention head; published files have 64.")
@click.option("--heads", "num_heads", type=click.IntRange(1), help="Number of attention heads instead.")
@click.option("--heads-up", "num_heads_up", type=click.IntRange(1), help="The same in the decoder; default --heads.")
@click.option("--qkv", type=click.Choice(["plain", "head-major"]), help="Order of the rows of OpenAI's attention.")
@click.option(
    "--preconditioner", type=click.Choice(["edm", "edm_boundary", "vp", "ve", "iddpm", "direct"]), help="Scalings it needs."
)
@click.option("--sigma-data", type=click.FloatRange(0, min_open=True), help="Of edm, edm_boundary and direct.")
@click.option("--sigma-min", type=click.FloatRange(0, 1, min_open=True), help="Of edm_boundary: D(x; sigma_min) = x.")
@click.option("--outer", type=click.Choice(["euler", "variance", "euler_variance_mixed"]), help="How a CTM network jumps.")
@click.option("--sampler", type=click.Choice(SAMPLERS), help="How it is sampled by default.")
@click.option("--mid-sigma", "mid_sigmas", multiple=True, type=float, help="Level between its steps; repeat for more.")
def convert(
    src: Path, dst: Path, preset: str, qkv: str | None, mid_sigmas: tuple[float, ...], **options: str | int | float | None
) -> None:
    """Make the bundle DST of a published checkpoint SRC: EDM, EDM2, ECT, OpenAI, CTM, diffusers, Hugging Face.

    SRC is a .pkl, .pt or safetensors file, or a folder; nothing in it is executed.

    \b
    fastcm convert edm-cifar10-32x32-uncond-vp.pkl edm.safetensors
    fastcm convert cd_imagenet64_lpips.pt cd.safetensors --preset cd_imagenet64_lpips
    """
    from fastcm.convert import Options
    from fastcm.convert import convert as run_conversion

    head_major = None if qkv is None else qkv == "head-major"
    told = Options(head_major=head_major, mid_sigmas=mid_sigmas or None, **options)
    click.echo("\n".join([*run_conversion(src, dst, told, preset=preset).lines(), f"bundle: {dst}"]))
