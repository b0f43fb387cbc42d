"""What stands for the objects and names of a pickle."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


class UnpicklingError(Exception):
    """The pickle is damaged, or wants something that is not plain data; nothing was executed."""


@dataclass(eq=False, repr=False, slots=True)
class Record:
    """An object that the file describes and nobody made: its class, what it was constructed with, its attributes."""

    module: str
    name: str
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: Any = None

    def __repr__(self) -> str:
        return f"<record of {self.module}.{self.name}>"


@dataclass(frozen=True, eq=False, slots=True)
class Reference:
    """A name of the table that a pickle may call; ``make`` is ours."""

    name: str
    make: Callable[..., Any]


def recorder(module: str, name: str) -> Callable[..., Record]:
    """A function that records the arguments it is called with."""
    return lambda *args, **kwargs: Record(module, name, args, kwargs)


class Names:
    """The names that a pickle may use; everything else is refused.

    Arguments: rebuild, our function for what the pickle would call, by dotted name; values, what a name stands for; records,
    a pattern of the dotted names whose calls become a ``Record``.
    """

    def __init__(
        self, rebuild: Mapping[str, Callable[..., Any]], values: Mapping[str, Any] | None = None, records: str = r"(?!)"
    ) -> None:
        self._entries = {name: Reference(name, make) for name, make in rebuild.items()} | dict(values or {})
        self._records = re.compile(records)

    def find(self, module: str, name: str) -> Any:
        """The entry of ``module.name``; raises UnpicklingError naming it if there is none.

        A name with a dot, an attribute of something in the module, never has one.
        """
        dotted = f"{module}.{name}"
        if dotted in self._entries and "." not in name:
            return self._entries[dotted]
        if self._records.fullmatch(dotted) is None or "." in name:
            raise UnpicklingError(f"it names {printable(dotted)}, which is none of the known classes; nothing was executed")
        return Reference(dotted, recorder(module, name))


def describe(value: Any) -> str:
    """A value of a pickle in a message."""
    return value.name if isinstance(value, Reference) else f"a {type(value).__name__}"


def checked_key(value: Any) -> Any:
    """A key of a dict or an item of a set; nested tuples are refused, whose hash recurses without limit."""
    if value is not None and not isinstance(value, str | bytes | int | float):
        raise UnpicklingError(f"it uses {describe(value)} as a key, expected text or a number")
    return value


def printable(text: str) -> str:
    """Text of a file in a message: short, and without control characters."""
    return ascii(text[:200])[1:-1]
