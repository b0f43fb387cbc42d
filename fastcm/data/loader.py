"""From sample numbers to batches: every batch is a pure function of its first global sample number."""

from typing import Protocol

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from fastcm.data.batch import Batch
from fastcm.data.dataset import ResidentDataset
from fastcm.data.order import Order
from fastcm.errors import ConfigError
from fastcm.random import Stream


class Augmentation(Protocol):
    """What the loader asks of an augmentation: images [N, C, H, W] and their keys in, images and labels out."""

    label_dim: int

    def __call__(self, images_NCHW: Tensor, index_N: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Transform the images; the labels [N, label_dim] say how."""
        ...


class Loader:
    """Cuts a resident data set into batches, with random flips and augmentation, on the training device.

    batch_size: images per step over all ranks; rank r of world_size takes the r-th contiguous slice of each batch, so the
    union over ranks is the same for any world size. xflip: mirror each image with probability 1/2.
    Raises ConfigError if batch_size cannot be split evenly over the ranks.
    """

    def __init__(
        self,
        dataset: ResidentDataset,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        *,
        xflip: bool = False,
        augment: Augmentation | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ConfigError(f"batch_size {batch_size} cannot be split evenly over {world_size} ranks; use a multiple of it")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is outside [0, {world_size})")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        # "cuda" becomes the device with its number, as tensors have it.
        self.device = torch.empty(0, device=device).device
        self.xflip, self.augment = xflip, augment
        self.local_size = batch_size // world_size
        self._offset = rank * self.local_size
        self._order = Order(len(dataset), seed, dataset.images.device)
        self._class_1K = torch.arange(dataset.label_dim, device=self.device)[None]

    @property
    def augment_dim(self) -> int:
        """Width of ``Batch.augment``, 0 without a pipe."""
        return self.augment.label_dim if self.augment is not None else 0

    def batch(self, first_index: int) -> Batch:
        """This rank's part of the batch that begins with global sample ``first_index``; nothing waits for the device."""
        first = first_index + self._offset
        index_N = torch.arange(first, first + self.local_size, device=self.device)
        ids_N = self._order.span(first, self.local_size)
        pixels_NHWC = self._gather(self.dataset.images, ids_N)
        if self.xflip:
            flip_N = Stream(self.seed, "xflip").bernoulli(index_N, 0.5)
            pixels_NHWC = torch.where(flip_N[:, None, None, None], pixels_NHWC.flip(2), pixels_NHWC)
        images, augment = to_unit_range(pixels_NHWC), None
        if self.augment is not None:
            images, augment = self.augment(images, index_N, self.seed)
            images = images.contiguous(memory_format=torch.channels_last)
        return Batch(images, self._one_hot(ids_N), augment, index_N)

    def _one_hot(self, ids_N: Tensor) -> Float32[Tensor, "N K"] | None:
        if self.dataset.labels is None:
            return None
        return (self._gather(self.dataset.labels, ids_N)[:, None] == self._class_1K).float()

    def _gather(self, table: Tensor, ids_N: Int64[Tensor, " N"]) -> Tensor:
        if table.device == self.device or self.device.type != "cuda":
            return table.index_select(0, ids_N).to(self.device)
        # A copy out of pageable memory would make the host wait for the device.
        rows = torch.empty((ids_N.shape[0], *table.shape[1:]), dtype=table.dtype, pin_memory=True)
        return torch.index_select(table, 0, ids_N, out=rows).to(self.device, non_blocking=True)


def to_unit_range(pixels_NHWC: UInt8[Tensor, "N H W C"]) -> Float32[Tensor, "N C H W"]:
    """uint8 pixels to fp32 in [-1, 1], x = pixels / 127.5 - 1, channels_last in memory."""
    return (pixels_NHWC.float() / 127.5 - 1).permute(0, 3, 1, 2)
