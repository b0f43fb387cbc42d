"""What an objective is to the training loop: a pure function from (networks, batch, seed, schedule) to one loss per image."""

from typing import NamedTuple, Protocol

from jaxtyping import Float, Int64
from torch import Tensor, nn

from fastcm.diffusion.preconditioners import Preconditioner
from fastcm.diffusion.trajectory import Trajectory
from fastcm.kernels.philox import PhiloxKey
from fastcm.model import Model
from fastcm.objectives.distances import PERCEPTUAL
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


class Networks(NamedTuple):
    """The networks of a training step: the student that learns, and what an objective says that it needs besides.

    target: a moving average of the student that gives the targets of consistency losses. teacher: a frozen diffusion model.
    perceptual: the distance of two batches of images, see ``image_distance``.
    """

    student: Model
    target: Model | None = None
    teacher: Model | None = None
    perceptual: nn.Module | None = None


class Objective:
    """A training objective, a frozen dataclass of its constants.

    All randomness comes from streams keyed by (seed, purpose) and ``batch.index``, so the loss of an image does not
    depend on the batch it is in. Nothing in ``loss`` waits for the device.
    """

    precond: Preconditioner  # to train with
    trajectory: Trajectory = Trajectory()  # how jumps are made of a network with a second time
    needs_teacher: bool = False

    @property
    def sampling_precond(self) -> Preconditioner:
        """The preconditioner to sample the trained network with; by default the one it is trained with."""
        return self.precond

    @property
    def perceptual(self) -> str | None:
        """The distance, where that is by frozen networks."""
        distance = getattr(self, "distance", None)
        return distance if distance in PERCEPTUAL else None

    def schedule(self, images: int) -> dict[str, float]:
        """What changes with the number of images seen in this phase; ``loss`` takes it back as 0-d fp32 tensors."""
        return {}

    def target_halflife(self, images: int) -> float | None:
        """Half-life, in images, of the moving average that is the target network; None where there is none."""
        return None

    def sampling_steps(self, images: int) -> int:
        """How many steps the network is made for after this many images; 0 where that is free."""
        return 0

    def stage(self, images: int, duration_images: int) -> range:
        """The images of a phase of duration_images, among them the next one, that have one teacher.

        When a stage ends, the student becomes the teacher, and the optimizer, its schedule and the weight averages begin anew.
        """
        return range(duration_images)

    def loss(self, networks: Networks, batch: TrainingBatch, seed: int, schedule: dict[str, Tensor]) -> LossTerms:
        """The loss of each image of the batch."""
        raise NotImplementedError


def noise_key(batch: TrainingBatch, seed: int) -> PhiloxKey:
    """The key of the unit normal noise of the batch's images, from the stream "noise"."""
    return Stream(seed, "noise").at(batch.index)


def dropout_key(batch: TrainingBatch, seed: int) -> PhiloxKey:
    """The key of the batch's dropout masks, from the stream "dropout"; student and teacher share it."""
    return Stream(seed, "dropout").at(batch.index)
