"""What a training step receives."""

from dataclasses import dataclass

from jaxtyping import Float32, Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's images of one step, with their labels and their place in the run.

    images: fp32 in [-1, 1], channels_last in memory; labels: one-hot rows, None for a set without classes;
    augment: the augmentation labels that the network is conditioned on, None without a pipe;
    index: the global sample number of each row, the key of every random number drawn for it.
    """

    images: Float32[Tensor, "N C H W"]
    labels: Float32[Tensor, "N label_dim"] | None
    augment: Float32[Tensor, "N augment_dim"] | None
    index: Int64[Tensor, " N"]

    def __len__(self) -> int:
        return self.images.shape[0]
