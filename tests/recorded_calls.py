"""CUDA graphs without a GPU: a recorder that repeats a call's operators on the memory they had, as a graph repeats kernels.

What a graph would not see is not seen here either: Python that ran once, numbers that were constants, tensors made anew by
every call. What a graph cannot hold, an operator whose result the host asks for, is an error. Not seen are the reuse of
memory within a graph's pool, the order of streams, and what a registered operator does inside.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that make the host wait or whose result has as many elements as the numbers say, and tensors made of numbers of
# the host, which on a device are copies from memory that a graph does not hold.
FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal", "lift_fresh")


class Operators(TorchDispatchMode):
    """Notes every operator with its arguments and results, and what all memory that it changes held before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = operator._schema.name.split("::")[-1]
        masks = [leaf for leaf in tree_leaves(args[1:2]) if isinstance(leaf, Tensor) and leaf.dtype == torch.bool]
        if name in FORBIDDEN or (name.startswith("index") and masks):
            raise RuntimeError(f"operation not permitted when stream is capturing: {operator}")
        for tensor in changed(operator, args, kwargs):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.before:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.before[storage.data_ptr()] = whole, whole.clone()
        result = operator(*args, **kwargs)
        self.calls.append((operator, args, kwargs, fresh(result, args, kwargs)))
        return result

    def undo(self) -> None:
        """A graph does no work while it is recorded."""
        for memory, content in self.before.values():
            memory.copy_(content)

    def repeat(self) -> None:
        """Run all operators again, each into the memory that its results had."""
        for operator, args, kwargs, results in self.calls:
            again = fresh(operator(*args, **kwargs), args, kwargs)
            for memory, value in zip(results, again, strict=True):
                memory.copy_(value)


def changed(operator: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The arguments that an operator writes to."""
    found = []
    for place, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def fresh(result: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The results in memory of their own: not views of arguments, not the arguments themselves."""
    given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.numel()]
    return [tensor for tensor in tensors if tensor.untyped_storage().data_ptr() not in given]


class OperatorRecorder:
    """A ``fastcm.graphs.Recorder`` for a CPU; ``num_recorded`` and ``num_replayed`` say what it was used for."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def run(self, call: Callable[[], Any]) -> Any:
        return call()

    def record(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.num_recorded += 1
        with Operators() as operators:
            result = call()
        operators.undo()

        @torch.no_grad()
        def replay() -> None:
            self.num_replayed += 1
            operators.repeat()

        return result, replay
