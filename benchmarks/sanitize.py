"""compute-sanitizer over every Triton kernel at small odd shapes: accesses out of bounds (memcheck) and races (racecheck).

    python -m benchmarks.sanitize [--json FILE] [--minutes 4]
    python -m benchmarks.sanitize --launch    # only launch the kernels, on this machine's GPU or in Triton's interpreter

Needs NVIDIA's compute-sanitizer on the PATH and a CUDA device. Memory comes without PyTorch's cache, so that an access past the
end of a tensor is one past the end of an allocation. Ends with code 1 where a tool reports an error, 2 where it cannot run.
"""

import argparse
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import fastcm.kernels
from benchmarks.baselines.contestants import backend
from benchmarks.measuring.result_file import RESULTS, ROOT, gpu_slug
from fastcm.bench.backends import FOLDERS, backends, prepare
from fastcm.bench.cases import OP_PASSES, AttentionShape, Case, GroupNormShape, ImageShape, Shape, build
from fastcm.bench.hardware import environment
from fastcm.io.atomic import atomic_write
from fastcm.kernels.runtime.launch import INTERPRETED, Launch, run
from fastcm.random import Stream
from fastcm.train.optimizer import Optimizer, WeightAverage

TOOLS = ("memcheck", "racecheck")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
DTYPE = torch.float16  # what the interpreter computes rightly, too
BATCH = 3
# Channels per group 3 and 5, odd sides; attention by whole images, by rows and by blocks of keys, D no power of two.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "group_norm": (GroupNormShape(9, 5, 3, True, True, True, True), GroupNormShape(40, 7, 8, False, False, True, False)),
    "attention": (AttentionShape(25, 3, 24), AttentionShape(81, 1, 136), AttentionShape(289, 2, 24)),
    "consistency_loss": (ImageShape(3, 7),),
    "add_noise": (ImageShape(3, 7),),
}


def calls(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is launched: every pass of every op at its shapes, then both kinds of optimizer step."""
    for op, shapes in SHAPES.items():
        for shape in shapes:
            for direction in OP_PASSES[op]:
                case = Case(op, "odd", shape, 1, BATCH, DTYPE, direction)
                yield f"{op} {direction} {case.label}", partial(_call, case, device)
    for kind in ("adam", "radam"):
        yield f"optimizer {kind}", partial(_optimizer, kind, device)


def _call(case: Case, device: torch.device) -> None:
    ours = next(row for row in backends(case, device) if row.name == "triton")
    prepare(ours, build(case, device), case.direction)()


def _optimizer(kind: str, device: torch.device) -> None:
    params = {}
    for number, shape in enumerate(((3, 5), (7,), (33, 9), (1,))):
        value = Stream(0, "sanitize").normal(torch.zeros(1, dtype=torch.int64, device=device), shape, draw=number)[0]
        params[f"p{number}"] = torch.nn.Parameter(value.contiguous())
        params[f"p{number}"].grad = value.clone().contiguous()
    optimizer = Optimizer(params, kind, (0.9, 0.999), 1e-8, averages=[WeightAverage(params)], copy_dtype=DTYPE)
    optimizer.step(torch.full((), 1e-3, device=device), torch.full((1,), 0.9, device=device))


def kernel_names() -> set[str]:
    """Every Triton kernel of the package."""
    found = set()
    for module in pkgutil.walk_packages(fastcm.kernels.__path__, "fastcm.kernels."):
        for value in vars(import_module(module.name)).values():
            name = getattr(getattr(value, "fn", None), "__name__", "")
            found |= {name} if name.endswith("_kernel") else set()
    return found


@contextmanager
def watching(names: set[str]) -> Iterator[None]:
    """Add the name of every kernel that is launched in the block."""

    def watched(launches: Sequence[Launch], device: torch.device) -> None:
        names.update(launch.kernel.fn.__name__ for launch in launches)
        run(launches, device)

    modules = [import_module(f"fastcm.kernels.{folder}.registration") for folder in FOLDERS.values()]
    for module in modules:
        module.run = watched
    try:
        yield
    finally:
        for module in modules:
            module.run = run


def launch() -> int:
    """Launch everything; ends with code 1 where a kernel was left out."""
    device, launched = torch.device("cpu" if INTERPRETED else "cuda"), set()
    with backend("triton"), watching(launched):
        for name, call in calls(device):
            print(f"sanitize: {name}", flush=True)
            call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    missing = kernel_names() - launched
    print(f"sanitize: launched {', '.join(sorted(launched))}")
    if missing:
        print(f"sanitize: error: not launched: {', '.join(sorted(missing))}", file=sys.stderr)
    return int(bool(missing))


def check(tool: str, program: str, seconds: float) -> dict[str, Any]:
    """What one tool says: the errors that it counts (None where it did not come to count), and the end of its output."""
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.sanitize", "--launch"]
    environ = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=seconds, check=False)
        output, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        output, code = f"stopped after {seconds:.0f} s; {(error.stdout or b'')[-400:]!r}", None
    counted = SUMMARY.findall(output)
    errors = int(counted[-1]) if counted else None
    return {"code": code, "errors": errors, "clean": code == 0 and errors == 0, "output": output.strip()[-2000:]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--minutes", type=float, default=4.0, help="limit of each tool")
    parser.add_argument("--launch", action="store_true")
    options = parser.parse_args()
    program = shutil.which("compute-sanitizer")
    if options.launch:
        sys.exit(launch())
    if program is None:
        parser.error("compute-sanitizer is not on the PATH; it comes with NVIDIA's CUDA toolkit")
    if not torch.cuda.is_available():
        parser.error("no CUDA device here; TRITON_INTERPRET=1 with --launch tries the launches without one")
    tools = {tool: check(tool, program, 60 * options.minutes) for tool in TOOLS}
    failed = sum(not found["clean"] for found in tools.values())
    for tool, found in tools.items():
        print(f"sanitize: {tool}: {'clean' if found['clean'] else found['output'][-600:]}")
    path = options.json or RESULTS / f"{gpu_slug()}-sanitize-{datetime.now(UTC):%Y-%m-%d}.json"
    result = {"environment": environment(torch.device("cuda")), "tools": tools, "failed": failed}
    atomic_write(path, json.dumps(result, indent=1) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
