"""The work of one optimizer step on all parameters of a network: state that a call changes, its truth, the contestants.

A call changes its state, so results are compared as changes: of parameters, moments and the average, against one step of
the reference in double precision.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcm.bench.backends import Backend, Thunk
from fastcm.bench.cases import Case
from fastcm.bench.check import Verdict, verdict
from fastcm.bench.shapes import parameter_shapes
from fastcm.kernels.optimizer import apex_unavailable, optimizer_step, optimizer_step_apex, optimizer_step_reference
from fastcm.kernels.optimizer.layout import flat_offsets, flat_views
from fastcm.kernels.runtime.fallback import unavailable
from fastcm.random import Stream

LR, BETAS, EPS, EMA_BETA = 1e-2, (0.9, 0.99), 1e-8, 0.9  # changes large enough to stand out of the rounding of fp32
NUM_STEPS = 20.0  # RAdam divides by the variance from here on
BLOCK = 1 << 20


class State(NamedTuple):
    """One set of parameters, gradients and optimizer state, as ``kernels/optimizer/reference.py`` takes them."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avg_P: Tensor
    exp_avg_sq_P: Tensor
    num_steps: Tensor
    lr: Tensor
    average_P: Tensor
    ema_betas: Tensor
    copy_P: Tensor | None

    def results(self) -> list[Tensor]:
        """What a step changes: parameters, moments, average, and the copy where there is one; copies without padding."""
        flats = [flat for flat in (self.exp_avg_P, self.exp_avg_sq_P, self.average_P, self.copy_P) if flat is not None]
        return [_joined(self.params), *(_joined(flat_views(self.params, flat)) for flat in flats)]

    def in_fp64(self) -> "State":
        """The same numbers in double precision."""
        flat = {name: getattr(self, name).double() for name in self._fields if isinstance(getattr(self, name), Tensor)}
        lists = {"params": [p.double() for p in self.params], "grads": [g.double() for g in self.grads]}
        return self._replace(**(flat | lists))


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([value.detach().reshape(-1) for value in tensors])


class Work:
    """What ``measure`` needs of one case."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.backends = _backends(case, device)
        self.shapes = parameter_shapes(case.shape_set)

    @property
    def set_bytes(self) -> int:
        """Parameters, gradients, two moments, one average."""
        return 5 * 4 * sum(map(prod, self.shapes))

    @property
    def result_bytes(self) -> int:
        """A step allocates two 0-d results."""
        return 8

    def judge(self, backend: Backend) -> Verdict:
        """One step beside one step in double precision: the changes in fp32, and the copy, which is no change."""
        state, truth = self.state(0), self.state(0).in_fp64()
        before = [value.double() for value in state.results()]
        backend.run(state)()
        _call(optimizer_step_reference, self.case, truth)()
        after = list(zip(state.results(), truth.results(), before, strict=True))
        pairs = [(mine.double() - old, true - old) for mine, true, old in after[:4]]
        found = verdict(*zip(*pairs, strict=True), torch.float32)
        if found.problem is None and len(after) > 4:
            copied = verdict([after[4][0]], [after[4][1]], self.case.dtype)
            found = found._replace(problem=copied.problem and f"weight copy: {copied.problem}")
        return found

    def prepare(self, backend: Backend, index: int) -> Thunk:
        """A step on the ``index``-th set of state."""
        return backend.run(self.state(index))

    def state(self, index: int) -> State:
        """Weights and gradients of a network's size: normal numbers with the standard deviation of trained weights."""
        _, size = flat_offsets([prod(shape) for shape in self.shapes])
        flat = {name: self._normal(name, index, size) for name in ("exp_avg", "exp_avg_sq", "average")}
        params = self._split("params", index, 0.05)
        return State(
            params,
            self._split("grads", index, 0.01),
            flat["exp_avg"] * 1e-3,
            flat["exp_avg_sq"].square() * 1e-4,
            self._scalar(NUM_STEPS),
            self._scalar(LR),
            flat["average"] * 0.05,
            self._scalar(EMA_BETA).reshape(1),
            None if self.case.dtype == torch.float32 else torch.empty_like(flat["average"], dtype=self.case.dtype),
        )

    def _scalar(self, value: float) -> Tensor:
        return torch.full((), value, device=self.device)

    def _split(self, name: str, index: int, scale: float) -> list[Tensor]:
        sizes = [prod(shape) for shape in self.shapes]
        flat = self._normal(name, index, sum(sizes)) * scale
        return [part.clone().reshape(shape) for part, shape in zip(flat.split(sizes), self.shapes, strict=True)]

    def _normal(self, name: str, index: int, size: int) -> Tensor:
        first = torch.zeros(1, dtype=torch.int64, device=self.device)
        block = Stream(0, f"bench/optimizer/{name}").normal(first, (min(size, BLOCK),), draw=index)[0]
        return block.repeat(-(-size // BLOCK) if size > BLOCK else 1)[:size]


def _backends(case: Case, device: torch.device) -> list[Backend]:
    rows = [
        Backend("triton", partial(_call, optimizer_step, case), unavailable=unavailable(device)),
        Backend("torch", partial(_call, optimizer_step_reference, case)),
        Backend("fused", partial(_torch_optim, case)),
    ]
    apex = apex_unavailable(case.shape.kind)
    return [*rows, Backend("apex", partial(_call, optimizer_step_apex, case), unavailable=apex)]


def _call(step: Callable[..., Any], case: Case, state: State) -> Thunk:
    return partial(
        step,
        *(state.params, state.grads, state.exp_avg_P, state.exp_avg_sq_P, state.num_steps, state.lr),
        kind=case.shape.kind,
        betas=BETAS,
        eps=EPS,
        averages=[state.average_P],
        ema_betas=state.ema_betas,
        copy_P=state.copy_P,
    )


def _torch_optim(case: Case, state: State) -> Thunk:
    """PyTorch's own optimizers, fused where there is such a kernel, and one foreach call each for average and copy.

    They check no gradient for being finite, which is the larger part of a read that ours makes.
    """
    on_gpu = state.lr.device.type == "cuda"
    if case.shape.kind == "adam":
        optimizer = torch.optim.Adam(state.params, lr=LR, betas=BETAS, eps=EPS, fused=True, capturable=on_gpu)
    else:
        optimizer = torch.optim.RAdam(state.params, lr=LR, betas=BETAS, eps=EPS, foreach=True, capturable=on_gpu)
    return _with_average(optimizer, state)


def _with_average(optimizer: torch.optim.Optimizer, state: State) -> Thunk:
    views = [flat_views(state.params, flat) for flat in (state.exp_avg_P, state.exp_avg_sq_P, state.average_P)]
    copies = None if state.copy_P is None else flat_views(state.params, state.copy_P)
    for p, grad, first, second in zip(state.params, state.grads, views[0], views[1], strict=True):
        p.requires_grad_().grad = grad
        optimizer.state[p] = {"step": state.num_steps.clone(), "exp_avg": first, "exp_avg_sq": second}

    @torch.no_grad()
    def step() -> tuple[Tensor, ...]:
        optimizer.step()
        torch._foreach_lerp_(views[2], state.params, 1 - EMA_BETA)
        if copies is not None:
            torch._foreach_copy_(copies, state.params)
        return ()

    return step
