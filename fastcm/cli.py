"""The command line: thin verbs, each of which calls one function.

Exit codes: 0 done, 2 usage or configuration, 3 data or checkpoint, 75 interrupted and saved, 1 a crash.
"""

import json
import logging
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import click

from fastcm import __version__
from fastcm.errors import FastcmError
from fastcm.evaluate.likelihood_options import likelihood_options

log = logging.getLogger("fastcm")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fastcm")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Train and sample few-step image generators."""


@cli.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder; default runs/<config name>.")
@click.option("--dry-run", is_flag=True, help="Print the resolved configuration and stop.")
def train(config: str, overrides: tuple[str, ...], out: Path | None, dry_run: bool) -> None:
    """Train CONFIG, a shipped name or a YAML file; the same command resumes an interrupted run.

    \b
    fastcm train digits
    fastcm train ect_cifar10_1hour data.path=cifar-10-binary.tar.gz phases.tune.init=edm.safetensors --out runs/ect
    """
    from fastcm.config import load_config

    resolved = load_config(config, overrides)
    if dry_run:
        click.echo(f"# configuration hash {resolved.hash}\n{resolved.to_yaml()}", nl=False)
        return
    from fastcm.evaluate.digits import evaluate_path
    from fastcm.train.build import compute_settings, select_device
    from fastcm.train.report import write_report
    from fastcm.train.trainer import train as run_training

    run = run_training(resolved, out or Path("runs") / Path(config).stem)
    if resolved.telemetry.evaluate:
        with compute_settings(resolved.compute):
            _print_distances(evaluate_path(run.path, select_device(resolved.compute.device)))
        write_report(run)
        click.echo(f"compare:  {run.comparison}")
    click.echo(f"pictures: {run.samples}\nreport:   {run.report}\nmodel:    {run.bundle}")


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--steps",
    type=click.IntRange(1),
    help="Network evaluations of a consistency or trajectory model, Heun steps of a diffusion model; default 2 or 18.",
)
@click.option("--num", default=64, show_default=True, type=click.IntRange(1, 10_000_000), help="Number of images.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1), help="Names the latents, at any batch size."
)
@click.option(
    "--out",
    default="samples.png",
    show_default=True,
    type=click.Path(path_type=Path),
    help="A .png grid, an .npz, or a folder.",
)
@click.option("--label", type=click.IntRange(0, 100_000), help="Class of every image; default a random one.")
@click.option(
    "--sampler",
    type=click.Choice(["heun", "euler", "consistency", "trajectory"]),
    help="Default the model's own; trajectory jumps, with networks that have a second time (CTM).",
)
@click.option("--gamma", type=float, help="Noise between jumps, from 0 (none) to 1; default the model's own.")
@click.option(
    "--mid-sigma", "mid_sigmas", multiple=True, type=float, help="Noise level to return to between steps; repeat for more."
)
@click.option("--ema", default="", help="Weight average to use, or 'net' for the raw weights; default the first average.")
@click.option("--batch-size", default=256, show_default=True, type=click.IntRange(1))
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
    device: str,
    **sampler: str | float | None,
) -> None:
    """Draw images from MODEL, a bundle or a run folder."""
    from fastcm.config import ComputeConfig
    from fastcm.io.bundle import load
    from fastcm.io.images import check_destination, save_images
    from fastcm.sampling.generate import draw_labels
    from fastcm.sampling.generate import sample as draw
    from fastcm.train.build import compute_settings, select_device

    check_destination(out)
    with compute_settings(ComputeConfig()):
        network = load(model, ema=ema, device=select_device(device))
        labels = draw_labels(network, num, seed, label)
        options = {"mid_sigmas": mid_sigmas or None, "batch_size": batch_size, **sampler}
        images = draw(network, num, steps, seed, labels=labels, **options)
    save_images(out, images, labels)
    click.echo(f"{num} images: {out}")


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1))
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
def evaluate(model: Path, seed: int, device: str) -> None:
    """Measure Frechet distances of MODEL, a bundle or a run folder, to the real images (embedded digits only)."""
    from fastcm.config import ComputeConfig
    from fastcm.evaluate.digits import evaluate_path
    from fastcm.train.build import compute_settings, select_device
    from fastcm.train.report import write_report
    from fastcm.train.run_folder import RunFolder

    with compute_settings(ComputeConfig()):
        _print_distances(evaluate_path(model, select_device(device), seed))
    run = RunFolder(model)
    if run.run.is_file():
        write_report(run)
        click.echo(f"report: {run.report}")


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


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--std", "stds", multiple=True, required=True, type=float, help="Relative width, 0.05 for 5 %; repeat for more.")
@click.option("--images", type=click.IntRange(1), help="Images of the phase at its end; default those of the last snapshot.")
@click.option("--phase", default="", help="Whose snapshots; default the last phase that has some.")
@click.option("--out", type=click.Path(path_type=Path), help="The bundle; default RUN/<phase>-ema.safetensors.")
@click.option("--skip-damaged", is_flag=True, help="Leave out snapshots that are damaged or of another run.")
def ema(run: Path, stds: tuple[float, ...], images: int | None, phase: str, out: Path | None, skip_damaged: bool) -> None:
    """Build weight averages of any length from the EMA snapshots in the folder RUN.

    A phase keeps them where it has 'ema_snapshot_images' and two 'emas' of kind 'power', best with std 0.05 and 0.1.

    \b
    fastcm ema runs/edm2 --std 0.08 --std 0.12 --out averages.safetensors
    """
    from fastcm.train.ema_reconstruction import reconstruct
    from fastcm.train.run_folder import RunFolder

    made = reconstruct(RunFolder(run), stds, images=images, phase=phase, out=out, skip_damaged=skip_damaged)
    click.echo("\n".join(made.describe()))


EXPORTS = ["hf", "diffusers", "safetensors", "edm", "openai", "edm2"]


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
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
    from fastcm.integrations.export import FORMATS

    note = FORMATS[layout](model, dst, ema)
    click.echo(f"{layout}: {dst}\n{note}")


def _list_presets(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from fastcm.convert.options import preset_table

        click.echo(preset_table())
        context.exit()


@cli.command()
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
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
@click.option("--sigma-min", type=click.FloatRange(0, min_open=True), help="Of edm_boundary: D(x; sigma_min) = x.")
@click.option("--outer", type=click.Choice(["euler", "variance", "euler_variance_mixed"]), help="How a CTM network jumps.")
@click.option("--sampler", type=click.Choice(["heun", "euler", "consistency", "trajectory"]), help="How it is sampled by default.")
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


@cli.command()
@click.argument("model", required=False, type=click.Path(path_type=Path))
def info(model: Path | None) -> None:
    """Describe MODEL, or without one this installation: versions, devices, kernel backends, configurations."""
    from fastcm.info import describe_installation, describe_model

    click.echo(json.dumps(describe_model(model) if model else describe_installation(), indent=2))


@cli.group(invoke_without_command=True)
@click.option("--tune", is_flag=True, help="The same as 'bench tune' with its defaults.")
@click.pass_context
def bench(context: click.Context, tune: bool) -> None:
    """Check and time the kernels, or tune their launch parameters on this GPU.

    \b
    fastcm bench kernels group_norm --shapes ddpmpp32 --batch 128 --dtype bf16 --json new.json --compare old.json
    """
    if tune:
        context.invoke(bench_tune)
    elif context.invoked_subcommand is None:
        raise click.UsageError("choose 'kernels' or 'tune'")


OP = click.argument(
    "op", required=False, type=click.Choice(["group_norm", "attention", "consistency_loss", "add_noise", "optimizer"])
)
SHAPES = click.option(
    "--shapes",
    default="ddpmpp32",
    show_default=True,
    type=click.Choice(["ddpmpp32", "adm64", "edm2-64", "digits8"]),
    help="Whose shapes.",
)
BATCH = click.option("--batch", default=128, show_default=True, type=click.IntRange(1))
DTYPE = click.option("--dtype", default="bf16", show_default=True, type=click.Choice(["bf16", "fp16", "fp32"]))
PASS = click.option(
    "--pass", "directions", multiple=True, type=click.Choice(["fwd", "bwd", "jvp"]), help="Repeat for more; default all."
)
DEVICE = click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))


@bench.command("kernels")
@OP
@SHAPES
@BATCH
@DTYPE
@PASS
@click.option("--backend", "backends", multiple=True, help="Repeat for more; default all that suit the device.")
@click.option("--budget", default=0.1, show_default=True, type=click.FloatRange(0), help="Seconds per measurement.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the rows.")
@click.option("--compare", type=click.Path(path_type=Path), help="An earlier --json; what became slower: exit code 1.")
@click.option("--fail-over", default=5.0, show_default=True, type=click.FloatRange(0), help="Percent that count as slower.")
@click.option("--dry-run", is_flag=True, help="Print shapes, calls, bytes, FLOPs and floors; measure nothing.")
@DEVICE
def bench_kernels(
    op: str | None,
    shapes: str,
    batch: int,
    dtype: str,
    directions: tuple[str, ...],
    backends: tuple[str, ...],
    budget: float,
    file: Path | None,
    compare: Path | None,
    fail_over: float,
    dry_run: bool,
    device: str,
) -> None:
    """Time OP, by default every op, against its baselines; one that is wrong against fp64 gets no speed."""
    from fastcm.bench import command
    from fastcm.train.build import select_device

    cases = command.select_cases(op, shapes, batch, dtype, directions)
    if dry_run:
        click.echo(command.floor_table(cases))
        return
    text, slower = command.run_kernels(cases, select_device(device), budget, backends, file, compare, fail_over)
    click.echo(text)
    if slower:
        raise FastcmError(f"{slower} rows are slower than in {compare} by more than {fail_over:g} %, or have no speed any more")


@bench.command("tune")
@OP
@SHAPES
@BATCH
@DTYPE
@PASS
@click.option("--budget", default=0.02, show_default=True, type=click.FloatRange(0), help="Seconds per candidate.")
def bench_tune(op: str | None, shapes: str, batch: int, dtype: str, directions: tuple[str, ...], budget: float) -> None:
    """Try launch parameters for each shape on this GPU and pin the fastest that pass the check, one rule per shape."""
    from fastcm.bench import command

    click.echo(command.run_tune(command.select_cases(op, shapes, batch, dtype, directions), budget))


def _print_distances(distances: dict[str, float]) -> None:
    click.echo("Frechet distance on digit-classifier features (898 images a set, lower is better)")
    for name, value in distances.items():
        click.echo(f"  {name:<24}{value:10.3f}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point: run a verb and end with the documented exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    try:
        cli.main(arguments, prog_name="fastcm", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        _fail(f"{error.format_message()} (see --help)", 2)
    except (click.Abort, KeyboardInterrupt):
        _fail("stopped at once, without saving; what was saved before is untouched", 1)
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        code = _exit_code(error)
        _fail(f"unexpected {type(error).__name__}: {error}" if code is None else str(error), code or 1)


def _exit_code(error: Exception) -> int | None:
    """The exit code of an error raised on purpose, None for any other."""
    if isinstance(error, FastcmError):
        return error.exit_code
    from fastcm.kernels.runtime.fallback import KernelUnavailableError

    return 2 if isinstance(error, KernelUnavailableError) else None


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"fastcm: error: {' '.join(message.split())}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
