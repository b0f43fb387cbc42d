"""Jumps along the trajectory of the probability flow ODE, from noise level t to s <= t (arXiv 2310.02279, section 3).

A network with a second time gives g(x, t, s) = c_skip(t) x + c_out(t) F(c_in(t) x; t, s), the inner parametrisation, which
is the model's preconditioner: ``EDM`` (the paper's), ``EDMBoundary`` (that of consistency models) or ``Direct`` (none).
The outer one, here, turns g into the jump G, which is x itself at s = t.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from fastcm.config.section import Sigma


@dataclass(frozen=True)
class Trajectory:
    """The outer parametrisation G(x, t, s) = a(t, s) x + (1 - s / t) g(x, t, s), arXiv 2310.02279, section 3.1.

    outer     a(t, s): "euler" (the paper's) s / t; "variance" v(t, s) = sqrt(((s - sigma_min)^2 + sigma_data^2) /
              ((t - sigma_min)^2 + sigma_data^2)); "euler_variance_mixed" (s + v(t, s)) / (t + 1)
    sigma_min the smallest level networks are trained to jump to
    """

    outer: Literal["euler", "variance", "euler_variance_mixed"] = "euler"
    sigma_data: Sigma = 0.5
    sigma_min: Sigma = 0.002

    def coefficients(
        self, t_N: Float[Tensor, " N"], s_N: Float[Tensor, " N"]
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """(a(t, s), 1 - s / t) for t > 0, 0 <= s <= t. At s = t they are exactly 1 and 0."""
        ratio_N = s_N / t_N
        if self.outer == "euler":
            return ratio_N, 1 - ratio_N
        v_N = (self._variance(s_N) / self._variance(t_N)).sqrt()
        return v_N if self.outer == "variance" else (s_N + v_N) / (t_N + 1), 1 - ratio_N

    def jump(
        self,
        x_NCHW: Float[Tensor, "N C H W"],
        g_NCHW: Float[Tensor, "N C H W"],
        t_N: Float[Tensor, " N"],
        s_N: Float[Tensor, " N"],
    ) -> Float[Tensor, "N C H W"]:
        """G(x, t, s) from x and g(x, t, s)."""
        a_N, b_N = self.coefficients(t_N, s_N)
        return a_N[:, None, None, None] * x_NCHW + b_N[:, None, None, None] * g_NCHW

    def denoised(
        self, x_NCHW: Float[Tensor, "N C H W"], g_NCHW: Float[Tensor, "N C H W"], t_N: Float[Tensor, " N"]
    ) -> Float[Tensor, "N C H W"]:
        """The denoiser D(x; t) = g(x, t, t) + (1 - t da/ds(t, t)) x that G stands for.

        It follows from dG/ds = (x - D(x; t)) / t at s = t, the ODE. With "euler" it is g(x, t, t); section 3.1.
        """
        if self.outer == "euler":
            return g_NCHW
        slope_N = (t_N - self.sigma_min) / self._variance(t_N)
        if self.outer == "euler_variance_mixed":
            slope_N = (1 + slope_N) / (t_N + 1)
        return g_NCHW + (1 - t_N * slope_N)[:, None, None, None] * x_NCHW

    def second_level(self, s_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """What the network is told for s: max(s, sigma_min), as no network was trained below it and ln 0 is not finite."""
        return s_N.clamp(min=self.sigma_min)

    def _variance(self, t_N: Tensor) -> Tensor:
        return (t_N - self.sigma_min) ** 2 + self.sigma_data**2
