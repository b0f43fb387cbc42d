"""How an image is cut over programs whose sums a second kernel adds: what the forward kernel and the JVP share."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..runtime.launch import Launch, ceil_div, next_power_of_2
from ..runtime.pinned import pinned

# Of one image; a sum over more is no longer one tile. Larger images give each program several tiles.
MAX_SPLITS = 1024
FINISH_TILE = 1024


class Split(NamedTuple):
    """The programs of one image, the tiles of each, the elements of a tile, and the warps of a program."""

    splits: int
    tiles: int
    block: int
    num_warps: int

    def launch(self, kernel: Any, num: int, arguments: dict[str, Any]) -> Launch:
        """All programs of ``num`` images."""
        sizes = {"SPLITS": self.splits, "TILES": self.tiles, "BLOCK": self.block}
        return Launch(kernel, (num * self.splits,), arguments | sizes, self.num_warps)

    def finish(self, kernel: Any, num: int, arguments: dict[str, Any]) -> Launch:
        """The launch that adds the parts of ``num`` images, several images to a program."""
        split_block = next_power_of_2(self.splits)
        rows = FINISH_TILE // split_block
        sizes = {"num": num, "SPLITS": self.splits, "SPLIT_BLOCK": split_block, "ROWS": rows}
        return Launch(kernel, (ceil_div(num, rows),), arguments | sizes)


def split_image(direction: str, elements: int, arch: str) -> Split:
    """The split of a pass ("forward", "jvp"): it depends on the image's size alone, so that a loss does not on its batch."""
    chosen = pinned("consistency_loss", direction, arch, elements=elements)
    block = min(chosen["block"], next_power_of_2(elements))
    tiles = max(1, ceil_div(elements, block * MAX_SPLITS))
    return Split(max(1, ceil_div(elements, block * tiles)), tiles, block, chosen["num_warps"])


@triton.jit
def sum_of_parts(partial_ptr, row, is_row, SPLITS: tl.constexpr, SPLIT_BLOCK: tl.constexpr):
    """The sum over each row [SPLITS] of parts, added in an order that does not depend on the batch."""
    split = tl.arange(0, SPLIT_BLOCK)
    mask = is_row[:, None] & (split < SPLITS)[None, :]
    return tl.sum(tl.load(partial_ptr + row[:, None] * SPLITS + split[None, :], mask=mask, other=0.0), axis=1)
