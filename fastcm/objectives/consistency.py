"""The core that all consistency objectives share: a pair of points on one trajectory, and the loss of a pair.

A method chooses the noise levels t > r, how x_r is found, which network is the target, the distance and the weight; the core
evaluates student and target with one dropout mask and gives the loss.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fastcm import ops
from fastcm.diffusion.preconditioners import Preconditioner, Scalings
from fastcm.kernels.philox import PhiloxKey
from fastcm.kernels.runtime.host import on_cpu
from fastcm.model import Model, per_image
from fastcm.objectives.base import TrainingBatch
from fastcm.objectives.distances import image_distance


class Point(NamedTuple):
    """One point of a trajectory per image: its noise level, the scalings there, x, and what the network is given of x."""

    sigma_N: Float[Tensor, " N"]
    scalings: Scalings
    x_NCHW: Float[Tensor, "N C H W"]
    input_NCHW: Float[Tensor, "N C H W"]


class Pair(NamedTuple):
    """Two points of one trajectory per image, at noise levels t and r < t.

    Where ``boundary_N``, r is 0 and the target is the clean image; the second point then holds a stand-in that the network
    can take, and what it makes of it is not used. None where r is never 0.
    """

    at_t: Point
    at_r: Point
    boundary_N: Bool[Tensor, " N"] | None = None


def noise_pair(
    images_NCHW: Float[Tensor, "N C H W"],
    noise: PhiloxKey | Float[Tensor, "N C H W"],
    t_N: Float[Tensor, " N"],
    r_N: Float[Tensor, " N"],
    precond: Preconditioner,
    dtype: torch.dtype = torch.float32,
) -> Pair:
    """The pair that shares its noise: x_t = y + t n, x_r = y + r n, an unbiased step along the trajectory.

    arXiv 2303.01469, Eq. 10; n is unit normal noise or the key to draw it, dtype that of the network's input. Rows with
    r = 0 get t in place of r, because c_noise = ln(r) / 4 does not exist there.
    """
    boundary_N = r_N <= 0
    r_N = torch.where(boundary_N, t_N, r_N)
    at_t, at_r = precond.scalings(t_N), precond.scalings(r_N)
    noised = ops.add_noise(images_NCHW, noise, t_N, at_t.c_in, r_N=r_N, c_in_r_N=at_r.c_in, dtype=dtype)
    points = Point(t_N, at_t, noised.x_t, noised.input_t), Point(r_N, at_r, noised.x_r, noised.input_r)
    return Pair(*points, boundary_N)


def solver_pair(
    images_NCHW: Float[Tensor, "N C H W"],
    noise: PhiloxKey | Float[Tensor, "N C H W"],
    t_N: Float[Tensor, " N"],
    r_N: Float[Tensor, " N"],
    precond: Preconditioner,
    teacher: Model,
    labels: Tensor | None,
    *,
    second_order: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Pair:
    """The pair on a trajectory of the teacher: x_t = y + t n, and x_r one step of its probability flow ODE below.

    d = (x_t - D(x_t; t)) / t, x_r = x_t + (r - t) d, by Heun's method with the mean of the slopes at both ends
    (``second_order``) or by Euler's; arXiv 2303.01469, Eq. 6 and Algorithm 2. r > 0 everywhere. No gradient.
    """
    at_t, at_r = precond.scalings(t_N), precond.scalings(r_N)
    noised = ops.add_noise(images_NCHW, noise, t_N, at_t.c_in, dtype=dtype)
    with torch.no_grad():
        x_r_NCHW = ode_step(teacher, noised.x_t, t_N, r_N, labels, second_order)
        input_r_NCHW = (per_image(at_r.c_in) * x_r_NCHW).to(dtype)
    return Pair(Point(t_N, at_t, noised.x_t, noised.input_t), Point(r_N, at_r, x_r_NCHW, input_r_NCHW))


def ode_step(
    teacher: Model,
    x_NCHW: Float[Tensor, "N C H W"],
    t_N: Float[Tensor, " N"],
    r_N: Float[Tensor, " N"],
    labels: Tensor | None,
    second_order: bool,
) -> Float[Tensor, "N C H W"]:
    """One step of Euler's or Heun's method from t to r on dx / dt = (x - D(x; t)) / t; arXiv 2206.00364, Eq. 1 and Alg. 1."""
    step = per_image(r_N - t_N)
    slope = (x_NCHW - teacher(x_NCHW, t_N, labels)) / per_image(t_N)
    x_r_NCHW = x_NCHW + step * slope
    if not second_order:
        return x_r_NCHW
    slope_r = (x_r_NCHW - teacher(x_r_NCHW, r_N, labels)) / per_image(r_N)
    return x_NCHW + step * (slope + slope_r) / 2


def pair_loss(
    student: Model,
    target: Model,
    pair: Pair,
    batch: TrainingBatch,
    weight_N: Float[Tensor, " N"],
    *,
    distance: str = "l2",
    c: float = 0.0,
    dropout: PhiloxKey | None = None,
    perceptual: nn.Module | None = None,
) -> Float[Tensor, " N"]:
    """weight d(D_student(x_t; t), D_target(x_r; r)) per image, with the clean image as the target at the boundary.

    The target has no gradient, and on the CPU no work where its output is not read; student and target see the same dropout
    masks. Distances are those of ``ops.consistency_loss`` and of ``image_distance``. arXiv 2303.01469, Eq. 7; arXiv 2406.14548.
    """
    conditions = (batch.labels, batch.augment, dropout)
    at_t, at_r = pair.at_t, pair.at_r
    F_t = student.from_input(at_t.input_NCHW, at_t.scalings.c_noise, *conditions)
    with torch.no_grad():
        F_r = _target_output(target, at_r, *conditions, pair.boundary_N)
    if distance not in ops.DISTANCES:
        D_r = denoised(at_r, F_r)
        if pair.boundary_N is not None:
            D_r = torch.where(per_image(pair.boundary_N), batch.images, D_r)
        return weight_N * image_distance(distance, denoised(at_t, F_t), D_r, perceptual, batch.index)
    return ops.consistency_loss(
        F_t,
        at_t.x_NCHW,
        at_t.scalings.c_skip,
        at_t.scalings.c_out,
        batch.images,
        weight_N,
        F_r=F_r,
        x_r=at_r.x_NCHW,
        c_skip_r=at_r.scalings.c_skip,
        c_out_r=at_r.scalings.c_out,
        boundary_N=pair.boundary_N,
        distance=distance,
        c=c,
    )


def _target_output(
    target: Model,
    point: Point,
    labels: Tensor | None,
    augment: Tensor | None,
    dropout: PhiloxKey | None,
    boundary_N: Tensor | None,
) -> Tensor:
    """What the target network makes of a point. Rows at the boundary are never read: where the host sees them they are 0.

    Elsewhere the host would have to wait for the device to learn which they are, so the network works for all rows.
    """
    columns = (point.input_NCHW, point.scalings.c_noise, labels, augment)
    if boundary_N is None or not on_cpu(boundary_N) or not boundary_N.any():
        return target.from_input(*columns, dropout)
    F_NCHW = torch.zeros_like(point.input_NCHW)
    rows = boundary_N.logical_not().nonzero()[:, 0]
    if len(rows):
        key = None if dropout is None else dropout._replace(index_N=dropout.index_N[rows])
        F_NCHW[rows] = target.from_input(*(None if column is None else column[rows] for column in columns), key)
    return F_NCHW


def denoised(point: Point, F_NCHW: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
    """D = c_skip x + c_out F in fp32; arXiv 2206.00364, Eq. 7."""
    return per_image(point.scalings.c_skip) * point.x_NCHW + per_image(point.scalings.c_out) * F_NCHW.float()
