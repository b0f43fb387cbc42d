"""Which part of an image one program owns: a slab of whole groups of channels, over all pixels.

A program that owns whole groups needs no other program's sums. Neighbouring slabs of one image run side by side, so that the
sectors of memory that they share are in the cache.
"""

from math import lcm
from typing import Any, NamedTuple

from ..runtime.launch import Launch, ceil_div, next_power_of_2
from ..runtime.pinned import pinned

VECTOR_BYTES = 16
MIN_WARPS, MAX_WARPS = 4, 16
REGISTERS = 65536  # of one multiprocessor
OP = "group_norm"


class Tiling(NamedTuple):
    """The tile [block_p, block_c] that one program holds at a time; block sizes are powers of two."""

    slab: int  # channels of one program: whole groups, whole vectors where the channels allow it
    num_slabs: int
    block_c: int
    block_g: int
    block_p: int
    resident: bool  # the tile is the whole slab: everything is read once
    num_warps: int
    max_registers: int | None

    def constants(self, num_pixels: int, channels: int, num_groups: int) -> dict[str, int | bool]:
        """The compile-time arguments that all kernels share."""
        return {
            "PIXELS": num_pixels,
            "CHANNELS": channels,
            "GROUPS": num_groups,
            "SLAB": self.slab,
            "BLOCK_C": self.block_c,
            "BLOCK_G": self.block_g,
            "BLOCK_P": self.block_p,
            "RESIDENT": self.resident,
        }

    def launch(self, kernel: Any, num_samples: int, arguments: dict[str, Any]) -> Launch:
        """One program per slab of each sample."""
        grid = (self.num_slabs * num_samples,)
        return Launch(kernel, grid, arguments, self.num_warps, max_registers=self.max_registers)


def slab_channels(channels: int, per_group: int, vector: int, min_block: int, max_block: int) -> tuple[int, int]:
    """(slab, block_c): the slab of whole groups whose padded blocks cover the channels with the fewest idle lanes.

    min_block and max_block bound the block where a group fits into it. Slabs begin at whole vectors where channels allow it.
    """
    unit = lcm(per_group, vector) if channels % vector == 0 else per_group
    block = max(min_block, next_power_of_2(unit))
    found = []
    while not found or block <= max_block:
        slab = min(block // unit * unit, channels)
        found.append((ceil_div(channels, slab) * block, block, slab))
        block *= 2
    _, block, slab = min(found)
    return slab, min(block, next_power_of_2(slab))


def tiling(
    direction: str, arch: str, *, num_pixels: int, channels: int, num_groups: int, itemsize: int, dropout: bool
) -> Tiling:
    """The pinned tiling of a pass ("forward", "backward", "jvp") for images [P, C] of elements of ``itemsize`` bytes.

    Facts for rules: pixels, channels, channels_per_group, itemsize, dropout (0 or 1). Pinned parameters: min_channels and
    max_channels of a block; resident, the elements of the largest slab that is kept, and per_thread, of which each of its
    threads holds so many; loop_tile and loop_warps for larger slabs; optionally blocks per multiprocessor, which bounds the
    registers where the compiler alone takes too many.
    """
    per_group = channels // num_groups
    facts = {"pixels": num_pixels, "channels": channels, "channels_per_group": per_group, "itemsize": itemsize}
    facts["dropout"] = int(dropout)
    use: dict[str, Any] = pinned(OP, direction, arch, **facts)
    slab, block_c = slab_channels(channels, per_group, VECTOR_BYTES // itemsize, use["min_channels"], use["max_channels"])
    whole = next_power_of_2(num_pixels)
    loop_p = max(1, use["loop_tile"] // block_c)
    resident = whole * block_c <= max(use["resident"], loop_p * block_c)
    warps = next_power_of_2(whole * block_c // (32 * use["per_thread"])) if resident else use["loop_warps"]
    warps = min(max(warps, MIN_WARPS), MAX_WARPS)
    return Tiling(
        slab=slab,
        num_slabs=ceil_div(channels, slab),
        block_c=block_c,
        block_g=next_power_of_2(slab // per_group),
        block_p=whole if resident else loop_p,
        resident=resident,
        num_warps=warps,
        max_registers=REGISTERS // (use["blocks"] * 32 * warps) // 8 * 8 if "blocks" in use else None,
    )
