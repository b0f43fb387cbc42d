"""The mathematics of diffusion: preconditioning, noise schedules, noise distributions and the consistency schedule."""

from fastcm.diffusion.preconditioners import PRECONDITIONERS, Preconditioner, Scalings

__all__ = ["PRECONDITIONERS", "Preconditioner", "Scalings"]
