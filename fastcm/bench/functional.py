"""The work of one case of an op that is a function: problems, their truth, and calls to time."""

from functools import cached_property

import torch
from torch import Tensor

from fastcm.bench.backends import Backend, Thunk, backends, prepare
from fastcm.bench.cases import Case, Problem, build, rotated
from fastcm.bench.check import Verdict, oracle, verdict


class Work:
    """What ``measure`` needs of one case: backends, a verdict on each, and calls on sets of memory of their own."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.backends = backends(case, device)

    @cached_property
    def problem(self) -> Problem:
        """The first set of inputs."""
        return build(self.case, self.device)

    @cached_property
    def truth(self) -> list[Tensor]:
        """The results in double precision."""
        return oracle(self.case, self.problem)

    @property
    def set_bytes(self) -> int:
        """Memory of the inputs of one call."""
        problem = self.problem
        extra = {"fwd": [], "bwd": [problem.cotangent], "jvp": list(problem.tangents.values())}[self.case.direction]
        return sum(value.nbytes for value in (*problem.tensors.values(), *extra))

    @property
    def result_bytes(self) -> int:
        """Memory of the results, about."""
        return sum(value.numel() for value in self.truth) * self.case.dtype.itemsize

    def judge(self, backend: Backend) -> Verdict:
        """Run once and compare with the truth."""
        results = prepare(backend, self.problem, self.case.direction)()
        return verdict([value.detach() for value in results], self.truth, self.case.dtype)

    def prepare(self, backend: Backend, index: int) -> Thunk:
        """A call on the ``index``-th set of inputs."""
        problem = rotated(self.problem, index) if index else self.problem
        return prepare(backend, problem, self.case.direction)
