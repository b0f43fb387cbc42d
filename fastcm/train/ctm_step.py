"""The gradient of CTM's losses, each network passed through as often as the mathematics asks and not once more.

The two losses weigh each other by their gradients at the last layer (arXiv 2310.02279, Eq. 14). So the student is cut before
it: both losses are differentiated down to the cut, which gives the gradients of what follows, the tail, on the way; the
weighted sum then goes through the rest of the student once, both losses' images in one batch. Written literally, each ratio
costs further backward passes through the frozen average.
"""

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch._functorch import config as functorch_config

from fastcm import graphs, ops
from fastcm.data.batch import Batch
from fastcm.diffusion.adversarial import adaptive_weight
from fastcm.diffusion.preconditioners import Scalings
from fastcm.kernels.philox import PhiloxKey
from fastcm.model import per_image
from fastcm.objectives.base import Networks, TrainingBatch, noise_key
from fastcm.objectives.ctm import CTM, Jumps
from fastcm.random import Stream
from fastcm.train.adversary import Adversary
from fastcm.train.step import parts_of, scaled

# Unit normal noise, or the key to draw it.
Noise = PhiloxKey | Float[Tensor, "N C H W"]


class Noised(NamedTuple):
    """Images at one noise level each: the level, the scalings there, x, and what the network is given of x."""

    sigma_N: Float[Tensor, " N"]
    scalings: Scalings
    x_NCHW: Float[Tensor, "N C H W"]
    input_NCHW: Float[Tensor, "N C H W"]


class SolvedMicrobatch(NamedTuple):
    """A microbatch before the student sees it: its jumps, x_t, and x_u = Solver(x_t, t, u), from which the target is made.

    x_u_NCHW: by the teacher, or by the moving average where there is none. at_sigma: the images of the denoising loss, if any.
    """

    batch: TrainingBatch
    jumps: Jumps
    at_t: Noised
    x_u_NCHW: Float[Tensor, "N C H W"]
    at_sigma: Noised | None


class PreparedBatch(NamedTuple):
    """What the student's step takes of a batch: its microbatches, solved, and whether the adversary has a say."""

    microbatches: list[SolvedMicrobatch]
    adversarial: bool


class Gradients(NamedTuple):
    """The gradient of a loss by the parameters of the tail, the weight of its first layer first, and by its input."""

    layer: list[Tensor]
    features: Tensor

    def plus(self, other: "Gradients", factor: Tensor) -> "Gradients":
        """The gradients of this loss + factor times the other."""
        layer = [one + factor * two for one, two in zip(self.layer, other.layer, strict=True)]
        return Gradients(layer, self.features + factor * other.features)


class CTMStep:
    """Accumulate the gradient of the mean of consistency loss + lambda denoising loss + lambda' generator loss into ``.grad``.

    The teacher's solver step, the targets, the student's trunk and each loss are compiled once, whatever the number of
    solver steps, which is known on the host without asking the device. Each microbatch has ratios lambda of its own, as
    published.
    """

    def __init__(
        self,
        networks: Networks,
        objective: CTM,
        seed: int,
        microbatch_size: int,
        compiled: bool,
        adversary: Adversary | None = None,
        recorder: graphs.Recorder | None = None,
        loss_scale: Tensor | None = None,
    ) -> None:
        """loss_scale: 0-d factor on the gradient, read anew by every call."""
        self.networks, self.objective, self.seed, self.microbatch_size = networks, objective, seed, microbatch_size
        self.adversary, self.loss_scale = adversary, loss_scale
        self._tail = networks.student.net.tail(objective.adaptive_layer)
        self._begin = graphs.graphed(self._draw, recorder)
        # A graph of its own, replayed k times: one recording serves every number of solver steps.
        solver_step = partial(graphs.compiled(objective.solver_step, compiled), networks.teacher)
        self._solver_step = graphs.graphed(solver_step, recorder)
        self._self_jump = graphs.graphed(graphs.compiled(self._plain_self_jump, compiled), recorder)
        self._target_image = graphs.compiled(objective.target_image, compiled)
        self._trunk = graphs.compiled(self._plain_trunk, compiled)
        self._estimate = graphs.compiled(self._plain_estimate, compiled)
        self._distance = graphs.compiled(partial(objective.consistency_loss, networks), compiled)
        self._denoising = graphs.compiled(self._plain_denoising, compiled)

    def prepare(self, batch: Batch, first_image: int) -> PreparedBatch:
        """The batch, solved; its first image has this global number, which names the draw of the solver steps."""
        num_steps, count = self._num_solver_steps(batch, first_image)
        microbatches = []
        for part in parts_of(batch, self.microbatch_size):
            jumps, points = self._begin(part, count)
            microbatches.append(self._solved(part, jumps, num_steps, points))
        return PreparedBatch(microbatches, self.adversary is not None and self.adversary.active(first_image))

    def _num_solver_steps(self, batch: Batch, first_image: int) -> tuple[int, Float[Tensor, ""]]:
        """k, for the host, which repeats the solver's step, and for the device, where one recording serves every k."""
        num_steps = self.objective.num_solver_steps(self.seed, first_image)
        return num_steps, torch.full((), float(num_steps), device=batch.index.device)

    def __call__(self, prepared: PreparedBatch, schedule: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Consistency loss and noise level t of every image, detached; a CUDA graph can hold it. CTM has no schedule."""
        num_images, losses = sum(len(solved.batch.index) for solved in prepared.microbatches), []
        for solved in prepared.microbatches:
            losses.append(self.accumulate(solved, len(solved.batch.index) / num_images, prepared.adversarial))
        return torch.cat(losses), torch.cat([solved.jumps.t_N for solved in prepared.microbatches])

    def prepare_discriminator(self, batch: Batch, first_image: int) -> tuple[Batch, Float[Tensor, ""]]:
        """What ``train_discriminator`` takes: the batch, and k of the jumps that the student estimates its images by."""
        return batch, self._num_solver_steps(batch, first_image)[1]

    def train_discriminator(self, batch: Batch, num_steps: Float[Tensor, ""]) -> None:
        """Accumulate the discriminator's gradient on the real images and the student's estimates, whose graph is not built."""
        for part in parts_of(batch, self.microbatch_size):
            fake_NCHW = self.generate(part, self.objective.jumps(part.index, self.seed, num_steps))
            share = len(part.index) / len(batch.index)
            self.adversary.accumulate(part.images, fake_NCHW, part.labels, part.index, share)

    @torch.no_grad()
    def generate(self, batch: TrainingBatch, jumps: Jumps) -> Float[Tensor, "N C H W"]:
        """The estimates, as the discriminator sees them."""
        at_t = self._noised(batch, jumps.t_N, noise_key(batch, self.seed))
        features = self._features([at_t], [self._second(self.objective.jumped_to(jumps))], batch.labels)
        return self._estimate(features, list(self._tail.parameters()), at_t, jumps, batch.labels)

    @torch.no_grad()
    def solved_microbatch(
        self,
        batch: TrainingBatch,
        jumps: Jumps,
        num_steps: int,
        noise: Noise,
        dsm_sigma_N: Float[Tensor, " N"],
        dsm_noise: Noise,
    ) -> SolvedMicrobatch:
        """The microbatch, solved from given noise levels, with unit normal noises or their keys."""
        return self._solved(batch, jumps, num_steps, self._points(batch, jumps, noise, dsm_sigma_N, dsm_noise))

    def _solved(
        self, batch: TrainingBatch, jumps: Jumps, num_steps: int, points: tuple[Noised, Noised | None]
    ) -> SolvedMicrobatch:
        at_t, at_sigma = points
        return SolvedMicrobatch(batch, jumps, at_t, self.solve(at_t.x_NCHW, jumps, num_steps, batch.labels), at_sigma)

    @torch.no_grad()
    def _draw(self, batch: Batch, num_steps: Float[Tensor, ""]) -> tuple[Jumps, tuple[Noised, Noised | None]]:
        """The jumps of the images and their noisy points, all from the streams."""
        jumps = self.objective.jumps(batch.index, self.seed, num_steps)
        dsm = self.objective.dsm_sigma(batch.index, self.seed), Stream(self.seed, "dsm_noise").at(batch.index)
        return jumps, self._points(batch, jumps, noise_key(batch, self.seed), *dsm)

    def _points(
        self, batch: TrainingBatch, jumps: Jumps, noise: Noise, dsm_sigma_N: Tensor, dsm_noise: Noise
    ) -> tuple[Noised, Noised | None]:
        """The noisy images at t, and those of the denoising loss if there is one."""
        at_sigma = None if self.objective.dsm == "none" else self._noised(batch, dsm_sigma_N, dsm_noise)
        return self._noised(batch, jumps.t_N, noise), at_sigma

    def accumulate(self, solved: SolvedMicrobatch, share: float = 1.0, adversarial: bool = False) -> Float[Tensor, " N"]:
        """Add the gradient of a microbatch, times ``share`` and the loss scale; the consistency loss of each image, detached.

        adversarial: whether the adversary has a say.
        """
        batch, jumps, at_t = solved.batch, solved.jumps, solved.at_t
        target_NCHW = self.target(solved.x_u_NCHW, jumps, batch.labels)
        points, second = [at_t], [self._second(self.objective.jumped_to(jumps))]
        if solved.at_sigma is not None:
            points.append(solved.at_sigma)
            second.append(solved.at_sigma.scalings.c_noise)
        features = self._features(points, second, batch.labels)
        leaves = [part.detach().requires_grad_() for part in features.split(len(batch.images))]
        layer = list(self._tail.parameters())
        loss_N, ctm, gan = self._differentiate(leaves[0], layer, at_t, target_NCHW, jumps, batch, adversarial)
        total = ctm if gan is None else ctm.plus(gan, self._gan_factor(ctm, gan))
        by_layer, by_features = total
        if solved.at_sigma is not None:
            dsm_N = self._denoising(leaves[1], layer, solved.at_sigma, batch.images)
            dsm = _gradients(scaled(dsm_N.mean(), self.loss_scale), layer, leaves[1])
            factor = self._dsm_factor(ctm, dsm)
            by_layer = [one + factor * other for one, other in zip(by_layer, dsm.layer, strict=True)]
            by_features = torch.cat([by_features, factor * dsm.features])
        features.backward(share * by_features)
        _add_gradients(layer, [share * gradient for gradient in by_layer])
        return loss_N.detach()

    def _differentiate(
        self,
        features: Tensor,
        layer: list[Tensor],
        at_t: Noised,
        target_NCHW: Tensor,
        jumps: Jumps,
        batch: TrainingBatch,
        adversarial: bool,
    ) -> tuple[Tensor, Gradients, Gradients | None]:
        """Consistency loss per image, its gradients from the cut on, and those of the generator loss if there is one."""
        # A compiled estimate must bear to be differentiated twice, which donated buffers do not. Always: what was compiled for
        # the stage or the run before serves in this one, and Inductor's cache on disk does not tell the two apart.
        with functorch_config.patch(donated_buffer=False):
            estimate_NCHW = self._estimate(features, layer, at_t, jumps, batch.labels)
            image_NCHW = estimate_NCHW.detach().requires_grad_()
            loss_N = self._distance(image_NCHW, target_NCHW, jumps, batch.index)
            slopes = [torch.autograd.grad(scaled(loss_N.mean(), self.loss_scale), image_NCHW)[0]]
            if adversarial:
                gan_N = self.adversary.generator_loss(image_NCHW, batch.labels, batch.index)
                slopes.append(torch.autograd.grad(scaled(gan_N.mean(), self.loss_scale), image_NCHW)[0])
            found = [_gradients(estimate_NCHW, layer, features, slope, again=slope is not slopes[-1]) for slope in slopes]
        return loss_N, found[0], found[1] if adversarial else None

    @torch.no_grad()
    def target(self, x_u_NCHW: Tensor, jumps: Jumps, labels: Tensor | None) -> Float[Tensor, "N C H W"]:
        """What the estimates must come to, x_u being where the teacher's way from x_t ends."""
        return self._target_image(self.networks, x_u_NCHW, jumps, labels)

    @torch.no_grad()
    def solve(self, x_NCHW: Tensor, jumps: Jumps, num_steps: int, labels: Tensor | None) -> Float[Tensor, "N C H W"]:
        """x_u: num_steps Heun steps of the teacher from t, or one jump of the average; no gradient."""
        if not self.objective.needs_teacher:
            return self._self_jump(x_NCHW, jumps.t_N, jumps.u_N, labels)
        for t_N, r_N in pairwise(self.objective.solver_level(jumps, step) for step in range(num_steps + 1)):
            x_NCHW = self._solver_step(x_NCHW, t_N, r_N, labels)
        return x_NCHW

    def _second(self, s_N: Tensor) -> Tensor:
        """What the student is told of the level to jump to."""
        student = self.networks.student
        return student.precond.scalings(student.trajectory.second_level(s_N)).c_noise

    def _features(self, points: list[Noised], second: list[Tensor], labels: Tensor | None) -> Tensor:
        """The student's features at the cut for all points in one batch."""
        input_NCHW = torch.cat([point.input_NCHW for point in points])
        c_noise_N = torch.cat([point.scalings.c_noise for point in points])
        labels = None if labels is None else labels.repeat(len(points), 1)
        return self._trunk(input_NCHW, c_noise_N, torch.cat(second), labels)

    def _noised(self, batch: TrainingBatch, sigma_N: Tensor, noise: Noise) -> Noised:
        scalings = self.objective.precond.scalings(sigma_N)
        noised = ops.add_noise(batch.images, noise, sigma_N, scalings.c_in, dtype=self.networks.student.dtype)
        return Noised(sigma_N, scalings, noised.x_t, noised.input_t)

    def _plain_self_jump(self, x_NCHW: Tensor, t_N: Tensor, u_N: Tensor, labels: Tensor | None) -> Tensor:
        return self.networks.target.jump(x_NCHW, t_N, u_N, labels)

    def _plain_trunk(self, input_NCHW: Tensor, c_noise_N: Tensor, second_N: Tensor, labels: Tensor | None) -> Tensor:
        return self.networks.student.net.trunk(input_NCHW, c_noise_N, second_N, labels, self.objective.adaptive_layer)

    def _plain_estimate(
        self, features: Tensor, layer: list[Tensor], at_t: Noised, jumps: Jumps, labels: Tensor | None
    ) -> Tensor:
        g_NCHW = self._inner(features, layer, at_t)
        level_N = self.objective.jumped_to(jumps)
        x_s_NCHW = self.networks.student.trajectory.jump(at_t.x_NCHW, g_NCHW, jumps.t_N, level_N)
        return self.objective.estimate(self.networks, x_s_NCHW, jumps, labels)

    def _plain_denoising(self, features: Tensor, layer: list[Tensor], at_sigma: Noised, clean_NCHW: Tensor) -> Tensor:
        g_NCHW = self._inner(features, layer, at_sigma)
        D_NCHW = self.networks.student.trajectory.denoised(at_sigma.x_NCHW, g_NCHW, at_sigma.sigma_N)
        return self.objective.denoising_loss(D_NCHW, clean_NCHW, at_sigma.sigma_N)

    def _inner(self, features: Tensor, layer: list[Tensor], point: Noised) -> Tensor:
        """g = c_skip x + c_out F with F from the features at the cut, through the tail's parameters as they are given."""
        parameters = dict(zip(dict(self._tail.named_parameters()), layer, strict=True))
        F_NCHW = torch.func.functional_call(self._tail, parameters, (features,))
        F_NCHW = F_NCHW[:, : self.networks.student.image_shape[0]].float()
        return per_image(point.scalings.c_skip) * point.x_NCHW + per_image(point.scalings.c_out) * F_NCHW

    def _dsm_factor(self, ctm: Gradients, dsm: Gradients) -> Tensor | float:
        """lambda: fixed, or the ratio of the two gradients of the weight right after the cut."""
        return self.objective.dsm_weight if self.objective.dsm == "fixed" else self._ratio(ctm, dsm)

    def _gan_factor(self, ctm: Gradients, gan: Gradients) -> Tensor:
        """The same ratio for the generator loss, within its bounds."""
        return self._ratio(ctm, gan, self.adversary.config.min_weight, self.adversary.config.max_weight)

    def _ratio(self, ctm: Gradients, other: Gradients, *bounds: float) -> Tensor:
        scale = 1.0 if self.loss_scale is None else self.loss_scale
        return adaptive_weight(ctm.layer[0].norm() / scale, other.layer[0].norm() / scale, *bounds)


def _gradients(
    output: Tensor, layer: list[Tensor], features: Tensor, slope: Tensor | None = None, again: bool = False
) -> Gradients:
    """The gradients of a loss, or of an output whose own gradient is ``slope``; ``again``: the graph is needed once more."""
    *by_layer, by_features = torch.autograd.grad(output, [*layer, features], slope, retain_graph=again)
    return Gradients(by_layer, by_features)


@torch.no_grad()
def _add_gradients(parameters: list[Tensor], gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
