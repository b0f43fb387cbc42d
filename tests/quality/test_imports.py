"""Imports point only downwards, and importing costs nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import pytest
from source_tree import ROOT, Source, source_of, sources

# From the bottom to the top. A part may import what stands on a lower line, and itself.
LEVELS = (
    ("kernels",),
    ("random", "errors", "passive_pickle"),
    ("backends",),
    ("graphs",),
    ("ops",),
    ("config", "configs"),
    ("diffusion",),
    ("nn",),
    ("model",),
    ("objectives", "sampling", "data", "io"),
    ("train", "evaluate", "integrations"),
    ("info", "bench", "convert"),
    ("cli",),
    ("__main__",),
)
RANK = {part: rank for rank, parts in enumerate(LEVELS) for part in parts}

# (importing part, imported part): why it may import sideways or upwards.
EXCEPTIONS: dict[tuple[str, str], str] = {}

MODULES = {source.module for source in sources("fastcm", "kernels")}


def imported_modules(source: Source) -> Iterator[str]:
    """The dotted names that a file imports anywhere in it, down to the module for names of this project."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute_name(source, node)
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else base for name in names)


def absolute_name(source: Source, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module
    package = source.module.split(".") if source.is_package else source.module.split(".")[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def part_of(module: str) -> str | None:
    """The second word of the name; None for the package fastcm itself, which imports nothing and may be imported by all."""
    return module.split(".")[1] if "." in module else None


def upward_imports(source: Source) -> list[str]:
    importer, found = part_of(source.module), []
    for name in imported_modules(source):
        imported = part_of(name)
        if name.split(".")[0] != "fastcm" or imported is None or imported == importer or (importer, imported) in EXCEPTIONS:
            continue
        if importer is None or RANK[imported] >= RANK[importer]:
            found.append(f"{source.path} imports {name}")
    return found


def test_every_part_has_a_level():
    parts = {part_of(module) for module in MODULES} - {None}
    assert parts <= set(RANK), f"write these into LEVELS: {sorted(parts - set(RANK))}"


def test_imports_point_only_downwards():
    assert [line for source in sources("fastcm", "kernels") for line in upward_imports(source)] == []


@pytest.mark.parametrize(
    "text",
    [
        "from fastcm.model import Model",
        "from fastcm import model",
        "import fastcm.model",
        "def f():\n    from fastcm.nn import UNet",
        "from ..train import trainer",
    ],
)
def test_an_upward_import_is_noticed(text):
    assert upward_imports(source_of(text, "fastcm/diffusion/example.py"))


# What lies below the ops and is none: random numbers, launching, fallbacks.
SHARED_KERNELS = {"philox", "runtime"}
# The door to the ops, and what measures their implementations one by one.
INSIDERS = {"kernels", "ops", "bench"}


def imports_past_the_door(source: Source) -> list[str]:
    """Imports of an op's own folder by what should call it through ``fastcm.ops``."""
    if part_of(source.module) in INSIDERS:
        return []
    words = [name.split(".") for name in imported_modules(source)]
    past = [name for name in words if name[:2] == ["fastcm", "kernels"] and not SHARED_KERNELS.intersection(name[2:3])]
    return [f"{source.path} imports {'.'.join(name)}" for name in past]


def test_ops_is_the_one_door_to_the_kernels():
    assert [line for source in sources("fastcm") for line in imports_past_the_door(source)] == []


@pytest.mark.parametrize(
    ("text", "is_past"),
    [
        ("from fastcm.kernels.consistency_loss import DISTANCES", True),
        ("from fastcm.kernels.consistency_loss.reference import distance_of", True),
        ("def f():\n    from fastcm.kernels import noise", True),
        ("from fastcm import kernels", True),
        ("from fastcm.kernels.philox import PhiloxKey", False),
        ("from fastcm import ops", False),
    ],
)
def test_an_import_past_the_door_is_noticed(text, is_past):
    assert bool(imports_past_the_door(source_of(text, "fastcm/objectives/example.py"))) == is_past


def test_exceptions_are_still_needed():
    pairs = {(part_of(source.module), part_of(name)) for source in sources("fastcm") for name in imported_modules(source)}
    assert set(EXCEPTIONS) <= pairs


def test_no_module_imports_itself_in_a_circle():
    graph = {source.module: MODULES.intersection(imported_modules(source)) for source in sources("fastcm", "kernels")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_kernels_know_nothing_of_fastcm():
    for source in sources("kernels"):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "fastcm" for alias in node.names), source.at(node)
            elif isinstance(node, ast.ImportFrom):
                inside = absolute_name(source, node).startswith("fastcm.kernels")
                assert inside if node.level else node.module.split(".")[0] != "fastcm", source.at(node)


def test_the_package_imports_neither_tests_nor_benchmarks_nor_bare_kernels():
    for source in sources("fastcm", "kernels"):
        roots = {name.split(".")[0] for name in imported_modules(source)}
        assert not roots & {"tests", "benchmarks", "kernels", "pytest"}, source.path


def run_python(code: str, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *options, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", ["fastcm", "fastcm.cli", "fastcm.config"])
def test_light_modules_do_not_import_torch(module):
    done = run_python(f"import sys, {module}; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, f"{module} imports torch {done.stderr}"


def test_importing_everything_is_silent_and_takes_no_device():
    code = "import importlib, torch\nthreads = torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed()\n"
    code += f"for name in {sorted(MODULES - {'fastcm.__main__'})}: importlib.import_module(name)\n"
    code += "assert not torch.cuda.is_initialized()\n"
    code += "assert threads == (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed())"
    done = run_python(code, "-W", "error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_bare_kernels_cannot_be_imported_from_the_repository_root():
    done = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("ImportError: ")
    assert "import fastcm.kernels" in last


def test_kernels_can_be_imported_from_anywhere(tmp_path):
    code = "import fastcm.kernels.philox as philox; print(philox.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "fastcm.kernels.philox"
