"""The noise kernel on a GPU: the CPU's numbers, bit for bit twice, in a CUDA graph, compiled."""

import pytest
import torch

from fastcm.diffusion.preconditioners import EDM
from fastcm.kernels.noise import add_noise, add_noise_reference
from fastcm.kernels.philox import random_normal
from fastcm.kernels.runtime.fallback import failures, set_strict
from fastcm.random import Stream

pytestmark = pytest.mark.gpu

SHAPES = [(128, 3, 32, 32), (32, 3, 64, 64), (2, 3, 256, 256), (5, 3, 17, 23), (512, 1, 8, 8)]


@pytest.fixture(autouse=True)
def _no_fallback():
    before = set_strict(True)
    yield
    set_strict(before)
    assert "add_noise" not in failures()


def arguments(shape, device="cuda"):
    index = torch.arange(shape[0], device=device) + 2**33
    clean = Stream(0, "images").image_normal(index, shape[1:])
    t = (Stream(0, "sigma").normal(index) * 2 - 1.1).exp()
    levels = {"r_N": 0.9 * t, "c_in_r_N": EDM().scalings(0.9 * t).c_in}
    return (clean, Stream(1, "noise").at(index, 1), t, EDM().scalings(t).c_in), levels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_images_are_those_of_the_cpu(shape, dtype):
    positional, levels = arguments(shape, "cpu")
    expected = add_noise_reference(*positional, **levels, dtype=dtype)
    clean, key, *vectors = positional
    key = key._replace(index_N=key.index_N.cuda())
    on_gpu = (clean.cuda(), key, *(value.cuda() for value in vectors))
    found = add_noise(*on_gpu, **{name: value.cuda() for name, value in levels.items()}, dtype=dtype)
    for level, exact, x in ((positional[2], expected.x_t, found.x_t), (levels["r_N"], expected.x_r, found.x_r)):
        bound = level[:, None, None, None] * 1e-6 + 3e-7 * exact.abs() + 1e-7
        assert ((x.cpu() - exact).abs() <= bound).all()
    scaled = (vectors[1].cuda()[:, None, None, None] * found.x_t).to(dtype)
    assert torch.equal(found.input_t, scaled)
    assert all(image.is_contiguous(memory_format=torch.channels_last) for image in found)


def test_a_million_normals_are_those_of_the_cpu():
    index = torch.arange(4)
    shape = (4, 1, 512, 512)
    zero, one = torch.zeros(shape, device="cuda"), torch.ones(4, device="cuda")
    key = Stream(3, "normals").at(index)
    found = add_noise(zero, key._replace(index_N=index.cuda()), one, one).x_t
    expected = random_normal(key, 512 * 512).reshape(shape)
    assert (found.cpu() - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("layout", ["nchw", "slice"])
def test_images_in_other_memory(layout):
    (clean, *others), levels = arguments(SHAPES[3])
    expected = add_noise(clean, *others, **levels)
    moved = clean.contiguous() if layout == "nchw" else torch.cat([clean, clean], 1)[:, :3]
    assert all(torch.equal(one, other) for one, other in zip(add_noise(moved, *others, **levels), expected, strict=True))


def test_the_same_call_gives_the_same_bits():
    positional, levels = arguments(SHAPES[0])
    first, second = (add_noise(*positional, **levels, dtype=torch.bfloat16) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_cuda_graph_draws_anew_for_new_indices():
    (clean, key, *vectors), levels = arguments(SHAPES[0])
    fixed = key._replace(index_N=key.index_N.clone())
    add_noise(clean, fixed, *vectors, **levels)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = add_noise(clean, fixed, *vectors, **levels)
    for step in (0, 1000):
        fixed.index_N.copy_(key.index_N + step)
        graph.replay()
        expected = add_noise(clean, key._replace(index_N=key.index_N + step), *vectors, **levels)
        assert all(torch.equal(one, other) for one, other in zip(captured, expected, strict=True))


def test_one_compiled_graph():
    positional, levels = arguments(SHAPES[0])
    compiled = torch.compile(add_noise, fullgraph=True)
    expected = add_noise(*positional, **levels)
    assert all(torch.equal(one, other) for one, other in zip(compiled(*positional, **levels), expected, strict=True))
