"""A network with its preconditioner: the denoiser D(x; sigma) that training, sampling and other projects call."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int64, Shaped
from pydantic import Field
from torch import Tensor, nn

from fastcm.config.section import Sigma
from fastcm.diffusion.preconditioners import Preconditioner, Scalings
from fastcm.diffusion.trajectory import Trajectory
from fastcm.kernels.philox import PhiloxKey


@dataclass(frozen=True)
class SamplingDefaults:
    """How a model is meant to be sampled.

    sampler: "heun" or "euler" for diffusion models, "consistency" with the noise levels mid_sigmas between its steps, which
    noise is added up to from renoise_sigma_min, or "trajectory" for networks with a second time, with its gamma and, where it
    is not to have Karras' levels, mid_sigmas. steps: how many, 0 for the sampler's usual number. sigma_min, sigma_max, rho: of
    the grid of noise levels (arXiv 2206.00364, Eq. 5).
    """

    sampler: Literal["heun", "euler", "ancestral", "dpm", "consistency", "trajectory"]
    mid_sigmas: tuple[Sigma, ...] = ()
    renoise_sigma_min: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    steps: Annotated[int, Field(ge=0)] = 0
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.0
    sigma_min: Sigma = 0.002
    sigma_max: Sigma = 80.0
    rho: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 7.0


class Model(nn.Module):
    """The denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) around a raw network F; arXiv 2206.00364, Eq. 7.

    With a network that takes a second time it also jumps along trajectories (arXiv 2310.02279, section 3): see ``jump``.

    Arguments: net, called as net(x, c_noise, labels=, augment=, dropout=) and, where net.second_time, with second_N=;
    precond, one of ``PRECONDITIONERS``; image_shape (C, H, W); label_dim, number of classes, 0 for none; dtype that the
    network's torso computes in; sampling, the sampler that ``fastcm.sample`` takes unless told otherwise; trajectory, how
    jumps are made of the network.
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
        trajectory: Trajectory | None = None,
    ) -> None:
        super().__init__()
        self.sampling = sampling or SamplingDefaults("heun")
        self.net, self.precond, self.label_dim, self.dtype = net, precond, label_dim, dtype
        self.trajectory = trajectory or Trajectory()
        self.image_shape: tuple[int, int, int] = tuple(image_shape)

    @property
    def second_time(self) -> bool:
        """Whether the network takes a second time, so that the model can jump."""
        return getattr(self.net, "second_time", False)

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

        Of a network with a second time this is the denoiser at s = t = sigma, ``Trajectory.denoised``.
        """
        x_NCHW, sigma_N = self._float(x_NCHW, sigma)
        g_NCHW = self._g(x_NCHW, sigma_N, None, labels, augment, dropout)
        return self.trajectory.denoised(x_NCHW, g_NCHW, sigma_N) if self.second_time else g_NCHW

    def jump(
        self,
        x_NCHW: Tensor,
        t: Tensor | float,
        s: Tensor | float,
        labels: Tensor | None = None,
        dropout: PhiloxKey | None = None,
    ) -> Float[Tensor, "N C H W"]:
        """G(x, t, s), the images at noise level s on the ODE trajectory through x at level t, fp32; arXiv 2310.02279.

        0 <= s <= t, t > 0: one level per image [N], or one for all. G(x, t, t) is x. Levels s below ``trajectory.sigma_min``
        are embedded as that level, so that s = 0 is finite. Other arguments as in ``forward``.
        Raises ValueError for a network without a second time, and for shapes or labels that do not fit.
        """
        if not self.second_time:
            raise ValueError("this model cannot jump: its network was built without a second time (second_time=False)")
        if not isinstance(t, Tensor) and not isinstance(s, Tensor) and not 0 <= s <= t:
            raise ValueError(f"a jump goes from t down to s with 0 <= s <= t, got t {t} and s {s}")
        x_NCHW, t_N = self._float(x_NCHW, t)
        s_N = self._noise_levels(s, x_NCHW)
        return self.trajectory.jump(x_NCHW, self._g(x_NCHW, t_N, s_N, labels, None, dropout), t_N, s_N)

    def _g(self, x_NCHW: Tensor, t_N: Tensor, s_N: Tensor | None, *conditions: Tensor | PhiloxKey | None) -> Tensor:
        """c_skip(t) x + c_out(t) F(c_in(t) x; t, s); s = t where it is None."""
        scalings = self.precond.scalings(t_N)
        F_NCHW = self.raw(x_NCHW, t_N, *conditions, scalings, s_N)
        return per_image(scalings.c_skip) * x_NCHW + per_image(scalings.c_out) * F_NCHW

    def _float(self, x_NCHW: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        """Images as fp32 and one noise level for each."""
        self._check_images(x_NCHW)
        x_NCHW = x_NCHW.float()
        return x_NCHW, self._noise_levels(sigma, x_NCHW)

    def raw(
        self,
        x_NCHW: Tensor,
        sigma_N: Float[Tensor, " N"],
        labels: Tensor | None = None,
        augment: Float[Tensor, "N A"] | None = None,
        dropout: PhiloxKey | None = None,
        scalings: Scalings | None = None,
        s_N: Float[Tensor, " N"] | None = None,
    ) -> Float[Tensor, "N C H W"]:
        """The raw network's output F(c_in x; c_noise), fp32; arguments as in ``forward``.

        ``scalings`` replaces the preconditioner's own. s_N: the level to jump to, for a network with a second time;
        None for sigma_N itself.
        """
        self._check_images(x_NCHW)
        scalings = self.precond.scalings(sigma_N) if scalings is None else scalings
        input_NCHW = (per_image(scalings.c_in) * x_NCHW).to(self.dtype, memory_format=torch.channels_last)
        second_N = None if s_N is None else self.precond.scalings(self.trajectory.second_level(s_N)).c_noise
        return self.from_input(input_NCHW, scalings.c_noise, labels, augment, dropout, second_N).float()

    def from_input(
        self,
        input_NCHW: Float[Tensor, "N C H W"],
        c_noise_N: Float[Tensor, " N"],
        labels: Tensor | None = None,
        augment: Float[Tensor, "N A"] | None = None,
        dropout: PhiloxKey | None = None,
        second_N: Float[Tensor, " N"] | None = None,
    ) -> Float[Tensor, "N C H W"]:
        """The raw network's output for images that are already scaled by c_in and have the torso's dtype, in that dtype.

        second_N: c_noise of the second time, for a network that takes one; None for c_noise_N itself.
        Channels beyond the image's (iDDPM's variance) are dropped.
        """
        labels = self._one_hot(labels, len(input_NCHW))
        second = {"second_N": c_noise_N if second_N is None else second_N} if self.second_time else {}
        F_NCHW = self.net(input_NCHW, c_noise_N, labels=labels, augment=augment, dropout=dropout, **second)
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


def per_image(value_N: Shaped[Tensor, " N"]) -> Shaped[Tensor, "N 1 1 1"]:
    """One value for each image, as a factor of images [N, C, H, W]."""
    return value_N.reshape(-1, 1, 1, 1)


def _listed(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
