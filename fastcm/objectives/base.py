"""What an objective is to the training loop: a pure function from (model, batch, seed, schedule) to one loss per image."""

from typing import NamedTuple, Protocol

from jaxtyping import Float, Int64
from torch import Tensor

from fastcm.diffusion.preconditioners import Preconditioner
from fastcm.kernels.philox import PhiloxKey
from fastcm.model import Model
from fastcm.random import Stream


class LossTerms(NamedTuple):
    """loss_N, to be averaged over the global batch; sigma_N, the noise level of each image; logs, 0-d tensors by name."""

    loss_N: Float[Tensor, " N"]
    sigma_N: Float[Tensor, " N"]
    logs: dict[str, Tensor]


class TrainingBatch(Protocol):
    """What objectives read of a batch (``fastcm.data.Batch`` has it)."""

    @property
    def images(self) -> Float[Tensor, "N C H W"]:
        """Images in [-1, 1]."""
        ...

    @property
    def labels(self) -> Float[Tensor, "N L"] | None:
        """One-hot rows, None without classes."""
        ...

    @property
    def augment(self) -> Float[Tensor, "N A"] | None:
        """Augmentation labels, None without augmentation."""
        ...

    @property
    def index(self) -> Int64[Tensor, " N"]:
        """Global sample number of each image."""
        ...


class Objective(Protocol):
    """A training objective, a frozen dataclass of its constants.

    All randomness comes from streams keyed by (seed, purpose) and ``batch.index``, so the loss of an image does not
    depend on the batch it is in. Nothing in ``loss`` waits for the device.
    """

    @property
    def precond(self) -> Preconditioner:
        """The preconditioner to train with."""
        ...

    @property
    def sampling_precond(self) -> Preconditioner:
        """The preconditioner to sample the trained network with."""
        ...

    def schedule(self, images: int) -> dict[str, float]:
        """What changes with the number of images seen in this phase; ``loss`` takes it back as 0-d fp32 tensors."""
        ...

    def loss(self, model: Model, batch: TrainingBatch, seed: int, schedule: dict[str, Tensor]) -> LossTerms:
        """The loss of each image of the batch."""
        ...


def noise_key(batch: TrainingBatch, seed: int) -> PhiloxKey:
    """The key of the unit normal noise of the batch's images, from the stream "noise"."""
    return Stream(seed, "noise").at(batch.index)


def dropout_key(batch: TrainingBatch, seed: int) -> PhiloxKey:
    """The key of the batch's dropout masks, from the stream "dropout"; student and teacher share it."""
    return Stream(seed, "dropout").at(batch.index)
