"""Verbs on runs: train, evaluate, ema, info."""

import json
from pathlib import Path

import click

from fastcm.cli.group import cli
from fastcm.cli.paths import PATH, OutputFile


@cli.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", type=PATH, help="Run folder; default runs/<config name>.")
@click.option("--dry-run", is_flag=True, help="Check the configuration, print it as resolved, and stop.")
def train(config: str, overrides: tuple[str, ...], out: Path | None, dry_run: bool) -> None:
    """Train CONFIG, a shipped name or a YAML file; the same command resumes an interrupted run.

    \b
    fastcm train digits
    fastcm train ect_cifar10_1hour data.path=cifar-10-binary.tar.gz phases.tune.init=edm.safetensors --out runs/ect
    """
    from fastcm.config import load_config
    from fastcm.train.preflight import check_config

    resolved = load_config(config, overrides)
    if dry_run:
        check_config(resolved)
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
@click.argument("model", type=PATH)
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
@click.argument("run", type=PATH)
@click.option("--std", "stds", multiple=True, required=True, type=float, help="Relative width, 0.05 for 5 %; repeat for more.")
@click.option("--images", type=click.IntRange(1), help="Images of the phase at its end; default those of the last snapshot.")
@click.option("--phase", default="", help="Whose snapshots; default the last phase that has some.")
@click.option("--out", type=OutputFile(), help="The bundle; default RUN/<phase>-ema.safetensors.")
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


@cli.command()
@click.argument("model", required=False, type=PATH)
def info(model: Path | None) -> None:
    """Describe MODEL, or without one this installation: versions, devices, kernel backends, configurations."""
    from fastcm.info import describe_installation, describe_model

    click.echo(json.dumps(describe_model(model) if model else describe_installation(), indent=2))


def _print_distances(distances: dict[str, float]) -> None:
    click.echo("Frechet distance on digit-classifier features (898 images a set, lower is better)")
    for name, value in distances.items():
        click.echo(f"  {name:<24}{value:10.3f}")
