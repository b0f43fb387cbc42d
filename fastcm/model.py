"""A network with its preconditioner: the denoiser D(x; sigma) that training, sampling and other projects call."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fastcm.diffusion.preconditioners import Preconditioner, Scalings
from fastcm.kernels.philox import PhiloxKey


@dataclass(frozen=True)
class SamplingDefaults:
    """How a model is meant to be sampled: "heun" (diffusion) or "consistency" with these noise levels between steps."""

    sampler: str
    mid_sigmas: tuple[float, ...] = ()


class Model(nn.Module):
    """The denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) around a raw network F; arXiv 2206.00364, Eq. 7.

    Arguments: net, called as net(x, c_noise, labels=, augment=, dropout=); precond, one of ``PRECONDITIONERS``;
    image_shape (C, H, W); label_dim, number of classes, 0 for none; dtype that the network's torso computes in;
    sampling, the sampler that ``fastcm.sample`` takes unless told otherwise.
    Everything outside the network is fp32.
    """

    def __init__(
        self,
        net: nn.Module,
        precond: Preconditioner,
        image_shape: tuple[int, int, int],
        label_dim: int = 0,
        dtype: torch.dtype = torch.float32,
        sampling: SamplingDefaults | None = None,
    ) -> None:
        super().__init__()
        self.sampling = sampling or SamplingDefaults("heun")
        self.net, self.precond, self.label_dim, self.dtype = net, precond, label_dim, dtype
        self.image_shape: tuple[int, int, int] = tuple(image_shape)

    @property
    def sigma_min(self) -> float:
        """Smallest noise level the network is defined on."""
        return self.precond.sigma_min

    @property
    def sigma_max(self) -> float:
        """Largest noise level the network is defined on."""
        return self.precond.sigma_max

    def round_sigma(self, sigma: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The nearest noise levels that the network was trained on."""
        return self.precond.round_sigma(sigma)

    def forward(
        self,
        x_NCHW: Tensor,
        sigma: Tensor | float,
        labels: Tensor | None = None,
        augment: Float[Tensor, "N A"] | None = None,
        dropout: PhiloxKey | None = None,
    ) -> Float[Tensor, "N C H W"]:
        """The denoised images, fp32.

        x_NCHW: noisy images of any float dtype. sigma: one noise level per image [N], or one for all. labels: class
        ids [N] or one-hot rows [N, label_dim]; None for no class. augment: augmentation labels. dropout: key of the
        dropout masks, None for no dropout. Raises ValueError for shapes or labels that do not fit.
        """
        self._check_images(x_NCHW)
        x_NCHW = x_NCHW.float()
        sigma_N = self._noise_levels(sigma, x_NCHW)
        scalings = self.precond.scalings(sigma_N)
        F_NCHW = self.raw(x_NCHW, sigma_N, labels, augment, dropout, scalings)
        return _per_image(scalings.c_skip) * x_NCHW + _per_image(scalings.c_out) * F_NCHW

    def raw(
        self,
        x_NCHW: Tensor,
        sigma_N: Float[Tensor, " N"],
        labels: Tensor | None = None,
        augment: Float[Tensor, "N A"] | None = None,
        dropout: PhiloxKey | None = None,
        scalings: Scalings | None = None,
    ) -> Float[Tensor, "N C H W"]:
        """The raw network's output F(c_in x; c_noise), fp32; arguments as in ``forward``.

        ``scalings`` replaces the preconditioner's own.
        """
        self._check_images(x_NCHW)
        scalings = self.precond.scalings(sigma_N) if scalings is None else scalings
        input_NCHW = (_per_image(scalings.c_in) * x_NCHW).to(self.dtype, memory_format=torch.channels_last)
        return self.from_input(input_NCHW, scalings.c_noise, labels, augment, dropout).float()

    def from_input(
        self,
        input_NCHW: Float[Tensor, "N C H W"],
        c_noise_N: Float[Tensor, " N"],
        labels: Tensor | None = None,
        augment: Float[Tensor, "N A"] | None = None,
        dropout: PhiloxKey | None = None,
    ) -> Float[Tensor, "N C H W"]:
        """The raw network's output for images that are already scaled by c_in and have the torso's dtype, in that dtype.

        Channels beyond the image's (iDDPM's variance) are dropped.
        """
        labels = self._one_hot(labels, len(input_NCHW))
        F_NCHW = self.net(input_NCHW, c_noise_N, labels=labels, augment=augment, dropout=dropout)
        return F_NCHW[:, : self.image_shape[0]]

    def _check_images(self, x_NCHW: Tensor) -> None:
        if x_NCHW.ndim != 4 or tuple(x_NCHW.shape[1:]) != self.image_shape:
            raise ValueError(f"expected images [N, {_listed(self.image_shape)}], got [{_listed(x_NCHW.shape)}]")
        if not x_NCHW.is_floating_point():
            raise ValueError(f"expected images of a float dtype in about [-1, 1], got {x_NCHW.dtype}")

    def _noise_levels(self, sigma: Tensor | float, x_NCHW: Tensor) -> Tensor:
        num = len(x_NCHW)
        if not isinstance(sigma, Tensor):
            return x_NCHW.new_full((num,), sigma)
        if sigma.ndim > 1 or sigma.numel() not in (1, num):
            raise ValueError(f"expected sigma as a number or [{num}], got shape [{_listed(sigma.shape)}]")
        return sigma.to(x_NCHW.device, torch.float32).expand(num)

    def _one_hot(self, labels: Tensor | None, num: int) -> Tensor | None:
        if labels is None:
            return None
        if self.label_dim == 0:
            raise ValueError("labels were given, but this model has no classes (label_dim 0)")
        ids = not labels.is_floating_point()
        if tuple(labels.shape) != ((num,) if ids else (num, self.label_dim)):
            raise ValueError(
                f"expected labels as class ids [{num}] or one-hot rows [{num}, {self.label_dim}] of floats, "
                f"got {labels.dtype} [{_listed(labels.shape)}]"
            )
        return one_hot(labels, self.label_dim) if ids else labels.float()


def one_hot(labels_N: Int64[Tensor, " N"], label_dim: int) -> Float[Tensor, "N L"]:
    """Class ids as fp32 one-hot rows, without a look at the values on the host; ids out of range give rows of zeros."""
    return (labels_N[:, None] == torch.arange(label_dim, device=labels_N.device)).float()


def _per_image(value_N: Tensor) -> Tensor:
    return value_N.reshape(-1, 1, 1, 1)


def _listed(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
