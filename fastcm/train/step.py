"""The gradient of one batch, compiled once and the same for every objective."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastcm import graphs
from fastcm.data.batch import Batch
from fastcm.objectives.base import Networks, Objective


class GradientStep:
    """Accumulate the gradient of the mean loss of a batch into ``.grad``, in microbatches if asked for.

    Noise, noise levels and dropout masks are keyed by the global sample index, so the split changes rounding only.
    """

    def __init__(
        self,
        networks: Networks,
        objective: Objective,
        seed: int,
        microbatch_size: int,
        compiled: bool,
        loss_scale: Tensor | None = None,
    ) -> None:
        """loss_scale: 0-d factor on the gradient, read anew by every call."""
        self.networks, self.objective, self.seed, self.microbatch_size = networks, objective, seed, microbatch_size
        self.loss_scale = loss_scale
        self._loss = graphs.compiled(self._plain_loss, compiled)

    def _plain_loss(self, batch: Batch, schedule: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        terms = self.objective.loss(self.networks, batch, self.seed, schedule)
        return terms.loss_N, terms.sigma_N

    def prepare(self, batch: Batch, first_image: int) -> Batch:
        """What a call takes of a batch: here the batch itself, wherever in the run it stands."""
        return batch

    def __call__(self, batch: Batch, schedule: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss and noise level of every sample, detached; nothing here depends on the host, so a CUDA graph can hold it."""
        losses, sigmas = [], []
        for part in parts_of(batch, self.microbatch_size):
            loss_N, sigma_N = self._loss(part, schedule)
            scaled(loss_N.sum() / len(batch.index), self.loss_scale).backward()
            losses.append(loss_N.detach())
            sigmas.append(sigma_N.detach())
        return torch.cat(losses), torch.cat(sigmas)


def scaled(loss: Tensor, loss_scale: Tensor | None) -> Tensor:
    """The loss times its scale, if it has one."""
    return loss if loss_scale is None else loss_scale * loss


def parts_of(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch in parts of this many images; whole where the size is 0."""
    num = len(batch.index)
    columns = (batch.images, batch.labels, batch.augment, batch.index)
    for start in range(0, num, size or num):
        part = slice(start, start + (size or num))
        yield Batch(*(None if column is None else column[part] for column in columns))
