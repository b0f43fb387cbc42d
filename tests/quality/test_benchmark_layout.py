"""benchmarks/: commands at the top, what they are made of in folders that import only from those before them."""

import pytest
from source_tree import ROOT, Source, source_of, sources
from test_imports import imported_modules

FOLDERS = ("baselines", "measuring", "gpu")
COMMANDS = [source for source in sources("benchmarks") if source.path.count("/") == 1 and not source.is_package]


def rank(module: str) -> int:
    """The place of the folder that a module is in; commands come after all folders."""
    folder = module.split(".")[1] if "." in module else ""
    return FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)


def misplaced_imports(source: Source) -> list[str]:
    """What is imported from a folder further on, or from a command."""
    allowed = min(rank(source.module), len(FOLDERS) - 1)
    names = [name for name in imported_modules(source) if name.split(".")[0] == "benchmarks"]
    return [f"{source.path} imports {name}" for name in names if rank(name) > allowed]


def test_every_folder_has_a_place():
    assert {path.parent.name for path in (ROOT / "benchmarks").glob("*/__init__.py")} == set(FOLDERS)


@pytest.mark.parametrize("source", COMMANDS, ids=lambda source: source.path)
def test_a_module_at_the_top_is_a_command_that_says_how_it_is_run(source):
    assert f"python -m {source.module}" in source.text or f"pytest {source.path}" in source.text


def test_folders_import_only_from_those_before_them_and_nothing_imports_a_command():
    assert [line for source in sources("benchmarks") for line in misplaced_imports(source)] == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("benchmarks/boundary.py", "from benchmarks.step import main"),
        ("benchmarks/boundary.py", "from benchmarks import step"),
        ("benchmarks/gpu/parts.py", "import benchmarks.gpu_report"),
        ("benchmarks/measuring/step_time.py", "from benchmarks.gpu.size import Size"),
        ("benchmarks/baselines/plain.py", "from benchmarks.measuring.step_time import WARM_UP"),
    ],
)
def test_a_misplaced_import_is_noticed(path, text):
    assert misplaced_imports(source_of(text, path))
