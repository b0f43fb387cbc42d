"""The type checker that pytest gives to jaxtyping's import hook (see addopts in pyproject.toml).

The hook passes every function of the packages named there, so that a test which hands over a wrong shape or dtype fails.
Nothing of it is installed: outside the tests annotations are only read by people.
"""

import functools
import typing
from collections.abc import Callable
from typing import Any

import torch
from beartype import beartype


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its arguments and result checked by beartype, except inside a graph that torch.compile traces."""
    for hint in typing.get_type_hints(function, include_extras=True).values():
        _make_protocols_checkable(hint)
    checked = beartype(function)

    @functools.wraps(function)
    def choose(*args: Any, **kwargs: Any) -> Any:
        # isinstance(tensor, Float[...]) has no place in a graph; shapes are checked in the same test's eager calls.
        return (function if torch.compiler.is_compiling() else checked)(*args, **kwargs)

    return choose


def _make_protocols_checkable(hint: Any) -> None:
    """Let isinstance work on the protocols in a type hint, as beartype needs; it then looks for their attributes."""
    if isinstance(hint, type) and getattr(hint, "_is_protocol", False):
        typing.runtime_checkable(hint)
    for part in typing.get_args(hint):
        _make_protocols_checkable(part)
