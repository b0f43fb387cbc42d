"""Compile launches for a GPU that is not there, and read from the result what it would use."""

import json
import os
import re
import subprocess
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastcm.kernels.runtime.launch import Launch

# Shared memory that one block may use, in bytes; registers of one multiprocessor.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 65536
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses, and what its code contains."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    wide_loads: int  # global loads of 16 bytes or more
    global_loads: int
    matrix_instructions: int
    fp64_instructions: int

    def as_row(self) -> dict[str, int]:
        return asdict(self)


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compile for sm_<capability> as a launch on that device would, with all pointers 16-byte aligned."""
    signature, constants, attributes = specialisation(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    return read_resources(compiled, launch.num_warps)


def compile_distinct(launches: dict[str, Launch], capability: int) -> dict[str, Resources]:
    """The resources of each launch by name; launches that differ in nothing that the compiler sees are compiled once."""
    compiled, found = {}, {}
    for name, launch in launches.items():
        key = repr((launch.kernel, specialisation(launch), launch.options))
        if key not in compiled:
            compiled[key] = compile_launch(launch, capability)
        found[name] = compiled[key]
    return found


def specialisation(launch: Launch):
    """Signature, constants and divisibility of each parameter, as the launcher derives them from the arguments."""
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        is_one = is_integer(value) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
            continue
        signature[parameter.name] = type_name(value)
        aligned = not is_integer(value) or value % 16 == 0
        if aligned and not parameter.do_not_specialize and not isinstance(value, float):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def type_name(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@lru_cache
def tool(name: str) -> str:
    import triton.backends.nvidia as nvidia

    return str(Path(nvidia.__file__).parent / "bin" / name)


def read_resources(compiled, num_warps: int) -> Resources:
    """What the driver would report of the compiled binary, and a look at the instructions it is assembled from.

    Those are PTX: to take a binary apart would cost as much time as to compile it.
    """
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = output(tool("cuobjdump"), "--dump-resource-usage", file.name)
    ptx = compiled.asm["ptx"]
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return Resources(
        registers=registers,
        stack_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        num_warps=num_warps,
        wide_loads=len(re.findall(r"\bld\.global\S*\.v(?:4\.b32|2\.b64|8\.b32|4\.b64)|\bcp\.async\.cg\b.*, 0x10\b", ptx)),
        global_loads=len(re.findall(r"\bld\.global\b|\bcp\.async\.c[ag]\b", ptx)),
        matrix_instructions=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
        fp64_instructions=len(re.findall(r"\.f64\b", ptx)),
    )


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def check_resources(resources: Resources, capability: int, *, matrix: bool | None = None, wide: bool = True) -> None:
    """The gates that every kernel passes; ``matrix``: whether tensor-core instructions must (not) appear."""
    assert resources.stack_bytes == 0, f"spills or a stack: {resources}"
    assert resources.shared_bytes <= SHARED_LIMIT[capability], resources
    assert resources.registers * resources.num_warps * 32 <= REGISTERS, resources
    assert resources.fp64_instructions == 0, resources
    assert resources.wide_loads > 0 or not wide, resources
    if matrix is not None:
        assert (resources.matrix_instructions > 0) == matrix, resources


def check_table(name: str, rows: dict[str, Resources]) -> None:
    """Compare with the committed table resources/<name>.json, which is made by one version of Triton and holds for it only.

    FASTCM_UPDATE_SNAPSHOTS=1 writes the table anew; the diff is for the author of the change to read.
    """
    path = Path(__file__).parent / "resources" / f"{name}.json"
    found = {"triton": triton.__version__, "rows": {key: row.as_row() for key, row in sorted(rows.items())}}
    if os.environ.get("FASTCM_UPDATE_SNAPSHOTS") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    committed = json.loads(path.read_text(encoding="utf-8"))
    if committed["triton"] == triton.__version__:
        assert found["rows"] == committed["rows"], "FASTCM_UPDATE_SNAPSHOTS=1 writes the table anew; read the diff"
