"""Dynamic loss scaling: what keeps small gradients of a network in fp16 from becoming zero."""

import torch
from jaxtyping import Float
from torch import Tensor

INITIAL, LARGEST = 2.0**16, 2.0**24
GROWTH_INTERVAL = 2_000  # steps


class LossScale:
    """The factor S on the loss whose gradients an optimizer divides by S again; arXiv 1710.03740, section 3.2.

    S is doubled after ``growth_interval`` finite steps in a row, and halved after a step that is not finite, which the
    optimizer leaves out. S is a power of two in [1, 2^24], so it changes no digit of a gradient. All state is on the device.
    """

    def __init__(self, device: torch.device, growth_interval: int = GROWTH_INTERVAL) -> None:
        self.growth_interval = growth_interval
        self.scale = torch.full((), INITIAL, device=device)
        self.finite_steps = torch.zeros((), device=device)

    @torch.no_grad()
    def update(self, finite: Float[Tensor, ""]) -> None:
        """Take note of a step: ``finite`` is 1, or 0 where it was left out."""
        steps = (self.finite_steps + 1) * finite
        grows = steps >= self.growth_interval
        factor = torch.where(finite > 0, torch.where(grows, 2.0, 1.0), 0.5)
        self.scale.copy_((self.scale * factor).clamp(1.0, LARGEST))
        self.finite_steps.copy_(torch.where(grows, 0.0, steps))

    def tensors(self) -> dict[str, Tensor]:
        """All that a resumed phase needs."""
        return {"scale": self.scale, "finite_steps": self.finite_steps}
