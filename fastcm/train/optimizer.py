"""Adam and RAdam over a list of tensors, without a host sync, where a non-finite gradient changes nothing at all.

The learning rate is a tensor and the step count lives on the device, so one captured graph serves every step.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class Optimizer:
    """Adam (arXiv 1412.6980, Alg. 1) or RAdam (arXiv 1908.03265, Alg. 2) for named fp32 parameters.

    Both are the update p <- p - a m / (s sqrt(v) + e), with scalars (a, s, e) that depend on the step count t:
    Adam: a = lr / (1 - beta1^t), s = 1 / sqrt(1 - beta2^t), e = eps.
    RAdam: a = lr rect sqrt(1 - beta2^t) / (1 - beta1^t), s = 1, e = eps once rho_t > 5; before that the variance is
    left out: a = lr / (1 - beta1^t), s = 0, e = 1.
    """

    def __init__(self, params: Mapping[str, Tensor], kind: str, betas: tuple[float, float], eps: float) -> None:
        self.names = list(params)
        self.params = list(params.values())
        self.kind, self.betas, self.eps = kind, betas, eps
        self.exp_avg = [torch.zeros_like(p, requires_grad=False) for p in self.params]
        self.exp_avg_sq = [torch.zeros_like(p, requires_grad=False) for p in self.params]
        self.num_steps = torch.zeros((), dtype=torch.float32, device=self.params[0].device)

    @torch.no_grad()
    def step(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the gradients in ``.grad`` and clear them: (finite, gradient norm), two 0-d fp32 tensors.

        finite is 0 where the norm of all gradients is not a finite number; then parameters, moments and the step
        count keep their bits. A parameter without a gradient counts as one with a gradient of zero.
        """
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.params]
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        not_finite = ~torch.isfinite(norm)
        finite = 1 - not_finite.float()
        for grad in grads:
            grad.masked_fill_(not_finite, 0.0)  # NaN times zero would still be NaN
        self.num_steps += finite
        a, s, e = self._scalars(lr)
        beta1, beta2 = self.betas
        _lerp_(self.exp_avg_sq, torch._foreach_mul(grads, grads), (1 - beta2) * finite)
        _lerp_(self.exp_avg, grads, (1 - beta1) * finite)
        update = torch._foreach_sqrt(self.exp_avg_sq)
        torch._foreach_mul_(update, s)
        torch._foreach_add_(update, e)
        update = torch._foreach_div(self.exp_avg, update)
        torch._foreach_mul_(update, -a * finite)
        torch._foreach_add_(self.params, update)
        for p in self.params:
            p.grad = None
        return finite, norm

    def _scalars(self, lr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        beta1, beta2 = self.betas
        t = self.num_steps.clamp(min=1).double()  # beta2^t loses the digits of 1 - beta2^t in fp32
        correction1, correction2 = 1 - beta1**t, 1 - beta2**t
        a, one = lr.double() / correction1, torch.ones_like(t)
        if self.kind == "adam":
            s, e = 1 / correction2.sqrt(), one * self.eps
        else:
            rho_inf = 2 / (1 - beta2) - 1
            rho = rho_inf - 2 * t * beta2**t / correction2
            rectified = rho > 5
            ratio = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
            a = a * torch.where(rectified, (ratio.clamp(min=0) * correction2).sqrt(), one)
            s, e = rectified * one, torch.where(rectified, one * self.eps, one)
        return a.float(), s.float(), e.float()

    def state_dict(self) -> dict[str, Tensor]:
        """Moments by parameter name, and the step count."""
        state = {"num_steps": self.num_steps}
        for name, first, second in zip(self.names, self.exp_avg, self.exp_avg_sq, strict=True):
            state |= {f"exp_avg/{name}": first, f"exp_avg_sq/{name}": second}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a saved state in; every key must be there."""
        for key, value in self.state_dict().items():
            value.copy_(state[key])


class WeightAverage:
    """An exponential moving average of named fp32 parameters: ema <- ema + (1 - beta) (p - ema)."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = list(params.values())
        self.averages = {name: p.detach().clone() for name, p in params.items()}

    @torch.no_grad()
    def update(self, beta: Tensor, finite: Tensor) -> None:
        """One update; where ``finite`` is 0 nothing changes."""
        _lerp_(list(self.averages.values()), self.params, (1 - beta) * finite)


def _lerp_(targets: list[Tensor], sources: list[Tensor], weight: Tensor) -> None:
    """targets += weight (sources - targets), in place; a weight of 0 keeps every bit of finite targets."""
    difference = torch._foreach_sub(sources, targets)
    torch._foreach_mul_(difference, weight)
    torch._foreach_add_(targets, difference)
