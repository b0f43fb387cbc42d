"""Run-time checks of array shapes and dtypes, in the tests only: ``install`` is called by tests/conftest.py.

jaxtyping's own pytest plugin also wraps the constructors of dataclasses, and torch.compile cannot trace those.
"""

import ast
import functools
import sys
import typing
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType
from typing import Any

import torch
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, jaxtyped


def install() -> None:
    """From now on check the array arguments and results of every function of fastcm that is imported."""
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith("fastcm."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Compiles a module with ``@shape_checked`` below the other decorators of each function; nothing of it is cached."""

    def get_code(self, fullname: str) -> CodeType:
        tree = ast.parse(self.get_data(self.path), self.path)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                decorator = ast.parse(f"__import__({__name__!r}).shape_checked", mode="eval").body
                node.decorator_list.append(ast.copy_location(decorator, node))
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


def shape_checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its arrays checked, except while torch.compile traces: a graph has no place for isinstance."""
    arrays = {name: hint for name, hint in function.__annotations__.items() if _has_array(hint)}
    if not arrays:
        return function
    checked = jaxtyped(function, typechecker=_check_arrays)

    @functools.wraps(function)
    def choose(*args: Any, **kwargs: Any) -> Any:
        return (function if torch.compiler.is_compiling() else checked)(*args, **kwargs)

    return choose


def _check_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype for the arrays alone: a wrong name or number is for the function's own message."""
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if _has_array(hint)}
    return beartype(function, conf=BeartypeConf(is_pep484_tower=True))


def _has_array(hint: Any) -> bool:
    is_array = isinstance(hint, type) and issubclass(hint, AbstractArray)
    return is_array or any(map(_has_array, typing.get_args(hint)))
