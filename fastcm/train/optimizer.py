"""Adam, RAdam and weight averages on flat fp32 state, without a host sync; a non-finite gradient changes nothing at all.

The update itself is ``ops.optimizer_step``; here is the state between the steps. Whatever
varies is a tensor on the device, so one captured graph serves every step.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastcm import ops
from fastcm.ops import FlatLayout


class WeightAverage:
    """An exponential moving average of named fp32 parameters: ema <- ema + (1 - beta) (p - ema).

    ``averages`` holds it by parameter name. An optimizer that is given the average updates it in the pass of its step.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = list(params.values())
        self.layout = FlatLayout(params)
        self.flat_P = self.layout.flatten(self.params)
        self.averages = self.layout.views(self.flat_P)

    @torch.no_grad()
    def update(self, beta: Tensor, finite: Tensor) -> None:
        """One update outside of an optimizer's step; where ``finite`` is 0 nothing changes."""
        self.flat_P.lerp_(self.layout.flatten(self.params), (1 - beta) * finite)


class Optimizer:
    """Adam (arXiv 1412.6980, Alg. 1) or RAdam (arXiv 1908.03265, Alg. 2) for named fp32 parameters.

    p <- p - a m / (s sqrt(v) + e), with the scalars (a, s, e) of ``fastcm.kernels.optimizer.step_scalars``.
    ``averages`` are updated in the same pass, after the parameters. ``copies`` holds the parameters by name in
    ``copy_dtype``, written anew by every step; it is empty without one.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        kind: str,
        betas: tuple[float, float],
        eps: float,
        *,
        averages: Sequence[WeightAverage] = (),
        copy_dtype: torch.dtype | None = None,
    ) -> None:
        self.params = list(params.values())
        self.layout = FlatLayout(params)
        self.kind, self.betas, self.eps = kind, betas, eps
        device = self.params[0].device
        self.exp_avg_P, self.exp_avg_sq_P = self.layout.zeros(device), self.layout.zeros(device)
        self.num_steps = torch.zeros((), device=device)
        self.averages = list(averages)
        self.copy_P = None if copy_dtype is None else self.layout.zeros(device, copy_dtype)
        self.copies = {} if self.copy_P is None else self.layout.views(self.copy_P)
        self.refresh_copies()

    @torch.no_grad()
    def step(self, lr: Tensor, ema_betas: Tensor | None = None, loss_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Apply the gradients in ``.grad`` and clear them: (finite, gradient norm), two 0-d fp32 tensors.

        lr and loss_scale (which the gradients are divided by) are 0-d, ema_betas holds one value for each average.
        finite is 0 where the norm of all gradients is not a finite number; then parameters, moments, averages, copies
        and the step count keep their bits. A parameter without a gradient counts as one with a gradient of zero.
        """
        result = ops.optimizer_step(
            self.params,
            [p.grad for p in self.params],
            self.exp_avg_P,
            self.exp_avg_sq_P,
            self.num_steps,
            lr,
            kind=self.kind,
            betas=self.betas,
            eps=self.eps,
            loss_scale=loss_scale,
            averages=[average.flat_P for average in self.averages],
            ema_betas=ema_betas,
            copy_P=self.copy_P,
        )
        for p in self.params:
            p.grad = None
        return result

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all gradients seen: moments and step count as at the beginning."""
        for state in (self.exp_avg_P, self.exp_avg_sq_P, self.num_steps):
            state.zero_()

    @torch.no_grad()
    def refresh_copies(self) -> None:
        """Write ``copies`` anew, for parameters that something other than ``step`` has changed."""
        for copy, p in zip(self.copies.values(), self.params, strict=bool(self.copies)):
            copy.copy_(p)

    def state_dict(self) -> dict[str, Tensor]:
        """Moments by parameter name, and the step count; views of the live state."""
        first, second = self.layout.views(self.exp_avg_P), self.layout.views(self.exp_avg_sq_P)
        state = {f"exp_avg/{name}": value for name, value in first.items()}
        return state | {f"exp_avg_sq/{name}": value for name, value in second.items()} | {"num_steps": self.num_steps}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a saved state in; every key must be there."""
        for key, value in self.state_dict().items():
            value.copy_(state[key])
