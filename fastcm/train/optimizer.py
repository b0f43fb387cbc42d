"""Adam, RAdam and weight averages on flat fp32 state, without a host sync; a non-finite gradient changes nothing at all.

The state of all parameters is one tensor each, so a step is a dozen operations however many parameters there are. The
learning rate is a tensor and the step count lives on the device, so one captured graph serves every step.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class FlatLayout:
    """Where each named parameter lies in a flat tensor [P], in the memory order of the parameter (no copy of layout)."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.names = list(params)
        self.orders = [sorted(range(p.ndim), key=p.stride, reverse=True) for p in params.values()]
        self.shapes = [[p.shape[axis] for axis in order] for p, order in zip(params.values(), self.orders, strict=True)]
        self.inverses = [sorted(range(len(order)), key=order.__getitem__) for order in self.orders]
        self.sizes = [p.numel() for p in params.values()]

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor after the other, [P]."""
        pairs = zip(tensors, self.orders, strict=True)
        return torch.cat([value.detach().permute(order).reshape(-1) for value, order in pairs])

    def views(self, flat_P: Tensor) -> dict[str, Tensor]:
        """The parts of a flat tensor by parameter name, with the shapes and strides of the parameters."""
        parts = zip(self.names, flat_P.split(self.sizes), self.shapes, self.inverses, strict=True)
        return {name: part.view(shape).permute(inverse) for name, part, shape, inverse in parts}


class Optimizer:
    """Adam (arXiv 1412.6980, Alg. 1) or RAdam (arXiv 1908.03265, Alg. 2) for named fp32 parameters.

    Both are the update p <- p - a m / (s sqrt(v) + e), with scalars (a, s, e) that depend on the step count t:
    Adam: a = lr / (1 - beta1^t), s = 1 / sqrt(1 - beta2^t), e = eps.
    RAdam: a = lr rect sqrt(1 - beta2^t) / (1 - beta1^t), s = 1, e = eps once rho_t > 5; before that the variance is
    left out: a = lr / (1 - beta1^t), s = 0, e = 1.
    """

    def __init__(self, params: Mapping[str, Tensor], kind: str, betas: tuple[float, float], eps: float) -> None:
        self.params = list(params.values())
        self.layout = FlatLayout(params)
        self.kind, self.betas, self.eps = kind, betas, eps
        device = self.params[0].device
        self.exp_avg_P = torch.zeros(sum(self.layout.sizes), device=device)
        self.exp_avg_sq_P = torch.zeros_like(self.exp_avg_P)
        self.num_steps = torch.zeros((), device=device)

    @torch.no_grad()
    def step(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the gradients in ``.grad`` and clear them: (finite, gradient norm), two 0-d fp32 tensors.

        finite is 0 where the norm of all gradients is not a finite number; then parameters, moments and the step
        count keep their bits. A parameter without a gradient counts as one with a gradient of zero.
        """
        grad_P = self.layout.flatten([p.grad if p.grad is not None else torch.zeros_like(p) for p in self.params])
        norm = torch.linalg.vector_norm(grad_P)
        is_finite = norm.isfinite()
        finite = is_finite.float()
        grad_P = torch.where(is_finite, grad_P, 0)  # NaN times zero would still be NaN
        self.num_steps += finite
        a, s, e = self._scalars(lr)
        beta1, beta2 = self.betas
        self.exp_avg_P.lerp_(grad_P, (1 - beta1) * finite)
        self.exp_avg_sq_P.lerp_(grad_P.square_(), (1 - beta2) * finite)
        update_P = self.exp_avg_P / self.exp_avg_sq_P.sqrt().mul_(s).add_(e)
        torch._foreach_add_(self.params, list(self.layout.views(update_P.mul_(-a * finite)).values()))
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
        """Moments by parameter name, and the step count; views of the live state."""
        first, second = self.layout.views(self.exp_avg_P), self.layout.views(self.exp_avg_sq_P)
        state = {f"exp_avg/{name}": value for name, value in first.items()}
        return state | {f"exp_avg_sq/{name}": value for name, value in second.items()} | {"num_steps": self.num_steps}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a saved state in; every key must be there."""
        for key, value in self.state_dict().items():
            value.copy_(state[key])


class WeightAverage:
    """An exponential moving average of named fp32 parameters: ema <- ema + (1 - beta) (p - ema).

    ``averages`` holds it by parameter name.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = list(params.values())
        self.layout = FlatLayout(params)
        self.flat_P = self.layout.flatten(self.params).clone()
        self.averages = self.layout.views(self.flat_P)

    @torch.no_grad()
    def update(self, beta: Tensor, finite: Tensor) -> None:
        """One update; where ``finite`` is 0 nothing changes."""
        self.flat_P.lerp_(self.layout.flatten(self.params), (1 - beta) * finite)
