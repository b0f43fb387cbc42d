"""Parameters, gradients and state of the optimizer step in awkward shapes and memories, for the tests of its backends."""

from functools import cache

import torch

from fastcm.kernels.optimizer import FlatLayout
from fastcm.kernels.runtime.launch import INTERPRETED
from fastcm.random import Stream

# Whole blocks and a rest, more than one chunk, the bias of a last layer, a permuted weight, one number, nothing.
SHAPES = {"wide": (70, 71), "long": (8195,), "odd": (3,), "conv": (6, 5, 3, 3), "one": (), "none": (0, 4)}
CPU = torch.device("cpu")
BAD = (torch.nan, torch.inf, -torch.inf, 3e38)


@cache
def normal(seed, name):
    shape = torch.Size(SHAPES[name])
    values = Stream(seed, f"optimizer {name}").normal(torch.arange(1), (max(1, shape.numel()),))
    return values[0, : shape.numel()].reshape(shape)


class Case:
    """One run: what a step changes and what it is given; ``dtype`` is fp32, or fp64 for the truth."""

    def __init__(self, dtype=torch.float32, averages=0, copy_dtype=None, loss_scale=None, device=CPU):
        named = {name: normal(0, name).to(device, dtype, copy=True) for name in SHAPES}
        named["conv"] = named["conv"].to(memory_format=torch.channels_last)
        self.layout, self.params, self.dtype, self.device = FlatLayout(named), list(named.values()), dtype, device
        self.exp_avg_P, self.exp_avg_sq_P = self.layout.zeros(device, dtype), self.layout.zeros(device, dtype)
        self.num_steps = torch.zeros((), dtype=dtype, device=device)
        self.averages = [self.layout.flatten(self.params, dtype) for _ in range(averages)]
        # Above and below one half, where the interpolation changes its form.
        self.ema_betas = torch.tensor([0.9, 0.3, 0.9999][:averages], dtype=dtype, device=device) if averages else None
        self.copy_P = None if copy_dtype is None else self.layout.flatten(self.params).to(copy_dtype)
        self.loss_scale = None if loss_scale is None else torch.tensor(loss_scale, dtype=dtype, device=device)

    def grads(self, step, grad_dtype=torch.float32):
        """The scaled gradients of a step, rounded to grad_dtype; sizes over five decades."""
        scale = 10.0 ** (step % 5 - 2) * (1 if self.loss_scale is None else float(self.loss_scale))
        rounded = [(normal(100 + step, name) * scale).to(grad_dtype) for name in SHAPES]
        rounded[3] = rounded[3].to(memory_format=torch.channels_last)  # as autograd hands it out
        return [value.to(self.device, grad_dtype if self.dtype == torch.float32 else self.dtype) for value in rounded]

    def step(self, function, grads, kind="adam", betas=(0.9, 0.99), eps=1e-8, lr=1e-2):
        state = (self.exp_avg_P, self.exp_avg_sq_P, self.num_steps, torch.tensor(lr, dtype=self.dtype, device=self.device))
        rest = {"averages": self.averages, "ema_betas": self.ema_betas, "copy_P": self.copy_P, "loss_scale": self.loss_scale}
        return function(self.params, grads, *state, kind=kind, betas=betas, eps=eps, **rest)

    def state(self):
        """All that a step may change, by name."""
        flats = {"m": self.exp_avg_P, "v": self.exp_avg_sq_P} | {f"ema{k}": flat for k, flat in enumerate(self.averages)}
        flats |= {} if self.copy_P is None else {"copy": self.copy_P}
        named = dict(zip(self.layout.names, self.params, strict=True)) | {"t": self.num_steps}
        return named | {f"{key}/{n}": v for key, flat in flats.items() for n, v in self.layout.views(flat).items()}

    def bits(self):
        """The state as integers, so that 0 and -0 differ."""
        integers = {2: torch.int16, 4: torch.int32}
        return {name: value.clone().view(integers[value.element_size()]) for name, value in self.state().items()}


def same_bits(first, second):
    return [name for name in first if not torch.equal(first[name], second[name])] == []


def rounded(value, dtype):
    """To the nearest, as everywhere; but Triton's interpreter makes bf16 by cutting bits off."""
    if INTERPRETED and dtype == torch.bfloat16:
        return (value.view(torch.int32) >> 16).to(torch.int16).view(dtype)
    return value.to(dtype)


def assert_as_exact(found, plain, exact):
    """Each part of the state is as near to the fp64 run as the fp32 reference is, within a factor of two."""
    found, plain, exact = found.state(), plain.state(), exact.state()
    for name, truth in exact.items():
        if name.startswith("copy/"):
            assert torch.equal(found[name], rounded(found[name.removeprefix("copy/")], found[name].dtype)), name
        elif truth.numel():
            scale = truth.abs().max()
            error, expected = ((side[name].double() - truth).abs().max() for side in (found, plain))
            assert error <= 2 * expected + 2e-7 * scale, f"{name}: {error:.2e} beside {expected:.2e} at {scale:.2e}"
