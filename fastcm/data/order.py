"""The endless order in which a data set is read: one permutation per epoch, a pure function of the seed."""

import torch
from jaxtyping import Int64
from torch import Tensor

from fastcm.random import Stream

CACHED_EPOCHS = 4


class Order:
    """Maps global sample numbers i = 0, 1, 2, ... to images of a set of n: image = permutation_e[i mod n], e = i div n.

    The permutation of epoch e is the stable argsort of n random words Stream(seed, "order").bits(e). Batch size, world
    size and the place where a run was resumed do not enter. ``device`` is where permutations are kept.
    Raises ValueError for an empty set.
    """

    def __init__(self, num_images: int, seed: int, device: torch.device | str = "cpu") -> None:
        if num_images < 1:
            raise ValueError(f"an order over {num_images} images does not exist")
        self.num_images = num_images
        self.device = torch.device(device)
        self._stream = Stream(seed, "order")
        self._cache: dict[int, Tensor] = {}

    def permutation(self, epoch: int) -> Int64[Tensor, " n"]:
        """The images of one epoch in the order they are read."""
        if epoch not in self._cache:
            while len(self._cache) >= CACHED_EPOCHS:
                self._cache.pop(next(iter(self._cache)))
            self._cache[epoch] = self._permute(epoch)
        return self._cache[epoch]

    def span(self, first_index: int, count: int) -> Int64[Tensor, " count"]:
        """The images of samples first_index .. first_index + count - 1, without reading anything back from the device."""
        pieces, index, end = [], first_index, first_index + count
        while index < end:
            epoch, start = divmod(index, self.num_images)
            piece = self.permutation(epoch)[start : start + end - index]
            pieces.append(piece)
            index += piece.shape[0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def ids(self, index_N: Int64[Tensor, " N"]) -> Int64[Tensor, " N"]:
        """The images of any samples, also across epochs; reads the epoch numbers on the host, so give it a CPU tensor."""
        epoch_N = index_N.div(self.num_images, rounding_mode="floor")
        ids_N = torch.empty_like(index_N, device=self.device)
        for epoch in epoch_N.unique().tolist():
            rows = (epoch_N == epoch).to(self.device)
            position_N = (index_N - epoch * self.num_images).to(self.device)
            ids_N[rows] = self.permutation(epoch)[position_N[rows]]
        return ids_N

    def _permute(self, epoch: int) -> Tensor:
        # Filled, not copied from the host: a copy would wait for the device.
        epoch_1 = torch.full((1,), epoch, dtype=torch.int64, device=self.device)
        words = self._stream.bits(epoch_1, (self.num_images,))
        return words.flatten().argsort(stable=True)
