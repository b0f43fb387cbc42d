"""The verbs of bench."""

from pathlib import Path

import click

from fastcm.cli.group import cli
from fastcm.cli.paths import PATH, OutputFile
from fastcm.errors import FastcmError


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
@click.option("--json", "file", type=OutputFile(), help="Write the rows.")
@click.option("--compare", type=PATH, help="An earlier --json; what became slower: exit code 1.")
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
