"""Group norm compiled for GPUs that are not there, at the shapes of DDPM++ and ADM-64, batch 128."""

from dataclasses import dataclass

import pytest
import torch
from ahead_of_time.compiler import REGISTERS, Resources, check_resources, check_table, compile_distinct, compile_launch

from fastcm.bench.shapes import SHAPE_SETS, GroupNormShape, kernel_calls
from fastcm.kernels.group_norm.backward import backward_launches
from fastcm.kernels.group_norm.call import Call, Gradients, Tangents
from fastcm.kernels.group_norm.forward import forward_launches
from fastcm.kernels.group_norm.jvp import jvp_launches

BATCH = 128
MAX_WARPS = 64  # of one multiprocessor
DIRECTIONS = ("forward", "backward", "jvp")
MAIN = GroupNormShape(256, 32, 32, addend=True, film=False, silu=True, dropout=True)


@dataclass(frozen=True)
class Row:
    """What a kernel uses, and how many blocks of it fit on a multiprocessor."""

    tile: str
    resources: Resources

    @property
    def blocks(self) -> int:
        warps = self.resources.num_warps
        registers = -(-self.resources.registers // 8) * 8  # given out in eights per thread
        return min(REGISTERS // (registers * 32 * warps), MAX_WARPS // warps)

    def as_row(self):
        return {"tile": self.tile, "blocks": self.blocks} | self.resources.as_row()


def image(channels, resolution, dtype, wide=None):
    """channels_last on the meta device; ``wide``: a slice of so many channels."""
    memory = torch.empty(BATCH, resolution, resolution, wide or channels, dtype=dtype, device="meta")
    return memory[..., :channels].permute(0, 3, 1, 2)


def launches(direction, shape, arch, dtype=torch.bfloat16, wide=None):
    """The launches of a pass whose second image (dy, tx) is a slice where ``wide`` is given; parameters are fp32."""

    def new():
        return image(shape.channels, shape.resolution, dtype)

    def rows(wanted):
        return torch.empty(BATCH, shape.channels, dtype=dtype, device="meta") if wanted else None

    vectors = [torch.empty(shape.channels, device="meta") for _ in range(4)]
    index = torch.empty(BATCH, dtype=torch.int64, device="meta") if shape.dropout else None
    modulation = (rows(shape.addend), rows(shape.film), rows(shape.film))
    call = Call(new(), shape.num_groups, *vectors[:2], 1e-6, *modulation, shape.silu, 0.1 * shape.dropout, index, 5, 6, 7)
    statistics = [torch.empty(BATCH, shape.num_groups, device="meta") for _ in range(2)]
    second = image(shape.channels, shape.resolution, dtype, wide)
    if direction == "forward":
        return forward_launches(call, new(), *statistics, arch)
    if direction == "backward":
        return backward_launches(call, second, *statistics, Gradients(new(), *vectors[2:], *modulation), arch)
    return jvp_launches(call, Tangents(second, *modulation), new(), new(), arch)


def shapes():
    return sorted({shape for name in SHAPE_SETS for shape in kernel_calls(name) if isinstance(shape, GroupNormShape)})


def name_of(shape):
    flags = [flag for flag in ("addend", "film", "silu", "dropout") if getattr(shape, flag)]
    return " ".join([f"{shape.channels}ch/{shape.num_groups} {shape.resolution}x{shape.resolution}", *flags])


def tile_of(launch):
    arguments = launch.arguments
    tile = f"{arguments['BLOCK_P']}x{arguments['SLAB']}/{arguments['BLOCK_C']}"
    return f"{tile} resident" if arguments["RESIDENT"] else tile


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_shape_of_the_networks(direction, capability):
    chosen = {name_of(shape): launches(direction, shape, f"sm{capability}")[0] for shape in shapes()}
    rows = {name: Row(tile_of(chosen[name]), found) for name, found in compile_distinct(chosen, capability).items()}
    for row in rows.values():
        check_resources(row.resources, capability, matrix=False)
        assert row.blocks >= 2, row
        assert row.resources.shared_bytes <= 16 * 1024, f"a tile goes through shared memory: {row}"
    check_table(f"group_norm_{direction}_sm{capability}", rows)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_images_of_fp32_are_read_in_wide_loads_too(direction):
    (launch, *_) = launches(direction, MAIN, "sm90", torch.float32)
    check_resources(compile_launch(launch, 90), 90, matrix=False)


@pytest.mark.parametrize("direction", ["backward", "jvp"])
def test_slices_of_channels_are_read_in_wide_loads(direction):
    """A slice costs no copy: the launch holds the tensor itself, and as many wide loads as for dense memory."""
    dense, sliced = (launches(direction, MAIN, "sm90", wide=wide)[0] for wide in (None, 512))
    name = "DY_STRIDE_P" if direction == "backward" else "TX_STRIDE_P"
    assert (dense.arguments[name], sliced.arguments[name]) == (256, 512)
    found = [compile_launch(launch, 90) for launch in (dense, sliced)]
    check_resources(found[1], 90)
    assert found[0].wide_loads == found[1].wide_loads


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_sum_over_samples_at_every_shape(capability):
    sums = {name_of(shape): launches("backward", shape, f"sm{capability}")[1] for shape in shapes()}
    for resources in compile_distinct(sums, capability).values():
        check_resources(resources, capability, matrix=False, wide=False)
