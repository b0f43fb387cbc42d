"""The machine that runs a pickle's instructions, none of which reaches outside of it."""

import pickletools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from fastcm.passive_pickle.plain import fill_array
from fastcm.passive_pickle.records import Names, Record, Reference, UnpicklingError, checked_key, describe, printable

LONGEST_LINE = 1 << 20  # bytes; text arguments of the old protocols end with a line feed that may never come
ALLOWANCE = 1 << 20  # items and bytes that calls may take beyond a multiple of the file's size


class Window:
    """A binary file that gives at most what it has: a claim of many bytes allocates nothing."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self.remaining = file, size, size

    def tell(self) -> int:
        """Position in bytes, from where the window was opened."""
        return self._size - self.remaining

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes, fewer at the end."""
        return self._advance(self._file.read(min(count, self.remaining)))

    def readline(self) -> bytes:
        """The next line, cut at ``LONGEST_LINE``."""
        return self._advance(self._file.readline(min(LONGEST_LINE, self.remaining)))

    def _advance(self, content: bytes) -> bytes:
        self.remaining -= len(content)
        return content

    def readinto(self, buffer: memoryview) -> bool:
        """Fill a buffer with the next bytes; False if there are too few."""
        if len(buffer) > self.remaining:
            return False
        count = self._file.readinto(buffer)
        self.remaining -= count
        return count == len(buffer)


def read_pickle(file: Window, names: Names, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The content of one pickle; ``file`` then stands behind it.

    ``persistent`` gives the object of a persistent id; without it such ids are refused.
    Raises UnpicklingError, and nothing else, whatever the bytes are.
    """
    try:
        return _Machine(names, persistent, ALLOWANCE + 4 * file.remaining).run(file)
    except UnpicklingError:
        raise
    # Damaged content fails in as many ways as there are conversions; none of them matters.
    except Exception as error:
        raise UnpicklingError(f"it is damaged: {type(error).__name__}: {printable(str(error))}") from error


class _Machine:
    """The stack machine of a pickle, protocols 0 to 5."""

    def __init__(self, names: Names, persistent: Callable[[Any], Any] | None, budget: int) -> None:
        self.names, self.persistent, self.budget = names, persistent, budget
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: Window) -> Any:
        for operation, argument, _ in pickletools.genops(file):
            if operation.name in _PUSHED:
                self.stack.append(argument)
            elif operation.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[operation.name]())
            elif operation.name not in _STEPS:
                raise UnpicklingError(f"it uses the instruction {operation.name}, which is refused; nothing was executed")
            else:
                _STEPS[operation.name](self, argument)
        return self._pop()

    def _pop(self) -> Any:
        return self.stack.pop()

    def _pop_marked(self) -> list[Any]:
        """What was put on the stack since the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _top(self, kind: type, doing: str) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise UnpicklingError(f"it wants to {doing} {describe(self.stack[-1])}; nothing was executed")
        return self.stack[-1]

    def mark(self, _: None) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop(self, _: None) -> None:
        # An empty stack means that the mark itself goes.
        self.stack.pop() if self.stack else self._pop_marked()

    def pop_mark(self, _: None) -> None:
        self._pop_marked()

    def duplicate(self, _: None) -> None:
        self.stack.append(self.stack[-1])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise UnpicklingError("it is damaged: it takes more from its stack than there is")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def marked_tuple(self, _: None) -> None:
        items = self._pop_marked()
        self.stack.append(tuple(items))

    def marked_list(self, _: None) -> None:
        items = self._pop_marked()
        self.stack.append(items)

    def marked_dict(self, _: None) -> None:
        items = self._pop_marked()
        self.stack.append({})
        self._set(items)

    def marked_frozenset(self, _: None) -> None:
        items = self._pop_marked()
        self.stack.append(frozenset(map(checked_key, items)))

    def append(self, _: None) -> None:
        value = self._pop()
        self._top(list, "append to").append(value)

    def extend(self, _: None) -> None:
        items = self._pop_marked()
        self._top(list, "append to").extend(items)

    def add_items(self, _: None) -> None:
        items = self._pop_marked()
        self._top(set, "add items to").update(map(checked_key, items))

    def set_item(self, _: None) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def set_items(self, _: None) -> None:
        self._set(self._pop_marked())

    def _set(self, items: list[Any]) -> None:
        self._top(dict, "set items of").update(zip(map(checked_key, items[::2]), items[1::2], strict=True))

    def name(self, argument: str) -> None:
        self.stack.append(self.names.find(*argument.split(" ", 1)))

    def stacked_name(self, _: None) -> None:
        name, module = self._pop(), self._pop()
        if not (isinstance(module, str) and isinstance(name, str)):
            raise UnpicklingError(f"it names {describe(module)} and {describe(name)}, expected two texts")
        self.stack.append(self.names.find(module, name))

    def call(self, _: None) -> None:
        args = self._pop()
        self._call(self._pop(), args)

    def call_with_keywords(self, _: None) -> None:
        kwargs, args = self._pop(), self._pop()
        self._call(self._pop(), args, kwargs)

    def call_marked(self, _: None) -> None:
        target, *args = self._pop_marked()
        self._call(target, tuple(args))

    def call_named(self, argument: str) -> None:
        self._call(self.names.find(*argument.split(" ", 1)), tuple(self._pop_marked()))

    def _call(self, target: Any, args: Any, kwargs: Any = None) -> None:
        if not isinstance(target, Reference):
            raise UnpicklingError(f"it wants to call {describe(target)}; nothing was executed")
        keywords = kwargs or {}
        if not (isinstance(args, tuple) and isinstance(keywords, dict)):
            raise UnpicklingError(f"it calls {target.name} without a tuple of arguments")
        self._spend(args)
        try:
            self.stack.append(target.make(*args, **keywords))
        except UnpicklingError:
            raise
        except Exception as error:
            raise UnpicklingError(f"it calls {target.name} with unexpected arguments: {printable(str(error))}") from error

    def _spend(self, args: tuple) -> None:
        """A small file could have one large value copied many times."""
        self.budget -= sum(len(value) for value in args if isinstance(value, str | bytes | bytearray | list | tuple))
        if self.budget < 0:
            raise UnpicklingError("it copies the same content again and again, far beyond its own size")

    def build(self, _: None) -> None:
        state = self._pop()
        target = self._top((Record, np.ndarray, dict), "set attributes of")
        if isinstance(target, Record):
            target.state = state
        elif isinstance(target, np.ndarray):
            self._spend(state)
            fill_array(target, state)
        # An OrderedDict with attributes is a state dict; its attributes are version numbers of modules.
        elif not isinstance(state, dict) or (state and not isinstance(target, OrderedDict)):
            raise UnpicklingError("it wants to set attributes of a dict; nothing was executed")

    def persistent_id(self, _: None) -> None:
        if self.persistent is None:
            raise UnpicklingError("it refers to an object outside of it (a persistent id); nothing was executed")
        self.stack.append(self.persistent(self._pop()))

    def nothing(self, _: Any) -> None: ...


_PUSHED = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
# The extension registry, buffers outside of the file and textual persistent ids are left out on purpose.
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.nothing,
    "FRAME": _Machine.nothing,
    "STOP": _Machine.nothing,
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.duplicate,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": _Machine.marked_tuple,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": _Machine.marked_list,
    "DICT": _Machine.marked_dict,
    "FROZENSET": _Machine.marked_frozenset,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.extend,
    "ADDITEMS": _Machine.add_items,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stacked_name,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "NEWOBJ_EX": _Machine.call_with_keywords,
    "OBJ": _Machine.call_marked,
    "INST": _Machine.call_named,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent_id,
}
