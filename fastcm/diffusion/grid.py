"""Discrete consistency models: the grid of noise levels, how fine it is after how many images, and which pair is drawn.

arXiv 2303.01469 (CD, CT) and arXiv 2310.14189 (iCT). The grid of N levels is Karras' (arXiv 2206.00364, Eq. 5): index 0 is
sigma_max and index N - 1 sigma_min, so a pair (i, i + 1) is a step towards the data.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from fastcm.errors import ConfigError

SCALES = ("fixed", "progressive", "doubling")


@dataclass(frozen=True)
class Grid:
    """Karras' grid between sigma_max and sigma_min with exponent rho; the number of levels may be a tensor on the device."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ConfigError(f"a grid needs 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")
        if not 1 <= self.rho < math.inf:
            raise ConfigError(f"rho: expected a number of at least 1, got {self.rho}")

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)

    def sigma(self, index_N: Float[Tensor, " N"], num_levels: Float[Tensor, ""] | float) -> Float[Tensor, " N"]:
        """The noise level at an index, which may lie between two levels.

        (sigma_max^(1/rho) + i / (N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho; arXiv 2206.00364, Eq. 5.
        """
        high, low = self._ends
        return (high + index_N / (num_levels - 1) * (low - high)) ** self.rho

    def uniform_index(self, uniform_N: Float32[Tensor, " N"], num_levels: Float[Tensor, ""] | float) -> Float[Tensor, " N"]:
        """The larger noise level of a pair, i ~ U{0, .., N - 2}, from u in [0, 1); arXiv 2303.01469, Algorithms 2 and 3."""
        return self._whole(uniform_N * (num_levels - 1), num_levels)

    def lognormal_index(
        self, uniform_N: Float32[Tensor, " N"], num_levels: Float[Tensor, ""] | float, p_mean: float, p_std: float
    ) -> Float[Tensor, " N"]:
        """The larger noise level of a pair from the discretised lognormal distribution, from u in [0, 1).

        p(i) ~ erf((ln sigma_i - P_mean) / (sqrt(2) P_std)) - erf((ln sigma_(i+1) - P_mean) / (sqrt(2) P_std));
        arXiv 2310.14189, section 3.5. A lognormal number between sigma_min and sigma_max falls between levels i and i + 1 with
        just that probability, so one is drawn by inversion and its place in the grid is computed: no table of N entries.
        """
        low, high = (math.erf((math.log(s) - p_mean) / (math.sqrt(2) * p_std)) for s in (self.sigma_min, self.sigma_max))
        deviation_N = math.sqrt(2) * torch.erfinv(low + uniform_N * (high - low))
        root_N = ((p_mean + p_std * deviation_N) / self.rho).exp()
        first, last = self._ends
        return self._whole((root_N - first) / (last - first) * (num_levels - 1), num_levels)

    @staticmethod
    def _whole(place_N: Tensor, num_levels: Tensor | float) -> Tensor:
        """The index below a place in the grid, kept to those that have a next level where rounding leaves the range."""
        last = torch.as_tensor(num_levels - 2, dtype=place_N.dtype, device=place_N.device)
        return torch.minimum(place_N.floor().clamp(min=0), last)


@dataclass(frozen=True)
class ScaleSchedule:
    """How many levels N the grid has after some images of a phase.

    "fixed" N = end. "progressive" N = ceil(sqrt(p ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 (arXiv 2303.01469, Appendix C);
    "doubling" N = min(s0 2^floor(p (floor(log2(s1 / s0)) + 1)), s1) + 1 (arXiv 2310.14189, section 3.4), with s0 = start,
    s1 = end and p = images / duration_images, at most 1.
    Raises ConfigError for values that cannot work.
    """

    kind: Literal["fixed", "progressive", "doubling"] = "fixed"
    start: int = 2
    end: int = 40
    duration_images: int = 1

    def __post_init__(self) -> None:
        if self.kind not in SCALES:
            raise ConfigError(f"scales: expected one of {', '.join(SCALES)}, got {self.kind!r}")
        if self.duration_images < 1 or self.start < 1 or self.end < (2 if self.kind == "fixed" else self.start):
            raise ConfigError(
                f"scales: expected at least 2 levels, 1 <= start <= end and a duration of images, got start {self.start}, "
                f"end {self.end}, duration {self.duration_images}"
            )

    def num_levels(self, images: int) -> int:
        """N."""
        return self.end if self.kind == "fixed" else self.num_intervals(images) + 1

    def num_intervals(self, images: int) -> int:
        """N before the final + 1, which the adaptive half-life of the target network is computed from; N where fixed."""
        done = min(images, self.duration_images)
        if self.kind == "progressive":
            rise = (self.end + 1) ** 2 - self.start**2
            return max(math.ceil(math.sqrt(done / self.duration_images * rise + self.start**2) - 1), 1)
        if self.kind == "doubling":
            stages = math.floor(math.log2(self.end // self.start)) + 1
            return min(self.start * 2 ** (done * stages // self.duration_images), self.end)
        return self.end
