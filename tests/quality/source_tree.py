"""The source files as syntax trees, for the tests of this folder."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One Python file; ``path`` is relative to the repository root, with slashes."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def module(self) -> str:
        """The name under which the file is imported: kernels/ is installed as fastcm.kernels."""
        name = self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        return f"fastcm.{name}" if name.split(".")[0] == "kernels" else name

    @property
    def is_package(self) -> bool:
        return self.path.endswith("/__init__.py")

    def functions(self) -> list[Function]:
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]

    def definitions(self) -> Iterator[tuple[str, ast.ClassDef | Function]]:
        """Classes, and functions outside functions, by dotted name."""
        return _definitions(self.tree, "")

    def at(self, node: ast.AST) -> str:
        return f"{self.path}:{node.lineno}"


def _definitions(parent: ast.AST, prefix: str) -> Iterator[tuple[str, ast.ClassDef | Function]]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef | Function):
            yield prefix + node.name, node
        if not isinstance(node, Function):
            yield from _definitions(node, f"{prefix}{node.name}." if isinstance(node, ast.ClassDef) else prefix)


@lru_cache
def sources(*places: str) -> tuple[Source, ...]:
    """All Python files in these folders (or these files themselves)."""
    paths = [path for place in places for path in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))]
    return tuple(Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in sorted(paths))


def source_of(text: str, path: str = "fastcm/example.py") -> Source:
    """A file that does not exist, to show that a rule notices what it forbids."""
    return Source(path, text)
